"""Deleting a voice deletes it everywhere; and requests while the voice store is away."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from helpers.deployments import FakeDeployments

from valle.model.chunks import Chunking
from valle.model.codec.interface import Wave
from valle.model.nar_decoding import NARRequest
from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio, storage
from valle.serve.app_args import AppArgs
from valle.serve.deployments.ar import ARDeployment
from valle.serve.deployments.nar import NARDeployment
from valle.serve.engine.request import Request
from valle.serve.web.api import create_api
from valle.serve.web.voices import PART_SECONDS

pytestmark = pytest.mark.anyio

VERSION = "models:/valle/1"
SPEECH, VOICES = "/v1/audio/speech", "/v1/audio/voices"


@pytest.fixture
def recording() -> Wave:
    return np.random.default_rng(0).normal(0, 0.1, 2 * SAMPLE_RATE).astype(np.float32)


@pytest.fixture
def deployments() -> FakeDeployments:
    return FakeDeployments()


@pytest.fixture
async def http(
    tmp_path: Path, recording: Wave, deployments: FakeDeployments
) -> AsyncIterator[httpx.AsyncClient]:
    for name in ("ann", "bob"):
        (tmp_path / f"{name}.wav").write_bytes(audio.wav_bytes(recording))
    api = create_api(AppArgs(model="/some/bundle", voices=str(tmp_path)), deployments)
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def speak(http: httpx.AsyncClient, voice: str) -> httpx.Response:
    body = {"input": "The train was late.", "voice": voice, "response_format": "pcm"}
    return await http.post(SPEECH, json=body)


async def test_a_deleted_voice_is_forgotten_by_all_replicas(
    http: httpx.AsyncClient, deployments: FakeDeployments, tmp_path: Path
) -> None:
    assert (await speak(http, "ann")).status_code == 200
    rest = tmp_path / "ann.flac.0123.part"  # of a writer that was killed
    rest.write_bytes(b"ann's recording")
    os.utime(rest, (0, time.time() - PART_SECONDS - 60))
    assert (await http.delete(f"{VOICES}/ann")).status_code == 200
    assert deployments.count("forget_prompts") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bob.wav"]
    assert (await speak(http, "ann")).status_code == 404


async def test_models_forget_the_prompts_of_ended_requests(tiny_models: None) -> None:
    """Neither the keys and values of a prompt nor those of a request in its voice stay."""
    args = AppArgs(max_sentence_seconds=1.0, slots=2, nar_prompt_cache_seconds=300)
    ar = ARDeployment(VERSION, "", "cpu", args)
    nar = NARDeployment(VERSION, "", "cpu", args)
    prompt = np.random.default_rng(0).integers(0, 1024, (8, 50)).astype(np.int16)
    request = Request(id="x", phonemes=[5, 9, 7], prompt=prompt, max_frames=20)
    [worker], [version] = ar.models, nar.models
    runner = worker._engine._runner
    stores = [runner._cache.keys, runner._cache.values, runner._hidden]
    stores += [runner.prefill.cache.keys, runner.prefill.cache.values]

    running = ar.stream(VERSION, request, Chunking(first_frames=8))
    first = await anext(running)
    chunk = await ar.generate(VERSION, replace(request, id="y"))
    await nar.decode(VERSION, NARRequest(request.phonemes, prompt, chunk.codes))
    assert len(version.decoder._prompts) == 1 and all(store.any() for store in stores[:3])

    await nar.forget_prompts()
    await ar.forget_prompts()
    assert not len(version.decoder._prompts)
    codes = [*first.codes.tolist()]
    async for part in running:  # a response that runs ends as if nothing had happened
        codes += part.codes.tolist()
    assert codes == chunk.codes.tolist()
    async with asyncio.timeout(30):
        while any(store.nan_to_num().any() for store in stores):
            await asyncio.sleep(0.01)
    again = await ar.generate(VERSION, request)
    assert (again.codes == chunk.codes).all()
    await asyncio.to_thread(worker.close)


async def test_models_drop_prompts_after_a_while_without_calls(tiny_models: None) -> None:
    args = AppArgs(nar_prompt_cache_seconds=0.2)
    nar = NARDeployment(VERSION, "", "cpu", args)
    codes = np.zeros((8, 5), np.int16)
    await nar.decode(VERSION, NARRequest([5], codes, codes[0]))
    prompts = nar.models[0].decoder._prompts
    assert prompts.currsize == 1
    async with asyncio.timeout(30):
        while prompts.currsize:
            await asyncio.sleep(0.01)


async def test_voices_in_memory_go_on_while_their_store_is_away(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await speak(http, "ann")
    assert expected.status_code == 200

    def away(*_: Any, **__: Any) -> Any:
        raise OSError("AWS Error SLOW_DOWN: 503")

    for name in ("file_stamp", "read_bytes", "exists", "list_files", "write_bytes"):
        monkeypatch.setattr(storage, name, away)
    assert (await speak(http, "ann")).content == expected.content
    answers = [
        await speak(http, "bob"),
        await http.get(VOICES),
        await http.delete(f"{VOICES}/ann"),
    ]
    for answer in answers:
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (503, "voice_store_unavailable")
        assert int(answer.headers["retry-after"]) >= 1 and "SLOW_DOWN" not in answer.text


async def test_concurrent_first_requests_read_and_encode_a_voice_once(
    http: httpx.AsyncClient, deployments: FakeDeployments, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_read = 0
    read_bytes = storage.read_bytes

    def count_reads(*args: Any, **options: Any) -> bytes:
        nonlocal n_read
        n_read += 1
        return read_bytes(*args, **options)

    monkeypatch.setattr(storage, "read_bytes", count_reads)
    answers = await asyncio.gather(*(speak(http, "ann") for _ in range(12)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert deployments.count("encode") == 1
    n_first = n_read
    assert (await speak(http, "ann")).status_code == 200 and n_read == n_first <= 2


def test_a_write_that_fails_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(self: Path, target: str) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", no_room)
    with pytest.raises(OSError, match="no space left"):
        storage.write_bytes("voices/ann.flac", b"ann's recording")
    assert not list((home / "voices").iterdir())


def test_sweep_parts_removes_old_ones_only(home: Path) -> None:
    for name, age in (("a.flac.1.part", 100), ("b.flac.2.part", 10), ("c.wav", 100)):
        storage.write_bytes(f"voices/{name}", b"x")
        os.utime(home / "voices" / name, (0, time.time() - age))
    assert storage.sweep_parts("voices", older_than_seconds=50) == 1
    assert sorted(x.name for x in (home / "voices").iterdir()) == ["b.flac.2.part", "c.wav"]
    assert storage.sweep_parts("nothing", older_than_seconds=50) == 0
