"""P3, training steps as `jobs/train.py` makes them: how fast, and where the time goes.

A made dataset goes through the real loader; a step is the real backend's. Utilisation counts the
operations that the model needs for its content, padding left out, forward and backward (three times
the forward pass), per row of S positions, of which P are prompt and T response:

    6 * 12 N D^2 * S    matrices of N layers of width D: query, key, value 3, out 1, feed-forward 8
    12 N D * pairs      scores and mixtures; pairs that see each other: S^2 / 2 where causal (AR),
                        S^2 - P (S - P) where all but the prompt see everything (NAR)
    6 * D * V * T       the head over V classes

against the bf16 matrix rate that P0 measured, in every precision: a float32 step at 5 % is that
much of what the card can do. (P0's rate is about four fifths of an H100's data sheet.)
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import torch

from valle.jobs.gpu import attention, samples, timing
from valle.jobs.gpu.card import compile_hindrance
from valle.jobs.gpu.parallel import CODEC
from valle.jobs.gpu.record import Bench
from valle.jobs.loader import Loader
from valle.model.config import Kind, ModelConfig
from valle.model.sequence import Batch
from valle.model.tokens import CODEBOOK_SIZE, FRAME_RATE, N_CODEBOOKS
from valle.model.training import (
    Optimization,
    TrainState,
    cut_responses,
    draw_levels,
    drop_conditions,
    seed_step,
)
from valle.platform import backends, dataset
from valle.platform.dataset import Statistics, TokenDataset
from valle.platform.sampler import Batching

KINDS: Final[tuple[Kind, ...]] = ("ar", "nar")
MODES: Final = ("fp32", "TF32", "bf16", "bf16 + compile")
TOKENS: Final = (4_000, 32_000, 64_000)
CONDITION_DROPOUT, BEGINNINGS = 0.1, 0.25
"""As recipes have them."""

FLOOR = 0.15
"""MFU of the AR model in bf16, compiled, with 32,000 tokens."""

WARM, MOST, LEAST_SECONDS = 3, 8, 3.0
"""Steps before the clock, steps under it, and the time after which fewer will do."""


@dataclass(frozen=True)
class Case:
    """A measurement."""

    kind: Kind
    tokens: int
    mode: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.kind} {self.tokens} {self.mode}"


def cases(quick: bool) -> list[Case]:
    """All combinations, those first that say most: time may end before they do."""
    if quick:
        return [Case(kind, 600, mode) for kind in KINDS for mode in ("fp32", "bf16")]
    first = [
        Case("ar", 32_000, "bf16"), Case("ar", 32_000, "bf16 + compile"),
        Case("ar", 4_000, "fp32"), Case("nar", 32_000, "bf16"), Case("ar", 4_000, "bf16"),
        Case("nar", 32_000, "bf16 + compile"), Case("ar", 4_000, "bf16 + compile"),
        Case("nar", 4_000, "fp32"), Case("ar", 64_000, "bf16"),
        Case("ar", 64_000, "bf16 + compile"), Case("ar", 32_000, "TF32"),
        Case("ar", 32_000, "fp32"),
    ]  # fmt: skip
    rest = [Case(kind, tokens, mode) for kind in KINDS for tokens in TOKENS for mode in MODES]
    return first + [case for case in rest if case not in first]


def run(bench: Bench) -> None:
    """Packed attention, then all cases."""
    loader = make_loader(bench)
    bench.record.attempt("varlen_attn", lambda: attention.compare(bench))
    hindrance = compile_hindrance(bench.device)
    for case in cases(bench.quick):
        compiled = case.mode.endswith("compile")
        if compiled and hindrance is not None:
            bench.record.leave_out(case.name, hindrance)
            continue
        bench.record.attempt(
            case.name, partial(measure, bench, loader, case), 30 if compiled else 5
        )


def make_loader(bench: Bench) -> Loader:
    """The training job's loader over utterances like LibriTTS's: two to twenty seconds, eleven on
    average, a phoneme for four frames."""
    generator = np.random.default_rng(0)
    count, scale = (60, 0.05) if bench.quick else (1000, 1.0)
    seconds = np.clip(generator.lognormal(np.log(10), 0.4, count), 2, 20) * scale
    rows = []
    for number, frames in enumerate((seconds * FRAME_RATE).astype(int).tolist()):
        rows.append(
            {
                "id": f"u{number:05d}", "speaker": f"s{number // 20}", "language": "en-us",
                "text": "", "phonemes": generator.integers(2, 100, max(1, frames // 4)).tolist(),
                "codes": samples.random_codes(generator, N_CODEBOOKS, frames), "frames": frames,
                "source": "made",
            }
        )  # fmt: skip
    uri, statistics, shards = str(bench.scratch / "tokens"), Statistics(), []
    for start in range(0, count, 250):
        table = dataset.table(rows[start : start + 250])
        statistics.add(table)
        shards.append(dataset.write_shard(uri, f"part{start}", table))
    dataset.write_manifest(uri, CODEC, shards, statistics)
    return Loader(
        TokenDataset(uri, bench.scratch / "cache"), prompt_seconds=3.0 * scale, held_out=10, seed=0
    )


def measure(bench: Bench, loader: Loader, case: Case) -> None:
    """Steps of one case, and a last one in which waits are counted."""
    device, config = bench.device, bench.config
    timing.allow_tf32(matmul=case.mode == "TF32", convolution=False)
    timing.reset_peak(device)
    model = samples.build(case.kind, config, device)
    if case.mode.endswith("compile"):
        model.transformer.compile(dynamic=True)
    backend = backends.DDP(model, Optimization(), device, case.mode.startswith("bf16"))
    model.train()
    stream = prepared(loader, case, config)
    begun = time.perf_counter()
    for step in range(WARM):
        take_step(backend, *next(stream), step)
    timing.synchronize(device)
    warm_seconds = time.perf_counter() - begun
    clock = Clock()
    timing.synchronize(device)
    started = time.perf_counter()
    for step in range(MOST):
        before = time.perf_counter()
        batch, level = next(stream)
        clock.loader_seconds += time.perf_counter() - before
        loss = take_step(backend, batch, level, step)
        clock.count(case.kind, config, batch)
        if time.perf_counter() - started > LEAST_SECONDS and step >= 2:
            break
    timing.synchronize(device)
    seconds = time.perf_counter() - started
    batch, level = next(stream)
    copies = timing.count_syncs(device, lambda: (batch.to(device), level.to(device)))
    syncs = timing.count_syncs(device, lambda: take_step(backend, batch, level, 0))
    value = loss.item()
    bench.record.check(f"{case.name}: the loss is a number", math.isfinite(value), loss=value)
    mfu = clock.flops / seconds / bench.card.bf16_flops
    bench.record.measurement(
        case.name, milliseconds=1000 * seconds / clock.steps, mfu=mfu,
        tokens_per_second=clock.tokens / seconds, peak_gigabytes=timing.peak_gigabytes(device),
        padding=1 - clock.tokens / clock.padded, syncs_per_step=syncs, of_these_copies=copies,
        loader_share=clock.loader_seconds / seconds, steps=clock.steps,
        warm_up_seconds=warm_seconds,
    )  # fmt: skip
    if case == Case("ar", 32_000, "bf16 + compile"):
        bench.record.floor("MFU of ar, bf16, compiled, 32,000 tokens", mfu, FLOOR)


@dataclass
class Clock:
    """Sums over the measured steps."""

    steps: int = 0
    loader_seconds: float = 0.0
    flops: float = 0.0
    tokens: int = 0
    padded: int = 0

    def count(self, kind: Kind, config: ModelConfig, batch: Batch) -> None:
        """Adds a step's batch."""
        self.steps += 1
        self.flops += model_flops(kind, config, batch)
        self.tokens += batch.n_tokens
        self.padded += batch.n_padded


def prepared(
    loader: Loader, case: Case, config: ModelConfig
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Batches and levels on the CPU, as the training loop prepares them."""
    batching = Batching(tokens=case.tokens)
    for _, number, batch in loader.batches(batching, TrainState(), 0, 1):
        key = f"bench/{number}"
        level = draw_levels(len(batch.frames), N_CODEBOOKS, key)
        batch = drop_conditions(batch, key, CONDITION_DROPOUT)
        if case.kind == "nar":
            batch = cut_responses(batch, key, BEGINNINGS, config.frames_per_phoneme)
        yield batch, level


def take_step(
    backend: backends.Backend, batch: Batch, level: torch.Tensor, step: int
) -> torch.Tensor:
    """One update; returns the loss, still on the device."""
    device = next(backend.model.parameters()).device
    seed_step(f"bench/{step}")
    loss, _ = backend.step(batch.to(device), level.to(device), 1e-5)
    return loss.loss.detach()


def model_flops(kind: Kind, config: ModelConfig, batch: Batch) -> float:
    """Floating-point operations of a step; the formula is above."""
    group = config.group if kind == "ar" else 1
    prompt = (batch.prompt_frames // group).double()
    response = batch.frames.double()
    positions = batch.phoneme_lengths + prompt + batch.frames // group + 2
    matrices = 6 * 12 * config.n_layers * config.width**2 * positions
    pairs = positions**2 / 2 if kind == "ar" else positions**2 - prompt * (positions - prompt)
    classes = CODEBOOK_SIZE + 1 if kind == "ar" else CODEBOOK_SIZE
    head = 6 * config.width * classes * (response + 1 if kind == "ar" else response)
    return float((matrices + 12 * config.n_layers * config.width * pairs + head).sum())
