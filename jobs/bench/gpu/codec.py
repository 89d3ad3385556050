"""P5, EnCodec: encoding and decoding in batches of growing size, and streaming in chunks.

The network has the official size and random weights, which do not affect speed. It is measured with
and without TF32 in its convolutions; PyTorch's default is with.
"""

from functools import partial

import numpy as np
import torch

from valle.jobs.bench.gpu import device_timing, synthetic
from valle.jobs.bench.gpu.record import PhaseContext
from valle.model.codec import encodec
from valle.model.codec.encodec import Encodec, EncodecConfig
from valle.model.codec.encodec_stream import EncodecState, decode_next
from valle.model.codec.interface import CodecIdentity, Codes
from valle.model.tokens import FRAME_RATE, N_CODEBOOKS

BATCH_SECONDS = (60, 480, 120, 1920)
"""Seconds of padded audio in a batch, the most informative sizes first."""

ITEM_SECONDS = 10
CHUNK_FRAMES = 15
SMALL = EncodecConfig(name="small", n_filters=4, dimension=16, lstm=1, n_codebooks=8)


def run(context: PhaseContext) -> None:
    """Measures batches, then a stream."""
    codec = build(context)
    sizes, item = ((2, 4), 1) if context.quick else (BATCH_SECONDS, ITEM_SECONDS)
    for tf32 in (True, False):
        device_timing.allow_tf32(matmul=False, convolution=tf32)
        for seconds in sizes if tf32 else sizes[:2]:
            name = f"{seconds} s a batch, TF32 {'on' if tf32 else 'off'}"
            context.record.attempt(
                name, partial(measure_batch, context, codec, name, seconds, item), 3
            )
    device_timing.allow_tf32(matmul=False, convolution=False)
    context.record.attempt("stream", lambda: measure_stream(context, codec, item * 2), 2)


def build(context: PhaseContext) -> Encodec:
    """A codec of random weights."""
    config = SMALL if context.quick else EncodecConfig()
    torch.manual_seed(0)
    model = encodec.build(config)
    for layer in model.quantizer.vq.layers:
        torch.nn.init.normal_(layer._codebook.embed, std=0.05)
    identity = CodecIdentity(name=config.name, sha256="0" * 64)
    return Encodec(model, identity, str(context.device))


def measure_batch(
    context: PhaseContext, codec: Encodec, name: str, seconds: int, item: int
) -> None:
    """Times encoding and decoding of one batch of `seconds`, in recordings of `item` seconds."""
    wave = synthetic.recording(item)
    waves = [np.roll(wave, 1000 * number) for number in range(seconds // item)]
    device = context.device
    codes: list[Codes] = codec.encode(waves, seconds)  # warm-up, and the input of decoding
    codec.decode(codes, seconds)
    peaks = []
    times = []
    for work in (lambda: codec.encode(waves, seconds), lambda: codec.decode(codes, seconds)):
        device_timing.reset_peak(device)
        times.append(min(device_timing.time_calls(device, work, 1 if context.quick else 3)))
        peaks.append(device_timing.peak_gigabytes(device))
    encode, decode = times
    context.record.measurement(
        name,
        encode_times_real_time=seconds / encode,
        decode_times_real_time=seconds / decode,
        encode_milliseconds=1000 * encode,
        decode_milliseconds=1000 * decode,
        encode_peak_gigabytes=peaks[0],
        decode_peak_gigabytes=peaks[1],
    )


def measure_stream(context: PhaseContext, codec: Encodec, seconds: int) -> None:
    """Times streaming decoding, as an endpoint does it in chunks, and checks its samples against
    those of decoding everything at once."""
    codes = synthetic.random_codes(np.random.default_rng(0), N_CODEBOOKS, seconds * FRAME_RATE)
    state: EncodecState | None = None
    waves = []
    chunks = range(0, codes.shape[1], CHUNK_FRAMES)
    times = []
    for start in chunks:
        chunk = codes[:, start : start + CHUNK_FRAMES]

        def work(chunk: Codes = chunk) -> None:
            nonlocal state
            wave, state = decode_next(codec, chunk, state)
            waves.append(wave)

        times += device_timing.time_calls(context.device, work)
    elapsed = sum(times[1:])  # the first chunk is the warm-up
    at_once = codec.decode([codes], seconds + 1)[0]
    error = float(np.abs(np.concatenate(waves) - at_once).max() / np.abs(at_once).max())
    context.record.check("chunks = decoded at once", error <= 1e-3, relative_error=error)
    context.record.measurement(
        f"chunks of {CHUNK_FRAMES} frames",
        milliseconds=1000 * elapsed / len(times[1:]),
        times_real_time=len(times[1:]) * CHUNK_FRAMES / FRAME_RATE / elapsed,
    )
