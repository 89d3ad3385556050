"""One sequence of text, prompt and response, without holes, for a batch of unequal lengths.

Legend: B batch, L phonemes, P prompt frames, T response frames, S joined length, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from valle.model.text import PAD
from valle.model.tokens import NULL_CODE


@dataclass(frozen=True)
class Batch:
    """What a model is given: text, the prompt recording, and the speech to learn or continue."""

    phonemes: Int[Tensor, "B L"]
    phoneme_lengths: Int[Tensor, " B"]
    prompt: Int[Tensor, "B Q P"]
    prompt_frames: Int[Tensor, " B"]
    codes: Int[Tensor, "B R T"]
    """R = Q, or 1 where only the first codebook is known."""
    frames: Int[Tensor, " B"]
    total_frames: Int[Tensor, " B"]
    """Frames that the whole text takes: more than `frames` where only its beginning is said."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    @property
    def n_tokens(self) -> int:
        """Positions that carry content: phonemes, prompt frames and response frames."""
        total = self.phoneme_lengths + self.prompt_frames + self.frames
        return int(total.sum())

    @property
    def n_padded(self) -> int:
        """Positions the joined sequences occupy, padding included."""
        total = self.phoneme_lengths + self.prompt_frames + self.frames
        return int(total.max()) * len(total)


def collate(
    phonemes: Sequence[Int[Tensor, " _"]],
    prompts: Sequence[Int[Tensor, "_ _"]],
    codes: Sequence[Int[Tensor, "_ _"]],
    total_frames: Sequence[int] | None = None,
) -> Batch:
    """Pads single items into a batch; each says its whole text, unless `total_frames` is more."""

    def lengths(items: Sequence[Tensor]) -> Tensor:
        return torch.tensor([item.shape[-1] for item in items])

    def pad(items: Sequence[Tensor], fill: int) -> Tensor:
        longest = max(item.shape[-1] for item in items)
        padded = [F.pad(item.long(), (0, longest - item.shape[-1]), value=fill) for item in items]
        return torch.stack(padded)

    return Batch(
        pad(phonemes, PAD), lengths(phonemes),
        pad(prompts, 0), lengths(prompts),
        pad(codes, 0), lengths(codes),
        lengths(codes) if total_frames is None else torch.tensor(total_frames),
    )  # fmt: skip


def single_batch(
    phonemes: Int[Tensor, " L"],
    prompt: Int[Tensor, "Q P"],
    codes: Int[Tensor, " T"],
    *,
    guided: bool = False,
) -> Batch:
    """A batch of one, from unpadded parts; `codes` is the first codebook. `guided` adds a second
    row, with text and prompt hidden."""

    def length(x: Tensor) -> Tensor:
        return torch.tensor([x.shape[-1]], device=phonemes.device)

    batch = Batch(
        phonemes[None], length(phonemes), prompt[None], length(prompt),
        codes[None, None], length(codes), length(codes),
    )  # fmt: skip
    return with_unconditional(batch) if guided else batch


def estimate_total_frames(phonemes: int, n_frames: int, frames_per_phoneme: float) -> int:
    """How long a text will be, of which `n_frames` are known and no end is in sight."""
    return max(n_frames, round(phonemes * frames_per_phoneme))


def unconditional(batch: Batch) -> Batch:
    """The same rows with text and prompt hidden, of which only the lengths are left: what
    classifier-free guidance compares with."""
    return replace(
        batch,
        phonemes=torch.full_like(batch.phonemes, PAD),
        prompt=torch.full_like(batch.prompt, NULL_CODE),
    )


def with_unconditional(batch: Batch) -> Batch:
    """All rows, and then all of them again with text and prompt hidden."""
    null = unconditional(batch)
    return Batch(
        *(torch.cat([getattr(batch, f), getattr(null, f)]) for f in Batch.__dataclass_fields__)
    )


@dataclass(frozen=True)
class Segment:
    """A padded part of the sequence: its embeddings, positions and true lengths."""

    x: Float[Tensor, "B N D"]
    positions: Float[Tensor, "B N"]
    lengths: Int[Tensor, " B"]


@dataclass(frozen=True)
class PaddedSequence:
    """Segments one after the other, each row's padding moved to its end."""

    x: Float[Tensor, "B S D"]
    positions: Float[Tensor, "B S"]
    valid: Bool[Tensor, "B S"]
    starts: tuple[Int[Tensor, " B"], ...]
    """Where each segment begins, per row."""

    def segment_mask(self, segment: int) -> Bool[Tensor, "B S"]:
        """Which positions belong to a segment that is not the last."""
        first, end = self.starts[segment][:, None], self.starts[segment + 1][:, None]
        steps = torch.arange(self.valid.shape[1], device=self.valid.device)
        return (steps >= first) & (steps < end)


def concat_segments(segments: Sequence[Segment]) -> PaddedSequence:
    """Concatenates segments row by row; rows are as long as their own content."""
    x = torch.cat([s.x for s in segments], dim=1)
    positions = torch.cat([s.positions for s in segments], dim=1)
    valid = torch.cat([length_mask(s.lengths, s.x.shape[1]) for s in segments], dim=1)
    # a stable sort by validity moves the holes to the end and keeps the order of the rest
    order = torch.argsort((~valid).int(), dim=1, stable=True)
    longest = int(valid.sum(1).max())
    order = order[:, :longest]
    lengths = torch.stack([s.lengths for s in segments])
    starts = lengths.cumsum(0) - lengths
    return PaddedSequence(
        x.gather(1, order[:, :, None].expand(-1, -1, x.shape[2])),
        positions.gather(1, order),
        valid.gather(1, order),
        tuple(starts),
    )


def gather_span(
    x: Float[Tensor, "B S D"], start: Int[Tensor, " B"], length: int
) -> Float[Tensor, "B {length} D"]:
    """`length` positions of each row from its `start` on (clamped to the end of the row)."""
    steps = torch.arange(length, device=x.device)
    index = (start[:, None] + steps).clamp_max(x.shape[1] - 1)
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def length_mask(lengths: Int[Tensor, " B"], size: int) -> Bool[Tensor, "B {size}"]:
    """True at the first `lengths` of `size` positions."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def frame_positions(
    lengths: Int[Tensor, " B"], size: int, stride: int = 1, end: bool = False
) -> Tensor:
    """Positions 0, 1, 2 ... of frames, or of groups of `stride` frames; with `end`, they count up
    to the separator's, which is at -1."""
    steps = torch.arange(size, device=lengths.device, dtype=torch.float32).expand(len(lengths), -1)
    return (steps - lengths[:, None]) * stride - 1 if end else steps * stride
