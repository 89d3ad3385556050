"""What the NAR model has read of a prompt, kept for whatever is said in that voice.

A prompt sees only itself, so its keys and values in each layer depend on the prompt and on the
codebook that is filled in, and on nothing else: three seconds are most of a short sentence's
positions, and need not be computed again for the next one.

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
    """Keys and values of one prompt, at the first V levels."""

    keys: Float[Tensor, "V N H P K"]
    values: Float[Tensor, "V N H P K"]


@dataclass
class KVRecorder:
    """Takes down what a transformer makes of whole prompts: a `model.layers.Cache`."""

    keys: list[Tensor] = field(default_factory=list)
    """`[B, H, P, K]` of each layer."""
    values: list[Tensor] = field(default_factory=list)

    causal = False

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, None]:
        """Keeps a layer's, and has all of it seen."""
        assert layer == len(self.keys), "layers come in their order"
        self.keys.append(key)
        self.values.append(value)
        return key, value, None

    def advance(self, n_positions: int) -> None:
        """Nothing comes after a prompt."""


@dataclass(frozen=True)
class BatchedPromptKV:
    """Prompts that were read, seen by all that follows: a `model.layers.Cache`."""

    keys: Float[Tensor, "N B H P K"]
    values: Float[Tensor, "N B H P K"]
    mask: Bool[Tensor, "B 1 1 _"]
    """Of P + S positions: prompts may differ in length, and so may what follows."""

    causal = False

    @classmethod
    def stack(
        cls, level: int, prompts: Sequence[PromptKV], valid: Bool[Tensor, "B S"]
    ) -> "BatchedPromptKV":
        """Prompts of a batch's rows at a level (1 .. V), before positions of which only
        `valid` ones are seen."""
        frames = [prompt.keys.shape[3] for prompt in prompts]
        longest = max(frames)

        def pad_and_stack(tensors: Sequence[Tensor]) -> Tensor:
            return torch.stack(
                [F.pad(t, (0, 0, 0, longest - t.shape[2])) for t in tensors], dim=1
            )  # fmt: skip

        in_prompt = torch.arange(longest) < torch.tensor(frames)[:, None]
        mask = torch.cat([in_prompt.to(valid.device), valid], dim=1)
        return cls(
            pad_and_stack([prompt.keys[level - 1] for prompt in prompts]),
            pad_and_stack([prompt.values[level - 1] for prompt in prompts]),
            mask[:, None, None],
        )

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A layer's keys and values `[B, H, S, K]`, after those of the prompts."""
        return (
            torch.cat([self.keys[layer], key], dim=2),
            torch.cat([self.values[layer], value], dim=2),
            self.mask,
        )

    def advance(self, n_positions: int) -> None:
        """All positions come at once."""
