"""What a training step computes: loss, accuracy, schedule, and the state that makes it resumable.

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
from valle.model.sequence import Batch, expected_frames, mask, unconditional
from valle.model.tokens import EOS

IGNORE = -100
SHORTEST_CUT = 15
"""Frames of the shortest beginning that is learnt from: 0.2 s."""


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """AdamW with linear warm-up and linear decay, as in the paper (section 5.1)."""

    learning_rate: float = 5e-4
    """Peak."""

    warmup: int = 200
    """Steps up to the peak."""

    final: float = 0.05
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

    def rate(self, step: int, total: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / self.warmup)
        done = max(0, step - self.warmup) / max(1, total - self.warmup)
        return self.learning_rate * warm * (1 - (1 - self.final) * min(1.0, done))


def build_optimizer(model: nn.Module, chosen: Optimization) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices of linear layers only."""
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    decayed = [p for p in model.parameters() if id(p) in matrices]
    others = [p for p in model.parameters() if id(p) not in matrices]
    groups = [
        {"params": decayed, "weight_decay": chosen.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, chosen.learning_rate, betas=chosen.betas, fused=True)


@dataclass(frozen=True)
class Loss:
    """A batch's loss, with sums from which accuracies of many batches add up."""

    loss: Tensor
    """Mean cross entropy per predicted token."""

    tokens: Int[Tensor, " levels"]
    """Predicted tokens, per codebook."""

    correct: Int[Tensor, " levels"]
    """Of those, predicted right."""

    total: Float[Tensor, " levels"]
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
    targets = targets.masked_fill(~mask(batch.frames + 1, size), IGNORE)
    return _summarise(logits, targets, batch.frames.new_zeros(rows), 1)


def nar_loss(logits: Float[Tensor, "B T 1024"], batch: Batch, level: Int[Tensor, " B"]) -> Loss:
    """Cross entropy over codebook `level` of the response; none on the prompt."""
    rows = torch.arange(len(level), device=level.device)
    targets = batch.codes[rows, level]
    targets = targets.masked_fill(~mask(batch.frames, targets.shape[1]), IGNORE)
    return _summarise(logits, targets, level - 1, batch.codes.shape[1] - 1)


def _summarise(
    logits: Float[Tensor, "B T V"],
    targets: Int[Tensor, "B T"],
    index: Int[Tensor, " B"],
    n_levels: int,
) -> Loss:
    each = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none"
    ).view_as(targets)
    counted = targets != IGNORE
    loss = each.sum() / counted.sum()
    right = (logits.detach().argmax(-1) == targets) & counted
    tokens, correct = (x.new_zeros(n_levels, dtype=torch.long) for x in (targets, targets))
    total = each.new_zeros(n_levels)
    tokens.index_add_(0, index, counted.sum(1))
    correct.index_add_(0, index, right.sum(1))
    total.index_add_(0, index, each.detach().sum(1))
    return Loss(loss, tokens, correct, total)


def draw_levels(rows: int, n_codebooks: int, key: str, emphasis: float = 0.0) -> Int[Tensor, " B"]:
    """A codebook k in 1 .. Q-1 to predict for each row, with weight 1 / k ** emphasis: uniform
    (VALL-E section 4.2.2) unless told otherwise."""
    chosen = random.Random(f"levels/{key}")
    levels = range(1, n_codebooks)
    weights = [level**-emphasis for level in levels]
    return torch.tensor(chosen.choices(levels, weights, k=rows))


def drop_conditions(batch: Batch, key: str, share: float) -> Batch:
    """Hides text and prompt of about a `share` of the rows: a model that has also learnt to speak
    without them can be guided by the difference (classifier-free guidance, Ho and Salimans 2022).
    """
    chosen = random.Random(f"conditions/{key}")
    dropped = torch.tensor([[chosen.random() < share] for _ in batch.frames])
    hidden = unconditional(batch)
    return replace(
        batch,
        phonemes=torch.where(dropped, hidden.phonemes, batch.phonemes),
        prompt=torch.where(dropped[:, :, None], hidden.prompt, batch.prompt),
    )


def cut_responses(batch: Batch, key: str, share: float, frames_per_phoneme: float) -> Batch:
    """Of about a `share` of the rows only the beginning is said: what the NAR model gets to fill in
    where speech is streamed inside a sentence, and how long the whole will be is a guess."""
    chosen = random.Random(f"cut/{key}")
    frames, expected = batch.frames.tolist(), batch.expected.tolist()
    phonemes = batch.phoneme_lengths.tolist()
    for row, whole in enumerate(frames):
        if whole > SHORTEST_CUT and chosen.random() < share:
            frames[row] = chosen.randint(SHORTEST_CUT, whole)
            expected[row] = expected_frames(phonemes[row], frames[row], frames_per_phoneme)
    said = batch.frames.new_tensor(frames)
    codes = batch.codes.masked_fill(~mask(said, batch.codes.shape[2])[:, None], 0)
    return replace(batch, codes=codes, frames=said, expected=said.new_tensor(expected))


def seed_step(key: str) -> None:
    """Seeds dropout for one step of one worker."""
    torch.manual_seed(random.Random(f"dropout/{key}").getrandbits(62))
