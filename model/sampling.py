"""From logits to tokens: guidance, temperature, top-k, top-p, repetition-aware sampling.

Rows may have settings of their own, and each draws from uniform numbers it is given: a stream says
the same alone and in a batch.

Legend: R rows (streams or frames), V classes, T tokens so far, W window.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

UNIFORMS_PER_TOKEN = 2
"""Uniform numbers per token: one for the token, one for drawing it again."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""

    top_k: int = 0
    """Keep only the k most likely; 0 keeps all."""

    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches p; 1 keeps all."""

    repetition_window: int = 10
    """K of repetition-aware sampling (VALL-E 2 section 3.3): how far back to look."""

    repetition_threshold: float = 1.0
    """t_r: a drawn token whose share of the window exceeds this is drawn again from the whole
    distribution. 1 switches it off; VALL-E 2 uses 0.1."""

    guidance_scale: float = 1.0
    """Classifier-free guidance: how far to go from what would be said without text and prompt to
    what is said with them, and beyond; 1 is off, more costs a second pass without them."""

    @property
    def guided(self) -> bool:
        """Whether a second pass is needed, without text and prompt."""
        return self.guidance_scale > 1

    def __post_init__(self) -> None:
        if not 1 <= self.guidance_scale <= 10:
            raise ValueError(f"guidance_scale: {self.guidance_scale} is not in [1, 10]")
        if not self.temperature >= 0:
            raise ValueError(f"temperature: {self.temperature} is below 0")
        if self.top_k < 0:
            raise ValueError(f"top_k: {self.top_k} is below 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p} is not in (0, 1]")
        if self.repetition_window < 1:
            raise ValueError(f"repetition_window: {self.repetition_window} is below 1")


@dataclass(frozen=True)
class SamplingTensors:
    """`Sampling` of each row, as tensors."""

    temperature: Float[Tensor, " R"]
    top_k: Int[Tensor, " R"]
    top_p: Float[Tensor, " R"]
    window: Int[Tensor, " R"]
    threshold: Float[Tensor, " R"]
    guidance_scale: Float[Tensor, " R"]

    @classmethod
    def from_rows(
        cls, rows: Sequence[Sampling], device: torch.device | str = "cpu"
    ) -> "SamplingTensors":
        """The settings of `rows`, in their order."""

        def column(name: str, dtype: torch.dtype) -> Tensor:
            return torch.tensor([getattr(row, name) for row in rows], dtype=dtype, device=device)

        return cls(
            column("temperature", torch.float32),
            column("top_k", torch.long),
            column("top_p", torch.float32),
            column("repetition_window", torch.long),
            column("repetition_threshold", torch.float32),
            column("guidance_scale", torch.float32),
        )


def guide(
    logits: Float[Tensor, "*R V"], unconditional: Float[Tensor, "*R V"], scale: Tensor | float
) -> Float[Tensor, "*R V"]:
    """Classifier-free guidance (Ho and Salimans 2022, equation 6, there for images): log
    probabilities with text and prompt, moved away from the `unconditional` ones; a scale of 1
    leaves them as they are."""
    conditional = logits.float().log_softmax(-1)
    return conditional + (scale - 1) * (conditional - unconditional.float().log_softmax(-1))


def sample(
    logits: Float[Tensor, "R V"],
    sampling: Sampling,
    *,
    generator: torch.Generator,
    history: Int[Tensor, "R T"] | None = None,
) -> Int[Tensor, " R"]:
    """One token per row. `history` is what repetition-aware sampling looks back on."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    rows = SamplingTensors.from_rows([sampling] * len(logits), logits.device)
    recent = None if history is None else history[:, -sampling.repetition_window :]
    return sample_rows(logits, rows, draw_uniforms(generator, len(logits)), recent)


def draw_uniforms(generator: torch.Generator, rows: int) -> Float[Tensor, "2 {rows}"]:
    """The uniform numbers that one token of each row needs."""
    return torch.rand(UNIFORMS_PER_TOKEN, rows, generator=generator, device=generator.device)


def sample_rows(
    logits: Float[Tensor, "R V"],
    rows: SamplingTensors,
    uniforms: Float[Tensor, "2 R"],
    recent: Int[Tensor, "R W"] | None = None,
) -> Int[Tensor, " R"]:
    """One token per row by its own settings; the most likely one where the temperature is 0.

    `recent` holds the last tokens of each row, -1 where there are none yet. Repetition-aware
    sampling (VALL-E 2): a token that fills more than `threshold` of the window is drawn again from
    the whole distribution.
    """
    temperature = rows.temperature.clamp_min(1e-6)[:, None]
    probability = (logits.float() / temperature).softmax(-1)
    ordered, index = probability.sort(dim=-1, descending=True)
    # draws walk through the classes in their own order: two that are nearly equally likely, and
    # change places in the sorted one with the last bit of a sum, change nothing
    mask = top_k_top_p_mask(ordered, rows.top_k, rows.top_p)
    mask = torch.zeros_like(mask).scatter(-1, index, mask)
    tokens = _pick(probability * mask, uniforms[0])
    if recent is not None and recent.shape[1]:
        age = torch.arange(recent.shape[1], 0, -1, device=recent.device)
        repeats = ((recent == tokens[:, None]) & (age <= rows.window[:, None])).sum(1)
        again = repeats / rows.window > rows.threshold
        tokens = torch.where(again, _pick(probability, uniforms[1]), tokens)
    return torch.where(rows.temperature > 0, tokens, logits.argmax(-1))


def top_k_top_p_mask(
    probability: Float[Tensor, "R V"], top_k: Int[Tensor, " R"], top_p: Float[Tensor, " R"]
) -> Bool[Tensor, "R V"]:
    """Which of the classes, the likeliest first, sampling may choose from: the k likeliest (0: all)
    and of those the fewest whose probability reaches p (Holtzman et al. 2020)."""
    rank = torch.arange(probability.shape[-1], device=probability.device)
    in_top_k = (rank < top_k[:, None]) | (top_k == 0)[:, None]
    probability = probability * in_top_k
    probability = probability / probability.sum(-1, keepdim=True)
    # the class that crosses p is kept: compare the sum before it
    before = probability.cumsum(-1) - probability
    # the likeliest is always kept, however small p is
    return in_top_k & ((before < top_p[:, None]) | (top_p >= 1)[:, None] | (rank == 0))


def _pick(weights: Float[Tensor, "R V"], uniform: Float[Tensor, " R"]) -> Int[Tensor, " R"]:
    """Index of each row's class that its uniform number falls on."""
    total = weights.cumsum(-1)
    position = (total <= uniform[:, None] * total[:, -1:]).sum(-1)
    # rounding must not reach the classes of no weight behind the last one
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(-1)
    return torch.minimum(position, last)
