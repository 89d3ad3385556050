"""From logits to tokens: temperature, top-k, top-p, repetition-aware sampling.

Legend: R rows (streams or frames), V classes, T tokens so far.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


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

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature: {self.temperature} is below 0")
        if self.top_k < 0:
            raise ValueError(f"top_k: {self.top_k} is below 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p} is not in (0, 1]")
        if self.repetition_window < 1:
            raise ValueError(f"repetition_window: {self.repetition_window} is below 1")


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
    logits = logits.float() / sampling.temperature
    tokens = _draw(nucleus(top_k(logits, sampling.top_k), sampling.top_p), generator)
    if history is None or sampling.repetition_threshold >= 1 or history.shape[1] == 0:
        return tokens
    recent = history[:, -sampling.repetition_window :]
    share = (recent == tokens[:, None]).sum(1) / sampling.repetition_window
    return torch.where(share > sampling.repetition_threshold, _draw(logits, generator), tokens)


def top_k(logits: Float[Tensor, "R V"], k: int) -> Float[Tensor, "R V"]:
    """All but the k largest logits become minus infinity; 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def nucleus(logits: Float[Tensor, "R V"], p: float) -> Float[Tensor, "R V"]:
    """Keeps the most likely tokens until their probability reaches p (Holtzman et al. 2020)."""
    if p >= 1:
        return logits
    ordered, index = logits.sort(dim=-1, descending=True)
    probability = ordered.softmax(-1)
    # the token that crosses p is kept: compare the sum before it
    beyond = probability.cumsum(-1) - probability >= p
    return logits.masked_fill(beyond.scatter(-1, index, beyond), -torch.inf)


def _draw(logits: Float[Tensor, "R V"], generator: torch.Generator) -> Int[Tensor, " R"]:
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
