"""The endpoint under fire: thousands of requests, good and bad, cancelled and too many, then a
replica killed; every answer is checked.

    python -m valle.jobs.bench.soak --requests 10000

Good requests have to be answered with what the model says offline for that text, voice and seed; of
a burst, some with "come again". Bad ones have to be refused with the right status. Memory of every
replica is taken before each burst and at the end. Then an AR replica is killed while clients ask:
how many requests fail, and how long until one succeeds again.
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

from valle.jobs.bench.replicas import memory, replicas
from valle.jobs.evaluation.items import load_items
from valle.jobs.starter_voices import make_starter_voices
from valle.model.valle import Synthesis, text_ids
from valle.platform import audio, registry, settings, storage
from valle.platform.cluster import connect
from valle.platform.progress import progress
from valle.serve.app import build_app
from valle.serve.engine.offline import Offline
from valle.serve.engine.request import Request
from valle.serve.web.audio import encode
from valle.serve.web.schema import AppArgs

Truth = dict[tuple[str, str, int], np.ndarray]
"""Samples by text, voice and seed."""

Bad = dict[str, tuple[int, dict[str, Any]]]
"""What is wrong with a request: the status that says so, and the request."""

VOICES = ("joe", "heart")
SEEDS = range(3)
WORDS = 5
"""Of each text: short requests are the many ones."""

BURST = 150
"""Requests at once: more than slots and queue hold."""

BURST_EVERY = 500

SPEAKING = 0.3
"""Share of a core from which on the AR replica counts as speaking."""


def bad_requests() -> Bad:
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
    found: Bad = {
        "no such voice": (404, {"input": "hello", "voice": "nobody"}),
        "no text": (400, {"input": "", "voice": "joe"}),
        "unknown field": (400, {"input": "hello", "voice": "joe", "volume": 11}),
        "not base64": (400, {"input": "hello", "ref_audio": "%%%"}),
        "no such language": (400, {"input": "One. Two.", "voice": "joe", "language": "xx"}),
    }
    for name, data in sounds.items():
        found[name] = (400, {"input": "hello", "ref_audio": base64.b64encode(data).decode()})
    return found


@dataclass
class Outcome:
    """What became of the requests."""

    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[dict[str, float]] = field(default_factory=list)
    """Megabytes of each replica, on the way."""


def expected(model: str, voices: str, texts: Sequence[str]) -> Truth:
    """Samples for every text, voice and seed, by the engine without Serve."""
    voice = registry.load_voice(registry.resolve(model))
    offline = Offline(voice, Synthesis(), slots=8, max_phonemes=1000)
    keys, requests = [], []
    for name in VOICES:
        recording = storage.read_bytes(storage.join(voices, f"{name}.wav"))
        prompt = voice.encode_prompt(audio.read(recording, max_seconds=30), Synthesis())
        for text, seed in itertools.product(texts, SEEDS):
            keys.append((text, name, seed))
            requests.append(
                Request(
                    id=str(len(keys)), phonemes=text_ids(text, "en-us"), prompt=prompt,
                    sampling=Synthesis().ar, max_frames=offline.max_frames, seed=seed,
                )
            )  # fmt: skip
    found = {}
    for key, said in zip(keys, offline.speak(requests), strict=True):
        if isinstance(said, ValueError):
            raise said
        found[key] = np.frombuffer(encode(said.wave, "pcm"), "<i2").astype(int)
    return found


class Client:
    """Asks for things, and checks what comes."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        truth: Truth,
        bad: Bad,
        outcome: Outcome,
    ) -> None:
        self._http, self._truth, self._bad, self._outcome = http, truth, bad, outcome

    async def one(self, number: int) -> None:
        """A request of a kind that its number decides."""
        chance = random.Random(number)
        kind = chance.choices(["good", "cancelled", "bad", "malformed"], [75, 12, 12, 1])[0]
        self._outcome.kinds[kind] += 1
        if kind == "bad":
            name, (status, body) = chance.choice(list(self._bad.items()))
            answer = await self._http.post("/v1/audio/speech", json=body)
            if answer.status_code != status or "error" not in answer.json():
                self._outcome.wrong.append(f"{name}: {answer.status_code} {answer.text[:200]}")
        elif kind == "malformed":
            answer = await self._http.post("/v1/audio/speech", content=b"{")
            if answer.status_code != 400:
                self._outcome.wrong.append(f"malformed: {answer.status_code}")
        else:
            leave_after = chance.random() * 0.5 if kind == "cancelled" else None
            again_after = await self._speak(chance.choice(list(self._truth)), leave_after)
            await asyncio.sleep(again_after)

    async def burst(self, number: int) -> None:
        """More than can be served, at once: some are, some are told to come again."""
        self._outcome.kinds["in a burst"] += BURST
        keys = random.Random(number).choices(list(self._truth), k=BURST)
        waits = await asyncio.gather(*(self._speak(key) for key in keys))
        refused = sum(again_after > 0 for again_after in waits)
        self._outcome.kinds["refused in a burst"] += refused
        if not 0 < refused < BURST:
            self._outcome.wrong.append(f"a burst of {BURST}, of which {refused} were refused")

    async def _speak(self, key: tuple[str, str, int], leave_after: float | None = None) -> float:
        """Seconds to wait, where the answer was to come again."""
        text, voice, seed = key
        truth = self._truth[key]
        body = {
            "input": text, "voice": voice, "seed": seed, "response_format": "pcm",
            "chunked": leave_after is not None,
        }  # fmt: skip
        try:
            async with asyncio.timeout(leave_after):
                answer = await self._http.post("/v1/audio/speech", json=body)
        except TimeoutError:
            return 0
        if answer.status_code == 429 and float(answer.headers.get("retry-after", 0)) > 0:
            self._outcome.kinds["refused for now"] += 1
            return float(answer.headers["retry-after"])
        if answer.status_code != 200:
            self._outcome.wrong.append(f"{body}: {answer.status_code} {answer.text[:200]}")
        elif leave_after is None:
            heard = np.frombuffer(answer.content, "<i2").astype(int)
            if len(heard) != len(truth) or np.abs(heard - truth).max() > 2:
                self._outcome.wrong.append(f"{body}: other samples than offline")
        return 0


async def fire(
    url: str, truth: Truth, bad: Bad, count: int, clients: int, minutes: float = float("inf")
) -> Outcome:
    """All requests, so many at a time, or as many as there is time for, and a burst among every
    `BURST_EVERY`."""
    outcome, end = Outcome(), time.perf_counter() + 60 * minutes
    numbers = itertools.takewhile(lambda _: time.perf_counter() < end, range(count))
    limits = httpx.Limits(max_connections=None)
    with progress(total=count, label="soak", unit="request") as bar:

        async def work() -> None:
            async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
                client = Client(http, truth, bad, outcome)
                for number in numbers:
                    if number % BURST_EVERY == BURST_EVERY // 2:
                        outcome.memory.append(memory())
                        await client.burst(number)
                    await client.one(number)
                    bar.update()

        await asyncio.gather(*(work() for _ in range(clients)))
    return outcome


async def _share_of_core(process: psutil.Process, seconds: float = 0.1) -> float:
    """What a process uses of a core, for a moment."""
    before = process.cpu_times()
    await asyncio.sleep(seconds)
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / seconds


async def kill_one(url: str, truth: Truth, clients: int) -> dict[str, Any]:
    """SIGKILL to the AR replica while it speaks."""
    outcomes: list[tuple[float, float, bool]] = []  # begun, ended, answered
    keys = list(truth)
    stop = time.perf_counter() + 40

    async def work(number: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=300) as http:
            while time.perf_counter() < stop:
                text, voice, seed = keys[number % len(keys)]
                body = {"input": text, "voice": voice, "seed": seed, "response_format": "pcm"}
                begun = time.perf_counter()
                try:
                    good = (await http.post("/v1/audio/speech", json=body)).status_code == 200
                except httpx.HTTPError:
                    good = False
                outcomes.append((begun, time.perf_counter(), good))
                number += clients
                if not good:
                    await asyncio.sleep(0.2)  # as a client that retries would

    running = [asyncio.create_task(work(number)) for number in range(clients)]
    await asyncio.sleep(8)
    process = replicas("AR")[0]  # there is one: `max_replicas`
    while (used := await _share_of_core(process)) < SPEAKING:
        if time.perf_counter() > stop - 15:
            raise RuntimeError("the AR replica never spoke: there was nothing to interrupt")
    killed = time.perf_counter()
    os.kill(process.pid, signal.SIGKILL)
    await asyncio.gather(*running)
    # who had begun before may have been past the AR model: only who came later needs a new one
    after = [ended for begun, ended, good in outcomes if good and begun > killed]
    return {
        "before_the_kill": sum(good for _, ended, good in outcomes if ended <= killed),
        "core_used_when_killed": round(used, 2),
        "failed": sum(not good for _, _, good in outcomes),
        "seconds_until_one_succeeds": round(min(after) - killed, 1) if after else None,
        "succeeded_afterwards": len(after),
    }


def summary(outcome: Outcome, seconds: float) -> dict[str, Any]:
    """What is reported of the fire."""
    names = dict.fromkeys(name for sample in outcome.memory for name in sample)
    return {
        "minutes": round(seconds / 60, 1), "kinds": dict(outcome.kinds),
        "wrong": len(outcome.wrong), "first_wrong": outcome.wrong[:20],
        "megabytes": {name: [sample.get(name) for sample in outcome.memory] for name in names},
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
    model = registry.pin(registry.absolute(arguments.model))
    voices = str(settings.read().home / "data" / "voices")
    make_starter_voices(voices)
    texts = [" ".join(item.text.split()[:WORDS]) for item in load_items("quick")][:8]
    truth = expected(model, voices, texts)
    url = f"http://127.0.0.1:{arguments.port}"
    bad = bad_requests()
    with connect():
        serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
        args = AppArgs(model=model, voices=voices, max_replicas=1)
        serve.run(build_app(args), name="valle")
        asyncio.run(fire(url, truth, bad, 200, arguments.clients))  # caches fill up first
        started = time.perf_counter()
        outcome = asyncio.run(
            fire(url, truth, bad, arguments.requests, arguments.clients, arguments.minutes)
        )
        outcome.memory.append(memory())
        print(json.dumps(summary(outcome, time.perf_counter() - started), indent=2), flush=True)
        killed = asyncio.run(kill_one(url, truth, arguments.clients))
        serve.shutdown()
    print(json.dumps({"replica_killed": killed}, indent=2))
    if outcome.wrong or not killed["succeeded_afterwards"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
