"""The two ways a training step is distributed over workers: DDP and DeepSpeed.

A backend owns the model and the optimizer of one worker; the loop (`loop.py`) sees only this
interface. Both need torch.distributed to be initialised where there is more than one worker. The
backend changes speed and memory, not results.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from valle.jobs.training.optimizer import Optimization, build_optimizer
from valle.platform import checkpoint

Inputs = tuple[Any, ...]
"""Positional arguments of an objective: a batch and what else its forward pass depends on."""


class Output(Protocol):
    """What an objective returns for one batch."""

    @property
    def loss(self) -> Tensor:
        """The scalar to minimise."""

    @property
    def terms(self) -> Mapping[str, Tensor]:
        """Scalars to log, as `train/{name}`."""


@dataclass(frozen=True)
class Update:
    """What `Backend.update` has done."""

    gradient_norm: float
    """Norm before it was clipped; not finite where the step was skipped for it."""

    taken: bool
    """False if the step was skipped; the same on every rank."""


class Backend(Protocol):
    """Model, objective, optimizer and collectives of one worker."""

    model: nn.Module
    """The bare module whose weights a checkpoint holds."""

    writes_on_every_rank: bool
    """True if each rank adds files of its own to a checkpoint."""

    def forward(self, inputs: Inputs) -> Output:
        """The objective of a batch."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss`, averaged over the workers."""

    def update(self, learning_rate: float) -> Update:
        """Clips the gradient and takes one optimizer step.

        Takes none, on any rank, if on any rank the loss or the gradient is not finite: weights,
        optimizer and the model's moving averages are as before `forward`. A collective.
        """

    def weights(self) -> dict[str, Tensor]:
        """All weights of the model. A collective: every rank must call it."""

    def save(self, folder: Path) -> None:
        """Adds the optimizer's state to a checkpoint folder that has a `state/`."""

    def load(self, folder: Path) -> None:
        """Restores weights and optimizer from a checkpoint folder."""


class DDPBackend:
    """PyTorch's DistributedDataParallel; with one worker, the plain module.

    `sync_buffers`: copy rank 0's buffers to all ranks before each forward pass; False where the
    objective keeps them equal itself.
    """

    writes_on_every_rank = False

    def __init__(
        self,
        model: nn.Module,
        objective: nn.Module,
        optimization: Optimization,
        device: torch.device,
        *,
        bf16: bool = False,
        sync_buffers: bool = True,
        make_optimizer: Callable[[nn.Module, Optimization], torch.optim.AdamW] = build_optimizer,
    ) -> None:
        self._objective = objective.to(device)
        self.model = model
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._objective = DistributedDataParallel(
                self._objective, forward_sync_buffers=sync_buffers
            )
        self._optimizer = make_optimizer(model, optimization)
        self._clip = optimization.clip
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        kept = objective.state_dict().keys()
        self._averages = [b for name, b in objective.named_buffers() if name in kept]
        self._averages_before: list[Tensor] = []
        self._random_state = torch.get_rng_state()
        self._is_finite = torch.ones((), device=device)

    def forward(self, inputs: Inputs) -> Output:
        # a codec's forward pass moves its codebooks, and draws entries, which a skipped step undoes
        if self._averages:
            self._averages_before = [buffer.clone() for buffer in self._averages]
            self._random_state = torch.get_rng_state()
        with self._autocast:
            output: Output = self._objective(*inputs)
        return output

    def backward(self, loss: Tensor) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._is_finite = loss.detach().isfinite().all().float()
        loss.backward()

    def update(self, learning_rate: float) -> Update:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        # gradients are averaged, so every rank has the same norm; the loss is each rank's own
        is_finite = self._is_finite * norm.isfinite()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(is_finite, dist.ReduceOp.MIN)
        taken = bool(is_finite)
        if taken:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
        else:
            self._optimizer.zero_grad(set_to_none=True)
            self._restore_averages()
        return Update(float(norm), taken)

    @torch.no_grad()
    def _restore_averages(self) -> None:
        if self._averages:
            for buffer, before in zip(self._averages, self._averages_before, strict=True):
                buffer.copy_(before)
            torch.set_rng_state(self._random_state)

    def weights(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def save(self, folder: Path) -> None:
        """Writes AdamW's averages as safetensors."""
        checkpoint.save_optimizer(folder, self.model, self._optimizer)

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(checkpoint.load_weights(folder))
        checkpoint.load_optimizer(folder, self.model, self._optimizer)


class DeepSpeedBackend:
    """ZeRO. Only the same number of workers at the same stage can read its shards back."""

    writes_on_every_rank = True

    def __init__(
        self,
        model: nn.Module,
        objective: nn.Module,
        optimization: Optimization,
        device: torch.device,
        *,
        bf16: bool,
        stage: int,
    ) -> None:
        import deepspeed
        import deepspeed.ops
        from deepspeed.accelerator import set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        if device.type == "cpu":
            # DeepSpeed takes any GPU that it sees, also one that is not this worker's
            set_accelerator(CPU_Accelerator())
            # only inference uses it, and compiling it at every start takes 45 s
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl")
        ds_config = {
            "train_micro_batch_size_per_gpu": 1,  # batches are counted in tokens, not in rows
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optimization.clip,
            "zero_optimization": {"stage": stage},
            # fp32 gradients are always checked
            "bf16": {"enabled": bf16, "check_grad_overflow": True},
            "steps_per_print": 10**9,
        }
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=objective,
            model_parameters=list(objective.parameters()),
            optimizer=build_optimizer(model, optimization),
            config=ds_config,
            dist_init_required=False,
        )
        self.model = model
        self._is_finite = True
        self._layout = {"world_size": dist.get_world_size(), "zero_stage": stage}

    def forward(self, inputs: Inputs) -> Output:
        output: Output = self._engine(*inputs)
        return output

    def backward(self, loss: Tensor) -> None:
        """The ranks agree on the loss first: DeepSpeed itself looks at the gradient only."""
        is_finite = loss.detach().isfinite().all().float()
        dist.all_reduce(is_finite, dist.ReduceOp.MIN)
        self._is_finite = bool(is_finite)
        if self._is_finite:
            self._engine.backward(loss)

    def update(self, learning_rate: float) -> Update:
        """DeepSpeed clips inside its step, and skips it on every rank if any gradient is not
        finite. Raises RuntimeError if it has not."""
        if not self._is_finite:
            return Update(math.nan, taken=False)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm, taken = self._engine.get_global_grad_norm(), self._engine.was_step_applied()
        if taken and norm is not None and not math.isfinite(norm):
            raise RuntimeError(f"DeepSpeed took a step with a gradient of norm {norm}")
        return Update(float(norm or 0.0), taken)

    def weights(self) -> dict[str, Tensor]:
        """Under ZeRO-3 gathered from all ranks."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            # a copy, and in float32: with bf16 DeepSpeed keeps the module itself in bf16
            return {name: value.float().clone() for name, value in self.model.state_dict().items()}

    def save(self, folder: Path) -> None:
        """Writes this rank's shards in DeepSpeed's own format; every rank must call it."""
        target = folder / checkpoint.STATE
        target.mkdir(parents=True, exist_ok=True)
        (target / "deepspeed.json").write_text(json.dumps(self._layout))
        self._engine.save_checkpoint(str(target / "deepspeed"), tag="ds")

    def load(self, folder: Path) -> None:
        """Restores weights and this rank's shards. Raises ValueError if the layout has changed."""
        target = folder / checkpoint.STATE
        saved = json.loads((target / "deepspeed.json").read_text())
        if saved != self._layout:
            raise ValueError(
                f"train.workers / train.zero_stage: the checkpoint was written with {saved}, this "
                f"run has {self._layout}; use the same, or start a new run"
            )
        self._engine.load_checkpoint(str(target / "deepspeed"), tag="ds")
