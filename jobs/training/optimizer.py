"""AdamW and its learning-rate schedule."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

Schedule = Literal["linear", "cosine", "linear_floor"]


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """AdamW with linear warm-up and decay; the defaults are VALL-E's (section 5.1)."""

    learning_rate: float = 5e-4
    """Peak learning rate; `learning_rate_at` gives that of a step."""

    warmup: int = 200
    """Steps of linear warm-up to the peak."""

    schedule: Schedule = "linear"
    """Decay after the peak. linear: from the end of the warm-up to `final_fraction` at the last
    step. cosine: half a cosine over all steps to `final_fraction`. linear_floor: linear over all
    steps towards zero, but never below `final_fraction`."""

    # as recipe.formerly("final"), whose module imports packages that `make gpu` does without
    final_fraction: float = field(default=0.05, metadata={"formerly": ("final",)})
    """Share of the peak learning rate that is left at the last step."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's running averages of the gradient and of its square."""

    weight_decay: float = 0.01
    """Decoupled weight decay. The AR and NAR models have none on norms, biases and embeddings."""

    clip: float = 1.0
    """Upper bound on the norm of the gradient; larger gradients are scaled down."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate: {self.learning_rate} is not above 0")
        if self.warmup < 1:
            raise ValueError(f"warmup: {self.warmup} is below 1")
        if self.schedule not in ("linear", "cosine", "linear_floor"):
            raise ValueError(f"schedule: {self.schedule!r} is none of linear, cosine, linear_floor")

    def learning_rate_at(self, step: int, total: int) -> float:
        """The learning rate of a step, counted from 0, in a run of `total` steps."""
        final = self.final_fraction
        progress = min(1.0, step / max(1, total))
        if self.schedule == "cosine":
            decay = final + (1 - final) * (0.5 * (1 + math.cos(math.pi * progress)))
        elif self.schedule == "linear_floor":
            decay = max(final, 1 - progress)
        else:
            progress = max(0, step - self.warmup) / max(1, total - self.warmup)
            decay = 1 - (1 - final) * min(1.0, progress)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * decay


def build_optimizer(model: nn.Module, optimization: Optimization) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices of linear layers only, as one fused kernel."""
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


def build_codec_optimizer(model: nn.Module, optimization: Optimization) -> torch.optim.AdamW:
    """AdamW with the same weight decay on every parameter.

    Not fused: the fused kernel rounds differently in the last bit, and the codecs' runs stay
    comparable with those that trained the shipped weights.
    """
    return torch.optim.AdamW(
        model.parameters(), optimization.learning_rate, betas=optimization.betas,
        weight_decay=optimization.weight_decay,
    )  # fmt: skip
