"""P3, training steps as `jobs/train.py` makes them: speed, utilisation, time of the loader.

Synthetic data goes through the real loader, and a step is the real backend's. Model-FLOPs
utilisation (MFU) counts the operations of forward and backward pass (three times the forward pass)
without padding, per row of S positions, of which P are prompt and T response:

    6 * 12 N D^2 * S    matrices of N layers of width D: query, key, value 3, out 1, feed-forward 8
    12 N D * pairs      scores and mixtures; pairs of positions that attend to each other: S^2 / 2
                        in the causal AR model, S^2 - P (S - P) in the NAR model, where all but
                        the prompt attend to everything
    6 * D * V * T       the head over V classes

The denominator is the bf16 matrix rate in every precision: a float32 step at 5 % uses that much of
the device. `mfu` refers to the rate that P0 measured, `mfu_data_sheet` to the data sheet's, of
which P0's is about four fifths.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import torch

from valle.jobs.bench.gpu import attention, compiling, device_timing, synthetic
from valle.jobs.bench.gpu.parallel import CODEC_IDENTITY
from valle.jobs.bench.gpu.record import PhaseContext
from valle.jobs.training import backends
from valle.jobs.training.augmentation import (
    draw_levels,
    drop_conditions,
    seed_step,
    truncate_responses,
)
from valle.jobs.training.loader import Loader
from valle.jobs.training.objective import Objective
from valle.jobs.training.optimizer import Optimization
from valle.jobs.training.sampler import Batching
from valle.model.config import Kind, ModelConfig
from valle.model.sequence import Batch
from valle.model.tokens import CODEBOOK_SIZE, FRAME_RATE, N_CODEBOOKS
from valle.platform import dataset
from valle.platform.checkpoint import TrainState
from valle.platform.dataset import Statistics, TokenDataset

KINDS: Final[tuple[Kind, ...]] = ("ar", "nar")
MODES: Final = ("fp32", "TF32", "bf16", "bf16 + compile")
BATCH_TOKENS: Final = (4_000, 32_000, 64_000)
FLOOR_TOKENS = 32_000
CONDITION_DROPOUT, TRUNCATED_SHARE = 0.1, 0.25
"""As in the recipes."""

FLOOR_NAME, FLOOR = "MFU of ar, bf16, compiled, 32,000 tokens", 0.15
"""MFU by the rate that P0 measured."""

WARMUP_STEPS, MAX_STEPS, MIN_SECONDS = 3, 8, 3.0
"""Steps before the clock starts, most steps timed, and seconds after which fewer are enough."""

MATMUL_SHARE: Final = {"fp32": 0.8, "TF32": 0.3, "bf16": 0.15, "bf16 + compile": 0.2}
"""Lowest MFU that is expected, for estimating the time of a case."""


@dataclass(frozen=True)
class Case:
    """A model, a batch size and a mode to measure."""

    kind: Kind
    tokens: int
    mode: str

    @property
    def name(self) -> str:
        """Name of its measurement."""
        return f"{self.kind} {self.tokens} {self.mode}"

    @property
    def compiled(self) -> bool:
        """True if the transformer is compiled."""
        return self.mode.endswith("compile")

    def estimated_seconds(self, context: PhaseContext) -> float:
        """Seconds for building the model and twelve steps, and for compiling, which takes less
        once an earlier case has compiled the same model."""
        limits, config = context.limits, context.config
        peak = {"fp32": limits.fp32_flops, "TF32": limits.tf32_flops}.get(
            self.mode, limits.bf16_flops
        )
        # of 12 steps; 80 = 6 * 12 of the matrices, and some for attention
        flops = 12 * self.tokens * 80 * config.n_layers * config.width**2
        needed = flops / (peak * MATMUL_SHARE[self.mode]) + 3
        if not self.compiled:
            return needed
        if context.quick:
            return needed + compiling.SHALLOW_COMPILE_SECONDS
        cold = self.tokens == FLOOR_TOKENS
        return needed + (compiling.COLD_COMPILE_SECONDS if cold else compiling.WARM_COMPILE_SECONDS)


def cases(quick: bool, on_gpu: bool) -> list[Case]:
    """All combinations, the most informative first, since the last may find no time."""
    if quick:
        eager = [Case(kind, 600, mode) for kind in KINDS for mode in ("fp32", "bf16")]
        return [*eager, Case("ar", 600, "bf16 + compile")] if on_gpu else eager
    small, middle, large = BATCH_TOKENS
    eager_modes, compiled = MODES[:-1], MODES[-1]
    return [
        Case("ar", middle, "bf16"),
        Case("ar", middle, compiled),
        *(
            case
            for mode in reversed(eager_modes)
            for tokens in (middle, small)
            for kind in KINDS
            if (case := Case(kind, tokens, mode)) != Case("ar", middle, "bf16")
        ),
        Case("nar", middle, compiled),
        *(Case(kind, small, compiled) for kind in KINDS),
        *(Case(kind, large, mode) for mode in reversed(MODES) for kind in KINDS),
    ]


def run(context: PhaseContext) -> None:
    """Measures all cases; packed attention comes after the first two, since its kernel might
    corrupt the CUDA context."""
    record = context.record
    if not context.quick:
        record.expect_floor(FLOOR_NAME, FLOOR)
    loader = make_loader(context)
    todo = cases(context.quick, context.on_gpu)
    unavailable = (
        compiling.unavailable_reason(context.device)
        if any(case.compiled for case in todo)
        else None
    )
    for number, case in enumerate(todo):
        if number == 2:
            record.attempt("varlen_attn", partial(attention.compare, context), 5)
        if case.compiled and unavailable is not None:
            record.skip(case.name, unavailable)
            continue
        record.attempt(
            case.name, partial(measure, context, loader, case), case.estimated_seconds(context)
        )


def make_loader(context: PhaseContext) -> Loader:
    """The training job's loader over random utterances of LibriTTS's lengths: 2 to 20 seconds, 11
    on average, four frames per phoneme."""
    generator = np.random.default_rng(0)
    count, scale = (60, 0.05) if context.quick else (1000, 1.0)
    seconds = np.clip(generator.lognormal(np.log(10), 0.4, count), 2, 20) * scale
    rows = []
    for number, frames in enumerate((seconds * FRAME_RATE).astype(int).tolist()):
        rows.append(
            {
                "id": f"u{number:05d}",
                "speaker": f"s{number // 20}",
                "language": "en-us",
                "text": "",
                "phonemes": generator.integers(2, 100, max(1, frames // 4)).tolist(),
                "codes": synthetic.random_codes(generator, N_CODEBOOKS, frames),
                "frames": frames,
                "source": "synthetic",
            }
        )
    uri, statistics, shards = str(context.scratch / "tokens"), Statistics(), []
    for start in range(0, count, 250):
        table = dataset.to_table(rows[start : start + 250])
        statistics.add(table)
        shards.append(dataset.write_shard(uri, f"part{start}", table))
    dataset.write_manifest(uri, CODEC_IDENTITY, shards, statistics)
    return Loader(
        TokenDataset(uri, context.scratch / "cache"),
        prompt_seconds=3.0 * scale,
        validation_utterances=10,
        seed=0,
    )


def measure(context: PhaseContext, loader: Loader, case: Case) -> None:
    """Measures one case; a compiled one under `compiling.strict`."""
    if not case.compiled:
        measure_steps(context, loader, case)
        return
    with compiling.strict() as counters:
        measure_steps(context, loader, case, counters)


def measure_steps(
    context: PhaseContext,
    loader: Loader,
    case: Case,
    counters: compiling.CompileCounters | None = None,
) -> None:
    """Times the steps of one case, then counts the host's waits in one more step."""
    device, config = context.device, context.config
    device_timing.allow_tf32(matmul=case.mode == "TF32", convolution=False)
    device_timing.reset_peak(device)
    model = synthetic.build_model(case.kind, config, device)
    if case.compiled:
        model.transformer.compile(dynamic=True)
    bf16 = case.mode.startswith("bf16")
    backend = backends.DDPBackend(model, Objective(model), Optimization(), device, bf16=bf16)
    model.train()
    stream = training_batches(loader, case, config)

    # warm-up: compiles, allocates, chooses kernels
    started = time.perf_counter()
    for step in range(WARMUP_STEPS):
        train_step(backend, *next(stream), step)
    device_timing.synchronize(device)
    warmup_seconds = time.perf_counter() - started

    timing = time_steps(backend, stream, device)
    batches, seconds = timing.batches, timing.seconds

    # operations and tokens of these very batches
    totals, steps = Totals.of(case.kind, config, batches), len(batches)
    rate, data_sheet_flops = totals.flops / seconds, context.limits.data_sheet_flops
    context.record.measurement(
        case.name,
        milliseconds=1000 * seconds / steps,
        mfu=rate / context.limits.bf16_flops,
        mfu_data_sheet=None if data_sheet_flops is None else rate / data_sheet_flops,
        tokens_per_second=totals.tokens / seconds,
        tokens_per_step=totals.tokens / steps,
        rows_per_step=totals.rows / steps,
        peak_gigabytes=device_timing.peak_gigabytes(device),
        padding=1 - totals.tokens / totals.padded,
        loader_share=timing.loader_seconds / seconds,
        steps=steps,
        warmup_seconds=warmup_seconds,
        graphs_traced=None if counters is None else counters.graphs,
    )
    if case == Case("ar", FLOOR_TOKENS, "bf16 + compile"):
        context.record.floor(FLOOR_NAME, rate / context.limits.bf16_flops)
    context.record.check(
        f"{case.name}: the loss is a number", math.isfinite(timing.last_loss), loss=timing.last_loss
    )

    # one more step, for the host's waits
    batch, level = next(stream)
    copies = device_timing.count_syncs(device, lambda: (batch.to(device), level.to(device)))
    syncs = device_timing.count_syncs(device, lambda: train_step(backend, batch, level, 0))
    context.record.measurement(
        f"{case.name}: waits for the device", per_step=syncs, of_these_copies=copies
    )


@dataclass(frozen=True)
class StepTiming:
    """Steps under the clock."""

    batches: list[Batch]
    seconds: float
    loader_seconds: float
    """Part of `seconds` that the loader took."""
    last_loss: float


def time_steps(
    backend: backends.Backend, stream: Iterator[tuple[Batch, torch.Tensor]], device: torch.device
) -> StepTiming:
    """Makes at most MAX_STEPS steps, three at least; stops after MIN_SECONDS."""
    batches: list[Batch] = []
    loader_seconds = 0.0
    started = time.perf_counter()
    for step in range(MAX_STEPS):
        before = time.perf_counter()
        batch, level = next(stream)
        loader_seconds += time.perf_counter() - before
        loss = train_step(backend, batch, level, step)
        batches.append(batch)
        if time.perf_counter() - started > MIN_SECONDS and step >= 2:
            break
    device_timing.synchronize(device)
    return StepTiming(batches, time.perf_counter() - started, loader_seconds, loss.item())


@dataclass(frozen=True)
class Totals:
    """Sums over batches."""

    flops: float
    rows: int
    tokens: int
    padded: int
    """Positions, padding included."""

    @classmethod
    def of(cls, kind: Kind, config: ModelConfig, batches: list[Batch]) -> "Totals":
        """Sums for the training steps of a model."""
        return cls(
            flops=sum(model_flops(kind, config, batch) for batch in batches),
            rows=sum(len(batch.frames) for batch in batches),
            tokens=sum(batch.n_tokens for batch in batches),
            padded=sum(batch.n_padded for batch in batches),
        )


def training_batches(
    loader: Loader, case: Case, config: ModelConfig
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Batches and NAR levels on the CPU, as the training loop prepares them."""
    # a limit on rows would leave large batches half empty
    batching = Batching(max_tokens=case.tokens, max_utterances=10**6)
    for planned in loader.batches(batching, TrainState(), 0, 1):
        batch, key = planned.data, f"bench/{planned.index}"
        level = draw_levels(len(batch.frames), N_CODEBOOKS, key)
        batch = drop_conditions(batch, key, CONDITION_DROPOUT)
        if case.kind == "nar":
            batch = truncate_responses(batch, key, TRUNCATED_SHARE, config.frames_per_phoneme)
        yield batch, level


def train_step(
    backend: backends.Backend, batch: Batch, level: torch.Tensor, step: int
) -> torch.Tensor:
    """Makes one optimizer step; returns the loss, on the device."""
    device = next(backend.model.parameters()).device
    seed_step(f"bench/{step}")
    output = backend.forward((batch.to(device), level.to(device)))
    backend.backward(output.loss)
    backend.update(1e-5)
    return output.loss.detach()


def model_flops(kind: Kind, config: ModelConfig, batch: Batch) -> float:
    """Floating-point operations of a step; the formula is above."""
    prompt = batch.prompt_frames.double()
    response = batch.frames.double()
    positions = batch.phoneme_lengths + prompt + response + 2
    matrices = 6 * 12 * config.n_layers * config.width**2 * positions
    pairs = positions**2 / 2 if kind == "ar" else positions**2 - prompt * (positions - prompt)
    classes = CODEBOOK_SIZE + 1 if kind == "ar" else CODEBOOK_SIZE
    head = 6 * config.width * classes * (response + 1 if kind == "ar" else response)
    return float((matrices + 12 * config.n_layers * config.width * pairs + head).sum())
