"""Streams that decode: what they say, in which engine, and how long a tick of it takes."""

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from valle.jobs.bench.gpu import samples, timing
from valle.jobs.bench.gpu.record import Bench
from valle.model.ar import AR
from valle.model.config import ModelConfig
from valle.model.precision import Precision, convert
from valle.model.sampling import Sampling
from valle.model.tokens import EOS, N_CODEBOOKS
from valle.serve.engine.engine import Engine
from valle.serve.engine.request import Request
from valle.serve.engine.runner import Runner
from valle.serve.engine.scheduler import Scheduler

PROFILED = 5
"""Ticks under the profiler."""


@dataclass(frozen=True)
class Task:
    """What every stream says."""

    phonemes: list[int]
    prompt: NDArray[np.int16]
    frames: int

    @classmethod
    def of(cls, quick: bool) -> "Task":
        """A sentence of four seconds and three seconds of a voice; quick, a tenth of it."""
        generator = np.random.default_rng(0)
        n_phonemes, prompt, frames = (6, 9, 12) if quick else (60, 225, 300)
        return cls(
            generator.integers(2, 100, n_phonemes).tolist(),
            samples.random_codes(generator, N_CODEBOOKS, prompt), frames,
        )  # fmt: skip


def untrained(bench: Bench, precision: Precision) -> AR:
    """An untrained model that never stops."""
    model = samples.build("ar", bench.config, bench.device).eval()
    assert isinstance(model, AR)
    with torch.no_grad():
        model.head.bias[EOS] = -1e9
    return convert(model, precision)


def tick_bytes(config: ModelConfig, model: AR, rows: int, task: Task) -> float:
    """Bytes that a tick of so many rows has to read, half way through the speech."""
    size = model.head.weight.element_size()
    matrices = sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if not name.endswith(("embedding.weight", "tables"))
    )
    positions = model.capacity(len(task.phonemes), task.prompt.shape[1], task.frames // 2)
    return matrices + 2.0 * config.n_layers * config.width * size * rows * positions


def engine_and_runner(
    model: AR, task: Task, streams: int, *, guided: bool, compiled: bool
) -> tuple[Engine, Runner]:
    """An engine with room for so many streams of the task, and what computes in it."""
    positions = model.capacity(len(task.phonemes), task.prompt.shape[1], task.frames)
    runner = Runner(model, slots=streams, positions=positions, guided=guided, compiled=compiled)
    return Engine(runner, Scheduler(streams)), runner


def add(engine: Engine, task: Task, streams: int, sampling: Sampling, frames: int) -> None:
    """Queues the streams."""
    for number in range(streams):
        engine.add(
            Request(
                id=str(number), phonemes=task.phonemes, prompt=task.prompt, sampling=sampling,
                max_frames=frames, seed=number,
            )
        )  # fmt: skip


def drain(engine: Engine) -> dict[str, list[int]]:
    """Codes of every stream, to the end."""
    codes: dict[str, list[int]] = {}
    while not engine.idle:
        for event in engine.step():
            codes.setdefault(event.id, []).extend(event.codes)
    return codes


@dataclass(frozen=True)
class Measured:
    """One run of an engine."""

    frames_per_second: float
    """All frames by all seconds, reading in and ending included."""
    tick_seconds: float
    """Median of the ticks in which all streams ran."""
    ticks: int
    """In which that was so."""
    codes: dict[str, list[int]]


def measure(
    bench: Bench, speaker: Engine, task: Task, streams: int, sampling: Sampling
) -> Measured:
    """A run by the clock."""
    codes: dict[str, list[int]] = {}
    steady: list[float] = []
    add(speaker, task, streams, sampling, task.frames)
    timing.synchronize(bench.device)
    started = before = time.perf_counter()
    while not speaker.idle:
        full = speaker.running == streams
        for event in speaker.step():
            codes.setdefault(event.id, []).extend(event.codes)
        now = time.perf_counter()
        if full and speaker.running == streams:
            steady.append(now - before)
        before = now
    timing.synchronize(bench.device)
    seconds = time.perf_counter() - started
    assert steady, "no tick had all streams: too few frames for so many"
    frames = sum(len(said) for said in codes.values())
    return Measured(frames / seconds, statistics.median(steady), len(steady), codes)


def profile(
    bench: Bench, speaker: Engine, task: Task, streams: int, sampling: Sampling
) -> timing.Launches:
    """Kernels of some ticks in which all streams run."""
    add(speaker, task, streams, sampling, task.frames)
    while speaker.running < streams:
        speaker.step()
        assert not speaker.idle, "the first ended before the last had been read"
    speaker.step()

    def ticks() -> None:
        for _ in range(PROFILED):
            speaker.step()

    launched = timing.launches(bench.device, ticks)
    for number in range(streams):
        speaker.abort(str(number))
    return launched
