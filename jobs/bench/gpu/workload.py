"""The workload of the decoding benchmarks, and the time that an engine's steps take for it."""

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
from valle.model.nar_decoding import NARRequest
from valle.model.quantize import Precision, convert
from valle.model.sampling import Sampling
from valle.model.tokens import EOS, N_CODEBOOKS
from valle.serve.engine.engine import Engine
from valle.serve.engine.request import Request
from valle.serve.engine.runner import Runner
from valle.serve.engine.scheduler import Scheduler

N_PHONEMES, PROMPT_FRAMES, FRAMES = 60, 225, 300
"""A sentence of four seconds, after a prompt of three seconds."""

QUICK_PHONEMES, QUICK_PROMPT_FRAMES, QUICK_FRAMES = 6, 9, 12

PROFILED_STEPS = 5
"""Steps under the profiler."""


@dataclass(frozen=True)
class Workload:
    """The request of every stream."""

    phonemes: list[int]
    prompt: NDArray[np.int16]
    """`[8, P]`."""
    frames: int
    """Length of the speech."""

    @classmethod
    def random(
        cls,
        generator: np.random.Generator,
        *,
        n_phonemes: int = N_PHONEMES,
        prompt_frames: int = PROMPT_FRAMES,
        frames: int = FRAMES,
    ) -> "Workload":
        """Random phonemes and a random prompt."""
        return cls(
            generator.integers(2, 100, n_phonemes).tolist(),
            synthetic.random_codes(generator, N_CODEBOOKS, prompt_frames),
            frames,
        )

    @classmethod
    def default(cls, quick: bool) -> "Workload":
        """The same at every call; `quick` has tiny shapes."""
        generator = np.random.default_rng(0)
        if not quick:
            return cls.random(generator)
        return cls.random(
            generator,
            n_phonemes=QUICK_PHONEMES,
            prompt_frames=QUICK_PROMPT_FRAMES,
            frames=QUICK_FRAMES,
        )


def nar_requests(
    count: int,
    *,
    n_phonemes: int = N_PHONEMES,
    prompt_frames: int = PROMPT_FRAMES,
    frames: int = FRAMES,
) -> list[NARRequest]:
    """Sentences of one voice, whose first codebooks are complete."""
    generator = np.random.default_rng(0)
    prompt = synthetic.random_codes(generator, N_CODEBOOKS, prompt_frames)
    return [
        NARRequest(
            generator.integers(2, 100, n_phonemes).tolist(),
            prompt,
            synthetic.random_codes(generator, frames),
        )
        for _ in range(count)
    ]


def exclude_eos(model: AR) -> None:
    """Makes EOS impossible: every stream then reaches its length limit."""
    with torch.no_grad():
        model.head.bias[EOS] = -1e9


def endless_ar(context: PhaseContext, precision: Precision) -> AR:
    """An untrained model that never draws EOS."""
    model = synthetic.build_model("ar", context.config, context.device).eval()
    assert isinstance(model, AR)
    exclude_eos(model)
    return convert(model, precision)


def generate(
    model: AR, workload: Workload, sampling: Sampling, frames: int, use_cache: bool = True
) -> list[int]:
    """At most `frames` frames of `AR.generate`, with the seed of stream 0."""
    device = model.head.weight.device
    codes = model.generate(
        torch.tensor(workload.phonemes, device=device),
        torch.from_numpy(workload.prompt.astype(np.int64)).to(device),
        sampling=sampling,
        max_frames=frames,
        use_cache=use_cache,
        seed=0,
    ).codes
    tokens: list[int] = codes.tolist()
    return tokens


def matrix_bytes(model: AR) -> int:
    """Bytes of all weights that a decode step reads completely: of the embeddings it reads single
    rows."""
    return sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if not name.endswith(("embedding.weight", "tables"))
    )


def step_bytes(config: ModelConfig, model: AR, rows: int, workload: Workload) -> float:
    """Bytes that a decode step of so many rows reads, half way through the speech: all matrices,
    and the keys and values of every row."""
    positions = model.capacity(
        len(workload.phonemes), workload.prompt.shape[1], workload.frames // 2
    )
    kv_bytes = 2.0 * config.n_layers * config.width * model.head.weight.element_size()
    return matrix_bytes(model) + kv_bytes * rows * positions


def build_engine(
    model: AR, workload: Workload, streams: int, *, guided: bool, compiled: bool
) -> tuple[Engine, Runner]:
    """An engine with a slot for every stream of the workload, and its runner."""
    positions = model.capacity(len(workload.phonemes), workload.prompt.shape[1], workload.frames)
    runner = Runner(model, slots=streams, max_positions=positions, guided=guided, compiled=compiled)
    return Engine(runner, Scheduler(streams)), runner


def add_streams(
    engine: Engine, workload: Workload, streams: int, sampling: Sampling, frames: int
) -> None:
    """Queues a request for every stream; its number is its id and its seed."""
    for number in range(streams):
        engine.add(
            Request(
                id=str(number),
                phonemes=workload.phonemes,
                prompt=workload.prompt,
                sampling=sampling,
                max_frames=frames,
                seed=number,
            )
        )


def run_until_idle(engine: Engine) -> dict[str, list[int]]:
    """Steps the engine until all requests have ended; returns the codes of every stream."""
    codes: dict[str, list[int]] = {}
    while not engine.idle:
        for output in engine.step():
            codes.setdefault(output.request_id, []).extend(output.codes)
    return codes


@dataclass(frozen=True)
class EngineTiming:
    """Times of one run of an engine."""

    frames_per_second: float
    """All frames by all seconds, prefill included."""
    step_seconds: float
    """Median of the steps that decoded all streams."""
    steps: int
    """Number of those steps."""
    codes: dict[str, list[int]]


def measure(
    context: PhaseContext, engine: Engine, workload: Workload, streams: int, sampling: Sampling
) -> EngineTiming:
    """Times a run of the workload in so many streams."""
    codes: dict[str, list[int]] = {}
    steady: list[float] = []
    add_streams(engine, workload, streams, sampling, workload.frames)
    device_timing.synchronize(context.device)
    started = before = time.perf_counter()
    while not engine.idle:
        # only steps that begin and end with all streams running are decode steps of full size
        full = engine.n_running == streams
        for output in engine.step():
            codes.setdefault(output.request_id, []).extend(output.codes)
        now = time.perf_counter()
        if full and engine.n_running == streams:
            steady.append(now - before)
        before = now
    device_timing.synchronize(context.device)
    seconds = time.perf_counter() - started
    assert steady, f"no step decoded all {streams} streams: raise the number of frames"
    frames = sum(map(len, codes.values()))
    return EngineTiming(frames / seconds, statistics.median(steady), len(steady), codes)


def profile_steps(
    context: PhaseContext, engine: Engine, workload: Workload, streams: int, sampling: Sampling
) -> device_timing.Launches:
    """Kernels of some decode steps of all streams."""
    add_streams(engine, workload, streams, sampling, workload.frames)
    while engine.n_running < streams:
        engine.step()
        assert not engine.idle, "a stream ended before the last prefill: raise the number of frames"
    engine.step()  # the first decode step of all streams may still allocate

    def run_steps() -> None:
        for _ in range(PROFILED_STEPS):
            engine.step()

    launches = device_timing.profile_launches(context.device, run_steps)
    for number in range(streams):
        engine.abort(str(number))
    return launches
