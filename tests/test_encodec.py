import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_models import TINY_CODEC

from valle.model.codec import encodec
from valle.model.codec.encodec import Encodec
from valle.model.codec.interface import CodecIdentity
from valle.model.tokens import HOP


def waves(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.normal(0, 0.1, n).astype(np.float32) for n in lengths]


def test_encode_batched_equals_single(tiny_codec: Encodec) -> None:
    recordings = waves(24_000, 7_777, 48_001, 640, 12_345)
    batched = tiny_codec.encode(recordings)
    for recording, codes in zip(recordings, batched, strict=True):
        assert codes.dtype == np.int16
        assert codes.shape == (8, -(-len(recording) // HOP))
        np.testing.assert_array_equal(codes, tiny_codec.encode([recording])[0])
    # any split into groups gives the same
    for codes, regrouped in zip(batched, tiny_codec.encode(recordings, 1.0), strict=True):
        np.testing.assert_array_equal(codes, regrouped)


def test_decode_batched_equals_single(tiny_codec: Encodec) -> None:
    codes = tiny_codec.encode(waves(24_000, 7_777, 3_200))
    for item, wave in zip(codes, tiny_codec.decode(codes), strict=True):
        assert wave.shape == (item.shape[1] * HOP,)
        np.testing.assert_allclose(wave, tiny_codec.decode([item])[0], atol=1e-5)


def test_encodec_equals_the_packages_model(tiny_codec_folder: Path) -> None:
    """The slow twin: EncodecModel.encode/decode with weight normalisation left in place."""
    model = encodec.build(TINY_CODEC).eval()
    model.load_state_dict(encodec.load_file(tiny_codec_folder / "model.safetensors"), strict=False)
    model.set_target_bandwidth(6.0)
    wave = waves(9_600)[0]
    with torch.inference_mode():
        codes, _ = model.encode(torch.from_numpy(wave)[None, None])[0]
        decoded = model.decode([(codes, None)])[0, 0].numpy()
    ours = encodec.load(str(tiny_codec_folder))
    np.testing.assert_array_equal(ours.encode([wave])[0], codes[0].numpy())
    np.testing.assert_allclose(ours.decode([codes[0].short().numpy()])[0], decoded, atol=1e-5)


def test_decode_refuses_codes_out_of_range_or_shape(tiny_codec: Encodec) -> None:
    with pytest.raises(ValueError, match=r"codes\[0\]: values must lie in 0 .. 1023"):
        tiny_codec.decode([np.full((8, 4), 1024, np.int16)])
    with pytest.raises(ValueError, match=r"codes\[1\]: expected \[1..8, T\]"):
        tiny_codec.decode([np.zeros((8, 4), np.int16), np.zeros((9, 4), np.int16)])


def test_identity_depends_on_the_weights(tiny_codec_folder: Path, tmp_path: Path) -> None:
    first = encodec.load(str(tiny_codec_folder)).identity
    assert encodec.load(str(tiny_codec_folder)).identity == first
    weights = encodec.load_file(tiny_codec_folder / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    encodec.save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_codec_folder / "config.json").read_text())
    other = encodec.load(str(tmp_path)).identity
    with pytest.raises(ValueError, match="codec mismatch: the dataset was made with tiny"):
        first.check(other, "the dataset")


def test_load_official_checkpoint_from_a_path(tmp_path: Path) -> None:
    """The official file is a state dict of exactly this architecture; here with random weights."""
    model = encodec.build(encodec.EncodecConfig())
    path = tmp_path / "encodec_24khz-d7cc33bc.th"
    torch.save(model.state_dict(), path)
    codec = encodec.load(str(path))
    assert codec.identity.name == "encodec-24khz"
    assert codec.encode(waves(6_400))[0].shape == (8, 20)


def test_load_without_network_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(FileNotFoundError, match="on a closed network put the file at"):
        encodec.load("encodec-24khz", cache=tmp_path)


def test_load_refuses_a_damaged_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = tmp_path / "served.th"
    served.write_bytes(b"not the checkpoint")
    monkeypatch.setattr(encodec, "OFFICIAL_URL", f"file://{served}")
    with pytest.raises(RuntimeError, match="invalid hash value"):
        encodec.load("encodec-24khz", cache=tmp_path / "cache")


def test_load_of_a_missing_folder_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give nano, encodec-24khz, a folder"):
        encodec.load(str(tmp_path / "nothing"))


def test_load_nano_ships_and_is_small() -> None:
    codec = encodec.load("nano")
    assert codec.identity == CodecIdentity(name="nano", sha256=codec.identity.sha256)
    assert (encodec.NANO_CODEC_FOLDER / "model.safetensors").stat().st_size < 8_000_000
    config = json.loads((encodec.NANO_CODEC_FOLDER / "config.json").read_text())
    assert config["n_codebooks"] == 8


def test_load_refuses_a_file_in_the_cache_that_has_changed(tmp_path: Path) -> None:
    """Compared at each use, not only after the download."""
    (tmp_path / "encodec_24khz-d7cc33bc.th").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="is not the official checkpoint .* delete it"):
        encodec.load("encodec-24khz", cache=tmp_path)
