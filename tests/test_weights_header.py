"""The header of weights is compared with the metadata before anything large is allocated."""

import json
import resource
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.tiny_models import tiny_ar, tiny_nar
from hypothesis import given
from hypothesis import strategies as st

from valle.model.codec.encodec import EncodecConfig
from valle.model.codec.interface import CodecIdentity
from valle.model.quantize import to_int8
from valle.platform import checkpoint
from valle.platform.weights_header import check_shapes, read_shapes

HUGE = [
    {"n_layers": 10**9}, {"width": 10**10, "n_heads": 1}, {"n_phonemes": 10**12},
    {"n_codebooks": 10**9}, {"n_layers": 0}, {"n_layers": -1}, {"width": 0},
]  # fmt: skip


@pytest.fixture(params=["ar", "nar"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = tiny_ar() if request.param == "ar" else tiny_nar()
    codec = CodecIdentity(name="tiny", sha256="0")
    metadata = checkpoint.new_metadata(model.config, codec, "test", {})
    checkpoint.save(tmp_path / "model", model.state_dict(), metadata)
    checkpoint.save(tmp_path / "int8", to_int8(model.state_dict()), metadata)
    return tmp_path


@pytest.mark.parametrize("stored", ["model", "int8"])
def test_read_shapes_are_those_of_the_loaded_weights(folder: Path, stored: str) -> None:
    weights = checkpoint.load_weights(folder / stored)
    shapes = read_shapes(folder / stored / "model.safetensors")
    assert shapes == {name: tuple(value.shape) for name, value in weights.items()}
    checkpoint.load(folder / stored)


@pytest.mark.parametrize("fields", HUGE, ids=str)
def test_load_refuses_sizes_that_the_weights_do_not_have(
    folder: Path, fields: dict[str, int]
) -> None:
    """Ten thousand million parameters are asked for; no memory is."""
    path = folder / "model/config.json"
    content = json.loads(path.read_text())
    content["model"] |= fields
    path.write_text(json.dumps(content))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"does not fit its config.json|is not a checkpoint's"):
        checkpoint.load(folder / "model")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 200_000_000


def test_load_refuses_zero_heads(folder: Path) -> None:
    path = folder / "model/config.json"
    content = json.loads(path.read_text())
    content["model"]["n_heads"] = 0
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is not a checkpoint's metadata"):
        checkpoint.load(folder / "model")


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1, -1000])
def test_load_names_a_truncated_file(folder: Path, cut: int) -> None:
    path = folder / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"model.safetensors"):
        checkpoint.load(folder / "model")


@pytest.mark.fuzz
@given(st.binary(max_size=300), st.integers(0, 2**64 - 1))
def test_read_shapes_of_any_bytes_is_a_value_error(
    tmp_path_factory: pytest.TempPathFactory, body: bytes, length: int
) -> None:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    for data in (body, struct.pack("<Q", length) + body, struct.pack("<Q", len(body)) + body):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="safetensors"):
            read_shapes(path)


def test_check_shapes_names_the_tensor(folder: Path) -> None:
    config = checkpoint.read_metadata(folder / "model").model
    path = folder / "model/model.safetensors"
    check_shapes(path, config)
    with pytest.raises(ValueError, match=r"transformer.blocks.\d.* has the shape none"):
        check_shapes(path, replace(config, n_layers=config.n_layers + 1))


@pytest.mark.parametrize("fields", [{"n_filters": 10**6}, {"lstm": 10**6}, {"n_codebooks": 0}])
def test_codec_sizes_are_bounded(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"codec: {next(iter(fields))} is"):
        EncodecConfig(**fields)
