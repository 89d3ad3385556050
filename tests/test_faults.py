"""What clients and machines do to an endpoint: floods, silence, bombs, killed replicas."""

import asyncio
import base64
import io
import json
import os
import signal
import socket
import time
from urllib.parse import urlsplit

import clusters
import httpx
import numpy as np
import pytest
import soundfile
from ray import serve

from valle.jobs.soak import replicas
from valle.platform import audio
from valle.serve.request import Request

LONG = "And on it goes. " * 40
SAY = {"voice": "ann", "response_format": "pcm"}


def busy() -> bool:
    """Whether the AR model speaks."""
    ar = serve.get_deployment_handle("AR", "valle")
    stats = ar.record_autoscaling_stats.remote().result(timeout_s=10)
    return bool(stats["slots_wanted"])


def idle() -> bool:
    """For a second on end: between two sentences the AR model is idle too."""
    return not any(time.sleep(0.05) or busy() for _ in range(20))


def speaks(endpoint: str) -> bool:
    try:
        ask = {"input": "hello", **SAY}
        answer = httpx.post(f"{endpoint}/v1/audio/speech", json=ask, timeout=60)
    except httpx.HTTPError:
        return False
    return answer.status_code == 200 and len(answer.content) > 0


def check_gone_before_the_first_sound(endpoint: str) -> None:
    address = urlsplit(endpoint)
    body = json.dumps({"input": LONG, **SAY}).encode()
    head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        clusters.wait_for(busy, 10, "the sentence")
    clusters.wait_for(idle, 15, "the slot")


def check_a_gigabyte_is_refused_unread(endpoint: str, route: str) -> None:
    """By its announced length; the connection ends before much of it has been sent."""
    address = urlsplit(endpoint)
    size = 2**30
    head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n"
    head += "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    sent, answer = 0, b""
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall(head.encode())
        connection.setblocking(False)
        while sent < size and not answer:
            try:
                sent += connection.send(bytes(2**20))
            except BlockingIOError:
                time.sleep(0.01)
            except ConnectionError:
                break
            try:
                answer = connection.recv(65_536)
            except BlockingIOError:
                continue
            except ConnectionError:
                break
    assert answer.startswith(b"HTTP/1.1 413 ") and b"request_too_large" in answer
    assert sent < size / 8


def check_bombs(endpoint: str) -> None:
    """Sound files that are small, and would not be once decoded."""
    hours = io.BytesIO()
    with soundfile.SoundFile(hours, "w", 8_000, 1, "PCM_16", format="FLAC") as file:
        for _ in range(180):
            file.write(np.zeros(60 * 8_000, np.float32))  # three hours of silence
    wav = bytearray(audio.wav_bytes(np.zeros(24_000, np.float32)))
    wav[40:44] = b"\xf0\xff\xff\xff"  # a header that announces four gigabytes
    huge = bytearray(hours.getvalue())
    huge[21:26] = b"\x00" * 5  # a header that does not say how long it is
    before = {p.pid: p.memory_info().rss for p in replicas()}
    for data in (hours.getvalue(), bytes(wav), bytes(huge), b"fLaC" + bytes(1000), b"OggS" * 99):
        assert len(data) < 700_000
        ask = {"input": "hello", "ref_audio": base64.b64encode(data).decode()}
        answer = httpx.post(f"{endpoint}/v1/audio/speech", json=ask, timeout=30)
        if answer.status_code == 200:
            assert data == bytes(wav)  # libsndfile goes by what is there: one second of silence
            continue
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "ref_audio")
    for process in replicas():
        assert process.memory_info().rss - before[process.pid] < 200e6


def check_a_slow_reader_holds_nobody_up(endpoint: str) -> None:
    """It gets the same answer as a fast one, which others need not wait for."""
    ask = {"input": "And on it goes. " * 8, **SAY}
    whole = httpx.post(f"{endpoint}/v1/audio/speech", json=ask, timeout=120)
    with httpx.stream("POST", f"{endpoint}/v1/audio/speech", json=ask, timeout=60) as answer:
        chunks = answer.iter_raw()
        data = next(chunks)
        clusters.wait_for(idle, 60, "all of it to be made, while nobody reads")
        assert speaks(endpoint)
        data += b"".join(chunks)
    assert data == whole.content


def check_overload(endpoint: str) -> None:
    """Who does not fit is told to come again, at once; who is let in is served."""

    async def fire() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=300, limits=httpx.Limits()) as client:
            ask = {"input": "And on it goes.", **SAY}
            calls = [client.post(f"{endpoint}/v1/audio/speech", json=ask) for _ in range(150)]
            return await asyncio.gather(*calls)

    answers = asyncio.run(fire())
    counts = {status: 0 for status in (200, 429)}
    for answer in answers:
        counts[answer.status_code] += 1
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
        else:
            assert answer.content == next(a for a in answers if a.status_code == 200).content
    assert counts[200] >= 64 and counts[429] >= 1
    assert speaks(endpoint)


def stream_until_it_breaks(endpoint: str) -> list[dict]:
    ask = {"input": LONG, "stream_format": "sse", **SAY}
    with httpx.stream("POST", f"{endpoint}/v1/audio/speech", json=ask, timeout=120) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def check_the_engine_breaks(endpoint: str) -> None:
    """A request that no border lets in, straight to the engine: Serve replaces the replica."""
    prompt = np.zeros((8, 225), np.int16)
    poison = Request(id="x", phonemes=[5], prompt=prompt, max_frames=9, seed="no number")
    ar = serve.get_deployment_handle("AR", "valle")
    with pytest.raises(Exception, match="the engine has stopped"):
        ar.generate.remote("models:/valle/1", poison).result(timeout_s=30)
    clusters.wait_for(lambda: speaks(endpoint), 60, "another replica")


async def check_a_killed_replica(endpoint: str) -> None:
    """Streams of the replica say that they broke; those that come later are answered."""
    streams = [asyncio.to_thread(stream_until_it_breaks, endpoint) for _ in range(3)]
    running = [asyncio.create_task(stream) for stream in streams]
    await asyncio.sleep(2)
    [process] = replicas("AR")
    os.kill(process.pid, signal.SIGKILL)
    for events in await asyncio.gather(*running):
        assert events[0]["type"] == "speech.audio.delta"
        assert events[-1] == {
            "type": "error",
            "error": {
                "message": "the server failed", "type": "server_error",
                "param": None, "code": None,
            },
        }  # fmt: skip
    clusters.wait_for(lambda: speaks(endpoint), 60, "another replica")


@pytest.mark.ray
@pytest.mark.parametrize("eos_bias", [-1e9], ids=["never stops"])
def test_what_clients_do(endpoint: str) -> None:
    assert speaks(endpoint)
    check_gone_before_the_first_sound(endpoint)
    for route in ("/v1/audio/speech", "/v1/audio/voices"):
        check_a_gigabyte_is_refused_unread(endpoint, route)
    check_bombs(endpoint)
    check_a_slow_reader_holds_nobody_up(endpoint)
    check_overload(endpoint)


@pytest.mark.ray
@pytest.mark.parametrize("eos_bias", [-1e9], ids=["never stops"])
def test_what_machines_do(endpoint: str) -> None:
    assert speaks(endpoint)
    asyncio.run(check_a_killed_replica(endpoint))
    check_the_engine_breaks(endpoint)
