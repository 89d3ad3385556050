"""Losses and accuracies of the AR and NAR models.

Shapes: B batch, T frames, T1 frames with EOS, V classes, `levels` codebooks that a model predicts
(1 for AR, Q - 1 for NAR).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from valle.model.ar import AR
from valle.model.nar import NAR
from valle.model.sequence import Batch, length_mask
from valle.model.tokens import EOS

IGNORE_INDEX = -100
"""Target of positions without a loss, PyTorch's own value."""


@dataclass(frozen=True)
class Loss:
    """Loss of a batch, with sums from which the means over many batches are computed."""

    loss: Tensor
    """Mean cross entropy per predicted token, a scalar."""

    tokens: Int[Tensor, " levels"]
    """Number of predicted tokens, per codebook."""

    correct: Int[Tensor, " levels"]
    """Number of tokens whose most likely class is the target, per codebook."""

    loss_sum: Float[Tensor, " levels"]
    """Summed cross entropy, per codebook."""

    @property
    def terms(self) -> Mapping[str, Tensor]:
        """Scalars to log."""
        return {"loss": self.loss, "accuracy": self.correct.sum() / self.tokens.sum()}


class Objective(nn.Module):
    """A model and its loss as one module, which DDP and DeepSpeed wrap."""

    def __init__(self, model: AR | NAR) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, level: Int[Tensor, " B"]) -> Loss:
        """Loss of a batch; `level` is each row's codebook for NAR and ignored for AR."""
        if isinstance(self.model, AR):
            return ar_loss(self.model(batch), batch)
        return nar_loss(self.model(batch, level), batch, level)


def ar_loss(logits: Float[Tensor, "B T1 1025"], batch: Batch) -> Loss:
    """Cross entropy of the response's first codebook, from its first frame to EOS."""
    rows, size = logits.shape[:2]
    targets = F.pad(batch.codes[:, 0], (0, 1))
    targets[torch.arange(rows, device=targets.device), batch.frames] = EOS
    targets = targets.masked_fill(~length_mask(batch.frames + 1, size), IGNORE_INDEX)
    return _summarize(logits, targets, batch.frames.new_zeros(rows), 1)


def nar_loss(logits: Float[Tensor, "B T 1024"], batch: Batch, level: Int[Tensor, " B"]) -> Loss:
    """Cross entropy of codebook `level` of the response; the prompt has no loss."""
    rows = torch.arange(len(level), device=level.device)
    targets = batch.codes[rows, level]
    targets = targets.masked_fill(~length_mask(batch.frames, targets.shape[1]), IGNORE_INDEX)
    return _summarize(logits, targets, level - 1, batch.codes.shape[1] - 1)


def _summarize(
    logits: Float[Tensor, "B T V"],
    targets: Int[Tensor, "B T"],
    index: Int[Tensor, " B"],
    n_levels: int,
) -> Loss:
    """Mean, sums and hits; row b counts for codebook `index[b]`."""
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    ).view_as(targets)
    counted = targets != IGNORE_INDEX
    loss = losses.sum() / counted.sum()
    correct_positions = (logits.detach().argmax(-1) == targets) & counted
    tokens, correct = (x.new_zeros(n_levels, dtype=torch.long) for x in (targets, targets))
    loss_sum = losses.new_zeros(n_levels)
    tokens.index_add_(0, index, counted.sum(1))
    correct.index_add_(0, index, correct_positions.sum(1))
    loss_sum.index_add_(0, index, losses.detach().sum(1))
    return Loss(loss, tokens, correct, loss_sum)
