"""The endpoint under fire: thousands of requests, valid and invalid, cancelled and too many, then a
replica killed; every answer is checked.

    python -m valle.jobs.bench.soak --requests 10000

Valid requests have to be answered with what the model says offline for that text, voice and seed;
of a burst, some with "come again". Invalid ones have to be refused with the right status. Memory of
every replica is taken before each burst and at the end. Then an AR replica is killed while clients
ask: how many requests fail, and how long until one succeeds again.
"""

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import psutil
import soundfile
from ray import serve

from valle.jobs.bench.replicas import replica_memory, replica_processes
from valle.jobs.evaluation.items import load_items
from valle.jobs.starter_voices import make_starter_voices
from valle.model.text import phoneme_ids
from valle.model.valle import Synthesis
from valle.platform import audio, registry, settings, storage
from valle.platform.cluster import connect
from valle.platform.progress import progress_bar
from valle.serve.app import build_app
from valle.serve.app_args import AppArgs
from valle.serve.engine.offline import OfflineSynthesizer
from valle.serve.engine.request import Request
from valle.serve.web.audio_formats import encode_audio

ReferenceAudio = dict[tuple[str, str, int], np.ndarray]
"""Samples by text, voice and seed."""

InvalidRequests = dict[str, tuple[int, dict[str, Any]]]
"""What is wrong with a request: the status that says so, and the request."""

VOICES = ("joe", "heart")
SEEDS = range(3)
WORDS_PER_TEXT = 5
"""Of each text: short requests are the many ones."""

BURST = 150
"""Requests at once: more than slots and queue hold."""

BURST_EVERY = 500

BUSY_CPU_SHARE = 0.3
"""Share of a core from which on the AR replica counts as speaking."""


def invalid_requests() -> InvalidRequests:
    """Requests to be refused."""
    hours = io.BytesIO()
    with soundfile.SoundFile(hours, "w", 8_000, 1, "PCM_16", format="FLAC") as file:
        for _ in range(180):
            file.write(np.zeros(60 * 8_000, np.float32))
    sounds = {
        "not audio": b"RIFF....", "not flac": b"fLaC" + bytes(1000),
        "three hours, packed": hours.getvalue(),
        "too short": audio.wav_bytes(np.full(2_400, 0.1, np.float32)),
    }  # fmt: skip
    requests: InvalidRequests = {
        "no such voice": (404, {"input": "hello", "voice": "nobody"}),
        "no text": (400, {"input": "", "voice": "joe"}),
        "unknown field": (400, {"input": "hello", "voice": "joe", "volume": 11}),
        "not base64": (400, {"input": "hello", "ref_audio": "%%%"}),
        "no such language": (400, {"input": "One. Two.", "voice": "joe", "language": "xx"}),
    }
    for name, data in sounds.items():
        requests[name] = (400, {"input": "hello", "ref_audio": base64.b64encode(data).decode()})
    return requests


@dataclass
class SoakResult:
    """What became of the requests."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    memory: list[dict[str, float]] = field(default_factory=list)
    """Megabytes of each replica, on the way."""


def reference_audio(model: str, voices: str, texts: Sequence[str]) -> ReferenceAudio:
    """Samples for every text, voice and seed, by the engine without Serve."""
    synthesizer = registry.load_synthesizer(registry.resolve(model))
    offline = OfflineSynthesizer(synthesizer, Synthesis(), slots=8, max_phonemes=1000)
    keys, requests = [], []
    for name in VOICES:
        recording = storage.read_bytes(storage.join(voices, f"{name}.wav"))
        prompt = synthesizer.encode_prompt(audio.read(recording, max_seconds=30), Synthesis())
        for text, seed in itertools.product(texts, SEEDS):
            keys.append((text, name, seed))
            requests.append(
                Request(
                    id=str(len(keys)), phonemes=phoneme_ids(text, "en-us"), prompt=prompt,
                    sampling=Synthesis().ar, max_frames=offline.max_frames, seed=seed,
                )
            )  # fmt: skip
    reference = {}
    for key, result in zip(keys, offline.synthesize(requests), strict=True):
        if isinstance(result, ValueError):
            raise result
        reference[key] = np.frombuffer(encode_audio(result.wave, "pcm"), "<i2").astype(int)
    return reference


class Client:
    """Asks for things, and checks what comes."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        reference: ReferenceAudio,
        invalid: InvalidRequests,
        result: SoakResult,
    ) -> None:
        self._http, self._reference, self._invalid, self._result = http, reference, invalid, result

    async def send_one(self, number: int) -> None:
        """A request of a kind that its number decides."""
        chance = random.Random(number)
        kind = chance.choices(["valid", "cancelled", "invalid", "malformed"], [75, 12, 12, 1])[0]
        self._result.counts[kind] += 1
        if kind == "invalid":
            name, (status, body) = chance.choice(list(self._invalid.items()))
            response = await self._http.post("/v1/audio/speech", json=body)
            if response.status_code != status or "error" not in response.json():
                self._result.failures.append(
                    f"{name}: {response.status_code} {response.text[:200]}"
                )
        elif kind == "malformed":
            response = await self._http.post("/v1/audio/speech", content=b"{")
            if response.status_code != 400:
                self._result.failures.append(f"malformed: {response.status_code}")
        else:
            leave_after = chance.random() * 0.5 if kind == "cancelled" else None
            retry_after = await self._speak(chance.choice(list(self._reference)), leave_after)
            await asyncio.sleep(retry_after)

    async def send_burst(self, number: int) -> None:
        """More than can be served, at once: some are, some are told to come again."""
        self._result.counts["in a burst"] += BURST
        keys = random.Random(number).choices(list(self._reference), k=BURST)
        waits = await asyncio.gather(*(self._speak(key) for key in keys))
        refused = sum(retry_after > 0 for retry_after in waits)
        self._result.counts["refused in a burst"] += refused
        if not 0 < refused < BURST:
            self._result.failures.append(f"a burst of {BURST}, of which {refused} were refused")

    async def _speak(self, key: tuple[str, str, int], leave_after: float | None = None) -> float:
        """Seconds to wait, where the answer was to come again."""
        text, voice, seed = key
        expected = self._reference[key]
        body = {
            "input": text, "voice": voice, "seed": seed, "response_format": "pcm",
            "chunked": leave_after is not None,
        }  # fmt: skip
        try:
            async with asyncio.timeout(leave_after):
                response = await self._http.post("/v1/audio/speech", json=body)
        except TimeoutError:
            return 0
        if response.status_code == 429 and float(response.headers.get("retry-after", 0)) > 0:
            self._result.counts["refused for now"] += 1
            return float(response.headers["retry-after"])
        if response.status_code != 200:
            self._result.failures.append(f"{body}: {response.status_code} {response.text[:200]}")
        elif leave_after is None:
            samples = np.frombuffer(response.content, "<i2").astype(int)
            if len(samples) != len(expected) or np.abs(samples - expected).max() > 2:
                self._result.failures.append(f"{body}: other samples than offline")
        return 0


async def run_soak(
    url: str,
    reference: ReferenceAudio,
    invalid: InvalidRequests,
    count: int,
    clients: int,
    minutes: float = float("inf"),
) -> SoakResult:
    """All requests, so many at a time, or as many as there is time for, and a burst among every
    `BURST_EVERY`."""
    result, end = SoakResult(), time.perf_counter() + 60 * minutes
    numbers = itertools.takewhile(lambda _: time.perf_counter() < end, range(count))
    limits = httpx.Limits(max_connections=None)
    with progress_bar(total=count, label="bench.soak", unit="request") as bar:

        async def work() -> None:
            async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
                client = Client(http, reference, invalid, result)
                for number in numbers:
                    if number % BURST_EVERY == BURST_EVERY // 2:
                        result.memory.append(replica_memory())
                        await client.send_burst(number)
                    await client.send_one(number)
                    bar.update()

        await asyncio.gather(*(work() for _ in range(clients)))
    return result


async def _share_of_core(process: psutil.Process, seconds: float = 0.1) -> float:
    """What a process uses of a core, for a moment."""
    before = process.cpu_times()
    await asyncio.sleep(seconds)
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / seconds


async def kill_replica(url: str, reference: ReferenceAudio, clients: int) -> dict[str, Any]:
    """SIGKILL to the AR replica while it speaks."""
    attempts: list[tuple[float, float, bool]] = []  # started, ended, succeeded
    keys = list(reference)
    stop = time.perf_counter() + 40

    async def work(number: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=300) as http:
            while time.perf_counter() < stop:
                text, voice, seed = keys[number % len(keys)]
                body = {"input": text, "voice": voice, "seed": seed, "response_format": "pcm"}
                started = time.perf_counter()
                try:
                    succeeded = (await http.post("/v1/audio/speech", json=body)).status_code == 200
                except httpx.HTTPError:
                    succeeded = False
                attempts.append((started, time.perf_counter(), succeeded))
                number += clients
                if not succeeded:
                    await asyncio.sleep(0.2)  # as a client that retries would

    running = [asyncio.create_task(work(number)) for number in range(clients)]
    await asyncio.sleep(8)
    process = replica_processes("AR")[0]  # there is one: `max_replicas`
    while (used := await _share_of_core(process)) < BUSY_CPU_SHARE:
        if time.perf_counter() > stop - 15:
            raise RuntimeError("the AR replica never spoke: there was nothing to interrupt")
    killed = time.perf_counter()
    os.kill(process.pid, signal.SIGKILL)
    await asyncio.gather(*running)
    # who had begun before may have been past the AR model: only who came later needs a new one
    after = [ended for started, ended, ok in attempts if ok and started > killed]
    return {
        "succeeded_before": sum(ok for _, ended, ok in attempts if ended <= killed),
        "cpu_share_at_kill": round(used, 2),
        "failed": sum(not ok for _, _, ok in attempts),
        "recovery_seconds": round(min(after) - killed, 1) if after else None,
        "succeeded_after": len(after),
    }


def summary(result: SoakResult, seconds: float) -> dict[str, Any]:
    """What is reported of the soak."""
    names = dict.fromkeys(name for sample in result.memory for name in sample)
    return {
        "minutes": round(seconds / 60, 1), "counts": dict(result.counts),
        "failures": len(result.failures), "first_failures": result.failures[:20],
        "megabytes": {name: [sample.get(name) for sample in result.memory] for name in names},
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=registry.CHAMPION, help="registry URI or bundle folder")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end earlier, then")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--port", type=int, default=8100)
    arguments = parser.parse_args(argv)
    model = registry.pin(arguments.model)
    voices = str(settings.read().home / "data" / "voices")
    make_starter_voices(voices)
    texts = [" ".join(item.text.split()[:WORDS_PER_TEXT]) for item in load_items("quick")][:8]
    reference = reference_audio(model, voices, texts)
    url = f"http://127.0.0.1:{arguments.port}"
    invalid = invalid_requests()
    with connect():
        serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
        args = AppArgs(model=model, voices=voices, max_replicas=1)
        serve.run(build_app(args), name="valle")
        asyncio.run(
            run_soak(url, reference, invalid, 200, arguments.clients)
        )  # caches fill up first
        started = time.perf_counter()
        result = asyncio.run(
            run_soak(
                url, reference, invalid, arguments.requests, arguments.clients, arguments.minutes
            )
        )
        result.memory.append(replica_memory())
        print(json.dumps(summary(result, time.perf_counter() - started), indent=2), flush=True)
        killed = asyncio.run(kill_replica(url, reference, arguments.clients))
        serve.shutdown()
    print(json.dumps({"replica_killed": killed}, indent=2))
    if result.failures or not killed["succeeded_after"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
