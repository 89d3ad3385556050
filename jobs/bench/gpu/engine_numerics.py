"""P4's correctness: an engine, compiled or not, computes what the model computes without one.

Codes cannot be compared: to an untrained model a thousand codes are almost equally likely, so that
rounding now and then changes the code that is drawn, and with it all that follow. Compared are the
hidden states from which frames are drawn; the frame at which codes differ is only recorded.
"""

from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from valle.jobs.bench.gpu import compiling, synthetic
from valle.jobs.bench.gpu.numerics import relative_error
from valle.jobs.bench.gpu.record import PhaseContext
from valle.jobs.bench.gpu.workload import (
    Workload,
    add_streams,
    build_engine,
    endless_ar,
    generate,
    run_until_idle,
)
from valle.model.sequence import single_batch
from valle.serve.engine.engine import Engine
from valle.serve.engine.runner import Runner

TOLERANCE = 1e-4
"""Relative norm of the difference of hidden states in float32, TF32 off."""

COMPARED_FRAMES = 60
MIN_FRAMES = 10
"""Least number of frames that the two engines must have in common: fewer would show too little."""

STREAMS: Final = 4


def check_compiled(context: PhaseContext, workload: Workload) -> None:
    """Checks that a compiled engine has an eager engine's hidden states and runs as CUDA graphs.

    The model has two layers of full width: its code is that of all layers and compiles in seconds.
    """
    shallow = replace(context, config=replace(context.config, n_layers=2))
    model, frames = endless_ar(shallow, "fp32"), min(COMPARED_FRAMES, workload.frames)
    with compiling.strict() as counters:
        engines = [
            build_engine(model, workload, STREAMS, guided=True, compiled=compiled)
            for compiled in (True, False)
        ]
        for engine, _ in engines:
            add_streams(engine, workload, STREAMS, synthetic.GUIDED_SAMPLING, frames)
        error, common_frames = step_both(engines)
        context.record.check(
            "compiled hidden states = eager, two layers",
            error <= TOLERANCE and common_frames >= min(MIN_FRAMES, frames),
            relative_error=error,
            frames=common_frames,
            of=frames,
            graphs_traced=counters.graphs,
        )
        for engine, _ in engines:
            for number in range(STREAMS):
                engine.abort(str(number))
        engine, _ = engines[0]
        # all shapes are compiled: every step of a second run must replay a graph
        add_streams(engine, workload, STREAMS, synthetic.GUIDED_SAMPLING, frames)
        before = counters.cudagraph_replays
        run_until_idle(engine)
    check_cudagraphs(
        context, "two layers", counters, counters.cudagraph_replays - before, frames - 1
    )


def step_both(engines: list[tuple[Engine, Runner]]) -> tuple[float, int]:
    """Steps two engines of the same streams until these end or their codes differ.

    Returns the largest relative difference of their hidden states, and the least number of frames
    that any stream has by then.
    """
    (first, runner), (second, other) = engines
    error = 0.0
    n_frames: dict[str, int] = {}
    while not first.idle:
        outputs = first.step()
        if outputs != second.step():
            break
        for output in outputs:
            n_frames[output.request_id] = n_frames.get(output.request_id, 0) + len(output.codes)
        if rows := hidden_rows(runner):
            error = max(error, relative_error(runner._hidden[:rows], other._hidden[:rows]))
    return error, min(n_frames.values(), default=0)


def hidden_rows(runner: Runner) -> int:
    """Number of rows that decode, those of guidance included."""
    return runner.batch_size * runner._rows_per_slot


def check_cudagraphs(
    context: PhaseContext, name: str, counters: compiling.CompileCounters, replays: int, steps: int
) -> None:
    """Checks that nothing was compiled without CUDA graphs and that every step launches at least
    one."""
    context.record.check(
        f"{name}: CUDA graphs were captured",
        counters.cudagraph_skips == 0 and replays >= steps,
        skipped=counters.cudagraph_skips,
        launches_per_step=replays / steps,
        graphs_traced=counters.graphs,
    )


def check_against_generate(context: PhaseContext, workload: Workload) -> None:
    """Checks an engine's hidden states against one uncached pass over the frames it
    generated, and records the frame at which `generate`, with the same random numbers, differs."""
    model, frames = endless_ar(context, "fp32"), min(COMPARED_FRAMES, workload.frames)
    engine, runner = build_engine(model, workload, 1, guided=False, compiled=False)
    add_streams(engine, workload, 1, synthetic.SAMPLING, frames)
    codes: list[int] = []
    states: list[Tensor] = []
    while not engine.idle:
        for output in engine.step():
            codes += output.codes
        if hidden_rows(runner):
            states.append(runner._hidden[0].clone())
    device = context.device
    text = torch.tensor(workload.phonemes, device=device)
    prompt = torch.from_numpy(workload.prompt.astype(np.int64)).to(device)
    with torch.inference_mode():
        expected = model.hidden(single_batch(text, prompt, torch.tensor(codes, device=device)))[0]
    # state i follows group i of the codes; the reference has one more before the first group
    error = relative_error(torch.stack(states), expected[1 : 1 + len(states)])
    context.record.check(
        "engine hidden states = one pass without a cache, float32",
        error <= TOLERANCE,
        relative_error=error,
        states=len(states),
    )
    reference_codes = generate(model, workload, synthetic.SAMPLING, frames)
    pairs = enumerate(zip(codes, reference_codes, strict=True))
    departs_at = next((i for i, (a, b) in pairs if a != b), None)
    context.record.measurement(
        "engine beside generate, float32", frames=frames, departs_at=departs_at
    )
