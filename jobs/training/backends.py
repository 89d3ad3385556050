"""The two ways a training step is spread over workers: DDP and DeepSpeed.

A backend owns model and optimizer of one worker; the loop in `jobs/train.py` sees only this
interface. Both run inside Ray Train's process group. Which one a recipe names changes speed and
memory, not results.
"""

import json
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from valle.jobs.training.objective import Loss, Objective
from valle.jobs.training.optimizer import Optimization, build_optimizer
from valle.model.sequence import Batch
from valle.platform import checkpoint


class Backend(Protocol):
    """Model, optimizer and collective of one worker."""

    model: nn.Module
    """The bare model."""

    writes_on_every_rank: bool
    """Whether each rank adds files of its own to a checkpoint."""

    def step(self, batch: Batch, level: Tensor, learning_rate: float) -> tuple[Loss, float]:
        """Forward, backward, clip, update; returns the loss and the gradient's norm."""

    def weights(self) -> dict[str, Tensor]:
        """The whole model's weights; every rank must call it."""

    def save(self, folder: Path) -> None:
        """Adds the optimizer to a checkpoint folder that holds `state/`."""

    def load(self, folder: Path) -> None:
        """Takes weights and optimizer from a checkpoint folder."""


class DDPBackend:
    """PyTorch's DistributedDataParallel; with one worker, the plain module."""

    writes_on_every_rank = False

    def __init__(
        self, model: nn.Module, optimization: Optimization, device: torch.device, bf16: bool
    ) -> None:
        self.model = model.to(device)
        self._objective: nn.Module = Objective(self.model)  # type: ignore[arg-type]
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._objective = DistributedDataParallel(self._objective)
        self._optimizer = build_optimizer(self.model, optimization)
        self._optimization = optimization
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    def step(self, batch: Batch, level: Tensor, learning_rate: float) -> tuple[Loss, float]:
        """One update at this learning rate."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        with self._autocast:
            loss: Loss = self._objective(batch, level)
        self._optimizer.zero_grad(set_to_none=True)
        loss.loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._optimization.clip)
        self._optimizer.step()
        return loss, float(norm)

    def weights(self) -> dict[str, Tensor]:
        """The module's own."""
        return self.model.state_dict()

    def save(self, folder: Path) -> None:
        """AdamW's averages as safetensors."""
        checkpoint.save_optimizer(folder, self.model, self._optimizer)

    def load(self, folder: Path) -> None:
        """Weights and averages."""
        self.model.load_state_dict(checkpoint.load_weights(folder))
        checkpoint.load_optimizer(folder, self.model, self._optimizer)


class DeepSpeedBackend:
    """ZeRO. Its shards can be read back by the same number of workers at the same stage only."""

    writes_on_every_rank = True

    def __init__(
        self,
        model: nn.Module,
        optimization: Optimization,
        device: torch.device,
        bf16: bool,
        stage: int,
    ) -> None:
        import deepspeed
        import deepspeed.ops
        from deepspeed.accelerator import set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        if device.type == "cpu":
            # it would take any GPU that it sees, also on a node whose GPUs are not this worker's
            set_accelerator(CPU_Accelerator())
            # otherwise compiled at every start (45 s); only inference uses it
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl")
        objective = Objective(model)  # type: ignore[arg-type]
        ds_config = {
            "train_micro_batch_size_per_gpu": 1,  # batches are counted in tokens, not in rows
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optimization.clip,
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": bf16},
            "steps_per_print": 10**9,
        }
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=objective, model_parameters=list(objective.parameters()),
            optimizer=build_optimizer(model, optimization), config=ds_config,
            dist_init_required=False,
        )  # fmt: skip
        self.model = model
        self._layout = {"world_size": dist.get_world_size(), "zero_stage": stage}

    def step(self, batch: Batch, level: Tensor, learning_rate: float) -> tuple[Loss, float]:
        """One update at this learning rate."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        loss: Loss = self._engine(batch, level)
        self._engine.backward(loss.loss)
        self._engine.step()
        return loss, float(self._engine.get_global_grad_norm() or 0.0)

    def weights(self) -> dict[str, Tensor]:
        """Gathered from all ranks where ZeRO-3 spread them."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            # a copy, and in float32: with bf16 DeepSpeed keeps the module itself in bf16
            return {name: value.float().clone() for name, value in self.model.state_dict().items()}

    def save(self, folder: Path) -> None:
        """This rank's shards, in DeepSpeed's own format; every rank must call it."""
        target = folder / checkpoint.STATE
        target.mkdir(parents=True, exist_ok=True)
        (target / "deepspeed.json").write_text(json.dumps(self._layout))
        self._engine.save_checkpoint(str(target / "deepspeed"), tag="ds")

    def load(self, folder: Path) -> None:
        """Weights and this rank's shards. Raises ValueError when the layout has changed."""
        target = folder / checkpoint.STATE
        saved = json.loads((target / "deepspeed.json").read_text())
        if saved != self._layout:
            raise ValueError(
                f"train.workers / train.zero_stage: the checkpoint was written with {saved}, this "
                f"run has {self._layout}; use the same, or start a new run"
            )
        self._engine.load_checkpoint(str(target / "deepspeed"), tag="ds")
