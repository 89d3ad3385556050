"""P4's truth: an engine computes what the model does without one, compiled or not.

Speech is no measure: an untrained model finds a thousand codes almost equally likely, so that the
last digit of a number decides now and then what is drawn, and all that follows differs. What is
compared is the hidden state from which each frame is drawn; where speech departs is written down.
"""

from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from valle.jobs.bench.gpu import compiling, samples
from valle.jobs.bench.gpu.record import Bench
from valle.jobs.bench.gpu.streams import Task, add, drain, engine_and_runner, untrained
from valle.jobs.bench.gpu.truth import relative
from valle.model.ar import AR, single
from valle.model.sampling import Sampling
from valle.serve.engine.engine import Engine
from valle.serve.engine.runner import Runner

TOLERANCE = 1e-4
"""Relative norm of the difference of hidden states in float32, TF32 off."""

COMPARED_FRAMES = 60
LEAST_FRAMES = 10
"""Of every stream, before speech departs: what is the same for fewer shows too little."""

STREAMS: Final = 4


def compiled(bench: Bench, task: Task) -> None:
    """Checks that a compiled engine is one, with CUDA graphs, and that its hidden states are an
    eager engine's.

    Two layers of the model's width: the code is that of all layers, and compiles in seconds.
    """
    shallow = replace(bench, config=replace(bench.config, n_layers=2))
    model, frames = untrained(shallow, "fp32"), min(COMPARED_FRAMES, task.frames)
    with compiling.strict() as compilations:
        engines = [
            engine_and_runner(model, task, STREAMS, guided=True, compiled=compiled)
            for compiled in (True, False)
        ]
        for engine, _ in engines:
            add(engine, task, STREAMS, samples.GUIDED, frames)
        error, together = in_step(engines)
        bench.record.check(
            "compiled hidden states = eager, two layers",
            error <= TOLERANCE and together >= min(LEAST_FRAMES, frames), relative_error=error,
            frames=together, of=frames, graphs_traced=compilations.graphs,
        )  # fmt: skip
        for engine, _ in engines:
            for number in range(STREAMS):
                engine.abort(str(number))
        engine, _ = engines[0]
        add(engine, task, STREAMS, samples.GUIDED, frames)  # every shape has been met
        before = compilations.replays
        drain(engine)
    captured(bench, "two layers", compilations, compilations.replays - before, frames - 1)


def in_step(engines: list[tuple[Engine, Runner]]) -> tuple[float, int]:
    """Steps two engines of the same streams until these end or say different things.

    Returns the largest relative difference of their hidden states, and the least number of frames
    that any stream had said by then.
    """
    (first, runner), (second, other) = engines
    error = 0.0
    said: dict[str, int] = {}
    while not first.idle:
        events = first.step()
        if events != second.step():
            break
        for event in events:
            said[event.id] = said.get(event.id, 0) + len(event.codes)
        if rows := hidden_rows(runner):
            error = max(error, relative(runner._hidden[:rows], other._hidden[:rows]))
    return error, min(said.values(), default=0)


def hidden_rows(runner: Runner) -> int:
    """Rows of the streams that are being spoken."""
    return runner.streams * runner._rows_per_slot


def captured(
    bench: Bench, name: str, compilations: compiling.Compilations, replays: int, ticks: int
) -> None:
    """Checks that CUDA graphs were captured and used: nothing was compiled without, and a tick
    launches one at least."""
    bench.record.check(
        f"{name}: CUDA graphs were captured", compilations.skipped == 0 and replays >= ticks,
        skipped=compilations.skipped, launches_per_tick=replays / ticks,
        graphs_traced=compilations.graphs,
    )  # fmt: skip


def with_reference(bench: Bench, task: Task) -> None:
    """Checks an engine's hidden states against one pass over all that it said, without a cache;
    and writes down where `generate` departs from it, one way to draw on both sides."""
    model, frames = untrained(bench, "fp32"), min(COMPARED_FRAMES, task.frames)
    engine, runner = engine_and_runner(model, task, 1, guided=False, compiled=False)
    add(engine, task, 1, samples.SPOKEN, frames)
    codes: list[int] = []
    states: list[Tensor] = []
    while not engine.idle:
        for event in engine.step():
            codes += event.codes
        if hidden_rows(runner):
            states.append(runner._hidden[0].clone())
    device = bench.device
    text = torch.tensor(task.phonemes, device=device)
    prompt = torch.from_numpy(task.prompt.astype(np.int64)).to(device)
    with torch.inference_mode():
        expected = model.hidden(single(text, prompt, torch.tensor(codes, device=device)))[0]
    # state i follows group i; the reference's first precedes all, its last follows the last
    error = relative(torch.stack(states), expected[1 : 1 + len(states)])
    bench.record.check(
        "engine hidden states = one pass without a cache, float32", error <= TOLERANCE,
        relative_error=error, states=len(states),
    )  # fmt: skip
    spoken = generate(model, text, prompt, samples.SPOKEN, frames)
    departs = next((i for i, (a, b) in enumerate(zip(codes, spoken, strict=True)) if a != b), None)
    bench.record.measurement("engine beside generate, float32", frames=frames, departs_at=departs)


def generate(
    model: AR, text: Tensor, prompt: Tensor, sampling: Sampling, frames: int, use_cache: bool = True
) -> list[int]:
    """So many frames of `AR.generate` with the seed of stream 0."""
    codes = model.generate(
        text, prompt, sampling=sampling, max_frames=frames, use_cache=use_cache,
        generator=torch.Generator(text.device).manual_seed(0),
    ).codes  # fmt: skip
    said: list[int] = codes.tolist()
    return said
