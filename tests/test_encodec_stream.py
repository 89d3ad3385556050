"""Decoding in chunks: the same samples as decoding the whole."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from valle.model.codec.encodec import Encodec, EncodecConfig, build, load
from valle.model.codec.encodec_stream import decode_next
from valle.model.codec.interface import CodecIdentity, Codes


def with_lstm() -> Encodec:
    """A codec with LSTM layers, as the official one."""
    torch.manual_seed(0)
    config = EncodecConfig(name="lstm", n_filters=4, dimension=16, lstm=2, n_codebooks=8)
    model = build(config)
    for layer in model.quantizer.vq.layers:
        layer._codebook.embed.normal_(std=0.3)
    return Encodec(model, CodecIdentity(name="lstm", sha256="0"))


@pytest.mark.parametrize("build_codec", [load, with_lstm], ids=["nano", "lstm"])
def test_decode_next_in_chunks_equals_decode(build_codec: Callable[[], Encodec]) -> None:
    codec = build_codec()
    codes: Codes = np.random.default_rng(1).integers(0, 1024, (8, 60)).astype(np.int16)
    expected = codec.decode([codes])[0]
    state, waves = None, []
    for start, end in ((0, 15), (15, 16), (16, 40), (40, 60)):
        wave, state = decode_next(codec, codes[:, start:end], state)
        assert len(wave) == (end - start) * 320
        waves.append(wave)
    np.testing.assert_allclose(np.concatenate(waves), expected, atol=1e-5)
    assert expected.std() > 1e-3
    assert state is not None and sum(x.nbytes for x in state.tensors) < 100_000


def test_decode_next_refuses_short_first_chunks_and_bad_codes(tiny_codec: Encodec) -> None:
    codes = np.zeros((8, 7), np.int16)
    with pytest.raises(ValueError, match="a first chunk of 7 frames; it needs 8"):
        decode_next(tiny_codec, codes, None)
    _, state = decode_next(tiny_codec, np.zeros((8, 8), np.int16), None)
    with pytest.raises(ValueError, match="values must lie in"):
        decode_next(tiny_codec, codes - 1, state)
