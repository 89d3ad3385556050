"""P4, decoding the first codebook: `generate` uncached and cached, and engines of many streams.

An untrained model without EOS decodes 300 frames after a prompt of three seconds. The lower bound
of a step is memory traffic: a decode step reads every matrix once, and the keys and values of every
row (two rows per guided stream), at the bandwidth that P0 measured. Steps are timed while all
streams decode and none is in prefill; frames per second of the whole run are given beside.

Compiled engines must run as CUDA graphs. The compiler's count of skipped graphs and the launches of
graphs show it, first with a model of two layers, which compiles in seconds where twelve take a
minute. Kernels are counted by a profiler, which slows the process from then on: eager engines are
timed before it.
"""

import time
from dataclasses import dataclass
from functools import partial
from typing import Final

from valle.jobs.bench.gpu import compiling, device_timing, engine_numerics, synthetic
from valle.jobs.bench.gpu.record import PhaseContext
from valle.jobs.bench.gpu.workload import (
    PROFILED_STEPS,
    EngineTiming,
    Workload,
    add_streams,
    build_engine,
    endless_ar,
    generate,
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
"""Frames decoded before the clock starts."""


@dataclass(frozen=True)
class Case:
    """An engine to measure."""

    precision: Precision
    streams: int
    guided: bool
    compiled: bool = False

    @property
    def name(self) -> str:
        """Name of its measurement."""
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
"""Two measurements and the least ratio of their frames per second."""


@dataclass(frozen=True)
class DecodingState:
    """State shared by the cases."""

    context: PhaseContext
    workload: Workload
    models: dict[Precision, AR]
    """Untrained models by precision, built at first use."""
    speeds: dict[str, float]
    """Frames per second by the name of the measurement."""
    timings: dict[Case, EngineTiming]

    def model(self, precision: Precision) -> AR:
        """The untrained model in this precision."""
        if precision not in self.models:
            self.models[precision] = endless_ar(self.context, precision)
        return self.models[precision]


def run(context: PhaseContext) -> None:
    """Checks first, then measurements, the most informative first; compiling all layers is started
    only where there is time for it."""
    device_timing.allow_tf32(matmul=False, convolution=False)
    decoding = DecodingState(context, Workload.default(context.quick), {}, {}, {})
    record = context.record
    for name, (_, _, floor) in FLOORS.items():
        if not context.quick:
            record.expect_floor(name, floor)
    unavailable = (
        "only on a CUDA device"
        if not context.on_gpu
        else compiling.unavailable_reason(context.device)
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

    # eager engines before compiled ones, and both before the profiler
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
    """Times `AR.generate`, cached or uncached, in some precisions."""
    for variant, precision in variants:
        name = f"{variant} generate {precision}"
        work = partial(measure_generate, decoding, name, precision, variant == "cached")
        decoding.context.record.attempt(name, work, 3)
        report_floors(decoding)


def run_eager(decoding: DecodingState, cases: tuple[Case, ...]) -> None:
    """Times eager engines."""
    for case in cases:
        decoding.context.record.attempt(case.name, partial(measure_engine, decoding, case), 5)
        report_floors(decoding)


def run_compiled(decoding: DecodingState, case: Case, seconds: float) -> None:
    """Times a compiled engine if at least `seconds` are left."""
    if decoding.context.quick:
        seconds = compiling.SHALLOW_COMPILE_SECONDS
    decoding.context.record.attempt(case.name, partial(measure_compiled, decoding, case), seconds)


def measure_generate(
    decoding: DecodingState, name: str, precision: Precision, use_cache: bool
) -> None:
    """Times `AR.generate` of one sentence."""
    context, workload, model = decoding.context, decoding.workload, decoding.model(precision)
    generate_frames = partial(generate, model, workload, synthetic.SAMPLING, use_cache=use_cache)
    generate_frames(WARMUP_FRAMES)
    started = time.perf_counter()
    generate_frames(workload.frames)  # waits for the device: its codes come to the host
    speed = workload.frames / (time.perf_counter() - started)
    decoding.speeds[name] = speed
    bytes_read = step_bytes(context.config, model, 1, workload)
    limit = context.limits.copy_bytes_per_second / bytes_read * model.config.group_size
    context.record.measurement(
        name,
        frames_per_second=speed,
        limit_frames_per_second=limit,
        share_of_bound=speed / limit,
        times_real_time=speed / FRAME_RATE,
    )


def measure_engine(decoding: DecodingState, case: Case) -> Engine:
    """Times a run of an engine and its steady steps; returns the engine, idle.

    The warm-up of a compiled engine is the whole workload, so that every shape is compiled and
    captured. Other slow steps at the beginning are few and do not move the median.
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
    rows = case.streams * (2 if case.guided else 1)  # guidance has an unconditional twin
    least = step_bytes(context.config, model, rows, workload) / context.limits.copy_bytes_per_second
    group = model.config.group_size
    complete = all(len(codes) == workload.frames for codes in timing.codes.values())
    context.record.check(f"{case.name}: every stream has {workload.frames} frames", complete)
    context.record.measurement(
        case.name,
        frames_per_second=case.streams * group / timing.step_seconds,
        limit_frames_per_second=case.streams * group / least,
        share_of_bound=least / timing.step_seconds,
        step_milliseconds=1000 * timing.step_seconds,
        steps=timing.steps,
        run_frames_per_second=timing.frames_per_second,
        times_real_time=timing.frames_per_second / FRAME_RATE,
        peak_gigabytes=device_timing.peak_gigabytes(context.device),
        warmup_seconds=warmup_seconds,
    )
    return engine


def measure_compiled(decoding: DecodingState, case: Case) -> None:
    """Times a compiled engine, checks that its steps are CUDA graphs, and counts its kernels."""
    with compiling.strict() as counters:
        engine = measure_engine(decoding, case)
        # all shapes are compiled: every further step must replay a graph
        before = counters.cudagraph_replays
        add_streams(
            engine, decoding.workload, case.streams, sampling_of(case), decoding.workload.frames
        )
        run_until_idle(engine)
        engine_numerics.check_cudagraphs(
            decoding.context,
            case.name,
            counters,
            counters.cudagraph_replays - before,
            decoding.timings[case].steps,
        )
        count_kernels(decoding, case, engine)


def sampling_of(case: Case) -> Sampling:
    """Sampling of its streams."""
    return synthetic.GUIDED_SAMPLING if case.guided else synthetic.SAMPLING


def count_kernels(decoding: DecodingState, case: Case, engine: Engine | None = None) -> None:
    """Counts the kernels of a step and the share of its time that the device is busy; builds an
    engine unless it is given one that has been warmed up."""
    context, workload = decoding.context, decoding.workload
    if engine is None:
        model = decoding.model(case.precision)
        engine, _ = build_engine(
            model, workload, case.streams, guided=case.guided, compiled=case.compiled
        )
    launches = profile_steps(context, engine, workload, case.streams, sampling_of(case))
    context.record.measurement(
        f"{case.name}: a step",
        kernels=launches.kernels / PROFILED_STEPS,
        device_busy=launches.busy_seconds / PROFILED_STEPS / decoding.timings[case].step_seconds,
        graphs=launches.graphs / PROFILED_STEPS,
    )


def report_floors(decoding: DecodingState) -> None:
    """Records each floor as soon as both its speeds are measured."""
    speeds, record = decoding.speeds, decoding.context.record
    waiting = {floor["name"] for floor in record.floors if floor["value"] is None}
    for name, (over, under, _) in FLOORS.items():
        if name in waiting and over in speeds and under in speeds:
            record.floor(name, speeds[over] / speeds[under])
