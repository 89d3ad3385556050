"""P4, decoding the first codebook: without a cache, with one, and many streams in the engine.

An untrained model that may not stop says 300 frames after a prompt of three seconds. The bound is
memory: a tick of the engine reads every matrix once, and the keys and values of every row (two rows
to a guided stream); bytes by the bandwidth that P0 measured are the least a tick can take. Ticks
are timed where all streams run and none is read in; frames a second of the whole run are beside.

`compiled` promises CUDA graphs. Whether there were any is asserted in two ways: the compiler counts
what it skipped, the profiler the launches of graphs.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import torch

from valle.jobs.gpu import samples, timing
from valle.jobs.gpu.card import compile_hindrance
from valle.jobs.gpu.record import Bench
from valle.jobs.gpu.streams import (
    PROFILED,
    Task,
    add,
    drain,
    make_engine,
    measure,
    profile,
    tick_bytes,
    untrained,
)
from valle.model.ar import AR
from valle.model.tokens import FRAME_RATE
from valle.serve.precision import Precision

STREAMS: Final = (1, 16, 64)
PRECISIONS: Final[tuple[Precision, ...]] = ("bf16", "fp32")
TIMES_ONE, TIMES_UNCACHED = 5.0, 20.0
"""Floors: 16 streams against one, and 16 streams against decoding without a cache."""

COMPARED_FRAMES = 60


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


EAGER: Final = tuple(
    Case(precision, streams, guided)
    for guided in (False, True)
    for precision in PRECISIONS
    for streams in STREAMS
)
EAGER_QUICK: Final = (Case("fp32", 1, False), Case("fp32", 3, True), Case("bf16", 2, False))
COMPILED: Final = tuple(
    Case("bf16", streams, guided, compiled=True)
    for guided, streams in ((True, 16), (True, 1), (True, 64), (False, 1), (False, 16), (False, 64))
)


class Speeds:
    """Frames a second by name, and what was said."""

    def __init__(self) -> None:
        self.frames_per_second: dict[str, float] = {}
        self.codes: dict[str, list[int]] = {}


def run(bench: Bench) -> None:
    """The reference with and without cache, engines, what tokens they say."""
    timing.allow_tf32(matmul=False, convolution=False)
    task, speeds, record = Task.of(bench.quick), Speeds(), bench.record
    ways: tuple[tuple[str, Precision], ...] = (
        ("cached", "fp32"), ("uncached", "fp32"), ("cached", "bf16"),
    )  # fmt: skip
    for way, precision in ways:
        name = f"{way} generate {precision}"
        record.attempt(
            name, partial(generate, bench, task, precision, way == "cached", name, speeds)
        )
    models: dict[Precision, AR] = {}
    for case in EAGER_QUICK if bench.quick else EAGER:
        record.attempt(case.name, partial(engine, bench, task, case, models, speeds), 3)
    judge(bench, speeds)
    hindrance = "only on a card" if not bench.on_card else compile_hindrance(bench.device)
    if hindrance is not None:
        record.leave_out("compiled engines", hindrance, required=bench.on_card)
        return
    first, *others = COMPILED
    compiled = partial(engine, bench, task, first, models, speeds)
    record.attempt(first.name, compiled, 20, required=True)
    record.attempt("compiled tokens", partial(same_tokens, bench, task), 20, required=True)
    for case in others:
        record.attempt(case.name, partial(engine, bench, task, case, models, speeds), 10)


def generate(
    bench: Bench, task: Task, precision: Precision, use_cache: bool, name: str, speeds: Speeds
) -> None:
    """`AR.generate`, one sentence at a time."""
    model, device = untrained(bench, precision), bench.device
    text = torch.tensor(task.phonemes, device=device)
    prompt = torch.from_numpy(task.prompt.astype(np.int64)).to(device)

    def say(frames: int) -> list[int]:
        codes = model.generate(
            text, prompt, sampling=samples.SPOKEN, max_frames=frames, use_cache=use_cache,
            generator=torch.Generator(device).manual_seed(0),
        ).codes  # fmt: skip
        return codes.tolist()

    say(min(10, task.frames))
    started = time.perf_counter()
    said = say(task.frames)
    speed = task.frames / (time.perf_counter() - started)
    speeds.frames_per_second[name], speeds.codes[name] = speed, said
    bytes_read = tick_bytes(bench.config, model, 1, task)
    limit = bench.card.bytes_per_second / bytes_read * bench.config.group
    bench.record.measurement(
        name, frames_per_second=speed, limit_frames_per_second=limit, share_of_bound=speed / limit,
        times_real_time=speed / FRAME_RATE,
    )  # fmt: skip


def engine(
    bench: Bench, task: Task, case: Case, models: dict[Precision, AR], speeds: Speeds
) -> None:
    """Measures an engine: whole run, steady ticks, kernels of a tick, CUDA graphs."""
    from torch._dynamo.utils import counters

    if case.precision not in models:
        models[case.precision] = untrained(bench, case.precision)
    model = models[case.precision]
    sampling = samples.GUIDED if case.guided else samples.SPOKEN
    counters.clear()
    timing.reset_peak(bench.device)
    begun = time.perf_counter()
    speaker = make_engine(model, task, case.streams, case.guided, case.compiled)
    add(speaker, task, case.streams, sampling, min(10, task.frames))
    drain(speaker)
    if case.compiled:  # every number of positions that comes later is compiled now
        add(speaker, task, case.streams, sampling, task.frames)
        drain(speaker)
    warm_seconds = time.perf_counter() - begun
    measured = measure(bench, speaker, task, case.streams, sampling)
    speeds.frames_per_second[case.name] = measured.frames_per_second
    speeds.codes[case.name] = measured.codes["0"]
    rows = case.streams * (2 if case.guided else 1)
    least = tick_bytes(bench.config, model, rows, task) / bench.card.bytes_per_second
    group = bench.config.group
    whole = all(len(codes) == task.frames for codes in measured.codes.values())
    bench.record.check(f"{case.name}: every stream says {task.frames} frames", whole)
    bench.record.measurement(
        case.name, frames_per_second=case.streams * group / measured.tick_seconds,
        limit_frames_per_second=case.streams * group / least,
        share_of_bound=least / measured.tick_seconds,
        tick_milliseconds=1000 * measured.tick_seconds,
        whole_run_frames_per_second=measured.frames_per_second,
        times_real_time=measured.frames_per_second / FRAME_RATE,
        peak_gigabytes=timing.peak_gigabytes(bench.device), warm_up_seconds=warm_seconds,
    )  # fmt: skip

    def kernels() -> None:
        launched = profile(bench, speaker, task, case.streams, sampling)
        bench.record.measurement(
            f"{case.name}: a tick", kernels=launched.kernels / PROFILED,
            card_busy=launched.busy_seconds / PROFILED / measured.tick_seconds,
            graphs=launched.graphs / PROFILED,
        )  # fmt: skip
        if case.compiled:
            skipped = counters["inductor"]["cudagraph_skips"]
            bench.record.check(
                f"{case.name}: CUDA graphs were captured",
                skipped == 0 and launched.graphs >= PROFILED, skipped=skipped,
                launches_per_tick=launched.graphs / PROFILED,
            )  # fmt: skip

    bench.record.attempt(f"{case.name}: a tick", kernels, required=case.compiled)


def same_tokens(bench: Bench, task: Task) -> None:
    """Checks that four guided streams say the same compiled and not, in float32."""
    model = untrained(bench, "fp32")
    said = []
    for compiled in (False, True):
        speaker = make_engine(model, task, 4, True, compiled)
        add(speaker, task, 4, samples.GUIDED, min(COMPARED_FRAMES, task.frames))
        said.append(drain(speaker))
    check_tokens(bench, "compiled tokens = eager tokens", said[1], said[0])


def check_tokens(
    bench: Bench, name: str, found: dict[str, list[int]], expected: dict[str, list[int]]
) -> None:
    """Records whether streams say the same, and where the first of them departs."""
    departures = {
        stream: next(
            (i for i, (a, b) in enumerate(zip(found[stream], codes, strict=True)) if a != b)
        )
        for stream, codes in expected.items()
        if found[stream] != codes
    }
    bench.record.check(
        name, not departures, frames=sum(map(len, expected.values())), departs_at=departures
    )


def judge(bench: Bench, speeds: Speeds) -> None:
    """Floors, and one stream of the engine against the reference."""
    reference, alone = "cached generate fp32", Case("fp32", 1, False).name
    if reference in speeds.codes and alone in speeds.codes:
        check_tokens(
            bench, "engine tokens = generate's, float32", {"0": speeds.codes[alone]},
            {"0": speeds.codes[reference]},
        )  # fmt: skip
    if bench.quick:
        return
    fast = speeds.frames_per_second
    floors: Sequence[tuple[str, str, str, float]] = (
        ("16 streams by one, bf16", "engine 16 bf16", "engine 1 bf16", TIMES_ONE),
        (
            "16 streams by uncached, fp32",
            "engine 16 fp32",
            "uncached generate fp32",
            TIMES_UNCACHED,
        ),
    )
    for name, over, under, floor in floors:
        if over in fast and under in fast:
            bench.record.floor(name, fast[over] / fast[under], floor)
