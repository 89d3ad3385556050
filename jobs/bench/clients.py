"""HTTP clients of an endpoint under load, and what they measure."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
from pydantic import BaseModel

from valle.jobs.bench.replicas import serve_cpu_seconds
from valle.model.tokens import SAMPLE_RATE

SPEECH_ROUTE = "/v1/audio/speech"

BYTES_PER_SECOND = 2 * SAMPLE_RATE
"""Of speech as 16-bit samples."""


class SpeechBody(BaseModel):
    """Body of a speech request: the fields that the benchmarks send."""

    input: str
    seed: int = 0
    voice: str = ""
    chunked: bool = False
    response_format: str = "pcm"


@dataclass
class LoadResult:
    """Measurements of one load: a variant, a number of clients, a round."""

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    """CPU time of all replicas and proxies."""
    first_audio_seconds: list[float] = field(default_factory=list)
    """From sending a request to its first byte of audio; one value a request."""
    real_time_factors: list[float] = field(default_factory=list)
    """Seconds of a request by seconds of its speech; one value a request."""
    speech_seconds: float = 0.0
    in_time: list[bool] = field(default_factory=list)
    """For every chunk after the first: it arrived before playback needed it."""

    @property
    def speech_per_second(self) -> float:
        """Seconds of speech generated per second, all clients together."""
        return self.speech_seconds / self.wall_seconds


async def send_request(
    http: httpx.AsyncClient, url: str, body: SpeechBody, result: LoadResult
) -> None:
    """Sends one request and reads its stream; raises HTTPStatusError for an error status.

    Playback starts with the first chunk: a later chunk is in time if it arrives before everything
    received ahead of it has been played.
    """
    started = time.perf_counter()
    first, received = 0.0, 0
    async with http.stream("POST", url, json=body.model_dump()) as response:
        response.raise_for_status()
        async for chunk in response.aiter_raw():
            now = time.perf_counter()
            if not received:
                first = now
                result.first_audio_seconds.append(now - started)
            else:
                result.in_time.append(now - first <= received / BYTES_PER_SECOND)
            received += len(chunk)
    seconds = received / BYTES_PER_SECOND
    result.speech_seconds += seconds
    result.real_time_factors.append((time.perf_counter() - started) / seconds)


async def run_load(url: str, bodies: Sequence[SpeechBody], clients: int) -> LoadResult:
    """Sends all requests from `clients` concurrent clients, each of which sends its next request
    when the previous one is answered."""
    result, waiting = LoadResult(), list(reversed(bodies))
    cpu, started = serve_cpu_seconds(), time.perf_counter()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(timeout=300, limits=limits) as http:

        async def run_client() -> None:
            while waiting:
                await send_request(http, url, waiting.pop(), result)

        await asyncio.gather(*(run_client() for _ in range(clients)))
    result.wall_seconds = time.perf_counter() - started
    result.cpu_seconds = serve_cpu_seconds() - cpu
    return result


async def run_load_for(
    seconds: float, url: str, sentences: Sequence[str], clients: int, voice: str
) -> LoadResult:
    """As `run_load`, with sentences in rotation until `seconds` have passed."""
    result, end = LoadResult(), time.perf_counter() + seconds

    async def run_client(number: int) -> None:
        async with httpx.AsyncClient(timeout=300) as http:
            while time.perf_counter() < end:
                body = SpeechBody(input=sentences[number % len(sentences)], voice=voice)
                await send_request(http, url, body, result)
                number += clients

    await asyncio.gather(*(run_client(number) for number in range(clients)))
    return result
