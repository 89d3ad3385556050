"""P2, training backends over NCCL (gloo without a card) with one worker: DDP and ZeRO 1, 2 and 3.

Each way trains the same model on the same batches as the plain module does: same losses, same
weights. Saved half way and loaded into a fresh model, four more steps end where the uninterrupted
run ended: to the last bit on a CPU. On a card it is asked for kernels that repeat to the bit, not
all of which exist, and held to rounding; AdamW makes steps of full size out of gradients that are
nothing but rounding (those of the keys' biases), so there weights are compared as a whole.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.utils.deterministic
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from valle.jobs.bench.gpu import compiling, samples, timing
from valle.jobs.bench.gpu.record import TINY, Bench
from valle.jobs.training import backends
from valle.jobs.training.backends import Backend
from valle.jobs.training.objective import Optimization, draw_levels, seed_step
from valle.model.codec.interface import CodecIdentity
from valle.model.config import Kind, ModelConfig
from valle.platform import checkpoint
from valle.platform.checkpoint import TrainState

STEPS, MORE = 10, 4
"""Before and after the checkpoint."""

OPTIMIZATION = Optimization(warmup=5)
CODEC = CodecIdentity(name="made", sha256="0" * 64)
LOSS, BF16_LOSS = 1e-4, 1e-2
"""Relative tolerance of losses, in float32 and of bf16 against it."""

ABSOLUTE, RELATIVE = 1e-5, 1e-4
"""Tolerances of each weight after the steps in float32, without a card."""

NORM = 1e-4
"""On a card: norm of all differences by the norm of all weights."""

ON_CARD = ModelConfig(width=256, n_heads=4, n_layers=4)


class WrappedDDP(backends.DDP):
    """DDP that wraps the model with one worker as well, so that the collective's code runs."""

    def __init__(
        self, model: nn.Module, chosen: Optimization, device: torch.device, bf16: bool
    ) -> None:
        super().__init__(model, chosen, device, bf16)
        self._objective = DistributedDataParallel(self._objective)


WAYS = ("plain", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")


@dataclass(frozen=True)
class Trial:
    """What a way of training came to."""

    losses: list[float]
    weights: dict[str, Tensor]
    resumed_losses: list[float]
    resumed: dict[str, Tensor]
    """Weights of the run that was saved and loaded."""


def run(bench: Bench) -> None:
    """All ways, both models, both precisions; compiled last, on a card."""
    backend = "nccl" if bench.on_card else "gloo"
    timing.allow_tf32(matmul=False, convolution=False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # it would fill with NaN what is allocated without a value, DeepSpeed's buffers too
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    dist.init_process_group(backend, rank=0, world_size=1)
    bench.record.measurement("process group", backend=dist.get_backend(), workers=1)
    kinds: tuple[Kind, ...] = ("nar", "ar")
    for kind in kinds:
        plain: dict[bool, Trial] = {}
        for bf16 in (False, True):
            for way in WAYS:
                name = f"{way} {kind} {'bf16' if bf16 else 'fp32'}"
                bench.record.attempt(
                    name, partial(judge, bench, name, way, kind, bf16, plain), required=True
                )
    missing = "only on a card" if not bench.on_card else compiling.missing(bench.device)
    if missing is not None:
        bench.record.leave_out("compiled", missing)
        return
    for way in ("DDP", "ZeRO-1", "ZeRO-3"):
        name = f"{way} nar compiled"
        bench.record.attempt(
            name, partial(judge_compiled, bench, name, way), compiling.QUICK_SECONDS
        )


def judge(
    bench: Bench, name: str, way: str, kind: Kind, bf16: bool, plain: dict[bool, Trial]
) -> None:
    """Checks one way against the plain module's trial, which is left in `plain` for the others."""
    record = bench.record
    trial = train_and_resume(bench, way, kind, bf16)
    if way == "plain":
        plain[bf16] = trial
    else:
        losses = worst(trial.losses, plain[bf16].losses)
        bound = BF16_LOSS if bf16 else LOSS
        record.check(f"{name}: losses = plain", losses <= bound, relative_error=losses)
        if not bf16:
            record.check(
                f"{name}: weights = plain", close(bench, trial.weights, plain[bf16].weights),
                **distances(trial.weights, plain[bf16].weights),
            )  # fmt: skip
    if bf16 and False in plain:
        losses = worst(trial.losses, plain[False].losses)
        record.check(
            f"{name}: losses follow float32",
            losses <= BF16_LOSS and trial.losses != plain[False].losses, relative_error=losses,
        )  # fmt: skip
    apart = distances(trial.resumed, trial.weights)
    exact = trial.losses[STEPS:] == trial.resumed_losses and not apart["largest_difference"]
    near = worst(trial.resumed_losses, trial.losses[STEPS:]) <= (BF16_LOSS if bf16 else LOSS)
    near = near and (bf16 or close(bench, trial.resumed, trial.weights))
    record.check(
        f"{name}: resumed = uninterrupted", near if bench.on_card else exact, to_the_bit=exact,
        **apart,
    )  # fmt: skip


def judge_compiled(bench: Bench, name: str, way: str) -> None:
    """Checks a few compiled steps against the same way's plain ones, without dropout: compiled code
    draws masks of its own.

    Under ZeRO-3 dynamo reaches its limit of compilations and goes on eagerly: users get the same,
    so the losses are compared nevertheless; `graphs_traced` and gpu.log show it.
    """
    losses = []
    with compiling.strict(raises=False) as compilations:
        for compiled in (False, True):
            backend = build(
                bench, way, "nar", seed=0, bf16=False, compiled=compiled, dropout=0.0
            )  # fmt: skip
            losses.append(advance(bench, backend, "nar", 0, MORE))
            del backend
    error = worst(losses[1], losses[0])
    bench.record.check(
        f"{name}: losses = eager", error <= LOSS and compilations.graphs > 0,
        relative_error=error, graphs_traced=compilations.graphs,
    )  # fmt: skip


def train_and_resume(bench: Bench, way: str, kind: Kind, bf16: bool) -> Trial:
    """Trains, saves, trains on; loads into another model, trains that on."""
    folder = bench.scratch / "parallel"
    shutil.rmtree(folder, ignore_errors=True)
    first = build(bench, way, kind, seed=0, bf16=bf16)
    losses = advance(bench, first, kind, 0, STEPS)
    save(first, folder, kind, model_config(bench))
    losses += advance(bench, first, kind, STEPS, STEPS + MORE)
    weights = clone(first.weights())
    del first
    second = build(bench, way, kind, seed=1, bf16=bf16)
    second.load(folder)
    state = checkpoint.load_state(folder)
    resumed_losses = advance(bench, second, kind, state.step, STEPS + MORE)
    return Trial(losses, weights, resumed_losses, clone(second.weights()))


def model_config(bench: Bench) -> ModelConfig:
    """With dropout, so that a resumed run has to draw what an uninterrupted one draws."""
    return replace(TINY if bench.quick else ON_CARD, dropout=0.1)


def build(
    bench: Bench, way: str, kind: Kind, *, seed: int, bf16: bool, compiled: bool = False,
    dropout: float = 0.1,
) -> Backend:  # fmt: skip
    """A fresh model of a seed in a backend."""
    config = replace(model_config(bench), dropout=dropout)
    model = samples.build(kind, config, torch.device("cpu"), seed)
    if compiled:
        model.transformer.compile(dynamic=True)
    makers: Mapping[str, Callable[..., Backend]] = {"plain": backends.DDP, "DDP": WrappedDDP}
    if way in makers:
        return makers[way](model, OPTIMIZATION, bench.device, bf16)
    return backends.DeepSpeed(model, OPTIMIZATION, bench.device, bf16, int(way[-1]))


def advance(bench: Bench, backend: Backend, kind: Kind, first: int, end: int) -> list[float]:
    """Steps `first` to `end` of a run; returns their losses."""
    losses = []
    frames = (18, 25, 12) if bench.quick else (180, 250, 120, 310, 90, 205)
    for step in range(first, end):
        key = f"parallel/{step}"
        seed_step(key)
        backend.model.train()
        batch = samples.random_batch(*frames, seed=step).to(bench.device)
        level = draw_levels(len(frames), 8, key).to(bench.device)
        loss, _ = backend.step(batch, level, OPTIMIZATION.rate(step, STEPS + MORE))
        losses.append(loss.loss.item())
    return losses


def save(backend: Backend, folder: Path, kind: Kind, config: ModelConfig) -> None:
    """A checkpoint as `jobs/train.py` writes it."""
    description = checkpoint.describe(kind, config, CODEC, "bench_gpu", {})
    checkpoint.save(folder, backend.weights(), description)
    checkpoint.save_state(folder, TrainState(step=STEPS))
    backend.save(folder)


def clone(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, which later steps leave alone."""
    return {name: value.detach().float().cpu().clone() for name, value in weights.items()}


def worst(losses: list[float], reference: list[float]) -> float:
    """Largest relative difference of two lists of losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def distances(weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest absolute difference of any weight, and the norm of all by that of the reference."""
    assert weights.keys() == reference.keys(), "two models of the same shape"
    apart = [weights[name] - value for name, value in reference.items()]
    norm = sum(float(value.square().sum()) for value in reference.values())
    return {
        "largest_difference": max(float(value.abs().max()) for value in apart),
        "relative_norm": (sum(float(value.square().sum()) for value in apart) / norm) ** 0.5,
    }


def close(bench: Bench, weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> bool:
    """Whether all weights agree within the tolerances."""
    if bench.on_card:
        return distances(weights, reference)["relative_norm"] <= NORM
    return all(
        torch.allclose(weights[name], value, atol=ABSOLUTE, rtol=RELATIVE)
        for name, value in reference.items()
    )
