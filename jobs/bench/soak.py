"""Soak test: thousands of requests, bursts and a killed replica, with every answer checked.

    python -m valle.jobs.bench.soak --requests 10000

Requests are valid, cancelled by the client, or invalid. A valid one must be answered with the audio
that the engine makes offline of the same text, voice and seed; an invalid one with its status; in a
burst beyond capacity some must be served and some refused with 429 and `Retry-After`. The memory of
every replica is sampled before each burst and at the end. Then an AR replica is killed under load:
how many requests fail, and how long until one succeeds again.

The exit status is 1 after a wrong answer, or when nothing succeeds after the kill.
"""

import argparse
import asyncio
import base64
import io
import itertools
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

from valle.jobs.bench.clients import SPEECH_ROUTE
from valle.jobs.bench.command_line import build_parser, endpoint_args, print_report
from valle.jobs.bench.offline import encode_voice, english_request, load_offline
from valle.jobs.bench.replicas import replica_memory, replica_processes
from valle.jobs.evaluation.items import load_items
from valle.platform import audio, storage
from valle.platform.cluster import connect
from valle.platform.progress import progress_bar
from valle.serve.deployments.handles import AR
from valle.serve.run import endpoint
from valle.serve.web.audio_formats import encode_audio

ReferenceAudio = dict[tuple[str, str, int], np.ndarray]
"""Samples by text, voice and seed."""

InvalidRequests = dict[str, tuple[int, dict[str, Any]]]
"""By what is wrong with a request, the status that it must be answered with, and its body."""

VOICES = ("joe", "heart")
SEEDS = range(3)
N_TEXTS, WORDS_PER_TEXT = 8, 5
"""Short texts: the number of requests counts here, not their length."""

BURST = 150
"""Concurrent requests of a burst: more than slots and queue hold."""

BURST_EVERY = 500
"""Requests between two bursts."""

BUSY_CPU_SHARE = 0.3
"""Share of a core above which the AR replica counts as decoding."""


def invalid_requests() -> InvalidRequests:
    """Requests that the endpoint must refuse."""
    hours = io.BytesIO()
    with soundfile.SoundFile(hours, "w", 8_000, 1, "PCM_16", format="FLAC") as file:
        for _ in range(180):
            file.write(np.zeros(60 * 8_000, np.float32))
    recordings = {
        "not audio": b"RIFF....",
        "not flac": b"fLaC" + bytes(1000),
        "three hours, packed": hours.getvalue(),
        "too short": audio.wav_bytes(np.full(2_400, 0.1, np.float32)),
    }
    requests: InvalidRequests = {
        "no such voice": (404, {"input": "hello", "voice": "nobody"}),
        "no text": (400, {"input": "", "voice": "joe"}),
        "unknown field": (400, {"input": "hello", "voice": "joe", "volume": 11}),
        "not base64": (400, {"input": "hello", "ref_audio": "%%%"}),
        "no such language": (400, {"input": "One. Two.", "voice": "joe", "language": "xx"}),
    }
    for name, data in recordings.items():
        requests[name] = (400, {"input": "hello", "ref_audio": base64.b64encode(data).decode()})
    return requests


@dataclass
class SoakResult:
    """Counts and failures of a soak, filled in by its clients."""

    counts: Counter[str] = field(default_factory=Counter)
    """Requests by kind, and refusals."""
    failures: list[str] = field(default_factory=list)
    """A line for every wrong answer."""
    memory: list[dict[str, float]] = field(default_factory=list)
    """Samples of the megabytes of each replica."""


def reference_audio(model: str, voices: str, texts: Sequence[str]) -> ReferenceAudio:
    """Samples of every text, voice and seed, by the engine without Serve."""
    offline = load_offline(model, slots=8)
    keys, requests = [], []
    for voice in VOICES:
        prompt = encode_voice(offline, storage.read_bytes(storage.join(voices, f"{voice}.wav")))
        for text, seed in itertools.product(texts, SEEDS):
            keys.append((text, voice, seed))
            requests.append(english_request(str(len(keys)), text, prompt, seed, offline.max_frames))
    reference = {}
    for key, result in zip(keys, offline.synthesize(requests), strict=True):
        if isinstance(result, ValueError):
            raise result
        reference[key] = np.frombuffer(encode_audio(result.wave, "pcm"), "<i2").astype(int)
    return reference


class Client:
    """Sends requests of every kind and checks the answers."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        reference: ReferenceAudio,
        invalid: InvalidRequests,
        result: SoakResult,
    ) -> None:
        self._http, self._reference, self._invalid, self._result = http, reference, invalid, result

    async def send_one(self, number: int) -> None:
        """Sends one request, whose number determines its kind and content."""
        chance = random.Random(number)
        kind = chance.choices(["valid", "cancelled", "invalid", "malformed"], [75, 12, 12, 1])[0]
        self._result.counts[kind] += 1
        if kind == "invalid":
            name, (status, body) = chance.choice(list(self._invalid.items()))
            response = await self._http.post(SPEECH_ROUTE, json=body)
            if response.status_code != status or "error" not in response.json():
                self._result.failures.append(
                    f"{name}: {response.status_code} {response.text[:200]}"
                )
        elif kind == "malformed":
            response = await self._http.post(SPEECH_ROUTE, content=b"{")
            if response.status_code != 400:
                self._result.failures.append(f"malformed: {response.status_code}")
        else:
            leave_after = chance.random() * 0.5 if kind == "cancelled" else None
            retry_after = await self._send_valid(chance.choice(list(self._reference)), leave_after)
            await asyncio.sleep(retry_after)

    async def send_burst(self, number: int) -> None:
        """Sends more requests at once than fit; some must be served, some refused."""
        self._result.counts["in a burst"] += BURST
        keys = random.Random(number).choices(list(self._reference), k=BURST)
        waits = await asyncio.gather(*(self._send_valid(key) for key in keys))
        refused = sum(retry_after > 0 for retry_after in waits)
        self._result.counts["refused in a burst"] += refused
        if not 0 < refused < BURST:
            self._result.failures.append(f"a burst of {BURST}, of which {refused} were refused")

    async def _send_valid(
        self, key: tuple[str, str, int], leave_after: float | None = None
    ) -> float:
        """Sends a valid request; returns its `Retry-After` in seconds, 0 if it was not refused.

        With `leave_after` the client disconnects after so many seconds, and audio is not compared.
        """
        text, voice, seed = key
        expected = self._reference[key]
        body = {
            "input": text,
            "voice": voice,
            "seed": seed,
            "response_format": "pcm",
            "chunked": leave_after is not None,
        }
        try:
            async with asyncio.timeout(leave_after):
                response = await self._http.post(SPEECH_ROUTE, json=body)
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
    """Sends `count` requests from concurrent clients, and a burst in the middle of every
    `BURST_EVERY` of them; stops early after `minutes`."""
    result, end = SoakResult(), time.perf_counter() + 60 * minutes
    # one iterator for all clients: each takes the next number
    numbers = itertools.takewhile(lambda _: time.perf_counter() < end, range(count))
    limits = httpx.Limits(max_connections=None)
    with progress_bar(total=count, label="bench.soak", unit="request") as bar:

        async def run_client() -> None:
            async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
                client = Client(http, reference, invalid, result)
                for number in numbers:
                    if number % BURST_EVERY == BURST_EVERY // 2:
                        result.memory.append(replica_memory())
                        await client.send_burst(number)
                    await client.send_one(number)
                    bar.update()

        await asyncio.gather(*(run_client() for _ in range(clients)))
    return result


async def _cpu_share(process: psutil.Process, seconds: float = 0.1) -> float:
    """Share of one core that a process uses during the next `seconds`."""
    before = process.cpu_times()
    await asyncio.sleep(seconds)
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / seconds


async def kill_replica(
    url: str,
    reference: ReferenceAudio,
    clients: int,
    *,
    before: float = 8.0,
    after: float = 32.0,
    enough: int | None = None,
) -> dict[str, Any]:
    """Sends SIGKILL to the AR replica while it decodes, under the load of concurrent clients.

    They run for `before` seconds ahead of the kill and `after` seconds past it, or, with `enough`,
    until so many of the requests begun after the kill have succeeded. Raises RuntimeError when the
    replica is never busy.
    """
    attempts: list[tuple[float, float, bool]] = []  # started, ended, succeeded
    keys = list(reference)
    stop = time.perf_counter() + before + after
    killed = float("inf")

    def recoveries() -> list[float]:
        # a request begun before the kill may have left the AR model: it needs no new replica
        return [ended for started, ended, succeeded in attempts if succeeded and started > killed]

    async def run_client(number: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=300) as http:
            while time.perf_counter() < stop and (enough is None or len(recoveries()) < enough):
                text, voice, seed = keys[number % len(keys)]
                body = {"input": text, "voice": voice, "seed": seed, "response_format": "pcm"}
                started = time.perf_counter()
                try:
                    succeeded = (await http.post(SPEECH_ROUTE, json=body)).status_code == 200
                except httpx.HTTPError:
                    succeeded = False
                attempts.append((started, time.perf_counter(), succeeded))
                number += clients
                if not succeeded:
                    await asyncio.sleep(0.2)  # as a client that retries would

    running = [asyncio.create_task(run_client(number)) for number in range(clients)]
    await asyncio.sleep(before)
    process = replica_processes(AR)[0]  # there is one: `max_replicas`
    while (share := await _cpu_share(process)) < BUSY_CPU_SHARE:
        if time.perf_counter() > stop - after / 2:
            raise RuntimeError("the AR replica was never busy: there was nothing to interrupt")
    killed = time.perf_counter()
    os.kill(process.pid, signal.SIGKILL)
    await asyncio.gather(*running)
    recovered = recoveries()
    return {
        "succeeded_before": sum(ok for _, ended, ok in attempts if ended <= killed),
        "cpu_share_at_kill": round(share, 2),
        "failed": sum(not ok for _, _, ok in attempts),
        "recovery_seconds": round(min(recovered) - killed, 1) if recovered else None,
        "succeeded_after": len(recovered),
    }


def summary(result: SoakResult, seconds: float) -> dict[str, Any]:
    """The report of a soak: counts, the first failures, and memory by replica over time."""
    names = dict.fromkeys(name for sample in result.memory for name in sample)
    return {
        "minutes": round(seconds / 60, 1),
        "counts": dict(result.counts),
        "failures": len(result.failures),
        "first_failures": result.failures[:20],
        "megabytes": {name: [sample.get(name) for sample in result.memory] for name in names},
    }


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__, serves=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument(
        "--warm-up", type=int, default=200, help="requests before memory is sampled (%(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="limit of the soak")
    parser.add_argument("--clients", type=int, default=12)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the soak and prints its reports."""
    arguments = parse_arguments(argv)
    args = endpoint_args(arguments.model, max_replicas=1)
    items = load_items("quick")[:N_TEXTS]
    texts = [" ".join(item.text.split()[:WORDS_PER_TEXT]) for item in items]
    reference, invalid = reference_audio(args.model, args.voices, texts), invalid_requests()
    with connect(), endpoint(args, arguments.port) as url:
        # caches fill up first, so that what grows afterwards is a leak
        asyncio.run(run_soak(url, reference, invalid, arguments.warm_up, arguments.clients))
        started = time.perf_counter()
        soak = run_soak(
            url, reference, invalid, arguments.requests, arguments.clients, arguments.minutes
        )
        result = asyncio.run(soak)
        result.memory.append(replica_memory())
        print_report(summary(result, time.perf_counter() - started))
        recovery = asyncio.run(kill_replica(url, reference, arguments.clients))
    print_report({"replica_killed": recovery})
    if result.failures or not recovery["succeeded_after"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
