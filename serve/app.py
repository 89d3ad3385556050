"""Ray Serve: ingress -> AR -> NAR -> codec, separate deployments that scale on their own.

    serve run valle.serve.app:build_app model=models:/valle@champion voices=data/voices

Codes travel between deployments as small int16 arrays (12 KB for ten seconds), by value.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI
from numpy.typing import NDArray
from ray import serve
from ray.serve import Application

from valle.model.chunks import Chunking
from valle.model.codec import Codes
from valle.model.codec_stream import DecoderState, decode_next
from valle.model.sampling import Sampling
from valle.model.tokens import FRAME_RATE, HOP
from valle.platform import registry, settings, storage
from valle.serve.api import create_api
from valle.serve.drain import Drain
from valle.serve.engine import Engine
from valle.serve.keys import read_keys
from valle.serve.prompts import PROMPT_FRAMES
from valle.serve.request import Finish, Request
from valle.serve.runner import Runner
from valle.serve.scheduler import Scheduler
from valle.serve.schema import AppArgs
from valle.serve.worker import EngineWorker

Chunk = tuple[NDArray[np.int16], bool, bool]
"""New frames of the first codebook, whether they are the last, and if so because of the limit."""

Unfilled = tuple[list[int], Codes, NDArray[np.int16]]
"""Phoneme ids, prompt and first codebook: what the NAR model goes by."""

TOGETHER = 32
"""Requests that a NAR or codec replica may hold; what fits is worked on at the same time."""


class ARDeployment:
    """Phonemes and prompt to the first codebook, many requests at once (see engine.py)."""

    def __init__(self, model: str, tracking_uri: str, device: str, args: AppArgs) -> None:
        _one_thread(device)
        ar = registry.load_ar(registry.resolve(model, tracking_uri), device)
        max_frames = int(args.sentence_seconds * FRAME_RATE)
        positions = ar.capacity(args.max_phonemes, PROMPT_FRAMES, max_frames)
        runner = Runner(ar, slots=args.slots, positions=positions)
        self._worker = EngineWorker(Engine(runner, Scheduler(args.slots)))

    async def stream(self, request: Request, chunking: Chunking) -> AsyncGenerator[Chunk]:
        """The first codebook as it comes, in chunks."""
        codes: list[int] = []
        sizes = chunking.sizes()
        size = next(sizes)
        async for event in self._worker.stream(request):
            codes += event.codes
            if event.finish is not None:
                yield np.array(codes, np.int16), True, event.finish is Finish.LENGTH
            elif len(codes) >= size:
                yield np.array(codes, np.int16), False, False
                codes, size = [], next(sizes)

    async def generate(self, request: Request) -> tuple[NDArray[np.int16], bool]:
        """First codebook `[T]`, and whether the length limit ended it."""
        codes: list[int] = []
        finish = None
        async for event in self._worker.stream(request):
            codes += event.codes
            finish = event.finish
        return np.array(codes, np.int16), finish is Finish.LENGTH

    def check_health(self) -> None:
        """Serve replaces a replica whose engine has died."""
        self._worker.check()


class NARDeployment:
    """First codebook to all eight, for all that wait and are alike in length."""

    def __init__(self, model: str, tracking_uri: str, device: str, args: AppArgs) -> None:
        _one_thread(device)
        self._model = registry.load_nar(registry.resolve(model, tracking_uri), device)
        self._device = device
        self._drain = Drain(self._work, _nar_frames, int(args.batch_seconds * FRAME_RATE))

    async def generate(self, ids: list[int], prompt: Codes, first: NDArray[np.int16]) -> Codes:
        """Codes `[8, T]`."""
        return await self._drain.do((ids, prompt, first))

    def _work(self, items: list[Unfilled]) -> list[Codes]:
        filled = self._model.generate_batch(
            [
                (
                    torch.tensor(ids, device=self._device),
                    torch.from_numpy(prompt.astype(np.int64)).to(self._device),
                    torch.from_numpy(first.astype(np.int64)).to(self._device),
                )
                for ids, prompt, first in items
            ],
            sampling=Sampling(temperature=0.0),
            generators=[torch.Generator(self._device) for _ in items],
        )
        return [codes.cpu().numpy().astype(np.int16) for codes in filled]


class CodecDeployment:
    """Recordings to codes and codes to waveforms."""

    def __init__(self, model: str, tracking_uri: str, device: str, args: AppArgs) -> None:
        _one_thread(device)
        codec = self._codec = registry.load_codec(registry.resolve(model, tracking_uri), device)
        budget = int(args.batch_seconds * FRAME_RATE)
        self._encoding = Drain(codec.encode, lambda wave: len(wave) // HOP, budget)
        self._decoding = Drain(codec.decode, lambda codes: int(codes.shape[1]), budget)

    async def encode(self, wave: NDArray[np.float32]) -> Codes:
        """Codes `[8, T]` of a recording."""
        return await self._encoding.do(wave)

    async def decode(self, codes: Codes) -> NDArray[np.float32]:
        """Samples at 24 kHz."""
        return await self._decoding.do(codes)

    async def decode_next(
        self, codes: Codes, state: DecoderState | None
    ) -> tuple[NDArray[np.float32], DecoderState]:
        """Samples of a stream's next codes, and what the replica that decodes more has to know."""
        return await asyncio.to_thread(decode_next, self._codec, codes, state)


def _nar_frames(item: Unfilled) -> int:
    """Positions of a row: the prompt counts as much as the response."""
    ids, prompt, first = item
    return len(ids) + prompt.shape[1] + len(first)


def _one_thread(device: str) -> None:
    if device == "cpu":
        torch.set_num_threads(1)  # replicas, not threads, use the other cores


def build_app(args: AppArgs) -> Application:
    """The application; Serve validates `args` before anything starts."""
    # replicas run in folders of their own: what is relative or local is fixed here
    tracking_uri = args.tracking_uri or settings.read().tracking_uri
    places = {"voices": storage.absolute(args.voices)}
    if args.api_keys:
        read_keys(args.api_keys)  # what is wrong with it is noticed here
        places["api_keys"] = storage.absolute(args.api_keys)
    args = args.model_copy(update=places)
    accelerator = "cuda" if args.use_gpu else "cpu"

    def deploy(target: type, name: str, device: str, together: int, *more: object) -> Application:
        """`together`: requests that one replica works on at the same time."""
        options: dict[str, Any] = {
            "name": name,
            "max_ongoing_requests": together,
            "max_queued_requests": 64,
            "autoscaling_config": {
                "min_replicas": 1, "max_replicas": args.max_replicas,
                "target_ongoing_requests": 0.75 * together,
            },
            "ray_actor_options": {
                # small shares: on two cores all four deployments must fit beside each other
                "num_cpus": 0.3,
                "num_gpus": 1 if device == "cuda" else 0,
            },
        }  # fmt: skip
        return serve.deployment(target, **options).bind(args.model, tracking_uri, device, *more)

    def build_api() -> FastAPI:  # Serve calls it on each ingress replica; a `partial` it would not
        return create_api(args)

    ar = deploy(ARDeployment, "AR", accelerator, args.slots, args)
    nar = deploy(NARDeployment, "NAR", accelerator, TOGETHER, args)
    codec = deploy(CodecDeployment, "Codec", "cpu", TOGETHER, args)
    ingress = serve.deployment(
        serve.ingress(build_api)(),
        name="Ingress",
        max_ongoing_requests=100,
        ray_actor_options={"num_cpus": 0.1},
    )
    return ingress.bind(ar, nar, codec)
