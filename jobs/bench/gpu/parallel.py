"""P2, training backends over NCCL (gloo on a CPU) with one worker: DDP and ZeRO 1, 2 and 3.

Each backend trains the same model on the same batches as the plain module does, and must have the
same losses and weights. Saved after ten steps and loaded into a fresh model, four more steps must
end where the uninterrupted run ended, on a CPU to the last bit. On a CUDA device not all kernels
have a deterministic version, so results are compared up to rounding; and since AdamW makes steps of
full size out of gradients that are only rounding (those of the keys' biases), weights are compared
by the norm of all.
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

from valle.jobs.bench.gpu import compiling, device_timing, synthetic
from valle.jobs.bench.gpu.record import TINY, PhaseContext
from valle.jobs.training import backends
from valle.jobs.training.augmentation import draw_levels, seed_step
from valle.jobs.training.backends import Backend
from valle.jobs.training.objective import Objective
from valle.jobs.training.optimizer import Optimization
from valle.model.codec.interface import CodecIdentity
from valle.model.config import ARConfig, Kind, ModelConfig, NARConfig
from valle.platform import checkpoint
from valle.platform.checkpoint import TrainState

STEPS_BEFORE_SAVE, STEPS_AFTER_SAVE = 10, 4
"""Training steps before and after the checkpoint."""

OPTIMIZATION = Optimization(warmup=5)
CODEC_IDENTITY = CodecIdentity(name="synthetic", sha256="0" * 64)
LOSS_TOLERANCE, BF16_LOSS_TOLERANCE = 1e-4, 1e-2
"""Relative tolerance of losses: in float32, and of bf16 against float32."""

WEIGHT_ATOL, WEIGHT_RTOL = 1e-5, 1e-4
"""Tolerances of each weight in float32, on a CPU."""

WEIGHT_NORM_TOLERANCE = 1e-4
"""On a CUDA device: norm of all differences by the norm of all weights."""

GPU_CONFIG = ModelConfig(width=256, n_heads=4, n_layers=4)


class WrappedDDP(backends.DDPBackend):
    """DDP that wraps the model for one worker as well, so that the collectives run."""

    def __init__(
        self, model: nn.Module, objective: nn.Module, optimization: Optimization,
        device: torch.device, *, bf16: bool,
    ) -> None:  # fmt: skip
        super().__init__(model, objective, optimization, device, bf16=bf16)
        self._objective = DistributedDataParallel(self._objective)


BACKENDS = ("plain", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")


@dataclass(frozen=True)
class BackendRun:
    """Losses and weights of training with a backend."""

    losses: list[float]
    weights: dict[str, Tensor]
    resumed_losses: list[float]
    resumed: dict[str, Tensor]
    """Weights of the run that was resumed from the checkpoint."""


def run(context: PhaseContext) -> None:
    """Checks all backends with both models in both precisions, then compiled ones on a device."""
    backend = "nccl" if context.on_gpu else "gloo"
    device_timing.allow_tf32(matmul=False, convolution=False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # deterministic mode would fill uninitialised memory with NaN, DeepSpeed's buffers too
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    dist.init_process_group(backend, rank=0, world_size=1)
    context.record.measurement("process group", backend=dist.get_backend(), workers=1)
    kinds: tuple[Kind, ...] = ("nar", "ar")
    for kind in kinds:
        plain: dict[bool, BackendRun] = {}
        for bf16 in (False, True):
            for backend_name in BACKENDS:
                name = f"{backend_name} {kind} {'bf16' if bf16 else 'fp32'}"
                context.record.attempt(
                    name,
                    partial(check_backend, context, name, backend_name, kind, bf16, plain),
                    required=True,
                )
    unavailable = (
        "only on a CUDA device"
        if not context.on_gpu
        else compiling.unavailable_reason(context.device)
    )
    if unavailable is not None:
        context.record.skip("compiled", unavailable)
        return
    for backend_name in ("DDP", "ZeRO-1", "ZeRO-3"):
        name = f"{backend_name} nar compiled"
        context.record.attempt(
            name,
            partial(check_compiled_backend, context, name, backend_name),
            compiling.SHALLOW_COMPILE_SECONDS,
        )


def check_backend(
    context: PhaseContext,
    name: str,
    backend_name: str,
    kind: Kind,
    bf16: bool,
    plain: dict[bool, BackendRun],
) -> None:
    """Checks one backend against the plain module, whose run by precision is kept in `plain`."""
    record = context.record
    result = train_and_resume(context, backend_name, kind, bf16)
    if backend_name == "plain":
        plain[bf16] = result
    else:
        losses = max_relative_error(result.losses, plain[bf16].losses)
        bound = BF16_LOSS_TOLERANCE if bf16 else LOSS_TOLERANCE
        record.check(f"{name}: losses = plain", losses <= bound, relative_error=losses)
        if not bf16:
            record.check(
                f"{name}: weights = plain",
                weights_close(context, result.weights, plain[bf16].weights),
                **weight_distances(result.weights, plain[bf16].weights),
            )
    # bf16 against float32: close, and not equal, or nothing was computed in bf16
    if bf16 and False in plain:
        losses = max_relative_error(result.losses, plain[False].losses)
        record.check(
            f"{name}: losses follow float32",
            losses <= BF16_LOSS_TOLERANCE and result.losses != plain[False].losses,
            relative_error=losses,
        )
    # resumed against uninterrupted
    distances = weight_distances(result.resumed, result.weights)
    exact = (
        result.losses[STEPS_BEFORE_SAVE:] == result.resumed_losses
        and not distances["largest_difference"]
    )
    near = max_relative_error(result.resumed_losses, result.losses[STEPS_BEFORE_SAVE:]) <= (
        BF16_LOSS_TOLERANCE if bf16 else LOSS_TOLERANCE
    )
    near = near and (bf16 or weights_close(context, result.resumed, result.weights))
    record.check(
        f"{name}: resumed = uninterrupted",
        near if context.on_gpu else exact,
        to_the_bit=exact,
        **distances,
    )


def check_compiled_backend(context: PhaseContext, name: str, backend_name: str) -> None:
    """Checks compiled steps against eager ones, without dropout, whose masks differ in compiled
    code.

    Under ZeRO-3 dynamo reaches its limit of recompilations and continues eagerly, as it does for
    users; losses are compared nevertheless, and `graphs_traced` and gpu.log show it.
    """
    losses = []
    with compiling.strict(raises=False) as counters:
        for compiled in (False, True):
            backend = build(
                context, backend_name, "nar", seed=0, bf16=False, compiled=compiled, dropout=0.0
            )
            losses.append(train_steps(context, backend, "nar", 0, STEPS_AFTER_SAVE))
            del backend
    error = max_relative_error(losses[1], losses[0])
    context.record.check(
        f"{name}: losses = eager",
        error <= LOSS_TOLERANCE and counters.graphs > 0,
        relative_error=error,
        graphs_traced=counters.graphs,
    )


def train_and_resume(
    context: PhaseContext, backend_name: str, kind: Kind, bf16: bool
) -> BackendRun:
    """Trains, saves and trains on; loads the checkpoint into another model and trains that on."""
    folder = context.scratch / "parallel"
    shutil.rmtree(folder, ignore_errors=True)
    first = build(context, backend_name, kind, seed=0, bf16=bf16)
    losses = train_steps(context, first, kind, 0, STEPS_BEFORE_SAVE)
    save(first, folder, kind, model_config(context))
    losses += train_steps(
        context, first, kind, STEPS_BEFORE_SAVE, STEPS_BEFORE_SAVE + STEPS_AFTER_SAVE
    )
    weights = clone(first.weights())
    del first
    second = build(context, backend_name, kind, seed=1, bf16=bf16)
    second.load(folder)
    state = checkpoint.load_state(folder)
    resumed_losses = train_steps(
        context, second, kind, state.step, STEPS_BEFORE_SAVE + STEPS_AFTER_SAVE
    )
    return BackendRun(losses, weights, resumed_losses, clone(second.weights()))


def model_config(context: PhaseContext) -> ModelConfig:
    """With dropout, so that a resumed run must restore the random state."""
    return replace(TINY if context.quick else GPU_CONFIG, dropout=0.1)


def build(
    context: PhaseContext,
    backend_name: str,
    kind: Kind,
    *,
    seed: int,
    bf16: bool,
    compiled: bool = False,
    dropout: float = 0.1,
) -> Backend:
    """An untrained model of a seed in a backend."""
    config = replace(model_config(context), dropout=dropout)
    model = synthetic.build_model(kind, config, torch.device("cpu"), seed)
    if compiled:
        model.transformer.compile(dynamic=True)
    backend_classes: Mapping[str, Callable[..., Backend]] = {
        "plain": backends.DDPBackend,
        "DDP": WrappedDDP,
    }
    objective = Objective(model)
    if backend_name in backend_classes:
        backend_class = backend_classes[backend_name]
        return backend_class(model, objective, OPTIMIZATION, context.device, bf16=bf16)
    return backends.DeepSpeedBackend(
        model, objective, OPTIMIZATION, context.device, bf16=bf16, stage=int(backend_name[-1])
    )


def train_steps(
    context: PhaseContext, backend: Backend, kind: Kind, first: int, end: int
) -> list[float]:
    """Makes steps `first` to `end` (exclusive) of a run; returns their losses."""
    losses = []
    frames = (18, 25, 12) if context.quick else (180, 250, 120, 310, 90, 205)
    for step in range(first, end):
        key = f"parallel/{step}"
        seed_step(key)
        backend.model.train()
        batch = synthetic.random_batch(*frames, seed=step).to(context.device)
        level = draw_levels(len(frames), 8, key).to(context.device)
        output = backend.forward((batch, level))
        backend.backward(output.loss)
        backend.update(OPTIMIZATION.learning_rate_at(step, STEPS_BEFORE_SAVE + STEPS_AFTER_SAVE))
        losses.append(output.loss.item())
    return losses


def save(backend: Backend, folder: Path, kind: Kind, config: ModelConfig) -> None:
    """A checkpoint as `jobs/train.py` writes it."""
    model_config = (ARConfig if kind == "ar" else NARConfig).from_shared(config)
    description = checkpoint.new_metadata(model_config, CODEC_IDENTITY, "bench.gpu", {})
    checkpoint.save(folder, backend.weights(), description)
    checkpoint.save_state(folder, TrainState(step=STEPS_BEFORE_SAVE))
    backend.save(folder)


def clone(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, in float32."""
    return {name: value.detach().float().cpu().clone() for name, value in weights.items()}


def max_relative_error(losses: list[float], reference: list[float]) -> float:
    """Largest relative difference of two lists of losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def weight_distances(
    weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> dict[str, float]:
    """Largest absolute difference of a weight; norm of all differences by the reference's norm."""
    assert weights.keys() == reference.keys(), "two models of the same shape"
    distances = [weights[name] - value for name, value in reference.items()]
    norm = sum(float(value.square().sum()) for value in reference.values())
    return {
        "largest_difference": max(float(value.abs().max()) for value in distances),
        "relative_norm": (sum(float(value.square().sum()) for value in distances) / norm) ** 0.5,
    }


def weights_close(
    context: PhaseContext, weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> bool:
    """True if the weights agree within the tolerances of the device."""
    if context.on_gpu:
        return weight_distances(weights, reference)["relative_norm"] <= WEIGHT_NORM_TOLERANCE
    return all(
        torch.allclose(weights[name], value, atol=WEIGHT_ATOL, rtol=WEIGHT_RTOL)
        for name, value in reference.items()
    )
