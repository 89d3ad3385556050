"""The engine: the codes of a request do not depend on the requests beside it."""

from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
from helpers.engines import build_engine, collect, generate_alone, request, short_ar

from valle.model.quantize import Precision, convert
from valle.model.sampling import Sampling
from valle.model.tokens import EOS
from valle.serve.engine.engine import Engine
from valle.serve.engine.request import FinishReason
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
def test_engine_equals_generate_in_any_order_of_arrivals_and_aborts(
    group: int,
    seed: int,
    guided: bool,
    precision: Precision,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if compiled:  # the compiler cannot trace the shape checks, which only tests enable
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model = convert(short_ar(group), precision)
    requests = [request(number) for number in range(12)]
    if not guided:
        requests = [item for item in requests if not item.sampling.guided]
    expected = {item.id: generate_alone(model, item) for item in requests}
    assert len({len(codes) for codes, _ in expected.values()}) > 3, (
        "the requests should end at different lengths"
    )
    rng = np.random.default_rng(seed)
    engine = build_engine(model, slots=4, guided=guided, compiled=compiled)
    codes: dict[str, list[int]] = {}
    ends: dict[str, FinishReason] = {}
    pending = [requests[i] for i in rng.permutation(len(requests))]
    aborted = {item.id for item in pending[::5]}
    while pending or not engine.idle:
        for _ in range(int(rng.integers(0, 3))):
            if pending:
                engine.add(pending.pop())
        collect(engine.step(), codes, ends)
        engine.check_integrity()
        for name in sorted(aborted - ends.keys()):
            if rng.random() < 0.2:
                engine.abort(name)
        engine.check_integrity()
    for item in requests:
        expected_codes, finish_reason = expected[item.id]
        if item.id in ends:
            assert (codes[item.id], ends[item.id]) == (expected_codes, finish_reason), item.id
        else:  # aborted: its codes up to then are the same
            assert item.id in aborted
            partial_codes = codes.get(item.id, [])
            assert partial_codes == expected_codes[: len(partial_codes)]


def test_engine_gives_every_request_at_least_one_frame() -> None:
    """From a model that would draw EOS at once."""
    model = short_ar(2)
    model.head.bias.data[EOS] += 100
    engine = build_engine(model, 3)
    codes: dict[str, list[int]] = {}
    ends: dict[str, FinishReason] = {}
    for number in range(5):
        engine.add(request(number))
    while not engine.idle:
        collect(engine.step(), codes, ends)
    for number in range(5):
        assert (codes[f"r{number}"], ends[f"r{number}"]) == generate_alone(model, request(number))
        assert len(codes[f"r{number}"]) == 1


def test_engine_refuses_a_request_that_cannot_run() -> None:
    engine = Engine(Runner(short_ar(2), slots=2, max_positions=60), Scheduler(2))
    with pytest.raises(ValueError, match="max_frames: text, prompt and 200 frames need"):
        engine.add(request(0, max_frames=200))
    unknown = replace(request(0), phonemes=[5, 10_000])
    with pytest.raises(ValueError, match="phonemes: ids must be 0 to"):
        engine.add(unknown)
    with pytest.raises(ValueError, match="prompt: 7 codebooks, not 8"):
        engine.add(replace(request(0), prompt=request(0).prompt[:7]))
    with pytest.raises(ValueError, match="prompt: codes outside 0 to 1023"):
        engine.add(replace(request(0), prompt=request(0).prompt + 1024))
    window = replace(request(0), sampling=Sampling(repetition_window=65))
    with pytest.raises(ValueError, match="repetition_window: at most 64"):
        engine.add(window)
    with pytest.raises(ValueError, match="guidance_scale: must be 1, this engine runs without"):
        engine.add(replace(request(0), sampling=Sampling(guidance_scale=1.5)))
    engine.add(request(0))
    with pytest.raises(ValueError, match="id: 'r0' is in use"):
        engine.add(request(0))
    with pytest.raises(ValueError, match="phonemes: the text is empty"):
        replace(request(0), phonemes=[])


def test_scheduler_serves_requests_in_order_of_arrival() -> None:
    scheduler = Scheduler(1)
    for name in ("first", "second", "third"):
        scheduler.add(replace(request(0), id=name))
    order = []
    while not scheduler.idle:
        state = scheduler.admit()
        assert state is not None and scheduler.admit() is None, "one prefill at a time"
        assert scheduler.activate() is state and scheduler.admit() is None, "there is one slot"
        order.append(state.request.id)
        scheduler.remove(state.request.id)
    assert order == ["first", "second", "third"]


def test_scheduler_skips_a_request_that_was_removed() -> None:
    scheduler = Scheduler(1)
    for name in ("a", "b", "c"):
        scheduler.add(replace(request(0), id=name))
    assert scheduler.n_waiting == 3
    scheduler.remove("a")
    scheduler.add(replace(request(0), id="a"))  # again, now at the end of the queue
    first = scheduler.admit()
    assert first is not None and first.request.id == "b"
    scheduler.check_integrity()
    assert [scheduler.n_waiting, len(scheduler.running())] == [2, 0], "b is in prefill"
    scheduler.activate()
    scheduler.check_integrity()
    assert [scheduler.n_waiting, len(scheduler.running())] == [2, 1]
    scheduler.remove("b")
    assert scheduler.admit() is not None and scheduler.prefilling is not None
    scheduler.remove(scheduler.prefilling.request.id)
    scheduler.check_integrity()
    assert scheduler.prefilling is None and scheduler.n_waiting == 1


def test_engine_prefills_a_long_text_in_chunks() -> None:
    """The running request gets a frame at every step meanwhile."""
    model = short_ar(1)
    model.head.bias.data[EOS] -= 100  # no EOS before the limit
    engine = build_engine(model, 2)
    codes: dict[str, list[int]] = {}
    ends: dict[str, FinishReason] = {}
    short = request(0, max_frames=60)
    engine.add(short)
    while not codes:
        collect(engine.step(), codes, ends)
    long = replace(request(1, max_frames=10), id="long", phonemes=[5] * 300)
    engine.add(long)
    n_steps = 0
    while "long" not in codes:
        before = len(codes["r0"])
        collect(engine.step(), codes, ends)
        assert len(codes["r0"]) == before + 1
        n_steps += 1
    assert n_steps == -(-(300 + 2 + long.prompt.shape[1]) // 16)
    while not engine.idle:
        collect(engine.step(), codes, ends)
    for item in (short, long):
        assert (codes[item.id], ends[item.id]) == generate_alone(model, item)


def test_engine_aborts_a_request_in_prefill() -> None:
    model = short_ar(2)
    engine = build_engine(model, 2)
    codes: dict[str, list[int]] = {}
    ends: dict[str, FinishReason] = {}
    engine.add(replace(request(1), id="aborted", phonemes=[5] * 300))
    for _ in range(3):
        assert not engine.step()
    engine.abort("aborted")
    engine.check_integrity()
    assert engine.idle
    engine.add(request(3))
    while not engine.idle:
        collect(engine.step(), codes, ends)
    assert (codes["r3"], ends["r3"]) == generate_alone(model, request(3))


def test_slots_stay_dense_after_a_release() -> None:
    slots = Slots(3)
    assert [slots.allocate(name) for name in "abc"] == [0, 1, 2] and slots.full
    assert slots.release(0) == Move(source=2, target=0)
    assert slots.request_ids == ("c", "b")
    assert slots.release(1) is None and slots.request_ids == ("c",)
    with pytest.raises(AssertionError, match="slot 1 is not in use"):
        slots.release(1)
    with pytest.raises(ValueError, match="slots: 0 is below 1"):
        Slots(0)
