"""The engine: every stream says what it would say alone, whoever comes and goes beside it."""

from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
from helpers.engines import alone, build, collect, lively_ar, request

from valle.model.precision import Precision, convert
from valle.model.sampling import Sampling
from valle.model.tokens import EOS
from valle.serve.engine.engine import Engine
from valle.serve.engine.request import Finish
from valle.serve.engine.runner import Runner
from valle.serve.engine.scheduler import Scheduler
from valle.serve.engine.slots import Move, Slots


@pytest.mark.parametrize(
    ("group", "seed", "guided", "precision", "compiled"),
    [
        (1, 0, False, "fp32", False), (2, 0, False, "fp32", False), (1, 1, True, "fp32", False),
        (2, 1, True, "fp32", False), (2, 1, True, "int8", False),
        pytest.param(2, 2, True, "fp32", True, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_any_order_of_arrivals_and_aborts_changes_nothing(
    group: int, seed: int, guided: bool, precision: Precision, compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if compiled:  # the compiler stumbles over checks of shapes, which only tests have
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model = convert(lively_ar(group), precision)
    asked = [request(number) for number in range(12)]
    if not guided:
        asked = [one for one in asked if not one.sampling.guided]
    expected = {one.id: alone(model, one) for one in asked}
    assert len({len(codes) for codes, _ in expected.values()}) > 3, "a dull test"
    chance = np.random.default_rng(seed)
    engine = build(model, slots=4, guided=guided, compiled=compiled)
    codes: dict[str, list[int]] = {}
    ends: dict[str, Finish] = {}
    late = [asked[i] for i in chance.permutation(len(asked))]
    aborted = {one.id for one in late[::5]}
    while late or not engine.idle:
        for _ in range(int(chance.integers(0, 3))):
            if late:
                engine.add(late.pop())
        collect(engine.step(), codes, ends)
        engine.check_integrity()
        for name in sorted(aborted - ends.keys()):
            if chance.random() < 0.2:
                engine.abort(name)
        engine.check_integrity()
    for one in asked:
        said, finish = expected[one.id]
        if one.id in ends:
            assert (codes[one.id], ends[one.id]) == (said, finish), one.id
        else:  # aborted: what it had said by then was right
            assert one.id in aborted
            begun = codes.get(one.id, [])
            assert begun == said[: len(begun)]


def test_no_text_is_answered_by_nothing() -> None:
    """A model that would stop at once, alone and beside others."""
    model = lively_ar(2)
    model.head.bias.data[EOS] += 100
    engine = build(model, 3)
    codes: dict[str, list[int]] = {}
    ends: dict[str, Finish] = {}
    for number in range(5):
        engine.add(request(number))
    while not engine.idle:
        collect(engine.step(), codes, ends)
    for number in range(5):
        assert (codes[f"r{number}"], ends[f"r{number}"]) == alone(model, request(number))
        assert len(codes[f"r{number}"]) == 1


def test_a_request_that_fits_no_slot_is_refused() -> None:
    engine = Engine(Runner(lively_ar(2), slots=2, positions=60), Scheduler(2))
    with pytest.raises(ValueError, match="max_frames: text, prompt and 200 frames need"):
        engine.add(request(0, max_frames=200))
    unknown = replace(request(0), phonemes=[5, 10_000])
    with pytest.raises(ValueError, match="phonemes: the model knows"):
        engine.add(unknown)
    with pytest.raises(ValueError, match="prompt: 7 codebooks, not 8"):
        engine.add(replace(request(0), prompt=request(0).prompt[:7]))
    with pytest.raises(ValueError, match="prompt: codes outside 0 to 1023"):
        engine.add(replace(request(0), prompt=request(0).prompt + 1024))
    window = replace(request(0), sampling=Sampling(repetition_window=65))
    with pytest.raises(ValueError, match="repetition_window: at most 64"):
        engine.add(window)
    with pytest.raises(ValueError, match="guidance_scale: this engine was made without"):
        engine.add(replace(request(0), sampling=Sampling(guidance_scale=1.5)))
    engine.add(request(0))
    with pytest.raises(ValueError, match="id: 'r0' is in use"):
        engine.add(request(0))
    with pytest.raises(ValueError, match="phonemes: the text is empty"):
        replace(request(0), phonemes=[])


def test_the_urgent_overtake_and_nobody_starves() -> None:
    now = 0.0
    scheduler = Scheduler(1, clock=lambda: now)
    for arrival, name, urgency in ((0.0, "first", 0), (1.0, "urgent", 5), (7.0, "late", 5)):
        now = arrival
        scheduler.add(replace(request(0), id=name, urgency=urgency))
    order = []
    while not scheduler.idle:
        stream = scheduler.admit()
        assert stream is not None and scheduler.admit() is None  # one is read at a time
        assert scheduler.seat() is stream and scheduler.admit() is None  # one slot
        order.append(stream.request.id)
        scheduler.remove(stream.request.id)
    assert order == ["urgent", "first", "late"]  # urgent by 5 s, not more


def test_an_aborted_request_leaves_the_queue() -> None:
    scheduler = Scheduler(1)
    for name in ("a", "b", "c"):
        scheduler.add(replace(request(0), id=name))
    assert scheduler.waiting == 3
    scheduler.remove("a")
    scheduler.add(replace(request(0), id="a"))  # again, behind the others now
    first = scheduler.admit()
    assert first is not None and first.request.id == "b"
    scheduler.check_integrity()
    assert [scheduler.waiting, len(scheduler.running())] == [2, 0], "b is being read"
    scheduler.seat()
    scheduler.check_integrity()
    assert [scheduler.waiting, len(scheduler.running())] == [2, 1]
    scheduler.remove("b")
    assert scheduler.admit() is not None and scheduler.reading is not None
    scheduler.remove(scheduler.reading.request.id)
    scheduler.check_integrity()
    assert scheduler.reading is None and scheduler.waiting == 1, "whoever left is not read on"


def test_a_long_text_holds_up_nobody() -> None:
    """It is read a piece at a tick, and all that time the others speak."""
    model = lively_ar(1)
    model.head.bias.data[EOS] -= 100  # speaks until its limit
    engine = build(model, 2)
    codes: dict[str, list[int]] = {}
    ends: dict[str, Finish] = {}
    short = request(0, max_frames=60)
    engine.add(short)
    while not codes:
        collect(engine.step(), codes, ends)
    long = replace(request(1, max_frames=10), id="long", phonemes=[5] * 300)
    engine.add(long)
    ticks = 0
    while "long" not in codes:
        before = len(codes["r0"])
        collect(engine.step(), codes, ends)
        assert len(codes["r0"]) == before + 1
        ticks += 1
    assert ticks == -(-(300 + 2 + long.prompt.shape[1]) // 16)
    while not engine.idle:
        collect(engine.step(), codes, ends)
    for one in (short, long):
        assert (codes[one.id], ends[one.id]) == alone(model, one)


def test_a_text_that_is_given_up_half_read_leaves_no_trace() -> None:
    model = lively_ar(2)
    engine = build(model, 2)
    codes: dict[str, list[int]] = {}
    ends: dict[str, Finish] = {}
    engine.add(replace(request(1), id="gone", phonemes=[5] * 300))
    for _ in range(3):
        assert not engine.step()
    engine.abort("gone")
    engine.check_integrity()
    assert engine.idle
    engine.add(request(3))
    while not engine.idle:
        collect(engine.step(), codes, ends)
    assert (codes["r3"], ends["r3"]) == alone(model, request(3))


def test_slots_stay_dense() -> None:
    slots = Slots(3)
    assert [slots.take(name) for name in "abc"] == [0, 1, 2] and slots.full
    assert slots.release(0) == Move(source=2, target=0)
    assert slots.owners == ("c", "b")
    assert slots.release(1) is None and slots.owners == ("c",)
    with pytest.raises(AssertionError, match="slot 1 is not in use"):
        slots.release(1)
    with pytest.raises(ValueError, match="slots: 0 is below 1"):
        Slots(0)
