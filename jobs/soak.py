"""The endpoint under fire: thousands of requests, good and bad, cancelled and too many, then a
replica killed; every answer is checked.

    python -m valle.jobs.soak --requests 10000

Good answers have to be what the model says offline for that text, voice and seed. Bad ones have to
be refused with the right status. Memory of every replica is taken at the start and the end. Then an
AR replica is killed under load: how many requests fail, and how long until one succeeds again.
"""

import argparse
import asyncio
import base64
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
from ray import serve

from valle.jobs.evaluation import load_items
from valle.model.valle import Synthesis, text_ids
from valle.platform import audio, registry, settings, storage
from valle.platform.cluster import connect
from valle.platform.progress import progress
from valle.serve.app import build_app
from valle.serve.audio import encode
from valle.serve.offline import Offline
from valle.serve.request import Request
from valle.serve.run import make_starter_voices
from valle.serve.schema import AppArgs

VOICES = ("joe", "heart")
SEEDS = range(3)
WORDS = 5
"""Of each text: short requests are the many ones."""

BAD: dict[str, tuple[int, dict[str, Any]]] = {
    "no such voice": (404, {"input": "hello", "voice": "nobody"}),
    "no text": (400, {"input": "", "voice": "joe"}),
    "unknown field": (400, {"input": "hello", "voice": "joe", "volume": 11}),
    "not audio": (400, {"input": "hello", "ref_audio": base64.b64encode(b"RIFF....").decode()}),
    "not base64": (400, {"input": "hello", "ref_audio": "%%%"}),
    "no such language": (400, {"input": "One. Two.", "voice": "joe", "language": "xx"}),
}


@dataclass
class Outcome:
    """What became of the requests."""

    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def expected(
    model: str, voices: str, texts: Sequence[str]
) -> dict[tuple[str, str, int], np.ndarray]:
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
        truth: dict[tuple[str, str, int], np.ndarray],
        outcome: Outcome,
    ) -> None:
        self._http, self._truth, self._outcome = http, truth, outcome

    async def one(self, number: int) -> None:
        """A request of a kind that its number decides."""
        chance = random.Random(number)
        kind = chance.choices(["good", "cancelled", "bad", "malformed"], [75, 12, 12, 1])[0]
        self._outcome.kinds[kind] += 1
        if kind == "bad":
            name, (status, body) = chance.choice(list(BAD.items()))
            answer = await self._http.post("/v1/audio/speech", json=body)
            if answer.status_code != status or "error" not in answer.json():
                self._outcome.wrong.append(f"{name}: {answer.status_code} {answer.text[:200]}")
        elif kind == "malformed":
            answer = await self._http.post("/v1/audio/speech", content=b"{")
            if answer.status_code != 400:
                self._outcome.wrong.append(f"malformed: {answer.status_code}")
        else:
            text, voice, seed = chance.choice(list(self._truth))
            body = {
                "input": text, "voice": voice, "seed": seed, "response_format": "pcm",
                "chunked": kind == "cancelled",
            }  # fmt: skip
            leave_after = chance.random() * 0.5 if kind == "cancelled" else None
            await self._speak(body, self._truth[text, voice, seed], leave_after)

    async def _speak(
        self, body: dict[str, Any], truth: np.ndarray, leave_after: float | None
    ) -> None:
        try:
            async with asyncio.timeout(leave_after):
                answer = await self._http.post("/v1/audio/speech", json=body)
        except TimeoutError:
            return
        if answer.status_code == 429 and "retry-after" in answer.headers:
            self._outcome.kinds["refused for now"] += 1
        elif answer.status_code != 200:
            self._outcome.wrong.append(f"{body}: {answer.status_code} {answer.text[:200]}")
        elif leave_after is None:
            heard = np.frombuffer(answer.content, "<i2").astype(int)
            if len(heard) != len(truth) or np.abs(heard - truth).max() > 2:
                self._outcome.wrong.append(f"{body}: other samples than offline")


async def fire(
    url: str, truth: dict[tuple[str, str, int], np.ndarray], count: int, clients: int
) -> Outcome:
    """All requests, so many at a time."""
    outcome = Outcome()
    numbers = iter(range(count))
    with progress(total=count, label="soak", unit="request") as bar:

        async def work() -> None:
            async with httpx.AsyncClient(base_url=url, timeout=300) as http:
                client = Client(http, truth, outcome)
                for number in numbers:
                    await client.one(number)
                    bar.update()

        await asyncio.gather(*(work() for _ in range(clients)))
    return outcome


async def kill_one(
    url: str, truth: dict[tuple[str, str, int], np.ndarray], clients: int
) -> dict[str, Any]:
    """SIGKILL to the AR replica in the middle of everything."""
    outcomes: list[tuple[float, bool]] = []
    keys = list(truth)
    stop = time.perf_counter() + 40

    async def work(number: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=300) as http:
            while time.perf_counter() < stop:
                text, voice, seed = keys[number % len(keys)]
                body = {"input": text, "voice": voice, "seed": seed, "response_format": "pcm"}
                try:
                    good = (await http.post("/v1/audio/speech", json=body)).status_code == 200
                except httpx.HTTPError:
                    good = False
                outcomes.append((time.perf_counter(), good))
                number += clients
                if not good:
                    await asyncio.sleep(0.2)  # as a client that retries would

    running = [asyncio.create_task(work(number)) for number in range(clients)]
    await asyncio.sleep(8)
    killed = time.perf_counter()
    [process] = replicas("AR")
    os.kill(process.pid, signal.SIGKILL)
    await asyncio.gather(*running)
    after = [moment for moment, good in outcomes if good and moment > killed + 0.5]
    return {
        "before_the_kill": sum(good for moment, good in outcomes if moment <= killed),
        "failed": sum(not good for _, good in outcomes),
        "seconds_until_one_succeeds": round(min(after) - killed, 1) if after else None,
        "succeeded_afterwards": len(after),
    }


def replicas(deployment: str = "") -> list[psutil.Process]:
    """Processes of this machine's replicas, or of those of one deployment."""
    start = "ray::ServeReplica:valle:" + deployment
    return [p for p in psutil.process_iter() if _name(p).startswith(start)]


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended meanwhile
        return ""


def memory() -> dict[str, float]:
    """MB of each replica."""
    return {
        f"{_name(p).split()[0]} {p.pid}": round(p.memory_info().rss / 1e6, 1) for p in replicas()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=registry.CHAMPION, help="registry URI or bundle folder")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--port", type=int, default=8100)
    arguments = parser.parse_args(argv)
    model = registry.pin(registry.absolute(arguments.model))
    voices = str(settings.read().home / "data" / "voices")
    make_starter_voices(voices)
    texts = [" ".join(item.text.split()[:WORDS]) for item in load_items("quick")][:8]
    truth = expected(model, voices, texts)
    url = f"http://127.0.0.1:{arguments.port}"
    with connect():
        serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
        args = AppArgs(model=model, voices=voices, max_replicas=1)
        serve.run(build_app(args), name="valle")
        asyncio.run(fire(url, truth, 200, arguments.clients))  # caches fill up first
        before, started = memory(), time.perf_counter()
        outcome = asyncio.run(fire(url, truth, arguments.requests, arguments.clients))
        seconds = time.perf_counter() - started
        after = memory()
        killed = asyncio.run(kill_one(url, truth, arguments.clients))
        serve.shutdown()
    report = {
        "requests": arguments.requests, "minutes": round(seconds / 60, 1),
        "kinds": dict(outcome.kinds), "wrong": len(outcome.wrong), "first_wrong": outcome.wrong[:5],
        "megabytes_before": before, "megabytes_after": after, "replica_killed": killed,
    }  # fmt: skip
    print(json.dumps(report, indent=2))
    if outcome.wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
