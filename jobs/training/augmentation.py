"""Random changes to a training batch of the AR and NAR models, repeatable from a key.

Every random draw of a step (the NAR's codebook, dropped conditions, truncation, dropout) is a
function of the key `{seed}/{step}/{rank}`. So a checkpoint needs no state of a random
generator, and a resumed run repeats an uninterrupted one.

Shapes: B batch.
"""

import random
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from valle.model.sequence import Batch, estimate_total_frames, length_mask, unconditional

MIN_TRUNCATED_FRAMES = 15
"""Frames of the shortest truncated response: 0.2 s at 75 frames a second."""


def draw_levels(rows: int, n_codebooks: int, key: str, emphasis: float = 0.0) -> Int[Tensor, " B"]:
    """A codebook k in 1 .. Q-1 for each row, drawn with weight 1 / k ** emphasis.

    An emphasis of 0 is uniform, as in VALL-E section 4.2.2.
    """
    rng = random.Random(f"levels/{key}")
    levels = range(1, n_codebooks)
    weights = [level**-emphasis for level in levels]
    return torch.tensor(rng.choices(levels, weights, k=rows))


def drop_conditions(batch: Batch, key: str, share: float) -> Batch:
    """Hides text and prompt in about a `share` of the rows.

    Trains the unconditional distribution that classifier-free guidance needs (Ho and Salimans
    2022).
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
    """Cuts the response to a random beginning in about a `share` of the rows.

    The text stays complete and the total length becomes an estimate: the NAR model's input when a
    sentence is streamed in chunks.
    """
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
    """Seeds torch's generator, from which dropout draws, for one step of one worker."""
    torch.manual_seed(random.Random(f"dropout/{key}").getrandbits(62))
