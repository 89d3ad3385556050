"""Weights at a quarter of their size: int8 with a scale per row, for what is shipped.

Only storage: a checkpoint is turned back into float32 when it is loaded. A row of a matrix (the
weights of one output, or one embedding) keeps its largest value as scale; the rounding error is at
most 1/254 of that.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

SCALE = ".scale"
"""Ending of the name under which the scales of an int8 tensor are stored."""


def to_int8(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices (and stacks of them) as int8 with scales; vectors as they are."""
    stored: dict[str, Tensor] = {}
    for name, value in weights.items():
        if value.dim() < 2:
            stored[name] = value
            continue
        largest = value.abs().amax(-1, keepdim=True).clamp_min(1e-12)
        stored[name] = (value / largest * 127).round().to(torch.int8)
        stored[name + SCALE] = (largest / 127).squeeze(-1).float()
    return stored


def from_int8(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `to_int8` was given, but for rounding; anything else as it is.

    Raises ValueError when an int8 tensor has no scales.
    """
    weights: dict[str, Tensor] = {}
    for name, value in stored.items():
        if value.dtype != torch.int8:
            matrix = stored.get(name.removesuffix(SCALE))
            if not (name.endswith(SCALE) and matrix is not None and matrix.dtype == torch.int8):
                weights[name] = value
            continue
        if name + SCALE not in stored:
            raise ValueError(f"{name} is int8 and has no {name + SCALE}")
        weights[name] = value.float() * stored[name + SCALE].unsqueeze(-1)
    return weights
