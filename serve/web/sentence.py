"""One sentence through AR, NAR and codec: whole, or in chunks as the AR model goes on.

Whole is what `model.valle.Synthesizer.synthesize` says, in chunks what `model.chunks` describes.
"""

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import numpy as np
from ray import serve
from ray.serve.handle import DeploymentHandle

from valle.model.chunks import Chunking
from valle.model.codec.encodec_stream import MIN_FIRST_CHUNK, EncodecState
from valle.model.codec.interface import Codes, Wave
from valle.model.nar_decoding import NARRequest
from valle.model.sampling import Sampling
from valle.model.tokens import N_CODEBOOKS
from valle.model.valle import Synthesis
from valle.serve.deployments.backpressure import call_deployment, prefetch, stream_deployment
from valle.serve.engine.request import Request
from valle.serve.web.schema import SpeechRequest


@dataclass(frozen=True)
class AudioChunk:
    """Some of a sentence, said."""

    wave: Wave
    frames: int
    hit_limit: bool = False
    """The sentence ended here because of its length limit."""
    last: bool = True
    """This is the sentence's last chunk."""


def deployment_handles() -> tuple[DeploymentHandle, DeploymentHandle, DeploymentHandle]:
    """AR, NAR and codec of the application that this runs in."""
    app = serve.get_replica_context().app_name
    ar, nar, codec = (serve.get_deployment_handle(name, app) for name in ("AR", "NAR", "Codec"))
    return ar, nar, codec


def engine_request(
    phonemes: list[int],
    prompt: Codes,
    request: SpeechRequest,
    max_frames: int,
    seed: int,
    guidance_scale: float,
) -> Request:
    """What the AR engine is asked for a sentence."""
    sampling = Sampling(
        temperature=request.temperature, top_p=request.top_p, guidance_scale=guidance_scale,
        repetition_threshold=Synthesis().ar.repetition_threshold,
    )  # fmt: skip
    return Request(
        id=uuid.uuid4().hex, phonemes=phonemes, prompt=prompt, sampling=sampling,
        max_frames=max_frames, seed=seed,
    )  # fmt: skip


async def synthesize_sentence(version: str, request: Request, retry: bool) -> AudioChunk:
    """The sentence, when all of it is made. Raises ApiError where too many wait, unless this
    one must retry."""
    ar, nar, codec = deployment_handles()
    first, hit_limit = await call_deployment(
        lambda: ar.generate.remote(version, request), retry=retry
    )
    # from here on work has been spent on it
    nar_request = NARRequest(request.phonemes, request.prompt, first, complete=not hit_limit)
    codes = await call_deployment(lambda: nar.generate.remote(version, nar_request), retry=True)
    wave = await call_deployment(lambda: codec.decode.remote(version, codes), retry=True)
    return AudioChunk(wave, len(first), hit_limit)


async def stream_sentence(
    version: str, request: Request, retry: bool, chunking: Chunking
) -> AsyncGenerator[AudioChunk]:
    """The sentence while it is being made. Raises as `synthesize_sentence` does."""
    _, _, codec = deployment_handles()
    state: EncodecState | None = None
    # the next chunk is filled in while this one is decoded
    chunks = prefetch(_nar_decode(version, request, retry, chunking), 1)
    async with aclosing(chunks):
        async for codes, last, hit_limit in chunks:
            if (
                last and state is None and codes.shape[1] < MIN_FIRST_CHUNK
            ):  # too short for a stream
                wave = await call_deployment(
                    partial(codec.decode.remote, version, codes), retry=True
                )
            else:
                decode = partial(codec.decode_next.remote, version, codes, state)
                wave, state = await call_deployment(decode, retry=True)
            yield AudioChunk(wave, codes.shape[1], hit_limit, last)


async def _nar_decode(
    version: str, request: Request, retry: bool, chunking: Chunking
) -> AsyncGenerator[tuple[Codes, bool, bool]]:
    """Codes `[8, T]` of each chunk, whether it is the last, and if so because of the limit."""
    ar, nar, _ = deployment_handles()
    first = np.zeros(0, np.int16)
    prefix = np.zeros((N_CODEBOOKS, 0), np.int16)
    stream = ar.options(stream=True).stream
    chunks = stream_deployment(lambda: stream.remote(version, request, chunking), retry=retry)
    async with aclosing(chunks):
        async for chunk, last, hit_limit in chunks:
            first = np.concatenate([first, chunk])
            start, end = prefix.shape[1], len(first) - (0 if last else chunking.lookahead)
            complete = last and not hit_limit
            nar_request = NARRequest(request.phonemes, request.prompt, first, prefix, complete)
            codes = await call_deployment(
                partial(nar.generate.remote, version, nar_request), retry=True
            )
            prefix = codes[:, :end]
            yield codes[:, start:end], last, hit_limit
