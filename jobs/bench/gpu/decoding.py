"""P4, decoding the first codebook: without a cache, with one, and many streams in the engine.

An untrained model that may not stop says 300 frames after a prompt of three seconds. The bound is
memory: a tick of the engine reads every matrix once, and the keys and values of every row (two rows
to a guided stream); bytes by the bandwidth that P0 measured are the least a tick can take. Ticks
are timed where all streams run and none is read in; frames a second of the whole run are beside.

`compiled` promises CUDA graphs. Whether there are any is asserted by what the compiler counts as
skipped, and by launches of graphs; first with a model of two layers, which compiles in seconds
where twelve take a minute. Kernels are counted by a profiler, whose traces stay with the process:
it comes when the eager engines have been timed.
"""

import time
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import torch

from valle.jobs.bench.gpu import agreement, compiling, samples, timing
from valle.jobs.bench.gpu.record import Bench
from valle.jobs.bench.gpu.streams import (
    PROFILED,
    Measured,
    Task,
    add,
    drain,
    engine_and_runner,
    measure,
    profile,
    tick_bytes,
    untrained,
)
from valle.model.ar import AR
from valle.model.precision import Precision
from valle.model.sampling import Sampling
from valle.model.tokens import FRAME_RATE
from valle.serve.engine.engine import Engine

WARM_FRAMES = 10
"""Before a clock."""


@dataclass(frozen=True)
class Case:
    """An engine to measure."""

    precision: Precision
    streams: int
    guided: bool
    compiled: bool = False

    @property
    def name(self) -> str:
        """For people."""
        guided = ", guided" if self.guided else ""
        return f"engine {self.streams} {self.precision}{guided}{self.compiled * ', compiled'}"


FIRST: Final = (
    Case("bf16", 1, False), Case("bf16", 16, False), Case("bf16", 64, False),
    Case("fp32", 16, False),
)  # fmt: skip
REST: Final = (
    Case("bf16", 16, True), Case("bf16", 1, True), Case("bf16", 64, True),
    Case("fp32", 1, False), Case("fp32", 64, False),
    Case("fp32", 1, True), Case("fp32", 16, True), Case("fp32", 64, True),
)  # fmt: skip
QUICK: Final = (Case("fp32", 1, False), Case("fp32", 3, True), Case("bf16", 2, False))
COMPILED: Final = tuple(
    Case("bf16", streams, guided, compiled=True)
    for guided, streams in ((True, 16), (True, 1), (True, 64), (False, 1), (False, 16), (False, 64))
)
COMPILED_QUICK: Final = (Case("bf16", 3, True, compiled=True),)

FLOORS: Final = {
    "16 streams by one, bf16": ("engine 16 bf16", "engine 1 bf16", 5.0),
    "16 streams by uncached, fp32": ("engine 16 fp32", "uncached generate fp32", 20.0),
}
"""Frames a second of one way by another's, and how many times as many there must be."""


@dataclass(frozen=True)
class Decoding:
    """What the cases share."""

    bench: Bench
    task: Task
    models: dict[Precision, AR]
    """By precision, once used."""
    speeds: dict[str, float]
    """Frames a second by the name of what was measured."""
    measured: dict[Case, Measured]

    def model(self, precision: Precision) -> AR:
        """The untrained model in a precision."""
        if precision not in self.models:
            self.models[precision] = untrained(self.bench, precision)
        return self.models[precision]


def run(bench: Bench) -> None:
    """First whether it is right, then what says most about speed; a compilation of all layers is
    begun where there is time for it."""
    timing.allow_tf32(matmul=False, convolution=False)
    decoding = Decoding(bench, Task.of(bench.quick), {}, {}, {})
    record = bench.record
    for name, (_, _, floor) in FLOORS.items():
        if not bench.quick:
            record.expect_floor(name, floor)
    missing = "only on a card" if not bench.on_card else compiling.missing(bench.device)
    if missing is not None:
        record.leave_out("compiled engines", missing, required=bench.on_card)
    truths = [("engine beside the model", agreement.with_reference, 2.0)]
    if missing is None:
        truths.insert(0, ("compiled engine", agreement.compiled, compiling.QUICK_SECONDS))
    for name, compare, seconds in truths:
        record.attempt(name, partial(compare, bench, decoding.task), seconds, required=True)
    speak(decoding, (("cached", "fp32"), ("uncached", "fp32")))
    eager(decoding, QUICK if bench.quick else FIRST)
    graphed = COMPILED_QUICK if bench.quick else COMPILED
    if missing is None:
        compiled(decoding, graphed[0], compiling.FIRST_SECONDS)
    speak(decoding, (("cached", "bf16"),))
    eager(decoding, () if bench.quick else REST)
    for case in decoding.measured:
        if not case.compiled:
            record.attempt(f"{case.name}: a tick", partial(count_kernels, decoding, case), 2)
    for case in graphed[1:] if missing is None else ():
        compiled(decoding, case, compiling.AGAIN_SECONDS)


def speak(decoding: Decoding, ways: tuple[tuple[str, Precision], ...]) -> None:
    """Times `AR.generate` in some ways."""
    for way, precision in ways:
        name = f"{way} generate {precision}"
        work = partial(measure_generate, decoding, name, precision, way == "cached")
        decoding.bench.record.attempt(name, work, 3)
        judge(decoding)


def eager(decoding: Decoding, cases: tuple[Case, ...]) -> None:
    """Times some engines."""
    for case in cases:
        decoding.bench.record.attempt(case.name, partial(measure_engine, decoding, case), 5)
        judge(decoding)


def compiled(decoding: Decoding, case: Case, seconds: float) -> None:
    """Times a compiled engine, with all that is known of its graphs."""
    if decoding.bench.quick:
        seconds = compiling.QUICK_SECONDS
    decoding.bench.record.attempt(case.name, partial(measure_compiled, decoding, case), seconds)


def measure_generate(decoding: Decoding, name: str, precision: Precision, use_cache: bool) -> None:
    """`AR.generate`, one sentence at a time."""
    bench, task, model = decoding.bench, decoding.task, decoding.model(precision)
    text = torch.tensor(task.phonemes, device=bench.device)
    prompt = torch.from_numpy(task.prompt.astype(np.int64)).to(bench.device)
    say = partial(
        agreement.generate, model, text, prompt, samples.SPOKEN, use_cache=use_cache
    )  # its codes come to the host, so that the clock stops when all is done
    say(frames=WARM_FRAMES)
    started = time.perf_counter()
    say(frames=task.frames)
    speed = task.frames / (time.perf_counter() - started)
    decoding.speeds[name] = speed
    bytes_read = tick_bytes(bench.config, model, 1, task)
    limit = bench.card.bytes_per_second / bytes_read * bench.config.group
    bench.record.measurement(
        name, frames_per_second=speed, limit_frames_per_second=limit, share_of_bound=speed / limit,
        times_real_time=speed / FRAME_RATE,
    )  # fmt: skip


def measure_engine(decoding: Decoding, case: Case) -> Engine:
    """Times an engine: a whole run, and its steady ticks; returns it, idle.

    A compiled one says all of the task before the clock, so that every shape has been compiled and
    captured; what else is slow at first is few ticks, of which the median takes no notice.
    """
    bench, task, model = decoding.bench, decoding.task, decoding.model(case.precision)
    sampling = sampling_of(case)
    timing.reset_peak(bench.device)
    begun = time.perf_counter()
    speaker, _ = engine_and_runner(
        model, task, case.streams, guided=case.guided, compiled=case.compiled
    )
    add(speaker, task, case.streams, sampling, task.frames if case.compiled else WARM_FRAMES)
    drain(speaker)
    warm_seconds = time.perf_counter() - begun
    measured = measure(bench, speaker, task, case.streams, sampling)
    decoding.measured[case] = measured
    decoding.speeds[case.name] = measured.frames_per_second
    rows = case.streams * (2 if case.guided else 1)
    least = tick_bytes(bench.config, model, rows, task) / bench.card.bytes_per_second
    group = bench.config.group
    whole = all(len(codes) == task.frames for codes in measured.codes.values())
    bench.record.check(f"{case.name}: every stream says {task.frames} frames", whole)
    bench.record.measurement(
        case.name, frames_per_second=case.streams * group / measured.tick_seconds,
        limit_frames_per_second=case.streams * group / least,
        share_of_bound=least / measured.tick_seconds,
        tick_milliseconds=1000 * measured.tick_seconds, ticks=measured.ticks,
        whole_run_frames_per_second=measured.frames_per_second,
        times_real_time=measured.frames_per_second / FRAME_RATE,
        peak_gigabytes=timing.peak_gigabytes(bench.device), warm_up_seconds=warm_seconds,
    )  # fmt: skip
    return speaker


def measure_compiled(decoding: Decoding, case: Case) -> None:
    """Times a compiled engine, counts its kernels, and checks that its ticks are CUDA graphs."""
    with compiling.strict() as compilations:
        speaker = measure_engine(decoding, case)
        before = compilations.replays
        add(speaker, decoding.task, case.streams, sampling_of(case), decoding.task.frames)
        drain(speaker)
        agreement.captured(
            decoding.bench, case.name, compilations, compilations.replays - before,
            decoding.measured[case].ticks,
        )  # fmt: skip
        count_kernels(decoding, case, speaker)


def sampling_of(case: Case) -> Sampling:
    """How its streams are drawn."""
    return samples.GUIDED if case.guided else samples.SPOKEN


def count_kernels(decoding: Decoding, case: Case, speaker: Engine | None = None) -> None:
    """Kernels of a tick, and how busy they keep the card; of an engine of its own, unless there is
    one that has been warmed up."""
    bench, task = decoding.bench, decoding.task
    if speaker is None:
        model = decoding.model(case.precision)
        speaker, _ = engine_and_runner(
            model, task, case.streams, guided=case.guided, compiled=case.compiled
        )
    launched = profile(bench, speaker, task, case.streams, sampling_of(case))
    bench.record.measurement(
        f"{case.name}: a tick", kernels=launched.kernels / PROFILED,
        card_busy=launched.busy_seconds / PROFILED / decoding.measured[case].tick_seconds,
        graphs=launched.graphs / PROFILED,
    )  # fmt: skip


def judge(decoding: Decoding) -> None:
    """Tells the record each floor as soon as both its figures are there."""
    speeds, record = decoding.speeds, decoding.bench.record
    waiting = {floor["name"] for floor in record.floors if floor["value"] is None}
    for name, (over, under, _) in FLOORS.items():
        if name in waiting and over in speeds and under in speeds:
            record.floor(name, speeds[over] / speeds[under])
