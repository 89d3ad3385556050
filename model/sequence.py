"""Batches of unequal lengths: segments (text, prompt, response) joined into padded sequences.

Legend: B batch, L phonemes, P prompt frames, T response frames, S joined length, Q codebooks,
D width.
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
    """Model input: text, prompt, and the response to learn or to continue."""

    phonemes: Int[Tensor, "B L"]
    phoneme_lengths: Int[Tensor, " B"]
    prompt: Int[Tensor, "B Q P"]
    prompt_frames: Int[Tensor, " B"]
    codes: Int[Tensor, "B R T"]
    """R = Q, or 1 if only the first codebook is known."""
    frames: Int[Tensor, " B"]
    total_frames: Int[Tensor, " B"]
    """Length of the whole response: more than `frames` where `codes` is only its beginning."""

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    @property
    def n_tokens(self) -> int:
        """Positions without padding: phonemes, prompt frames and response frames."""
        total = self.phoneme_lengths + self.prompt_frames + self.frames
        return int(total.sum())

    @property
    def n_padded(self) -> int:
        """Positions of the joined sequences, padding included."""
        total = self.phoneme_lengths + self.prompt_frames + self.frames
        return int(total.max()) * len(total)


def collate(
    phonemes: Sequence[Int[Tensor, " _"]],
    prompts: Sequence[Int[Tensor, "_ _"]],
    codes: Sequence[Int[Tensor, "_ _"]],
    total_frames: Sequence[int] | None = None,
) -> Batch:
    """Pads single items into a batch; `total_frames` are by default the frames of `codes`."""

    def lengths(items: Sequence[Tensor]) -> Tensor:
        return torch.tensor([item.shape[-1] for item in items])

    def pad(items: Sequence[Tensor], fill: int) -> Tensor:
        longest = max(item.shape[-1] for item in items)
        padded = [F.pad(item.long(), (0, longest - item.shape[-1]), value=fill) for item in items]
        return torch.stack(padded)

    return Batch(
        pad(phonemes, PAD),
        lengths(phonemes),
        pad(prompts, 0),
        lengths(prompts),
        pad(codes, 0),
        lengths(codes),
        lengths(codes) if total_frames is None else torch.tensor(total_frames),
    )


def single_batch(
    phonemes: Int[Tensor, " L"],
    prompt: Int[Tensor, "Q P"],
    codes: Int[Tensor, " T"],
    *,
    guided: bool = False,
) -> Batch:
    """A batch of one item; `codes` is the first codebook. `guided` adds its unconditional row."""

    def length(x: Tensor) -> Tensor:
        return torch.tensor([x.shape[-1]], device=phonemes.device)

    batch = Batch(
        phonemes[None],
        length(phonemes),
        prompt[None],
        length(prompt),
        codes[None, None],
        length(codes),
        length(codes),
    )
    return with_unconditional(batch) if guided else batch


def estimate_total_frames(phonemes: int, n_frames: int, frames_per_phoneme: float) -> int:
    """Estimated response length of a text, of which `n_frames` exist and more will follow."""
    return max(n_frames, round(phonemes * frames_per_phoneme))


def unconditional(batch: Batch) -> Batch:
    """The same rows with text and prompt replaced by padding and null codes of equal length: the
    unconditional input of classifier-free guidance."""
    return replace(
        batch,
        phonemes=torch.full_like(batch.phonemes, PAD),
        prompt=torch.full_like(batch.prompt, NULL_CODE),
    )


def with_unconditional(batch: Batch) -> Batch:
    """All rows, followed by the unconditional version of each."""
    null = unconditional(batch)
    return Batch(
        *(torch.cat([getattr(batch, f), getattr(null, f)]) for f in Batch.__dataclass_fields__)
    )


@dataclass(frozen=True)
class Segment:
    """A padded part of the sequence: embeddings, rotary positions and lengths without padding."""

    x: Float[Tensor, "B N D"]
    positions: Float[Tensor, "B N"]
    lengths: Int[Tensor, " B"]


@dataclass(frozen=True)
class PaddedSequence:
    """Segments joined row by row, with each row's padding at its end."""

    x: Float[Tensor, "B S D"]
    positions: Float[Tensor, "B S"]
    valid: Bool[Tensor, "B S"]
    starts: tuple[Int[Tensor, " B"], ...]
    """First position of each segment, per row."""

    def segment_mask(self, segment: int) -> Bool[Tensor, "B S"]:
        """True at the positions of a segment, which must not be the last."""
        first, end = self.starts[segment][:, None], self.starts[segment + 1][:, None]
        steps = torch.arange(self.valid.shape[1], device=self.valid.device)
        return (steps >= first) & (steps < end)


def concat_segments(segments: Sequence[Segment]) -> PaddedSequence:
    """Joins segments and moves all padding to the end of the rows."""
    x = torch.cat([s.x for s in segments], dim=1)
    positions = torch.cat([s.positions for s in segments], dim=1)
    valid = torch.cat([length_mask(s.lengths, s.x.shape[1]) for s in segments], dim=1)
    # a stable sort by validity moves padding to the end and keeps the order of the rest
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
    """`length` positions of each row from its `start` on; beyond the end, the last one repeated."""
    steps = torch.arange(length, device=x.device)
    index = (start[:, None] + steps).clamp_max(x.shape[1] - 1)
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def length_mask(lengths: Int[Tensor, " B"], size: int) -> Bool[Tensor, "B {size}"]:
    """True at the first `lengths` of `size` positions."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def frame_positions(
    lengths: Int[Tensor, " B"], size: int, stride: int = 1, end: bool = False
) -> Tensor:
    """Rotary positions 0, 1, 2 ... of frames, or of groups of `stride` frames. With `end` the last
    one comes right before the separator, which is at -1."""
    steps = torch.arange(size, device=lengths.device, dtype=torch.float32).expand(len(lengths), -1)
    return (steps - lengths[:, None]) * stride - 1 if end else steps * stride
