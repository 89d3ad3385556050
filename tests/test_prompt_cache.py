"""Prompts in memory: made once, removed with their voice, usable while the store is down."""

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
import pytest

from valle.model.codec.interface import Codes
from valle.platform.storage import FileStamp
from valle.serve.web import prompt_cache
from valle.serve.web.prompt_cache import (
    PROMPT_CACHE_SECONDS,
    RETRY_SECONDS,
    STALE_SECONDS,
    PromptCache,
)
from valle.serve.web.single_flight import SingleFlight
from valle.serve.web.voices import VoiceError, VoiceStoreError

pytestmark = pytest.mark.anyio


@dataclass
class Store:
    """Stamps of voices, and a clock that stands still until it is moved."""

    voices: dict[Hashable, int] = field(default_factory=lambda: {"ann": 1})
    """Time of the last change, by voice."""
    away: bool = False
    n_asked: int = 0
    n_made: int = 0
    now: float = 1000.0

    def __post_init__(self) -> None:
        self.cache = PromptCache(self.stamp, clock=lambda: self.now)

    async def stamp(self, voice: Hashable) -> FileStamp:
        self.n_asked += 1
        await asyncio.sleep(0)
        if self.away:
            raise VoiceStoreError("503 Slow Down")
        if voice not in self.voices:
            raise VoiceError(f"no voice {voice!r}", "voice_not_found")
        return FileStamp(f"{voice}.wav", self.voices[voice], 10)

    async def make(self) -> Codes:
        self.n_made += 1
        await asyncio.sleep(0.01)
        if self.away:
            raise VoiceStoreError("503 Slow Down")
        return np.full((8, 1), self.n_made, np.int16)

    async def codes(self, voice: str = "ann", version: str = "1") -> int:
        return int((await self.cache.of_voice(voice, version, self.make))[0, 0])


async def test_concurrent_first_requests_encode_a_voice_once() -> None:
    store = Store()
    assert set(await asyncio.gather(*(store.codes() for _ in range(20)))) == {1}
    assert (store.n_made, store.n_asked) == (1, 1)
    assert await store.codes() == 1
    assert (store.n_made, store.n_asked) == (1, 2), "an unchanged voice is not read"
    assert await store.codes(version="2") == 2, "another codec"


async def test_a_replaced_voice_is_encoded_anew() -> None:
    store = Store()
    assert await store.codes() == 1
    store.voices["ann"] = 2
    assert await store.codes() == 2
    assert len(store.cache) == 1, "the old codes have gone"


async def test_a_deleted_voice_is_not_spoken_and_leaves_the_memory() -> None:
    store = Store()
    await store.codes()
    del store.voices["ann"]
    with pytest.raises(VoiceError, match="no voice 'ann'"):
        await store.codes()
    assert not len(store.cache)


async def test_a_sweep_removes_voices_that_another_replica_has_deleted() -> None:
    store = Store(voices={"ann": 1, "bob": 1})
    await store.codes("ann")
    await store.codes("bob")
    await store.cache.of_content(b"hash of ann's recording", "1", store.make)
    del store.voices["ann"]
    await store.cache.sweep()
    assert len(store.cache) == 1 and await store.codes("bob") == 2


async def test_a_timer_sweeps_while_no_request_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "SWEEP_SECONDS", 0.01)
    store = Store()
    await store.codes()
    del store.voices["ann"]
    async with asyncio.timeout(10):
        while len(store.cache):
            await asyncio.sleep(0.01)
    n_asked = store.n_asked
    await asyncio.sleep(0.1)
    assert store.n_asked == n_asked, "nothing is left to ask for"


async def test_recordings_of_requests_expire_while_no_request_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prompt_cache, "SWEEP_SECONDS", 0.01)
    store = Store()
    for _ in range(2):
        await store.cache.of_content(b"hash", "1", store.make)
    assert store.n_made == 1
    store.now += PROMPT_CACHE_SECONDS + 1
    async with asyncio.timeout(10):
        while store.cache._contents.currsize:
            await asyncio.sleep(0.01)


async def test_confirmed_voices_go_on_for_a_while_without_the_store() -> None:
    store = Store()
    await store.codes()
    store.away = True
    store.now += STALE_SECONDS - 1
    n_asked = store.n_asked
    for _ in range(5):
        assert await store.codes() == 1
    assert store.n_asked == n_asked + 1, "a store that has just failed is left alone"
    store.now += RETRY_SECONDS
    with pytest.raises(VoiceStoreError, match="503 Slow Down"):
        await store.codes()
    with pytest.raises(VoiceStoreError):
        await store.codes("bob")
    store.away = False
    assert await store.codes() == 1 and store.n_made == 1


async def test_a_voice_that_is_used_all_the_time_outlives_an_outage() -> None:
    """Its lifetime counts from the last time that the store has confirmed it."""
    store = Store()
    for _ in range(20):
        await store.codes()
        store.now += STALE_SECONDS - 5
    store.away = True
    assert await store.codes() == 1 and store.n_made == 1


async def test_a_store_that_hangs_counts_as_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "STORE_SECONDS", 0.01)
    store = Store()
    await store.codes()

    async def hang(voice: Hashable) -> FileStamp:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(store.cache, "_read_stamp", hang)
    assert await store.codes() == 1
    store.now += STALE_SECONDS + 1
    with pytest.raises(VoiceStoreError, match="no answer in time"):
        await store.codes()


async def test_prompts_are_unconfirmed_after_a_long_outage() -> None:
    """What cannot be confirmed may have been deleted."""
    store = Store()
    await store.codes()
    store.away = True
    store.now += STALE_SECONDS + 1
    await store.cache.sweep()
    assert not len(store.cache)


async def test_forget_removes_codes_that_are_being_made() -> None:
    store = Store()
    tasks = [
        asyncio.create_task(store.codes()),
        asyncio.create_task(store.cache.of_content(b"hash", "1", store.make)),
    ]
    while store.n_made < 2:
        await asyncio.sleep(0)
    store.cache.forget()
    await asyncio.gather(*tasks)
    assert not len(store.cache), "they are used once, and not kept"


async def test_single_flight_is_cancelled_with_its_last_caller() -> None:
    flights = SingleFlight()
    started, cancelled = 0, 0

    async def work() -> int:
        nonlocal started, cancelled
        started += 1
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled += 1
            raise
        return 1

    callers = [asyncio.create_task(flights.run("a", work)) for _ in range(3)]
    await asyncio.sleep(0.01)
    for number, caller in enumerate(callers):
        assert (started, cancelled) == (1, 0), number
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        await asyncio.sleep(0)
    assert (started, cancelled) == (1, 1)


async def test_single_flight_shares_an_error_and_then_works_anew() -> None:
    flights = SingleFlight()
    n_calls = 0

    async def work() -> int:
        nonlocal n_calls
        n_calls += 1
        await asyncio.sleep(0)
        if n_calls == 1:
            raise OSError("no room")
        return n_calls

    errors = await asyncio.gather(
        *(flights.run("a", work) for _ in range(3)), return_exceptions=True
    )
    assert [str(error) for error in errors] == ["no room"] * 3
    assert await flights.run("a", work) == 2
