"""Streams that decode: what they say, in which engine, and how long a step of it takes."""

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from valle.jobs.bench.gpu import device_timing, synthetic
from valle.jobs.bench.gpu.record import PhaseContext
from valle.model.ar import AR
from valle.model.config import ModelConfig
from valle.model.quantize import Precision, convert
from valle.model.sampling import Sampling
from valle.model.tokens import EOS, N_CODEBOOKS
from valle.serve.engine.engine import Engine
from valle.serve.engine.request import Request
from valle.serve.engine.runner import Runner
from valle.serve.engine.scheduler import Scheduler

PROFILED_STEPS = 5
"""Steps under the profiler."""


@dataclass(frozen=True)
class Workload:
    """What every stream says."""

    phonemes: list[int]
    prompt: NDArray[np.int16]
    frames: int

    @classmethod
    def default(cls, quick: bool) -> "Workload":
        """A sentence of four seconds and three seconds of a voice; quick, a tenth of it."""
        generator = np.random.default_rng(0)
        n_phonemes, prompt, frames = (6, 9, 12) if quick else (60, 225, 300)
        return cls(
            generator.integers(2, 100, n_phonemes).tolist(),
            synthetic.random_codes(generator, N_CODEBOOKS, prompt), frames,
        )  # fmt: skip


def endless_ar(context: PhaseContext, precision: Precision) -> AR:
    """An untrained model that never stops."""
    model = synthetic.build_model("ar", context.config, context.device).eval()
    assert isinstance(model, AR)
    with torch.no_grad():
        model.head.bias[EOS] = -1e9
    return convert(model, precision)


def step_bytes(config: ModelConfig, model: AR, rows: int, workload: Workload) -> float:
    """Bytes that a step of so many rows has to read, half way through the speech."""
    size = model.head.weight.element_size()
    matrices = sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if not name.endswith(("embedding.weight", "tables"))
    )
    positions = model.capacity(
        len(workload.phonemes), workload.prompt.shape[1], workload.frames // 2
    )
    return matrices + 2.0 * config.n_layers * config.width * size * rows * positions


def build_engine(
    model: AR, workload: Workload, streams: int, *, guided: bool, compiled: bool
) -> tuple[Engine, Runner]:
    """An engine with room for so many streams of the workload, and what computes in it."""
    positions = model.capacity(len(workload.phonemes), workload.prompt.shape[1], workload.frames)
    runner = Runner(model, slots=streams, max_positions=positions, guided=guided, compiled=compiled)
    return Engine(runner, Scheduler(streams)), runner


def add_streams(
    engine: Engine, workload: Workload, streams: int, sampling: Sampling, frames: int
) -> None:
    """Queues the streams."""
    for number in range(streams):
        engine.add(
            Request(
                id=str(number), phonemes=workload.phonemes, prompt=workload.prompt,
                sampling=sampling, max_frames=frames, seed=number,
            )
        )  # fmt: skip


def run_until_idle(engine: Engine) -> dict[str, list[int]]:
    """Codes of every stream, to the end."""
    codes: dict[str, list[int]] = {}
    while not engine.idle:
        for output in engine.step():
            codes.setdefault(output.request_id, []).extend(output.codes)
    return codes


@dataclass(frozen=True)
class EngineTiming:
    """One run of an engine."""

    frames_per_second: float
    """All frames by all seconds, reading in and ending included."""
    step_seconds: float
    """Median of the steps in which all streams ran."""
    steps: int
    """In which that was so."""
    codes: dict[str, list[int]]


def measure(
    context: PhaseContext, engine: Engine, workload: Workload, streams: int, sampling: Sampling
) -> EngineTiming:
    """A run by the clock."""
    codes: dict[str, list[int]] = {}
    steady: list[float] = []
    add_streams(engine, workload, streams, sampling, workload.frames)
    device_timing.synchronize(context.device)
    started = before = time.perf_counter()
    while not engine.idle:
        full = engine.n_running == streams
        for output in engine.step():
            codes.setdefault(output.request_id, []).extend(output.codes)
        now = time.perf_counter()
        if full and engine.n_running == streams:
            steady.append(now - before)
        before = now
    device_timing.synchronize(context.device)
    seconds = time.perf_counter() - started
    assert steady, "no step had all streams: too few frames for so many"
    frames = sum(map(len, codes.values()))
    return EngineTiming(frames / seconds, statistics.median(steady), len(steady), codes)


def profile_steps(
    context: PhaseContext, engine: Engine, workload: Workload, streams: int, sampling: Sampling
) -> device_timing.Launches:
    """Kernels of some steps in which all streams run."""
    add_streams(engine, workload, streams, sampling, workload.frames)
    while engine.n_running < streams:
        engine.step()
        assert not engine.idle, "the first ended before the last had been read"
    engine.step()

    def run_steps() -> None:
        for _ in range(PROFILED_STEPS):
            engine.step()

    launches = device_timing.profile_launches(context.device, run_steps)
    for number in range(streams):
        engine.abort(str(number))
    return launches
