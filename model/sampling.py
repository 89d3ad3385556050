"""From logits to tokens: guidance, temperature, top-k, top-p, repetition-aware sampling.

Each row of a batch has its own settings. Random numbers come from a counter-based generator: a
uniform is a hash of the seed, the token's codebook and position, and the number of the draw (Salmon
et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). There is no state to carry along. A
stream therefore draws the same numbers on CPU and GPU, alone and in a batch, and inside a CUDA
graph.

Legend: R rows (streams or frames), V classes, T tokens so far, W window.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from valle.model.validation import validate_integer, validate_number

UNIFORMS_PER_TOKEN = 2
"""Uniform numbers per token: one for the first draw, one for repetition-aware sampling's second."""

MAX_SEED = 2**63 - 1
"""Seeds are 0 to this: what an int64 tensor holds."""

MAX_TEMPERATURE = 1000.0
"""Upper bound of the temperature: logits divided by it are almost uniform, and finite."""

_CODEBOOK_SHIFT = 40
"""Positions count below 2**40, the codebook from there on: codebooks share no counter."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings for drawing tokens from logits."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""

    top_k: int = 0
    """Keep only the k most likely; 0 keeps all."""

    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches p; 1 keeps all."""

    repetition_window: int = 10
    """K of repetition-aware sampling (VALL-E 2 section 3.3): how many past tokens count."""

    repetition_threshold: float = 1.0
    """t_r of repetition-aware sampling: a token whose share of the window exceeds this is drawn
    again from the whole distribution. 1 switches it off; VALL-E 2 uses 0.1."""

    guidance_scale: float = 1.0
    """Classifier-free guidance: factor on the difference between log probabilities with and without
    text and prompt. 1 is off; above 1 each step takes a second, unconditional row."""

    @property
    def guided(self) -> bool:
        """True if sampling needs unconditional logits too."""
        return bool(self.guidance_scale > 1)

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises ValueError, naming the field, for a value that no row can have."""
        validate_number("guidance_scale", self.guidance_scale, 1.0, 10.0)
        validate_number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        validate_integer("top_k", self.top_k, 0, 2**31 - 1)
        validate_number("top_p", self.top_p, 0.0, 1.0)
        if not self.top_p > 0:
            raise ValueError("top_p: 0 keeps no token; give a number above 0")
        validate_integer("repetition_window", self.repetition_window, 1, 2**31 - 1)
        validate_number("repetition_threshold", self.repetition_threshold, 0.0, 1e6)


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
    """Classifier-free guidance (Ho and Salimans 2022, equation 6): log probabilities with text and
    prompt, moved away from the `unconditional` ones by `scale`; 1 leaves them unchanged."""
    conditional = logits.float().log_softmax(-1)
    return conditional + (scale - 1) * (conditional - unconditional.float().log_softmax(-1))


def validate_seed(seed: object) -> None:
    """Raises ValueError for anything but an integer in 0 to `MAX_SEED`."""
    validate_integer("seed", seed, 0, MAX_SEED)


def sample(
    logits: Float[Tensor, "R V"],
    sampling: Sampling,
    *,
    seed: int,
    positions: Int[Tensor, " R"],
    codebook: int = 0,
    history: Int[Tensor, "R T"] | None = None,
) -> Int[Tensor, " R"]:
    """One token per row, by the same settings and seed.

    `positions` are the tokens' frames in the response. `history` holds the tokens before each, for
    repetition-aware sampling. Raises ValueError for a seed outside 0 to `MAX_SEED`.
    """
    validate_seed(seed)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    rows = SamplingTensors.from_rows([sampling] * len(logits), logits.device)
    recent = None if history is None else history[:, -sampling.repetition_window :]
    uniforms = draw_uniforms(torch.full_like(positions, seed), positions, codebook)
    return sample_rows(logits, rows, uniforms, recent)


def draw_uniforms(
    seeds: Int[Tensor, " R"], positions: Int[Tensor, " R"], codebook: int = 0
) -> Float[Tensor, "2 R"]:
    """The uniform numbers, in [0, 1), of the token at each position (below 2**40) of a codebook.

    Each is the element of a splitmix64 sequence (Steele, Lea and Flood 2014) whose state is hashed
    from the seed, and whose index is built of codebook, position and draw. int64 multiplication
    wraps as the algorithm's unsigned one does. Tensor operations only: nothing waits for a device.
    """
    draws = torch.arange(UNIFORMS_PER_TOKEN, device=positions.device)[:, None]
    token = positions + (codebook << _CODEBOOK_SHIFT)
    counters = token * UNIFORMS_PER_TOKEN + draws
    # consecutive seeds must not give shifted copies of one sequence: hash them first
    state = _mix(seeds + _GOLDEN_GAMMA)
    bits = _mix(state + counters * _GOLDEN_GAMMA)
    # the upper 24 bits are what float32 holds exactly: 1 is never reached
    return _shift_right(bits, 40).float() * 2.0**-24


def _int64(unsigned: int) -> int:
    """The signed number of the same 64 bits."""
    return unsigned - 2**64 if unsigned >= 2**63 else unsigned


_GOLDEN_GAMMA = _int64(0x9E3779B97F4A7C15)
_MULTIPLIERS = _int64(0xBF58476D1CE4E5B9), _int64(0x94D049BB133111EB)


def _mix(x: Int[Tensor, "*R"]) -> Int[Tensor, "*R"]:
    """splitmix64's finaliser: a bijection in which each bit in changes half of the bits out."""
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shift_right(x, 31)


def _shift_right(x: Int[Tensor, "*R"], count: int) -> Int[Tensor, "*R"]:
    """Logical shift: torch's repeats the sign bit, which the mask removes."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def sample_rows(
    logits: Float[Tensor, "R V"],
    rows: SamplingTensors,
    uniforms: Float[Tensor, "2 R"],
    recent: Int[Tensor, "R W"] | None = None,
) -> Int[Tensor, " R"]:
    """One token per row by the row's settings; greedy where the temperature is 0.

    `recent` holds the last tokens of each row, the newest last, -1 before the first. A token that
    fills more than `threshold` of the row's window is drawn again from the whole distribution
    (repetition-aware sampling, VALL-E 2 section 3.3).
    """
    temperature = rows.temperature.clamp_min(1e-6)[:, None]
    probability = (logits.float() / temperature).softmax(-1)
    ordered, index = probability.sort(dim=-1, descending=True)
    # a draw accumulates probabilities in class order, not in sorted order: two almost equally
    # likely classes may swap ranks with the last bit of a sum, which must not change the token
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
    """Which classes, sorted by falling probability, sampling may draw: the k most likely (0: all),
    and of those the smallest set whose probability reaches p (nucleus sampling, Holtzman et al.
    2020)."""
    rank = torch.arange(probability.shape[-1], device=probability.device)
    in_top_k = (rank < top_k[:, None]) | (top_k == 0)[:, None]
    probability = probability * in_top_k
    probability = probability / probability.sum(-1, keepdim=True)
    # the class that crosses p belongs to the set: compare the sum before it
    before = probability.cumsum(-1) - probability
    # the most likely class stays even where p is 0 in float32
    return in_top_k & ((before < top_p[:, None]) | (top_p >= 1)[:, None] | (rank == 0))


def _pick(weights: Float[Tensor, "R V"], uniform: Float[Tensor, " R"]) -> Int[Tensor, " R"]:
    """The class of each row in whose share of the total weight the uniform number lies."""
    total = weights.cumsum(-1)
    position = (total <= uniform[:, None] * total[:, -1:]).sum(-1)
    # rounding of the sums must not select a class of zero weight after the last weighted one
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(-1)
    return torch.minimum(position, last)
