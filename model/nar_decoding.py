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
from valle.model.prompt import PromptKV
from valle.model.sampling import Sampling, guide, sample, validate_seed
from valle.model.sequence import collate, estimate_total_frames, with_unconditional
from valle.model.tokens import NULL_CODE


@dataclass(frozen=True, kw_only=True)
class NARDecoding:
    """How codebooks 2 to 8 are filled in."""

    sampling: Sampling
    """A temperature of 0 is the paper's greedy choice."""

    guided_levels: int
    """Codebooks that are filled in with guidance, from the second on: they carry the words."""

    seed: int = 0
    """Of sampling, if there is any."""

    def __post_init__(self) -> None:
        validate_seed(self.seed)
        if self.guided_levels < 0:
            raise ValueError(f"guided_levels: {self.guided_levels} is below 0")


@dataclass(frozen=True)
class NARRequest:
    """Speech of which the first codebook is known."""

    phonemes: list[int]
    """Ids."""
    prompt: Codes
    """`[8, P]`"""
    first_codebook: NDArray[np.int16]
    """`[T]`"""
    prefix: Codes | None = None
    """`[8, S]`: the first frames, where they are settled already."""
    complete: bool = True
    """Whether that says the whole text, or the AR model has more to say, or would have had."""

    @property
    def n_positions(self) -> int:
        """Of the NAR model's sequence, but for two separators: a prompt that was read before is
        still looked at, and takes memory in each row."""
        return len(self.phonemes) + self.prompt.shape[1] + len(self.first_codebook)

    def total_frames(self, frames_per_phoneme: float) -> int:
        """Frames of the whole."""
        n_frames = len(self.first_codebook)
        if self.complete:
            return n_frames
        return estimate_total_frames(len(self.phonemes), n_frames, frames_per_phoneme)


def nar_decode(nar: NAR, item: NARRequest, decoding: NARDecoding) -> Codes:
    """All codebooks `[8, T]`, the plain way."""
    device = nar.heads.device
    codes = nar.generate(
        torch.tensor(item.phonemes, device=device), _codes(item.prompt, device),
        _codes(item.first_codebook, device),
        sampling=decoding.sampling, guided_levels=decoding.guided_levels,
        seed=decoding.seed,
        prefix=None if item.prefix is None else _codes(item.prefix, device),
        total_frames=item.total_frames(nar.config.frames_per_phoneme),
    )  # fmt: skip
    return codes.to("cpu", torch.int16).numpy()


class NARDecoder:
    """`nar_decode` for many at once, by a NAR model that remembers the prompts it has read last."""

    def __init__(self, nar: NAR, max_prompts: int = 8) -> None:
        """`max_prompts` are remembered: of each frame, keys and values of every layer at seven
        levels, 19 MB for three seconds in nano, 155 MB in the paper's size (float32)."""
        self._nar = nar
        self._prompts: LRUCache[bytes, PromptKV] = LRUCache(max_prompts)
        # null prompts differ in length only, and most prompts are as long as they may be
        self._null_prompts: LRUCache[tuple[int, int], PromptKV] = LRUCache(2)

    def decode(self, items: Sequence[NARRequest], decoding: NARDecoding) -> list[Codes]:
        """All codebooks `[8, T]` of each item."""
        nar = self._nar
        device = nar.heads.device
        texts = [torch.tensor(item.phonemes, device=device) for item in items]
        # prompts have been read
        no_prompts = [texts[0].new_empty(nar.config.n_codebooks, 0)] * len(items)
        codes = [_codes(item.first_codebook, device) for item in items]
        codes = [torch.cat([row[None], row.new_zeros(nar.n_levels, len(row))]) for row in codes]
        positions = [torch.arange(len(item.first_codebook), device=device) for item in items]
        guided_levels = min(decoding.guided_levels, nar.n_levels) if decoding.sampling.guided else 0
        prompts = [self._prompt(item.prompt) for item in items]
        null_prompts = [
            self._null_prompt(item.prompt, guided_levels) for item in items if guided_levels
        ]
        total_frames = [item.total_frames(nar.config.frames_per_phoneme) for item in items]
        for level in range(1, nar.config.n_codebooks):
            batch = collate(texts, no_prompts, codes, total_frames).to(device)
            if level <= guided_levels:
                both = nar.forward_cached(prompts + null_prompts, with_unconditional(batch), level)
                logits, unconditional = both.chunk(2)
                logits = guide(logits, unconditional, decoding.sampling.guidance_scale)
            else:
                logits = nar.forward_cached(prompts, batch, level)
            for row, scores, item, frames in zip(codes, logits, items, positions, strict=True):
                row[level] = sample(
                    scores[: len(frames)], decoding.sampling, seed=decoding.seed,
                    positions=frames, codebook=level,
                )  # fmt: skip
                if item.prefix is not None:
                    row[level, : item.prefix.shape[1]] = _codes(item.prefix[level], device)
        return [row.to("cpu", torch.int16).numpy() for row in codes]

    def _prompt(self, prompt: Codes) -> PromptKV:
        """A prompt, read now or before."""
        key = prompt.tobytes()
        if (prompt_kv := self._prompts.get(key)) is None:
            prompt_kv = self._nar.prefill_prompt(self._tensor(prompt), self._nar.n_levels)
            self._prompts[key] = prompt_kv
        return prompt_kv

    def _null_prompt(self, prompt: Codes, n_levels: int) -> PromptKV:
        """A null prompt of the same length: what guidance compares with."""
        key = prompt.shape[1], n_levels
        if (prompt_kv := self._null_prompts.get(key)) is None:
            null_prompt = self._tensor(np.full_like(prompt, NULL_CODE))
            prompt_kv = self._nar.prefill_prompt(null_prompt, n_levels)
            self._null_prompts[key] = prompt_kv
        return prompt_kv

    def _tensor(self, codes: Codes) -> Int[Tensor, "Q _"]:
        return _codes(codes, self._nar.heads.device)


def _codes(codes: NDArray[np.int16], device: torch.device) -> Int[Tensor, "*_"]:
    return torch.from_numpy(codes).long().to(device)
