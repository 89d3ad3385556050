"""What clients and machines do to an endpoint: floods, silence, bombs, killed replicas."""

import asyncio
import base64
import io
import json
import os
import select
import signal
import socket
import time
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

LONG = {"input": "And on it goes. " * 120, "voice": "ann", "response_format": "pcm"}
"""Two minutes in pieces, more than sockets hold."""

pytestmark = [
    pytest.mark.ray,
    pytest.mark.parametrize("eos_bias", [-1e9], ids=["never stops"]),
]


def speaks(endpoint: str) -> bool:
    try:
        body = {"input": "hello", "voice": "ann", "response_format": "pcm"}
        answer = httpx.post(f"{endpoint}/v1/audio/speech", json=body, timeout=60)
    except httpx.HTTPError:
        return False
    return answer.status_code == 200 and len(answer.content) > 0


def connect(endpoint: str, head: str) -> socket.socket:
    address = urlsplit(endpoint)
    connection = socket.create_connection((address.hostname, address.port), timeout=60)
    connection.sendall(head.replace("\n", "\r\n").encode())
    return connection


def check_gone_before_the_first_sound(endpoint: str, to_the_end: float) -> None:
    body = json.dumps(LONG)
    head = "POST /v1/audio/speech HTTP/1.1\nHost: x\nContent-Type: application/json\n"
    started = time.monotonic()
    with connect(endpoint, f"{head}Content-Length: {len(body)}\n\n{body}"):
        clusters.wait_for(clusters.slot_demand, 20, "the first sentence")
    clusters.wait_for(clusters.endpoint_idle, 60, "the slot")
    assert time.monotonic() - started < to_the_end / 2


def check_a_gigabyte_is_refused_unread(endpoint: str, route: str) -> None:
    """By its announced length, and before much of it has been sent."""
    size, sent = 2**30, 0
    head = f"POST {route} HTTP/1.1\nHost: x\nContent-Length: {size}\n"
    with connect(endpoint, f"{head}Content-Type: multipart/form-data; boundary=x\n\n") as client:
        while sent < size:
            readable, writable, _ = select.select([client], [client], [], 30)
            if readable or not writable:
                break
            sent += client.send(bytes(2**16))
        answer = HTTPResponse(client)
        answer.begin()
        content = json.loads(answer.read())
    assert (answer.status, content["error"]["code"]) == (413, "request_too_large")
    assert sent < size / 8


def peak(pid: int) -> int:
    """Bytes of memory that a process has needed at most since `forget_peak`."""
    [line] = [x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) * 1024


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def check_bombs(endpoint: str) -> None:
    """Sound files that are small, and would not be once decoded."""
    written = io.BytesIO()
    with soundfile.SoundFile(written, "w", 8_000, 1, "PCM_16", format="FLAC") as file:
        for _ in range(180):
            file.write(np.zeros(60 * 8_000, np.float32))
    hours = written.getvalue()  # three, of silence
    unknown = bytearray(hours)
    unknown[21] &= 0xF0  # the length in FLAC's header, 36 bits: not known
    unknown[22:26] = bytes(4)
    wav = bytearray(audio.wav_bytes(np.zeros(24_000, np.float32)))
    wav[40:44] = b"\xf0\xff\xff\xff"  # a header that announces four gigabytes
    running = [process.pid for process in replica_processes()]
    for pid in running:
        forget_peak(pid)
    before = {pid: peak(pid) for pid in running}
    statuses = []
    for data in (hours, bytes(unknown), bytes(wav), b"fLaC" + bytes(1000), b"OggS" * 99):
        assert len(data) < 700_000
        body = {"input": "hello", "ref_audio": base64.b64encode(data).decode()}
        answer = httpx.post(f"{endpoint}/v1/audio/speech", json=body, timeout=30)
        statuses.append(answer.status_code)
        if answer.status_code != 200:
            assert answer.json()["error"]["param"] == "ref_audio"
    assert (statuses[0], *statuses[3:]) == (400, 400, 400)
    # what a false header stands before may be refused, or used as far as the limit
    assert set(statuses) <= {200, 400}
    # three hours would be 345 MB
    assert max(peak(pid) - before[pid] for pid in running) < 100e6


def check_a_slow_reader_holds_nobody_up(endpoint: str, reference: bytes) -> None:
    """It gets the same answer as a fast one, and others need not wait for it."""
    with httpx.stream("POST", f"{endpoint}/v1/audio/speech", json=LONG, timeout=60) as answer:
        assert answer.status_code == 200
        chunks = answer.iter_raw()
        data = next(chunks)
        clusters.wait_for(
            clusters.endpoint_idle, 120, "nothing to be made any more, while nobody reads"
        )
        assert speaks(endpoint)
        data += b"".join(chunks)
    samples, expected = np.frombuffer(data, "<i2"), np.frombuffer(reference, "<i2")
    assert len(samples) == len(expected)
    assert np.abs(samples.astype(int) - expected).max() <= 2  # batched with other neighbours


def check_overload(endpoint: str) -> None:
    """Who does not fit is told to come again, at once; who is let in is served."""

    async def fire() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=300, limits=limits) as client:
            body = LONG | {"input": "And on it goes. " * 4}
            calls = [client.post(f"{endpoint}/v1/audio/speech", json=body) for _ in range(250)]
            return await asyncio.gather(*calls)

    answers = asyncio.run(fire())
    served = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(served) + len(refused) == len(answers)
    assert len(served) >= 64 and refused
    assert {len(answer.content) for answer in served} == {len(served[0].content)}
    for answer in refused:
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
    slowest = max(answer.elapsed for answer in served)
    assert max(answer.elapsed for answer in refused) < slowest / 2
    assert speaks(endpoint)


async def check_a_killed_replica(endpoint: str) -> None:
    """Streams that it was speaking say that they broke; those that come later are answered."""
    open_streams = []

    async def listen() -> list[dict]:
        events = []
        body = LONG | {"stream_format": "sse"}
        async with (
            httpx.AsyncClient(timeout=300) as client,
            client.stream("POST", f"{endpoint}/v1/audio/speech", json=body) as answer,
        ):
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line:
                    events.append(json.loads(line.removeprefix("data: ")))
                    open_streams.append(events)
        return events

    running = [asyncio.create_task(listen()) for _ in range(3)]
    while len({id(events) for events in open_streams}) < 3:
        await asyncio.sleep(0.1)
    await asyncio.to_thread(clusters.wait_for, clusters.slot_demand, 20, "a stream at work")
    [process] = replica_processes("AR")
    os.kill(process.pid, signal.SIGKILL)
    last = [events[-1] for events in await asyncio.gather(*running)]
    broken = [event["error"] for event in last if event["type"] == "error"]
    assert broken and {event["type"] for event in last} <= {"error", "speech.audio.done"}
    assert {error["message"] for error in broken} == {"the server failed"}
    clusters.wait_for(lambda: speaks(endpoint), 60, "another replica")


def check_the_engine_breaks(endpoint: str) -> None:
    """A request that no border lets in, straight to the engine: Serve replaces the replica."""
    prompt = np.zeros((8, 225), np.int16)
    poison = Request(id="x", phonemes=[5], prompt=prompt, max_frames=9, seed="no number")
    ar = serve.get_deployment_handle("AR", "valle")
    with pytest.raises(Exception, match="the engine has stopped"):
        ar.generate.remote("models:/valle/1", poison).result(timeout_s=30)
    clusters.wait_for(lambda: speaks(endpoint), 60, "another replica")


def test_what_clients_do(endpoint: str) -> None:
    started = time.monotonic()
    reference = httpx.post(f"{endpoint}/v1/audio/speech", json=LONG, timeout=300)
    to_the_end = time.monotonic() - started
    assert reference.status_code == 200
    check_gone_before_the_first_sound(endpoint, to_the_end)
    for route in ("/v1/audio/speech", "/v1/audio/voices"):
        check_a_gigabyte_is_refused_unread(endpoint, route)
    check_bombs(endpoint)
    check_a_slow_reader_holds_nobody_up(endpoint, reference.content)
    check_overload(endpoint)


def test_what_machines_do(endpoint: str) -> None:
    assert speaks(endpoint)
    asyncio.run(check_a_killed_replica(endpoint))
    check_the_engine_breaks(endpoint)
