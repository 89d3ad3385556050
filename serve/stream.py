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
from valle.model.codec import Codes
from valle.model.codec_stream import FIRST, DecoderState
from valle.model.filling import Unfilled
from valle.model.sampling import Sampling
from valle.model.valle import Synthesis
from valle.platform import audio
from valle.serve.calls import result, results
from valle.serve.request import Request
from valle.serve.schema import SpeechRequest


@dataclass(frozen=True)
class Piece:
    """Some of a sentence, said."""

    wave: audio.Wave
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
    unfilled = Unfilled(asked.phonemes, asked.prompt, first)
    codes = await result(lambda: nar.fill_in.remote(version, unfilled), insist=True)
    wave = await result(lambda: codec.decode.remote(version, codes), insist=True)
    return Piece(wave, len(first), hit_limit)


async def say_in_chunks(
    version: str, asked: Request, insist: bool, chunking: Chunking
) -> AsyncGenerator[Piece]:
    """The sentence while it is being made. Raises as `say_whole` does."""
    ar, nar, codec = deployments()
    first = np.zeros(0, np.int16)
    spoken: Codes | None = None
    said = 0
    state: DecoderState | None = None
    talk = ar.options(stream=True).stream
    chunks = results(lambda: talk.remote(version, asked, chunking), insist=insist)
    async with aclosing(chunks):
        async for new, ended, hit_limit in chunks:
            first = np.concatenate([first, new])
            ready = len(first) if ended else len(first) - chunking.look_ahead
            unfilled = Unfilled(asked.phonemes, asked.prompt, first, spoken, ended)
            codes = await result(partial(nar.fill_in.remote, version, unfilled), insist=True)
            chunk, spoken = codes[:, said:ready], codes[:, :ready]
            if ended and state is None and ready < FIRST:  # too short for a stream
                wave = await result(partial(codec.decode.remote, version, chunk), insist=True)
            else:
                decode = partial(codec.decode_next.remote, version, chunk, state)
                wave, state = await result(decode, insist=True)
            yield Piece(wave, ready - said, hit_limit, ended)
            said = ready
