"""What one writes first, for bench/serve.py to compare with: one at a time, and `@serve.batch`."""

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import FastAPI, Response
from pydantic import BaseModel
from ray import serve
from ray.serve import Application

from valle.model.text import phoneme_ids
from valle.model.valle import Synthesis, SynthesisResult, Synthesizer
from valle.platform import audio, registry
from valle.serve.engine.offline import OfflineSynthesizer
from valle.serve.engine.request import Request
from valle.serve.web.audio_formats import encode_audio

MAX_BATCH = 16
REPLICAS = 3
"""As many processes with a model as ours has: AR, NAR and codec."""


class SpeechBody(BaseModel):
    """Body of a request to a baseline: the fields that this program sends."""

    input: str
    seed: int = 0
    voice: str = ""
    chunked: bool = False
    response_format: str = "pcm"


class _Replica:
    """The model in a replica, with one prompt."""

    def __init__(self, model: str, tracking_uri: str, recording: bytes) -> None:
        torch.set_num_threads(1)
        self.synthesizer: Synthesizer = registry.load_synthesizer(
            registry.resolve(model, tracking_uri)
        )
        prompt = audio.read(recording, max_seconds=30)
        self.prompt = self.synthesizer.encode_prompt(prompt, Synthesis())
        self.offline = OfflineSynthesizer(
            self.synthesizer, Synthesis(), slots=MAX_BATCH, max_phonemes=1000
        )
        self._number = 0

    def synthesize(self, bodies: Sequence[SpeechBody]) -> list[bytes]:
        """Samples of each, all spoken together."""
        requests = []
        for body in bodies:
            self._number += 1
            requests.append(
                Request(
                    id=str(self._number), phonemes=phoneme_ids(body.input, "en-us"),
                    prompt=self.prompt, sampling=Synthesis().ar,
                    max_frames=self.offline.max_frames, seed=body.seed,
                )
            )  # fmt: skip
        results = self.offline.synthesize(requests)
        return [
            encode_audio(s.wave, "pcm") if isinstance(s, SynthesisResult) else b"" for s in results
        ]


one_api, batch_api = FastAPI(), FastAPI()


@serve.ingress(one_api)
class NoBatching:
    """Whoever comes while it speaks waits."""

    def __init__(self, *arguments: Any) -> None:
        self._replica = _Replica(*arguments)

    @one_api.post("/")
    def synthesize(self, body: SpeechBody) -> Response:
        """The whole sentence."""
        return Response(self._replica.synthesize([body])[0])


@serve.ingress(batch_api)
class StaticBatching:
    """What has come in within 20 ms is spoken together; nobody joins later."""

    def __init__(self, *arguments: Any) -> None:
        self._replica = _Replica(*arguments)

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.02)
    async def _batch(self, bodies: list[SpeechBody]) -> list[bytes]:
        return await asyncio.to_thread(self._replica.synthesize, bodies)

    @batch_api.post("/")
    async def synthesize(self, body: SpeechBody) -> Response:
        """The whole sentence."""
        return Response(await self._batch(body))


def baseline_apps(model: str, tracking_uri: str, recording: bytes) -> dict[str, Application]:
    """Each baseline by its name, ready to be run under a route of its own."""
    apps: dict[str, Application] = {}
    for name, target, max_ongoing in (
        ("one", NoBatching, 1), ("batch", StaticBatching, 4 * MAX_BATCH),
    ):  # fmt: skip
        options: dict[str, Any] = {
            "max_ongoing_requests": max_ongoing, "ray_actor_options": {"num_cpus": 0.1},
            "num_replicas": REPLICAS,
        }  # fmt: skip
        deployment = serve.deployment(target, **options)
        apps[name] = deployment.bind(model, tracking_uri, recording)
    return apps
