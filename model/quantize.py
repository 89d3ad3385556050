"""int8 weights with a scale per row: a storage format, and a precision to compute in.

`to_int8` stores a checkpoint in a quarter of its size; `from_int8` restores float32 when it is
loaded. The scale of a row (the weights of one output, or one embedding) is its largest magnitude;
the rounding error is at most 1/254 of it. `convert` sets the precision that a model computes in.
"""

from collections.abc import Mapping
from typing import Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from valle.model.ar import AR
from valle.model.nar import NAR

Precision = Literal["fp32", "bf16", "int8"]
Model = TypeVar("Model", AR, NAR)

SCALE = ".scale"
"""Suffix of the name under which the scales of an int8 tensor are stored."""


def to_int8(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices, and stacks of them, as int8 with scales; vectors unchanged."""
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
    """The inverse of `to_int8`, up to rounding; other tensors unchanged.

    Raises ValueError for an int8 tensor without scales.
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


def convert(model: Model, precision: Precision) -> Model:
    """The model, converted in place to compute in `precision`.

    int8 is for CPUs with bf16 instructions. It stores the matrices of the AR model's transformer in
    int8 and multiplies them by bf16 activations: a decoding step, which memory bandwidth limits,
    reads a quarter of the bytes. The NAR model computes hundreds of frames at once, which
    arithmetic limits; it gets bf16.
    """
    if precision == "int8" and isinstance(model, AR):
        for block in model.transformer.blocks:
            _replace_linear(block)
        return model
    return model if precision == "fp32" else model.to(torch.bfloat16)


def _replace_linear(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        else:
            _replace_linear(child)


class Int8Linear(nn.Module):
    """A linear layer whose matrix stays int8, with a scale per row."""

    weight: Tensor
    scale: Tensor
    bias: Tensor
    _ones: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        stored = to_int8({"weight": linear.weight.detach()})
        scale = stored["weight.scale"]
        bias = torch.zeros_like(scale) if linear.bias is None else linear.bias.detach()
        self.register_buffer("weight", stored["weight"])
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        # the kernel's scales are bf16, too coarse: it gets ones, and `forward` scales in float32
        self.register_buffer("_ones", torch.ones_like(scale, dtype=torch.bfloat16))

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """`x` times the matrix, plus the bias: a bf16 product, scaled and added in float32."""
        rows = x.flatten(0, -2).bfloat16()
        product = torch._weight_int8pack_mm(rows, self.weight, self._ones)
        return torch.addcmul(self.bias, product, self.scale).view(*x.shape[:-1], -1)
