"""Sizes of the two models."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final, Literal

from valle.model.text import INVENTORY
from valle.model.tokens import N_CODEBOOKS

Kind = Literal["ar", "nar"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture fields that both models share; `ARConfig` and `NARConfig` build a model."""

    kind: ClassVar[Kind]
    """Set by the two subclasses."""

    width: int
    """D, of the residual stream."""

    n_heads: int
    """Attention heads; must divide the width into even parts."""

    n_layers: int = 12
    """Blocks (12 in the paper)."""

    dropout: float = 0.1
    """On attention and feed-forward outputs during training."""

    n_phonemes: int = len(INVENTORY)
    """Size of the phoneme inventory."""

    n_codebooks: int = N_CODEBOOKS
    """Q of the prompt and of the complete response."""

    frames_per_phoneme: float = 4.0
    """Rotary positions of the text advance by this much per phoneme, so that a phoneme lies near
    its frames (75 frames and about 18 IPA symbols a second)."""

    def __post_init__(self) -> None:
        for name in ("width", "n_heads", "n_layers", "n_phonemes", "n_codebooks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is below 1")
        if self.width % (2 * self.n_heads):
            raise ValueError(f"width: {self.width} is no even multiple of n_heads {self.n_heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout} is not in [0, 1)")

    def shared_fields(self) -> dict[str, Any]:
        """Name and value of each field that both models share."""
        return {field.name: getattr(self, field.name) for field in fields(ModelConfig)}


@dataclass(frozen=True, kw_only=True)
class ARConfig(ModelConfig):
    """All that is needed to build an AR model."""

    kind: ClassVar[Kind] = "ar"

    group_size: int = 1
    """G, frames that the model reads and predicts per step (VALL-E 2's grouped codes): its
    sequence is G times shorter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 1:
            raise ValueError(f"group_size: {self.group_size} is below 1")

    @classmethod
    def from_shared(cls, shared: ModelConfig, group_size: int = 1) -> "ARConfig":
        """An AR model with the shared fields of any config."""
        return cls(**shared.shared_fields(), group_size=group_size)


@dataclass(frozen=True, kw_only=True)
class NARConfig(ModelConfig):
    """All that is needed to build a NAR model."""

    kind: ClassVar[Kind] = "nar"

    @classmethod
    def from_shared(cls, shared: ModelConfig) -> "NARConfig":
        """A NAR model with the shared fields of any config."""
        return cls(**shared.shared_fields())


SIZES: Final = {
    "mini": ModelConfig(width=256, n_heads=4, n_layers=6),
    "quarter": ModelConfig(width=256, n_heads=4),
    "half": ModelConfig(width=512, n_heads=8),
    "full": ModelConfig(width=1024, n_heads=16),
}
"""The presets of the reference system (12 layers), and one small enough for two CPU cores."""
