"""P4, decoding the first codebook: without a cache, with one, and many streams in the engine.

An untrained model that may not stop says 300 frames after a prompt of three seconds. The bound is
memory: a step of the engine reads every matrix once, and the keys and values of every row (two rows
to a guided stream); bytes by the bandwidth that P0 measured are the least a step can take. Steps
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

from valle.jobs.bench.gpu import compiling, device_timing, engine_numerics, synthetic
from valle.jobs.bench.gpu.record import PhaseContext
from valle.jobs.bench.gpu.workload import (
    PROFILED_STEPS,
    EngineTiming,
    Workload,
    add_streams,
    build_engine,
    endless_ar,
    measure,
    profile_steps,
    run_until_idle,
    step_bytes,
)
from valle.model.ar import AR
from valle.model.quantize import Precision
from valle.model.sampling import Sampling
from valle.model.tokens import FRAME_RATE
from valle.serve.engine.engine import Engine

WARMUP_FRAMES = 10
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


FIRST_CASES: Final = (
    Case("bf16", 1, False), Case("bf16", 16, False), Case("bf16", 64, False),
    Case("fp32", 16, False),
)  # fmt: skip
OTHER_CASES: Final = (
    Case("bf16", 16, True), Case("bf16", 1, True), Case("bf16", 64, True),
    Case("fp32", 1, False), Case("fp32", 64, False),
    Case("fp32", 1, True), Case("fp32", 16, True), Case("fp32", 64, True),
)  # fmt: skip
QUICK_CASES: Final = (Case("fp32", 1, False), Case("fp32", 3, True), Case("bf16", 2, False))
COMPILED_CASES: Final = tuple(
    Case("bf16", streams, guided, compiled=True)
    for guided, streams in ((True, 16), (True, 1), (True, 64), (False, 1), (False, 16), (False, 64))
)
QUICK_COMPILED_CASES: Final = (Case("bf16", 3, True, compiled=True),)

FLOORS: Final = {
    "16 streams by one, bf16": ("engine 16 bf16", "engine 1 bf16", 5.0),
    "16 streams by uncached, fp32": ("engine 16 fp32", "uncached generate fp32", 20.0),
}
"""Frames a second of one case by another's, and how many times as many there must be."""


@dataclass(frozen=True)
class DecodingState:
    """What the cases share."""

    context: PhaseContext
    workload: Workload
    models: dict[Precision, AR]
    """By precision, once used."""
    speeds: dict[str, float]
    """Frames a second by the name of what was measured."""
    timings: dict[Case, EngineTiming]

    def model(self, precision: Precision) -> AR:
        """The untrained model in a precision."""
        if precision not in self.models:
            self.models[precision] = endless_ar(self.context, precision)
        return self.models[precision]


def run(context: PhaseContext) -> None:
    """First whether it is right, then what says most about speed; a compilation of all layers is
    begun where there is time for it."""
    device_timing.allow_tf32(matmul=False, convolution=False)
    decoding = DecodingState(context, Workload.default(context.quick), {}, {}, {})
    record = context.record
    for name, (_, _, floor) in FLOORS.items():
        if not context.quick:
            record.expect_floor(name, floor)
    unavailable = (
        "only on a card" if not context.on_gpu else compiling.unavailable_reason(context.device)
    )
    if unavailable is not None:
        record.skip("compiled engines", unavailable, required=context.on_gpu)
    checks = [("engine beside the model", engine_numerics.check_against_generate, 2.0)]
    if unavailable is None:
        checks.insert(
            0,
            ("compiled engine", engine_numerics.check_compiled, compiling.SHALLOW_COMPILE_SECONDS),
        )
    for name, check, seconds in checks:
        record.attempt(name, partial(check, context, decoding.workload), seconds, required=True)
    run_generate(decoding, (("cached", "fp32"), ("uncached", "fp32")))
    run_eager(decoding, QUICK_CASES if context.quick else FIRST_CASES)
    compiled_cases = QUICK_COMPILED_CASES if context.quick else COMPILED_CASES
    if unavailable is None:
        run_compiled(decoding, compiled_cases[0], compiling.COLD_COMPILE_SECONDS)
    run_generate(decoding, (("cached", "bf16"),))
    run_eager(decoding, () if context.quick else OTHER_CASES)
    for case in decoding.timings:
        if not case.compiled:
            record.attempt(f"{case.name}: a step", partial(count_kernels, decoding, case), 2)
    for case in compiled_cases[1:] if unavailable is None else ():
        run_compiled(decoding, case, compiling.WARM_COMPILE_SECONDS)


def run_generate(decoding: DecodingState, variants: tuple[tuple[str, Precision], ...]) -> None:
    """Times `AR.generate` in some variants."""
    for variant, precision in variants:
        name = f"{variant} generate {precision}"
        work = partial(measure_generate, decoding, name, precision, variant == "cached")
        decoding.context.record.attempt(name, work, 3)
        report_floors(decoding)


def run_eager(decoding: DecodingState, cases: tuple[Case, ...]) -> None:
    """Times some engines."""
    for case in cases:
        decoding.context.record.attempt(case.name, partial(measure_engine, decoding, case), 5)
        report_floors(decoding)


def run_compiled(decoding: DecodingState, case: Case, seconds: float) -> None:
    """Times a compiled engine, with all that is known of its graphs."""
    if decoding.context.quick:
        seconds = compiling.SHALLOW_COMPILE_SECONDS
    decoding.context.record.attempt(case.name, partial(measure_compiled, decoding, case), seconds)


def measure_generate(
    decoding: DecodingState, name: str, precision: Precision, use_cache: bool
) -> None:
    """`AR.generate`, one sentence at a time."""
    context, workload, model = decoding.context, decoding.workload, decoding.model(precision)
    text = torch.tensor(workload.phonemes, device=context.device)
    prompt = torch.from_numpy(workload.prompt.astype(np.int64)).to(context.device)
    generate = partial(
        engine_numerics.generate, model, text, prompt, synthetic.SAMPLING, use_cache=use_cache
    )  # its codes come to the host, so that the clock stops when all is done
    generate(frames=WARMUP_FRAMES)
    started = time.perf_counter()
    generate(frames=workload.frames)
    speed = workload.frames / (time.perf_counter() - started)
    decoding.speeds[name] = speed
    bytes_read = step_bytes(context.config, model, 1, workload)
    limit = context.limits.copy_bytes_per_second / bytes_read * model.config.group_size
    context.record.measurement(
        name, frames_per_second=speed, limit_frames_per_second=limit, share_of_bound=speed / limit,
        times_real_time=speed / FRAME_RATE,
    )  # fmt: skip


def measure_engine(decoding: DecodingState, case: Case) -> Engine:
    """Times an engine: a whole run, and its steady steps; returns it, idle.

    A compiled one says all of the workload before the clock, so that every shape has been compiled
    and captured; what else is slow at first is few steps, of which the median takes no notice.
    """
    context, workload, model = decoding.context, decoding.workload, decoding.model(case.precision)
    sampling = sampling_of(case)
    device_timing.reset_peak(context.device)
    started = time.perf_counter()
    engine, _ = build_engine(
        model, workload, case.streams, guided=case.guided, compiled=case.compiled
    )
    warmup_frames = workload.frames if case.compiled else WARMUP_FRAMES
    add_streams(engine, workload, case.streams, sampling, warmup_frames)
    run_until_idle(engine)
    warmup_seconds = time.perf_counter() - started
    timing = measure(context, engine, workload, case.streams, sampling)
    decoding.timings[case] = timing
    decoding.speeds[case.name] = timing.frames_per_second
    rows = case.streams * (2 if case.guided else 1)
    least = step_bytes(context.config, model, rows, workload) / context.limits.copy_bytes_per_second
    group = model.config.group_size
    complete = all(len(codes) == workload.frames for codes in timing.codes.values())
    context.record.check(f"{case.name}: every stream says {workload.frames} frames", complete)
    context.record.measurement(
        case.name, frames_per_second=case.streams * group / timing.step_seconds,
        limit_frames_per_second=case.streams * group / least,
        share_of_bound=least / timing.step_seconds,
        step_milliseconds=1000 * timing.step_seconds, steps=timing.steps,
        run_frames_per_second=timing.frames_per_second,
        times_real_time=timing.frames_per_second / FRAME_RATE,
        peak_gigabytes=device_timing.peak_gigabytes(context.device), warmup_seconds=warmup_seconds,
    )  # fmt: skip
    return engine


def measure_compiled(decoding: DecodingState, case: Case) -> None:
    """Times a compiled engine, counts its kernels, and checks that its steps are CUDA graphs."""
    with compiling.strict() as counters:
        engine = measure_engine(decoding, case)
        before = counters.cudagraph_replays
        add_streams(
            engine, decoding.workload, case.streams, sampling_of(case), decoding.workload.frames
        )
        run_until_idle(engine)
        engine_numerics.check_cudagraphs(
            decoding.context, case.name, counters, counters.cudagraph_replays - before,
            decoding.timings[case].steps,
        )  # fmt: skip
        count_kernels(decoding, case, engine)


def sampling_of(case: Case) -> Sampling:
    """How its streams are drawn."""
    return synthetic.GUIDED_SAMPLING if case.guided else synthetic.SAMPLING


def count_kernels(decoding: DecodingState, case: Case, engine: Engine | None = None) -> None:
    """Kernels of a step, and how busy they keep the card; of an engine of its own, unless there is
    one that has been warmed up."""
    context, workload = decoding.context, decoding.workload
    if engine is None:
        model = decoding.model(case.precision)
        engine, _ = build_engine(
            model, workload, case.streams, guided=case.guided, compiled=case.compiled
        )
    launches = profile_steps(context, engine, workload, case.streams, sampling_of(case))
    context.record.measurement(
        f"{case.name}: a step", kernels=launches.kernels / PROFILED_STEPS,
        card_busy=launches.busy_seconds / PROFILED_STEPS / decoding.timings[case].step_seconds,
        graphs=launches.graphs / PROFILED_STEPS,
    )  # fmt: skip


def report_floors(decoding: DecodingState) -> None:
    """Tells the record each floor as soon as both its figures are there."""
    speeds, record = decoding.speeds, decoding.context.record
    waiting = {floor["name"] for floor in record.floors if floor["value"] is None}
    for name, (over, under, _) in FLOORS.items():
        if name in waiting and over in speeds and under in speeds:
            record.floor(name, speeds[over] / speeds[under])
