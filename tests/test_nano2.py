"""nano 2: recordings to codes and back through a vocoder, and the metrics of a codec."""

from pathlib import Path

import numpy as np
import pytest
import torch

from valle.jobs.evaluate_codec import CodecEvaluator, evaluate
from valle.jobs.evaluation.metrics.speaker_similarity import load_speaker_encoder
from valle.jobs.evaluation.metrics.words import load_recognizer
from valle.jobs.speakers import Heart, Joe
from valle.model.codec.encodec import Encodec
from valle.model.codec.interface import Wave
from valle.model.codec.loading import load_codec
from valle.model.codec.nano2 import Nano2Codec
from valle.model.codec.quantizer import Quantizer, QuantizerConfig
from valle.model.codec.weights import save_quantizer


def write_quantizer(rate: int, folder: Path) -> Path:
    """A folder with a small untrained quantiser whose features have about the right scale."""
    torch.manual_seed(0)
    quantizer = Quantizer(
        QuantizerConfig(frame_rate=rate, n_codebooks=3, codebook_size=16, dimension=8, width=12)
    )
    for name, buffer in quantizer.named_buffers():
        if name.endswith("embed"):
            buffer.normal_()
    quantizer.mean[0], quantizer.mean[18] = -5.0, -0.5
    quantizer.deviation.fill_(0.3)
    save_quantizer(quantizer, folder)
    return folder


@pytest.fixture(scope="module", params=[75, 50, 25])
def codec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Nano2Codec:
    return Nano2Codec.load(write_quantizer(request.param, tmp_path_factory.mktemp("nano2")))


@pytest.fixture(scope="module")
def waves() -> list[Wave]:
    """Modulated noise whose lengths are no whole frames."""
    generator = np.random.default_rng(0)
    shapes = [np.abs(np.sin(np.arange(n) / 1200)) for n in (9_601, 3_700, 6_000)]
    return [(generator.normal(size=len(s)) * s * 0.1).astype(np.float32) for s in shapes]


def test_encode_and_decode_lengths_are_whole_frames(codec: Nano2Codec, waves: list[Wave]) -> None:
    codes = codec.encode(waves)
    hop = 24_000 // codec.identity.frame_rate
    assert [item.shape for item in codes] == [(3, -(-len(wave) // hop)) for wave in waves]
    assert [len(wave) for wave in codec.decode(codes)] == [item.shape[1] * hop for item in codes]


def test_encode_and_decode_batched_equal_single(codec: Nano2Codec, waves: list[Wave]) -> None:
    batched_codes = codec.encode(waves)
    for wave, codes in zip(waves, batched_codes, strict=True):
        np.testing.assert_array_equal(codec.encode([wave])[0], codes)
    batched_waves = codec.decode(batched_codes)
    for codes, wave in zip(batched_codes, batched_waves, strict=True):
        np.testing.assert_allclose(codec.decode([codes])[0], wave, atol=1e-4)
    single_waves = codec.decode(batched_codes, batch_seconds=0.1)  # one item per batch
    assert all(np.abs(a - b).max() < 1e-4 for a, b in zip(single_waves, batched_waves, strict=True))


def test_decode_of_fewer_codebooks_and_of_bad_codes(codec: Nano2Codec, waves: list[Wave]) -> None:
    codes = codec.encode(waves[:1])[0]
    one = codec.decode([codes[:1]])[0]
    assert len(one) == len(codec.decode([codes])[0])
    for wrong in (codes[0], np.concatenate([codes, codes]), codes[:, :0]):
        with pytest.raises(ValueError, match=r"codes\[0\]: expected \[1..3, T\]"):
            codec.decode([wrong])
    for value in (-1, 16):
        with pytest.raises(ValueError, match=r"codes\[0\]: values must lie in 0 .. 15"):
            codec.decode([np.full((3, 4), value, np.int16)])


def test_load_codec_by_name_or_folder(tmp_path: Path, tiny_codec_folder: Path) -> None:
    loaded = load_codec(str(write_quantizer(50, tmp_path)))
    assert isinstance(loaded, Nano2Codec)
    assert loaded.identity == Nano2Codec.load(tmp_path).identity
    assert (loaded.identity.name, loaded.identity.frame_rate) == ("nano2", 50)
    loaded.quantizer.codebooks()[0].cluster_size.fill_(7)  # of training, no part of the codec
    assert Nano2Codec(loaded.quantizer).identity == loaded.identity
    assert isinstance(load_codec(str(tiny_codec_folder)), Encodec)
    with pytest.raises(ValueError, match="codec mismatch"):
        load_codec(str(tiny_codec_folder)).identity.check(loaded.identity, "a dataset")


@pytest.mark.slow
def test_resynthesize_keeps_words_and_voice(tmp_path: Path) -> None:
    """The features lose little; an untrained quantiser loses the voice."""
    text = "The boats came home before the storm had reached the harbour."
    recordings = [
        Joe().synthesize(text, "joe", "en-us"),
        Heart().synthesize(text, "heart", "en-us"),
    ]
    evaluator = CodecEvaluator(load_recognizer("whisper"), load_speaker_encoder("wespeaker"))
    codec = Nano2Codec.load(write_quantizer(50, tmp_path))
    systems = evaluate(codec, [text, text], recordings, evaluator, [3])
    assert systems["recording"].speaker_similarity == pytest.approx(1, abs=1e-3)
    assert max(systems[name].wer for name in ("recording", "unquantised")) < 0.1
    assert systems["unquantised"].speaker_similarity > 0.6
    assert systems["unquantised"].distillmos > systems["recording"].distillmos - 0.8
    assert systems["3 codebooks"].speaker_similarity < 0.4
