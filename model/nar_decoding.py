"""The NAR model's part: from the first codebook to all eight, one sentence or many at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from cachetools import LRUCache
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from valle.model.codec.interface import Codes
from valle.model.nar import NAR
from valle.model.prompt import ReadPrompt
from valle.model.sampling import Sampling, guide, sample
from valle.model.sequence import collate, expected_frames, with_unconditional
from valle.model.tokens import HIDDEN


@dataclass(frozen=True, kw_only=True)
class Filling:
    """How codebooks 2 to 8 are filled in."""

    sampling: Sampling
    """A temperature of 0 is the paper's greedy choice."""

    guided_levels: int
    """Codebooks that are filled in with guidance, from the second on: they carry the words."""

    seed: int = 0
    """Of sampling, if there is any."""

    def __post_init__(self) -> None:
        if self.guided_levels < 0:
            raise ValueError(f"guided_levels: {self.guided_levels} is below 0")


@dataclass(frozen=True)
class Unfilled:
    """Speech of which the first codebook is known."""

    ids: list[int]
    """Phonemes."""
    prompt: Codes
    """`[8, P]`"""
    first: NDArray[np.int16]
    """`[T]`"""
    spoken: Codes | None = None
    """`[8, S]`: the first frames, where they are settled already."""
    ended: bool = True
    """Whether that says the whole text, or the AR model has more to say, or would have had."""

    @property
    def positions(self) -> int:
        """Of the NAR model's sequence, but for two separators: a prompt that was read before is
        still looked at, and takes memory in each row."""
        return len(self.ids) + self.prompt.shape[1] + len(self.first)

    def expected(self, frames_per_phoneme: float) -> int:
        """Frames of the whole."""
        said = len(self.first)
        return said if self.ended else expected_frames(len(self.ids), said, frames_per_phoneme)


def fill_in(nar: NAR, item: Unfilled, how: Filling) -> Codes:
    """All codebooks `[8, T]`, the plain way."""
    device = nar.heads.device
    codes = nar.generate(
        torch.tensor(item.ids, device=device), _codes(item.prompt, device),
        _codes(item.first, device), sampling=how.sampling, guided_levels=how.guided_levels,
        generator=torch.Generator(device).manual_seed(how.seed),
        spoken=None if item.spoken is None else _codes(item.spoken, device),
        expected=item.expected(nar.config.frames_per_phoneme),
    )  # fmt: skip
    return codes.to("cpu", torch.int16).numpy()


class Filler:
    """`fill_in` for many at once, by a NAR model that remembers the prompts it has read last."""

    def __init__(self, nar: NAR, prompts: int = 8) -> None:
        """`prompts` are remembered: of each frame, keys and values of every layer at seven levels,
        19 MB for three seconds in nano, 155 MB in the paper's size (float32)."""
        self._nar = nar
        self._read: LRUCache[bytes, ReadPrompt] = LRUCache(prompts)
        # hidden ones differ in length only, and most prompts are as long as they may be
        self._hidden: LRUCache[tuple[int, int], ReadPrompt] = LRUCache(2)

    def fill_in(self, items: Sequence[Unfilled], how: Filling) -> list[Codes]:
        """All codebooks `[8, T]` of each item."""
        nar = self._nar
        device = nar.heads.device
        texts = [torch.tensor(item.ids, device=device) for item in items]
        nothing = [texts[0].new_empty(nar.config.n_codebooks, 0)] * len(
            items
        )  # prompts have been read
        codes = [_codes(item.first, device) for item in items]
        codes = [torch.cat([row[None], row.new_zeros(nar.n_levels, len(row))]) for row in codes]
        generators = [torch.Generator(device).manual_seed(how.seed) for _ in items]
        guided_levels = min(how.guided_levels, nar.n_levels) if how.sampling.guided else 0
        given = [self._prompt(item.prompt) for item in items]
        hidden = [
            self._hidden_prompt(item.prompt, guided_levels) for item in items if guided_levels
        ]
        expected = [item.expected(nar.config.frames_per_phoneme) for item in items]
        for level in range(1, nar.config.n_codebooks):
            batch = collate(texts, nothing, codes, expected).to(device)
            if level <= guided_levels:
                both = nar.after(given + hidden, with_unconditional(batch), level)
                logits, without = both.chunk(2)
                logits = guide(logits, without, how.sampling.guidance_scale)
            else:
                logits = nar.after(given, batch, level)
            for row, scores, item, generator in zip(codes, logits, items, generators, strict=True):
                row[level] = sample(scores[: row.shape[1]], how.sampling, generator=generator)
                if item.spoken is not None:
                    row[level, : item.spoken.shape[1]] = _codes(item.spoken[level], device)
        return [row.to("cpu", torch.int16).numpy() for row in codes]

    def _prompt(self, prompt: Codes) -> ReadPrompt:
        """A prompt, read now or before."""
        name = prompt.tobytes()
        if (read := self._read.get(name)) is None:
            read = self._nar.read_prompt(self._tensor(prompt), self._nar.n_levels)
            self._read[name] = read
        return read

    def _hidden_prompt(self, prompt: Codes, n_levels: int) -> ReadPrompt:
        """A hidden prompt of the same length: what guidance compares with."""
        name = prompt.shape[1], n_levels
        if (read := self._hidden.get(name)) is None:
            read = self._nar.read_prompt(self._tensor(np.full_like(prompt, HIDDEN)), n_levels)
            self._hidden[name] = read
        return read

    def _tensor(self, codes: Codes) -> Int[Tensor, "Q _"]:
        return _codes(codes, self._nar.heads.device)


def _codes(codes: NDArray[np.int16], device: torch.device) -> Int[Tensor, "*_"]:
    return torch.from_numpy(codes).long().to(device)
