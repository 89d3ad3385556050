"""Packed attention, `torch.nn.attention.varlen.varlen_attn`, against SDPA with padding.

Causality is a window (-1, 0) in torch 2.11 and 2.13, a flag in 2.10. 2.13 adds `seqused_k`,
`block_table` and `num_splits`, which a paged KV cache needs; the arguments present are recorded.
"""

import inspect
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from valle.jobs.bench.gpu import device_timing
from valle.jobs.bench.gpu.numerics import relative_error
from valle.jobs.bench.gpu.record import PhaseContext
from valle.model.sequence import length_mask

TOLERANCE = 1e-2
"""Relative error allowed for outputs and gradients in bf16, which has three digits."""

PAGED_ARGUMENTS = ("seqused_k", "block_table", "num_splits")


def causal_arguments(function: Callable[..., object]) -> dict[str, Any]:
    """Arguments that make a version of `varlen_attn` causal. Raises ValueError for an unknown
    version."""
    names = inspect.signature(function).parameters
    if "window_size" in names:
        return {"window_size": (-1, 0)}
    if "is_causal" in names:
        return {"is_causal": True}
    raise ValueError(f"varlen_attn: neither window_size nor is_causal among {', '.join(names)}")


def compare(context: PhaseContext) -> None:
    """Checks packed attention against single sequences, and times it against a padded batch."""
    record, device = context.record, context.device
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        record.skip("varlen_attn", f"not in this version of torch: {error}")
        return
    names = inspect.signature(varlen_attn).parameters
    record.measurement(
        "varlen_attn",
        torch=torch.__version__,
        causal=str(causal_arguments(varlen_attn)),
        paged=[name for name in PAGED_ARGUMENTS if name in names],
    )
    if not context.on_gpu:
        record.skip("varlen_attn = SDPA", "its kernel needs a CUDA device")
        return
    lengths = torch.tensor([900, 1250, 640, 1100, 1400, 800, 1000, 1200, 300, 1500, 700, 1250])
    for causal in (True, False):
        _compare(context, varlen_attn, lengths, causal, device)


def _compare(
    context: PhaseContext,
    varlen_attn: Callable[..., Any],
    lengths: Tensor,
    causal: bool,
    device: torch.device,
) -> None:
    """Compares forward and backward passes with one of the two masks."""
    # queries, keys and values of all sequences, end to end
    generator = torch.Generator().manual_seed(0)
    total, longest = int(lengths.sum()), int(lengths.max())
    heads, width = 16, 64
    packed = [
        torch.randn(total, heads, width, generator=generator)
        .to(device, torch.bfloat16)
        .requires_grad_()
        for _ in range(3)
    ]
    grad_output = torch.randn(total, heads, width, generator=generator).to(device, torch.bfloat16)
    starts = F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    arguments = causal_arguments(varlen_attn) if causal else {}

    def packed_attention() -> Tensor:
        output: Tensor = varlen_attn(*packed, starts, starts, longest, longest, **arguments)
        return output

    def one_by_one() -> Tensor:
        parts = zip(*(part.split(lengths.tolist()) for part in packed), strict=True)
        return torch.cat(
            [sdpa([x.transpose(0, 1)[None] for x in part], None, causal)[0] for part in parts], 1
        ).transpose(0, 1)

    actual, expected = (
        gradients(run, packed, grad_output) for run in (packed_attention, one_by_one)
    )
    error = max(relative_error(a.float(), b.float()) for a, b in zip(actual, expected, strict=True))
    name = "causal" if causal else "all to all"
    context.record.check(f"varlen_attn = SDPA, {name}", error <= TOLERANCE, relative_error=error)

    # the same sizes as a padded batch, for its time only
    padded = [
        torch.randn(
            len(lengths), heads, longest, width, device=device, dtype=torch.bfloat16
        ).requires_grad_()
        for _ in range(3)
    ]
    mask = None if causal else length_mask(lengths.to(device), longest)[:, None, None]
    padded_grad_output = torch.randn_like(padded[0])

    def with_padding() -> Tensor:
        return sdpa(padded, mask, causal)

    def time(run: Callable[[], Tensor], inputs: list[Tensor], grad_output: Tensor) -> float:
        times = device_timing.time_calls(device, lambda: gradients(run, inputs, grad_output), 13)
        return statistics.median(times[3:])

    fast, slow = (
        time(packed_attention, packed, grad_output),
        time(with_padding, padded, padded_grad_output),
    )
    context.record.measurement(
        f"varlen_attn, {name}, forward and backward",
        milliseconds=1000 * fast,
        padded_sdpa_milliseconds=1000 * slow,
        speedup=slow / fast,
        padding=1 - total / (longest * len(lengths)),
    )


def sdpa(parts: Sequence[Tensor], mask: Tensor | None, causal: bool) -> Tensor:
    """SDPA of queries, keys and values `[B, H, S, K]`."""
    query, key, value = parts
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)


def gradients(run: Callable[[], Tensor], inputs: list[Tensor], grad_output: Tensor) -> list[Tensor]:
    """The output, and the gradients of `inputs` for the output gradient `grad_output`."""
    output = run()
    return [output.detach(), *torch.autograd.grad(output, inputs, grad_output)]
