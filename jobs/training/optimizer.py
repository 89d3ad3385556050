"""AdamW with its learning-rate schedule."""

from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """AdamW with linear warm-up and linear decay, as in the paper (section 5.1)."""

    learning_rate: float = 5e-4
    """Peak."""

    warmup: int = 200
    """Steps up to the peak."""

    # not recipe.formerly(): the bare machine of `make gpu` lacks what that module imports
    final_fraction: float = field(default=0.05, metadata={"formerly": ("final",)})
    """Share of the peak that is left at the last step."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW's averages."""

    weight_decay: float = 0.01
    """On matrices; norms, biases and embeddings have none."""

    clip: float = 1.0
    """Bound on the gradient's norm."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate: {self.learning_rate} is not above 0")
        if self.warmup < 1:
            raise ValueError(f"warmup: {self.warmup} is below 1")

    def learning_rate_at(self, step: int, total: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / self.warmup)
        progress = max(0, step - self.warmup) / max(1, total - self.warmup)
        return self.learning_rate * warm * (1 - (1 - self.final_fraction) * min(1.0, progress))


def build_optimizer(model: nn.Module, optimization: Optimization) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices of linear layers only."""
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    decayed = [p for p in model.parameters() if id(p) in matrices]
    others = [p for p in model.parameters() if id(p) not in matrices]
    groups = [
        {"params": decayed, "weight_decay": optimization.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, optimization.learning_rate, betas=optimization.betas, fused=True
    )
