"""Sizes of the two models."""

from dataclasses import dataclass
from typing import Final, Literal

from valle.model.text import INVENTORY
from valle.model.tokens import N_CODEBOOKS

Kind = Literal["ar", "nar"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of an AR or NAR transformer; all that is needed to rebuild it."""

    width: int
    """D, of the residual stream."""

    n_heads: int
    """Attention heads; must divide the width into even parts."""

    n_layers: int = 12
    """Blocks (12 in the paper)."""

    dropout: float = 0.1
    """On attention and feed-forward outputs while training."""

    n_phonemes: int = len(INVENTORY)
    """Size of the phoneme inventory."""

    n_codebooks: int = N_CODEBOOKS
    """Q of the prompt and of the finished speech."""

    frames_per_phoneme: float = 4.0
    """Rotary positions of the text advance by this much per phoneme, so that a phoneme and the
    frames that say it lie near each other (75 frames a second, about 18 symbols of IPA)."""

    group: int = 1
    """G, frames that the AR model reads and predicts per step (VALL-E 2's grouped codes): its
    sequence is G times shorter. The NAR model takes no notice of it."""

    def __post_init__(self) -> None:
        if self.group < 1:
            raise ValueError(f"group: {self.group} is below 1")
        if self.width % (2 * self.n_heads):
            raise ValueError(f"width: {self.width} is no even multiple of n_heads {self.n_heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout} is not in [0, 1)")


SIZES: Final = {
    "mini": ModelConfig(width=256, n_heads=4, n_layers=6),
    "quarter": ModelConfig(width=256, n_heads=4),
    "half": ModelConfig(width=512, n_heads=8),
    "full": ModelConfig(width=1024, n_heads=16),
}
"""The presets of the reference system (12 layers), and one small enough for two CPU cores."""
