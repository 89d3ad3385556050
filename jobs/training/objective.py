"""What a training step computes: loss, accuracy, and the random draws that make it repeatable.

Everything random in a step (level of the NAR, hidden conditions, dropout) is drawn from (seed,
step, rank), so the state that has to be saved is two counters, and a resumed run repeats an
uninterrupted one.
"""

import random
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from valle.model.ar import AR
from valle.model.nar import NAR
from valle.model.sequence import Batch, estimate_total_frames, length_mask, unconditional
from valle.model.tokens import EOS

IGNORE_INDEX = -100
MIN_TRUNCATED_FRAMES = 15
"""Frames of the shortest beginning that is learnt from: 0.2 s."""


@dataclass(frozen=True)
class Loss:
    """A batch's loss, with sums from which accuracies of many batches add up."""

    loss: Tensor
    """Mean cross entropy per predicted token."""

    tokens: Int[Tensor, " levels"]
    """Predicted tokens, per codebook."""

    correct: Int[Tensor, " levels"]
    """Of those, predicted right."""

    loss_sum: Float[Tensor, " levels"]
    """Summed cross entropy, per codebook."""


class Objective(nn.Module):
    """A model with its loss: what DDP and DeepSpeed wrap."""

    def __init__(self, model: AR | NAR) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, level: Int[Tensor, " B"]) -> Loss:
        """Loss of a batch. The AR model has one codebook and takes no notice of `level`."""
        if isinstance(self.model, AR):
            return ar_loss(self.model(batch), batch)
        return nar_loss(self.model(batch, level), batch, level)


def ar_loss(logits: Float[Tensor, "B T1 1025"], batch: Batch) -> Loss:
    """Cross entropy over the response's first codebook, its first frame and EOS included."""
    rows, size = logits.shape[:2]
    targets = F.pad(batch.codes[:, 0], (0, 1))
    targets[torch.arange(rows, device=targets.device), batch.frames] = EOS
    targets = targets.masked_fill(~length_mask(batch.frames + 1, size), IGNORE_INDEX)
    return _summarize(logits, targets, batch.frames.new_zeros(rows), 1)


def nar_loss(logits: Float[Tensor, "B T 1024"], batch: Batch, level: Int[Tensor, " B"]) -> Loss:
    """Cross entropy over codebook `level` of the response; none on the prompt."""
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
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    ).view_as(targets)
    counted = targets != IGNORE_INDEX
    loss = losses.sum() / counted.sum()
    right = (logits.detach().argmax(-1) == targets) & counted
    tokens, correct = (x.new_zeros(n_levels, dtype=torch.long) for x in (targets, targets))
    loss_sum = losses.new_zeros(n_levels)
    tokens.index_add_(0, index, counted.sum(1))
    correct.index_add_(0, index, right.sum(1))
    loss_sum.index_add_(0, index, losses.detach().sum(1))
    return Loss(loss, tokens, correct, loss_sum)


def draw_levels(rows: int, n_codebooks: int, key: str, emphasis: float = 0.0) -> Int[Tensor, " B"]:
    """A codebook k in 1 .. Q-1 to predict for each row, with weight 1 / k ** emphasis: uniform
    (VALL-E section 4.2.2) unless told otherwise."""
    rng = random.Random(f"levels/{key}")
    levels = range(1, n_codebooks)
    weights = [level**-emphasis for level in levels]
    return torch.tensor(rng.choices(levels, weights, k=rows))


def drop_conditions(batch: Batch, key: str, share: float) -> Batch:
    """Hides text and prompt of about a `share` of the rows: a model that has also learnt to speak
    without them can be guided by the difference (classifier-free guidance, Ho and Salimans 2022).
    """
    rng = random.Random(f"conditions/{key}")
    dropped = torch.tensor([[rng.random() < share] for _ in batch.frames])
    hidden = unconditional(batch)
    return replace(
        batch,
        phonemes=torch.where(dropped, hidden.phonemes, batch.phonemes),
        prompt=torch.where(dropped[:, :, None], hidden.prompt, batch.prompt),
    )


def truncate_responses(batch: Batch, key: str, share: float, frames_per_phoneme: float) -> Batch:
    """Of about a `share` of the rows only the beginning is said: what the NAR model gets to fill in
    where speech is streamed inside a sentence, and how long the whole will be is a guess."""
    rng = random.Random(f"cut/{key}")
    frames, total_frames = batch.frames.tolist(), batch.total_frames.tolist()
    phonemes = batch.phoneme_lengths.tolist()
    for row, n_frames in enumerate(frames):
        if n_frames > MIN_TRUNCATED_FRAMES and rng.random() < share:
            frames[row] = rng.randint(MIN_TRUNCATED_FRAMES, n_frames)
            total_frames[row] = estimate_total_frames(
                phonemes[row], frames[row], frames_per_phoneme
            )
    lengths = batch.frames.new_tensor(frames)
    codes = batch.codes.masked_fill(~length_mask(lengths, batch.codes.shape[2])[:, None], 0)
    return replace(
        batch, codes=codes, frames=lengths, total_frames=lengths.new_tensor(total_frames)
    )


def seed_step(key: str) -> None:
    """Seeds dropout for one step of one worker."""
    torch.manual_seed(random.Random(f"dropout/{key}").getrandbits(62))
