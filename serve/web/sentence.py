"""One sentence through AR, NAR and codec: whole, or in chunks as the AR model goes on.

Whole is what `model.valle.Voice.speak` says, in chunks what `model.chunks` describes.
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
from valle.model.codec.encodec_stream import FIRST, DecoderState
from valle.model.codec.interface import Codes, Wave
from valle.model.nar_decoding import Unfilled
from valle.model.sampling import Sampling
from valle.model.tokens import N_CODEBOOKS
from valle.model.valle import Synthesis
from valle.serve.deployments.backpressure import ahead, result, results
from valle.serve.engine.request import Request
from valle.serve.web.schema import SpeechRequest


@dataclass(frozen=True)
class Piece:
    """Some of a sentence, said."""

    wave: Wave
    frames: int
    hit_limit: bool = False
    """The sentence ended here because of its length limit."""
    ends: bool = True
    """This is the sentence's last piece."""


def deployments() -> tuple[DeploymentHandle, DeploymentHandle, DeploymentHandle]:
    """AR, NAR and codec of the application that this runs in."""
    app = serve.get_replica_context().app_name
    ar, nar, codec = (serve.get_deployment_handle(name, app) for name in ("AR", "NAR", "Codec"))
    return ar, nar, codec


def ask(
    ids: list[int],
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
        id=uuid.uuid4().hex, phonemes=ids, prompt=prompt, sampling=sampling,
        max_frames=max_frames, seed=seed,
    )  # fmt: skip


async def say_whole(version: str, asked: Request, insist: bool) -> Piece:
    """The sentence, when all of it is made. Raises ApiError where too many wait, unless this
    one must insist."""
    ar, nar, codec = deployments()
    first, hit_limit = await result(lambda: ar.generate.remote(version, asked), insist=insist)
    # from here on work has been spent on it
    unfilled = Unfilled(asked.phonemes, asked.prompt, first, ended=not hit_limit)
    codes = await result(lambda: nar.fill_in.remote(version, unfilled), insist=True)
    wave = await result(lambda: codec.decode.remote(version, codes), insist=True)
    return Piece(wave, len(first), hit_limit)


async def say_in_chunks(
    version: str, asked: Request, insist: bool, chunking: Chunking
) -> AsyncGenerator[Piece]:
    """The sentence while it is being made. Raises as `say_whole` does."""
    _, _, codec = deployments()
    state: DecoderState | None = None
    # the next chunk is filled in while this one is decoded
    chunks = ahead(_filled(version, asked, insist, chunking), 1)
    async with aclosing(chunks):
        async for codes, ended, hit_limit in chunks:
            if ended and state is None and codes.shape[1] < FIRST:  # too short for a stream
                wave = await result(partial(codec.decode.remote, version, codes), insist=True)
            else:
                decode = partial(codec.decode_next.remote, version, codes, state)
                wave, state = await result(decode, insist=True)
            yield Piece(wave, codes.shape[1], hit_limit, ended)


async def _filled(
    version: str, asked: Request, insist: bool, chunking: Chunking
) -> AsyncGenerator[tuple[Codes, bool, bool]]:
    """Codes `[8, T]` of each chunk, whether it is the last, and if so because of the limit."""
    ar, nar, _ = deployments()
    first = np.zeros(0, np.int16)
    spoken = np.zeros((N_CODEBOOKS, 0), np.int16)
    talk = ar.options(stream=True).stream
    chunks = results(lambda: talk.remote(version, asked, chunking), insist=insist)
    async with aclosing(chunks):
        async for new, ended, hit_limit in chunks:
            first = np.concatenate([first, new])
            said, ready = spoken.shape[1], len(first) - (0 if ended else chunking.look_ahead)
            said_all = ended and not hit_limit
            unfilled = Unfilled(asked.phonemes, asked.prompt, first, spoken, said_all)
            codes = await result(partial(nar.fill_in.remote, version, unfilled), insist=True)
            spoken = codes[:, :ready]
            yield codes[:, said:ready], ended, hit_limit
