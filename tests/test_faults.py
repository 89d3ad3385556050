"""The endpoint under faults: overload, slow and leaving clients, bad files, killed replicas.

Replicas are killed while clients speak: every response is then complete and the same as without.
"""

import asyncio
import base64
import io
import json
import math
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from http.client import HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import soundfile
from helpers import clusters
from ray import serve

from valle.jobs.bench.replicas import replica_processes
from valle.platform import audio
from valle.serve.engine.request import Request

LONG = {"input": "And on it goes. " * 120, "voice": "ann", "response_format": "pcm", "seed": 0}
"""Two minutes of speech: more than the sockets' buffers hold."""

pytestmark = [
    pytest.mark.ray,
    pytest.mark.parametrize("eos_bias", [-1e9], ids=["never stops"]),
]


def speaks(endpoint: str) -> bool:
    try:
        body = {"input": "hello", "voice": "ann", "response_format": "pcm"}
        response = httpx.post(f"{endpoint}/v1/audio/speech", json=body, timeout=60)
    except httpx.HTTPError:
        return False
    return response.status_code == 200 and len(response.content) > 0


def connect(endpoint: str, head: str) -> socket.socket:
    address = urlsplit(endpoint)
    connection = socket.create_connection((address.hostname, address.port), timeout=60)
    connection.sendall(head.replace("\n", "\r\n").encode())
    return connection


def check_a_client_that_leaves_before_the_first_audio(endpoint: str) -> None:
    body = json.dumps(LONG)
    head = "POST /v1/audio/speech HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"
    seconds = clusters.audio_seconds(endpoint)
    with connect(endpoint, f"{head}Content-Length: {len(body)}\n\n{body}"):
        clusters.wait_for(clusters.slot_demand, 20, "the first sentence")
    clusters.wait_for(clusters.endpoint_idle, 60, "the slot")
    # 120 sentences of a second; what was synthesized of them counts when the response ends
    assert clusters.audio_seconds(endpoint) - seconds < 60


def check_a_gigabyte_is_refused_unread(endpoint: str, route: str) -> None:
    """By its declared length, before much of it has been sent."""
    size, sent = 2**30, 0
    head = f"POST {route} HTTP/1.1\nHost: localhost\nContent-Length: {size}\n"
    with connect(endpoint, f"{head}Content-Type: multipart/form-data; boundary=x\n\n") as client:
        while sent < size:
            readable, writable, _ = select.select([client], [client], [], 30)
            if readable or not writable:
                break
            sent += client.send(bytes(2**16))
        response = HTTPResponse(client)
        response.begin()
        content = json.loads(response.read())
    assert (response.status, content["error"]["code"]) == (413, "request_too_large")
    assert sent < size / 8


def peak_memory(pid: int) -> int:
    """Peak resident memory of a process since `reset_peak_memory`, in bytes."""
    [line] = [x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) * 1024


def reset_peak_memory(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def check_decompression_bombs(endpoint: str) -> None:
    """Small audio files that would take a lot of memory when decoded."""
    written = io.BytesIO()
    with soundfile.SoundFile(written, "w", 8_000, 1, "PCM_16", format="FLAC") as file:
        for _ in range(180):
            file.write(np.zeros(60 * 8_000, np.float32))
    hours = written.getvalue()  # three hours of silence
    unknown = bytearray(hours)
    unknown[21] &= 0xF0  # FLAC's header then says that the length is unknown
    unknown[22:26] = bytes(4)
    wav = bytearray(audio.wav_bytes(np.zeros(24_000, np.float32)))
    wav[40:44] = b"\xf0\xff\xff\xff"  # a header that states four gigabytes
    running = [process.pid for process in replica_processes()]
    for pid in running:
        reset_peak_memory(pid)
    before = {pid: peak_memory(pid) for pid in running}
    statuses = []
    for data in (hours, bytes(unknown), bytes(wav), b"fLaC" + bytes(1000), b"OggS" * 99):
        assert len(data) < 700_000
        body = {"input": "hello", "ref_audio": base64.b64encode(data).decode()}
        response = httpx.post(f"{endpoint}/v1/audio/speech", json=body, timeout=30)
        statuses.append(response.status_code)
        if response.status_code != 200:
            assert response.json()["error"]["param"] == "ref_audio"
    assert (statuses[0], *statuses[3:]) == (400, 400, 400)
    # a file with a false header may be refused, or read up to the limit
    assert set(statuses) <= {200, 400}
    # three hours are 345 MB of samples
    assert max(peak_memory(pid) - before[pid] for pid in running) < 100e6


def check_a_slow_reader_blocks_no_other_request(endpoint: str, reference: bytes) -> None:
    """It gets the same response as a fast one."""
    with httpx.stream("POST", f"{endpoint}/v1/audio/speech", json=LONG, timeout=60) as response:
        assert response.status_code == 200
        chunks = response.iter_raw()
        data = next(chunks)
        clusters.wait_for(
            clusters.endpoint_idle, 120, "the end of the synthesis, while the client does not read"
        )
        assert speaks(endpoint)
        data += b"".join(chunks)
    samples, expected = np.frombuffer(data, "<i2"), np.frombuffer(reference, "<i2")
    assert len(samples) == len(expected)
    assert np.abs(samples.astype(int) - expected).max() <= 2  # batched with other neighbours


def check_overload(endpoint: str) -> None:
    """Requests beyond slots and queue are refused with 429; all others are served."""

    async def send_requests() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=300, limits=limits) as client:
            body = LONG | {"input": "And on it goes. " * 2}
            calls = [client.post(f"{endpoint}/v1/audio/speech", json=body) for _ in range(250)]
            return await asyncio.gather(*calls)

    responses = asyncio.run(send_requests())
    served = [response for response in responses if response.status_code == 200]
    refused = [response for response in responses if response.status_code == 429]
    assert len(served) + len(refused) == len(responses)
    assert len(served) >= 64 and refused
    assert {len(response.content) for response in served} == {len(served[0].content)}
    for response in refused:
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "rate_limit_error"
    assert speaks(endpoint)


TEXT = "And on it goes. So we walked. The train was late."
KINDS = [
    {"input": TEXT},
    {"input": TEXT, "chunked": True},
    {"input": "The train was late.", "chunked": True},
    {"input": "The train was late."},
]
"""Responses whose AR calls are streams and plain calls, in one sentence and in several."""


@dataclass
class Outage:
    """What clients see of a replica that is killed."""

    lost: list[str] = field(default_factory=list)
    """Responses that were refused, broken or others than without the fault."""
    n_complete: int = 0
    seconds_to_success: float = math.inf
    """From the kill to the end of the first complete response that was asked for after it."""


def same_speech(data: bytes, expected: bytes) -> bool:
    """Equal but for rounding: batches have other neighbours."""
    samples, others = np.frombuffer(data, "<i2").astype(int), np.frombuffer(expected, "<i2")
    return len(samples) == len(others) and np.abs(samples - others).max() <= 2


async def kill_under_load(endpoint: str, deployment: str, n_clients: int = 8) -> Outage:
    """Clients speak one request after the other; meanwhile the deployment's replica is killed, and
    the clients go on until each has had two responses after that."""
    url = f"{endpoint}/v1/audio/speech"
    outage = Outage()
    killed_at = math.inf

    async with httpx.AsyncClient(timeout=300) as http:

        async def speak(kind: dict[str, object]) -> bytes:
            body = {"voice": "ann", "response_format": "pcm", "seed": 3} | kind
            response = await http.post(url, json=body)
            assert response.status_code == 200, response.text
            return response.content

        expected = [await speak(kind) for kind in KINDS]

        async def client(number: int) -> None:
            n_after = 0
            while n_after < 2:
                kind, started = number % len(KINDS), time.monotonic()
                try:
                    data = await speak(KINDS[kind])
                    if not same_speech(data, expected[kind]):
                        outage.lost.append(f"{KINDS[kind]}: other speech, {len(data)} bytes")
                except (httpx.HTTPError, AssertionError) as error:
                    outage.lost.append(f"{KINDS[kind]}: {error!r}")
                else:
                    outage.n_complete += 1
                    if started > killed_at:
                        now = time.monotonic()
                        outage.seconds_to_success = min(outage.seconds_to_success, now - killed_at)
                n_after += started > killed_at
                number += 1

        [process] = replica_processes(deployment)  # slow: nothing may be in flight after it
        clients = [asyncio.create_task(client(number)) for number in range(n_clients)]
        while outage.n_complete < n_clients:
            await asyncio.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        killed_at = time.monotonic()
        await asyncio.gather(*clients)
    return outage


def check_an_engine_survives_a_bad_request(endpoint: str) -> None:
    """One that has passed by the checks of the HTTP layer and of its own type."""
    [process] = replica_processes("AR")
    prompt = np.zeros((8, 225), np.int16)
    bad_request = Request(id="x", phonemes=[5], prompt=prompt, max_frames=9)
    object.__setattr__(bad_request, "seed", "no number")
    ar = serve.get_deployment_handle("AR", "valle")
    with pytest.raises(ValueError, match="seed: 'no number' is not an integer"):
        ar.generate.remote("models:/valle/1", bad_request).result(timeout_s=30)
    assert speaks(endpoint)
    assert [running.pid for running in replica_processes("AR")] == [process.pid]


def test_endpoint_survives_its_clients(endpoint: str) -> None:
    reference = httpx.post(f"{endpoint}/v1/audio/speech", json=LONG, timeout=300)
    assert reference.status_code == 200
    check_a_client_that_leaves_before_the_first_audio(endpoint)
    for route in ("/v1/audio/speech", "/v1/audio/voices"):
        check_a_gigabyte_is_refused_unread(endpoint, route)
    check_decompression_bombs(endpoint)
    check_a_slow_reader_blocks_no_other_request(endpoint, reference.content)
    check_overload(endpoint)


def test_endpoint_loses_no_request_to_killed_replicas(
    endpoint: str, record_testsuite_property: Callable[[str, object], None]
) -> None:
    check_an_engine_survives_a_bad_request(endpoint)
    for deployment in ("NAR", "Codec", "AR"):
        outage = asyncio.run(kill_under_load(endpoint, deployment))
        record_testsuite_property(deployment, asdict(outage))
        assert not outage.lost, f"{deployment} was killed"
        assert outage.n_complete >= 12 and outage.seconds_to_success < math.inf


@pytest.mark.faults
def test_endpoint_loses_no_request_to_killed_replicas_again_and_again(
    endpoint: str, record_testsuite_property: Callable[[str, object], None]
) -> None:
    for turn in range(8):
        for deployment in ("AR", "NAR", "Codec"):
            outage = asyncio.run(kill_under_load(endpoint, deployment, n_clients=16))
            record_testsuite_property(f"{deployment} {turn}", asdict(outage))
            assert not outage.lost, f"{deployment} was killed, turn {turn}"
