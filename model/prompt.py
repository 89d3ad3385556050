"""Cached keys and values of the NAR model's prompts.

Prompt positions attend to the prompt only. Their keys and values in each layer therefore depend on
the prompt and the level (the codebook to predict) alone, and one computation serves every sentence
in that voice. A prompt of three seconds is most of a short sentence's positions.

Legend: V levels, N layers, B rows, H heads, P prompt frames, S other positions, K head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class PromptKV:
    """Keys and values of one prompt at levels 1 .. V."""

    keys: Float[Tensor, "V N H P K"]
    values: Float[Tensor, "V N H P K"]


@dataclass
class KVRecorder:
    """A `model.layers.Cache` that collects the keys and values of whole prompts."""

    keys: list[Tensor] = field(default_factory=list)
    """`[B, H, P, K]` of each layer."""
    values: list[Tensor] = field(default_factory=list)

    causal = False

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, None]:
        """Stores the layer's keys and values and returns them, all visible."""
        assert layer == len(self.keys), "layers come in their order"
        self.keys.append(key)
        self.values.append(value)
        return key, value, None

    def advance(self, n_positions: int) -> None:
        """A recorder takes one call per layer, so there is no length to keep."""


@dataclass(frozen=True)
class BatchedPromptKV:
    """A `model.layers.Cache` that puts each row's cached prompt before the row's positions."""

    keys: Float[Tensor, "N B H P K"]
    values: Float[Tensor, "N B H P K"]
    mask: Bool[Tensor, "B 1 1 _"]
    """Valid ones among the P + S positions; rows differ in prompt length and in length."""

    causal = False

    @classmethod
    def stack(
        cls, level: int, prompts: Sequence[PromptKV], valid: Bool[Tensor, "B S"]
    ) -> "BatchedPromptKV":
        """The rows' prompts at a level (1 .. V), padded to one length. `valid` marks the rows' own
        positions that are no padding."""
        frames = [prompt.keys.shape[3] for prompt in prompts]
        longest = max(frames)

        def pad_and_stack(tensors: Sequence[Tensor]) -> Tensor:
            return torch.stack([F.pad(t, (0, 0, 0, longest - t.shape[2])) for t in tensors], dim=1)

        in_prompt = torch.arange(longest) < torch.tensor(frames)[:, None]
        mask = torch.cat([in_prompt.to(valid.device), valid], dim=1)
        return cls(
            pad_and_stack([prompt.keys[level - 1] for prompt in prompts]),
            pad_and_stack([prompt.values[level - 1] for prompt in prompts]),
            mask[:, None, None],
        )

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's cached prompts, followed by keys and values `[B, H, S, K]`."""
        return (
            torch.cat([self.keys[layer], key], dim=2),
            torch.cat([self.values[layer], value], dim=2),
            self.mask,
        )

    def advance(self, n_positions: int) -> None:
        """Each pass starts over, so there is no length to keep."""
