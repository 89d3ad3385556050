"""Deletion of a voice from all memory, and requests while the voice store does not answer."""

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
from helpers.engines import build_engine, collect, generate_alone, request, short_ar
from helpers.recordings import speech

from valle.model.codec.interface import Wave
from valle.model.nar_decoding import NARRequest
from valle.model.tokens import EOS
from valle.platform import audio, storage
from valle.serve.app_args import AppArgs
from valle.serve.deployments.ar import ARDeployment
from valle.serve.deployments.nar import NARDeployment
from valle.serve.engine.engine import Engine
from valle.serve.engine.request import FinishReason
from valle.serve.web.api import create_api
from valle.serve.web.voices import PART_SECONDS

pytestmark = pytest.mark.anyio

MODEL = "/some/bundle#" + "1a2b3c4d" * 8
"""A folder with its content's hash: no registry is asked about it."""

SPEECH, VOICES = "/v1/audio/speech", "/v1/audio/voices"


@pytest.fixture
def recording() -> Wave:
    return speech(2)


@pytest.fixture
def deployments() -> FakeDeployments:
    return FakeDeployments()


@pytest.fixture
async def http(
    tmp_path: Path, recording: Wave, deployments: FakeDeployments
) -> AsyncIterator[httpx.AsyncClient]:
    for name in ("ann", "bob"):
        (tmp_path / f"{name}.wav").write_bytes(audio.wav_bytes(recording))
    api = create_api(AppArgs(model=MODEL, voices=str(tmp_path)), deployments)
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def speak(http: httpx.AsyncClient, voice: str) -> httpx.Response:
    body = {"input": "The train was late.", "voice": voice, "response_format": "pcm", "seed": 0}
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


def leftovers(engine: Engine) -> list[str]:
    """Where an engine still holds something of a request."""
    runner = engine._runner
    stores = {
        "keys": runner._cache.keys,
        "values": runner._cache.values,
        "hidden states": runner._hidden,
        "keys of the prefill": runner.prefill.cache.keys,
        "values of the prefill": runner.prefill.cache.values,
        "input of the prefill": runner.prefill._x,
    }
    return [name for name, store in stores.items() if store.nan_to_num().any()]


@pytest.mark.parametrize("n_steps", [0, 1, 2, 9, None], ids=lambda n: f"after {n} steps")
@pytest.mark.parametrize("n_others", [0, 1])
def test_engine_forgets_a_request_in_any_state(n_steps: int | None, n_others: int) -> None:
    """Waiting, in prefill, running beside another one, ended: nothing stays of it in the end, and
    its codes are the same. A later request is not disturbed."""
    model = short_ar(1)
    model.head.bias.data[EOS] -= 100  # each has all its frames
    engine = build_engine(model, slots=2, prefill_chunk=32)
    requests = [request(number, max_frames=12) for number in range(n_others + 1)]
    requests[0] = replace(requests[0], phonemes=requests[0].phonemes * 8)  # two prefill steps
    for item in requests:
        engine.add(item)
    codes: dict[str, list[int]] = {}
    ends: dict[str, FinishReason] = {}
    while not engine.idle if n_steps is None else n_steps > 0:
        collect(engine.step(), codes, ends)
        n_steps = None if n_steps is None else n_steps - 1
    assert n_steps is not None or leftovers(engine)
    engine.forget_prompts()
    while not engine.idle:
        collect(engine.step(), codes, ends)
    assert leftovers(engine) == []
    later = request(3, max_frames=12)
    engine.add(later)
    while not engine.idle:
        collect(engine.step(), codes, ends)
    for item in (*requests, later):
        assert codes[item.id] == generate_alone(model, item)[0]


async def test_deployments_forget_prompts(tiny_models: None) -> None:
    args = AppArgs(max_sentence_seconds=1.0, slots=2, nar_prompt_cache_seconds=300)
    ar, nar = ARDeployment("a", "", "cpu", args), NARDeployment("a", "", "cpu", args)
    [worker], [version] = ar.models, nar.models
    item = request(1, max_frames=20)
    chunk = await ar.generate("a", item)
    await nar.decode("a", NARRequest(item.phonemes, item.prompt, chunk.codes))
    assert len(version.decoder._prompts) == 1 and leftovers(worker._engine)
    await nar.forget_prompts()
    await ar.forget_prompts()
    assert not len(version.decoder._prompts)
    async with asyncio.timeout(30):
        while leftovers(worker._engine):
            await asyncio.sleep(0.01)
    assert (await ar.generate("a", item)).codes.tolist() == chunk.codes.tolist()
    await asyncio.to_thread(worker.close)


async def test_models_drop_prompts_after_a_while_without_calls(tiny_models: None) -> None:
    args = AppArgs(nar_prompt_cache_seconds=2.0)
    nar = NARDeployment("a", "", "cpu", args)
    codes = np.zeros((8, 5), np.int16)
    await nar.decode("a", NARRequest([5], codes, codes[0]))
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
