"""NAR decoding: from the first codebook to all of them, for one sentence or a batch.

Legend: Q codebooks, T frames, P prompt frames, S settled frames.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from cachetools import LRUCache, TTLCache
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from valle.model.codec.interface import Codes
from valle.model.config import NARConfig
from valle.model.nar import NAR
from valle.model.prompt import PromptKV
from valle.model.sampling import Sampling, guide, sample, validate_seed
from valle.model.sequence import collate, estimate_total_frames, with_unconditional
from valle.model.tokens import NULL_CODE
from valle.model.validation import validate_codes, validate_ids


@dataclass(frozen=True, kw_only=True)
class NARDecoding:
    """Settings of NAR decoding, the same for a batch."""

    sampling: Sampling
    """A temperature of 0 is greedy, as in the paper."""

    guided_levels: int
    """Number of codebooks decoded with guidance, from the second on: the low ones carry the
    words."""

    seed: int = 0
    """Seed of sampling, 0 to 2**63 - 1; greedy decoding ignores it."""

    def __post_init__(self) -> None:
        validate_seed(self.seed)
        if self.guided_levels < 0:
            raise ValueError(f"guided_levels: {self.guided_levels} is below 0")


@dataclass(frozen=True)
class NARRequest:
    """A sentence, or its beginning, whose first codebook the AR model has generated."""

    phonemes: list[int]
    """Ids of the whole text."""
    prompt: Codes
    """`[Q, P]`"""
    first_codebook: NDArray[np.int16]
    """`[T]`"""
    prefix: Codes | None = None
    """`[Q, S]`: first frames whose codes are already in use and must not change."""
    complete: bool = True
    """False if the AR model is still generating or stopped at its length limit."""

    def validate(self, config: NARConfig) -> None:
        """Raises ValueError, naming the field, for a request that a model cannot decode."""
        validate_ids("phonemes", self.phonemes, config.n_phonemes)
        if not self.phonemes:
            raise ValueError("phonemes: the text is empty; give at least one id")
        validate_codes("prompt", self.prompt, config.n_codebooks)
        validate_codes("first_codebook", self.first_codebook, ndim=1)
        if self.prefix is not None:
            validate_codes("prefix", self.prefix, config.n_codebooks)
            if self.prefix.shape[1] > len(self.first_codebook):
                raise ValueError(
                    f"prefix: {self.prefix.shape[1]} frames of {len(self.first_codebook)}"
                )

    @property
    def n_positions(self) -> int:
        """Length of the NAR model's sequence, separators apart. The prompt counts even if its keys
        and values are cached: they take memory in each row."""
        return len(self.phonemes) + self.prompt.shape[1] + len(self.first_codebook)

    def total_frames(self, frames_per_phoneme: float) -> int:
        """Frames of the whole sentence: known if it is `complete`, else estimated."""
        n_frames = len(self.first_codebook)
        if self.complete:
            return n_frames
        return estimate_total_frames(len(self.phonemes), n_frames, frames_per_phoneme)


def nar_decode(nar: NAR, item: NARRequest, decoding: NARDecoding) -> Codes:
    """All codebooks `[Q, T]` of one sentence, by `NAR.generate`: the slow reference."""
    device = nar.heads.device
    codes = nar.generate(
        torch.tensor(item.phonemes, device=device),
        _codes(item.prompt, device),
        _codes(item.first_codebook, device),
        sampling=decoding.sampling,
        guided_levels=decoding.guided_levels,
        seed=decoding.seed,
        prefix=None if item.prefix is None else _codes(item.prefix, device),
        total_frames=item.total_frames(nar.config.frames_per_phoneme),
    )
    return codes.to("cpu", torch.int16).numpy()


class NARDecoder:
    """Batched `nar_decode` with a cache of prompt keys and values."""

    def __init__(self, nar: NAR, max_prompts: int = 8, *, prompt_seconds: float = math.inf) -> None:
        """The cache holds `max_prompts`, each for `prompt_seconds`. One prompt of three seconds
        takes 19 MB in the `mini` size and 155 MB in the paper's (keys and values of every layer at
        seven levels, float32)."""
        self._nar = nar
        self._prompts: TTLCache[bytes, PromptKV] = TTLCache(max_prompts, prompt_seconds)
        self._lock = threading.Lock()  # batches run in a thread, expiry in another
        # null prompts differ in length only, and most prompts have the maximal length
        self._null_prompts: LRUCache[tuple[int, int], PromptKV] = LRUCache(2)

    def decode(self, items: Sequence[NARRequest], decoding: NARDecoding) -> list[Codes]:
        """All codebooks `[Q, T]` of each item."""
        nar = self._nar
        device = nar.heads.device
        texts = [torch.tensor(item.phonemes, device=device) for item in items]
        # the batch itself has empty prompts: their keys and values come from the cache
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
        # one pass per codebook; each reads the codes of the passes before it
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
                    scores[: len(frames)],
                    decoding.sampling,
                    seed=decoding.seed,
                    positions=frames,
                    codebook=level,
                )
                if item.prefix is not None:
                    row[level, : item.prefix.shape[1]] = _codes(item.prefix[level], device)
        return [row.to("cpu", torch.int16).numpy() for row in codes]

    def _prompt(self, prompt: Codes) -> PromptKV:
        """The keys and values of a prompt, from the cache if it is there."""
        key = prompt.tobytes()
        with self._lock:
            prompt_kv = self._prompts.get(key)
        if prompt_kv is None:
            prompt_kv = self._nar.prefill_prompt(self._tensor(prompt), self._nar.n_levels)
            with self._lock:
                self._prompts[key] = prompt_kv
        return prompt_kv

    @property
    def config(self) -> NARConfig:
        """Architecture of the model."""
        return self._nar.config

    def expire_prompts(self) -> int:
        """Removes prompts whose time is over; returns the number of those that stay."""
        with self._lock:
            self._prompts.expire()
            return len(self._prompts)

    def forget_prompts(self) -> None:
        """Empties the cache of prompts."""
        with self._lock:
            self._prompts.clear()

    def _null_prompt(self, prompt: Codes, n_levels: int) -> PromptKV:
        """The same for a null prompt of equal length, for the unconditional rows."""
        key = prompt.shape[1], n_levels
        if (prompt_kv := self._null_prompts.get(key)) is None:
            null_prompt = self._tensor(np.full_like(prompt, NULL_CODE))
            prompt_kv = self._nar.prefill_prompt(null_prompt, n_levels)
            self._null_prompts[key] = prompt_kv
        return prompt_kv

    def _tensor(self, codes: Codes) -> Int[Tensor, "Q _"]:
        return _codes(codes, self._nar.heads.device)


def _codes(codes: NDArray[np.int16], device: torch.device) -> Int[Tensor, "*_"]:
    return torch.from_numpy(np.ascontiguousarray(codes)).long().to(device)
