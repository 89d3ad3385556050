"""What one writes first, for `bench_serve` to compare with: one at a time, and `@serve.batch`."""

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import FastAPI, Response
from pydantic import BaseModel
from ray import serve
from ray.serve import Application

from valle.model.valle import Spoken, Synthesis, Voice, text_ids
from valle.platform import audio, registry
from valle.serve.engine.offline import Offline
from valle.serve.engine.request import Request
from valle.serve.web.audio import encode

TOGETHER = 16
REPLICAS = 3
"""As many processes with a model as ours has: AR, NAR and codec."""


class Ask(BaseModel):
    """What the opponents are asked: the fields that this program sends."""

    input: str
    seed: int = 0
    voice: str = ""
    chunked: bool = False
    response_format: str = "pcm"


class _Speaker:
    """The model in a replica, with one prompt."""

    def __init__(self, model: str, tracking_uri: str, recording: bytes) -> None:
        torch.set_num_threads(1)
        self.voice: Voice = registry.load_voice(registry.resolve(model, tracking_uri))
        prompt = audio.read(recording, max_seconds=30)
        self.prompt = self.voice.encode_prompt(prompt, Synthesis())
        self.offline = Offline(self.voice, Synthesis(), slots=TOGETHER, max_phonemes=1000)
        self._number = 0

    def speak(self, asks: Sequence[Ask]) -> list[bytes]:
        """Samples of each, all spoken together."""
        requests = []
        for ask in asks:
            self._number += 1
            requests.append(
                Request(
                    id=str(self._number), phonemes=text_ids(ask.input, "en-us"),
                    prompt=self.prompt, sampling=Synthesis().ar,
                    max_frames=self.offline.max_frames, seed=ask.seed,
                )
            )  # fmt: skip
        said = self.offline.speak(requests)
        return [encode(s.wave, "pcm") if isinstance(s, Spoken) else b"" for s in said]


one_api, batch_api = FastAPI(), FastAPI()


@serve.ingress(one_api)
class OneAtATime:
    """Whoever comes while it speaks waits."""

    def __init__(self, *arguments: Any) -> None:
        self._speaker = _Speaker(*arguments)

    @one_api.post("/")
    def say(self, ask: Ask) -> Response:
        """The whole sentence."""
        return Response(self._speaker.speak([ask])[0])


@serve.ingress(batch_api)
class Batches:
    """What has come in within 20 ms is spoken together; nobody joins later."""

    def __init__(self, *arguments: Any) -> None:
        self._speaker = _Speaker(*arguments)

    @serve.batch(max_batch_size=TOGETHER, batch_wait_timeout_s=0.02)
    async def _together(self, asks: list[Ask]) -> list[bytes]:
        return await asyncio.to_thread(self._speaker.speak, asks)

    @batch_api.post("/")
    async def say(self, ask: Ask) -> Response:
        """The whole sentence."""
        return Response(await self._together(ask))


def applications(model: str, tracking_uri: str, recording: bytes) -> dict[str, Application]:
    """Each rival by its name, ready to be run under a route of its own."""
    found: dict[str, Application] = {}
    for name, target, together in (
        ("one", OneAtATime, 1), ("batch", Batches, 4 * TOGETHER),
    ):  # fmt: skip
        options: dict[str, Any] = {
            "max_ongoing_requests": together, "ray_actor_options": {"num_cpus": 0.1},
            "num_replicas": REPLICAS,
        }  # fmt: skip
        deployment = serve.deployment(target, **options)
        found[name] = deployment.bind(model, tracking_uri, recording)
    return found
