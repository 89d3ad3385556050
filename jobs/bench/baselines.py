"""The two obvious ways to serve a model, as baselines: no batching, and `@serve.batch`."""

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import FastAPI, Response
from ray import serve
from ray.serve import Application

from valle.jobs.bench.clients import SpeechBody
from valle.jobs.bench.offline import encode_voice, english_request, load_offline
from valle.model.valle import SynthesisResult
from valle.serve.web.audio_formats import encode_audio

MAX_BATCH = 16

REPLICAS = 3
"""Of each baseline: as many processes with a model as the endpoint has (AR, NAR, codec)."""


class _Replica:
    """The model in a replica, with one voice and one torch thread."""

    def __init__(self, model: str, tracking_uri: str, recording: bytes) -> None:
        torch.set_num_threads(1)
        self._offline = load_offline(model, MAX_BATCH, tracking_uri)
        self._prompt = encode_voice(self._offline, recording)
        self._number = 0

    def synthesize(self, bodies: Sequence[SpeechBody]) -> list[bytes]:
        """16-bit samples of each text; all are decoded as one batch. Empty for a refused text."""
        requests = []
        for body in bodies:
            self._number += 1
            requests.append(
                english_request(
                    str(self._number), body.input, self._prompt, body.seed, self._offline.max_frames
                )
            )
        results = self._offline.synthesize(requests)
        return [
            encode_audio(result.wave, "pcm") if isinstance(result, SynthesisResult) else b""
            for result in results
        ]


one_api, batch_api = FastAPI(), FastAPI()


@serve.ingress(one_api)
class NoBatching:
    """One request at a time; the others wait in Serve's queue."""

    def __init__(self, *arguments: Any) -> None:
        self._replica = _Replica(*arguments)

    @one_api.post("/")
    def synthesize(self, body: SpeechBody) -> Response:
        """The whole sentence as one body."""
        return Response(self._replica.synthesize([body])[0])


@serve.ingress(batch_api)
class StaticBatching:
    """Requests that arrive within 20 ms form a batch; none joins a batch that has started."""

    def __init__(self, *arguments: Any) -> None:
        self._replica = _Replica(*arguments)

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.02)
    async def _batch(self, bodies: list[SpeechBody]) -> list[bytes]:
        return await asyncio.to_thread(self._replica.synthesize, bodies)

    @batch_api.post("/")
    async def synthesize(self, body: SpeechBody) -> Response:
        """The whole sentence as one body."""
        return Response(await self._batch(body))


def baseline_apps(
    model: str, tracking_uri: str, recording: bytes, replicas: int = REPLICAS
) -> dict[str, Application]:
    """Each baseline by its name, which is also the route it is to be deployed under."""
    apps: dict[str, Application] = {}
    for name, target, max_ongoing in (
        ("one", NoBatching, 1),
        ("batch", StaticBatching, 4 * MAX_BATCH),
    ):
        options: dict[str, Any] = {
            "max_ongoing_requests": max_ongoing,
            "ray_actor_options": {"num_cpus": 0.1},
            "num_replicas": replicas,
        }
        deployment = serve.deployment(target, **options)
        apps[name] = deployment.bind(model, tracking_uri, recording)
    return apps
