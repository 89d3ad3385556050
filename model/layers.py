"""The transformer of both models: attention with cache, feed-forward, level-adaptive norm.

Legend: B batch, S sequence, D width, H heads, K head width, N layers.

Choices: pre-norm, which trains stably at any depth; rotary positions, since the relative offset of
text and frames in one sequence carries the alignment, and since they need no table and no maximal
length; GELU with 4 D hidden units, as in the paper.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from valle.model.config import ModelConfig
from valle.model.tokens import CODEBOOK_SIZE


@runtime_checkable  # shapes and types are checked in tests
class Cache(Protocol):
    """Store of keys and values, as attention uses it."""

    @property
    def causal(self) -> bool:
        """True if appended positions must attend causally to each other, by a causal kernel."""

    def append(
        self, layer: int, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Stores new positions `[B, H, S, K]` of a layer. Returns the keys and values to attend to,
        and the mask of visible ones (None: all)."""

    def advance(self, n_positions: int) -> None:
        """Marks `n_positions` as filled, after every layer has appended them."""


@dataclass
class KVCache:
    """Keys and values of past positions, for incremental decoding of equally long rows."""

    keys: Float[Tensor, "N B H S K"]
    values: Float[Tensor, "N B H S K"]
    length: int = 0
    """Filled positions, the same for every row."""

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, capacity: int, like: Tensor) -> "KVCache":
        """An empty cache of `capacity` positions, with the device and dtype of `like`."""
        head = config.width // config.n_heads
        shape = (config.n_layers, batch, config.n_heads, capacity, head)
        return cls(like.new_empty(shape), like.new_empty(shape))

    @property
    def causal(self) -> bool:
        """True for the first append; later ones return a mask instead."""
        return self.length == 0

    def append(
        self, layer: int, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Bool[Tensor, "B 1 S _"] | None]:
        """Stores new positions `[B, H, S, K]`; returns all positions so far, and a causal mask if
        several new positions follow earlier ones."""
        new = key.shape[2]
        end = self.length + new
        assert end <= self.keys.shape[3], "KV cache is full: capacity was computed too small"
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        mask = None
        if self.length and new > 1:
            steps = torch.arange(end, device=key.device)
            mask = (steps <= steps[self.length :, None]).expand(len(key), 1, -1, -1)
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end], mask

    def advance(self, n_positions: int) -> None:
        """Marks `n_positions` as filled."""
        self.length += n_positions

    def reset(self) -> None:
        """Empties the cache; the memory stays allocated."""
        self.length = 0


def rotary_cos_sin(positions: Float[Tensor, "B S"], width: int) -> Float[Tensor, "2 B 1 S half"]:
    """Cosine and sine of each position at `width / 2` frequencies (RoFormer, Su et al. 2021)."""
    exponent = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    angles = positions.float()[:, None, :, None] * torch.pow(10_000.0, -exponent)
    return torch.stack([angles.cos(), angles.sin()])


def apply_rotary(x: Float[Tensor, "*n B H S K"], cos_sin: Float[Tensor, "2 B 1 S half"]) -> Tensor:
    """Rotates each pair of features of queries or keys by the angles of their position."""
    cos, sin = cos_sin.to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


def dot_product_attention(
    query: Float[Tensor, "B H S K"],
    key: Float[Tensor, "B H T K"],
    value: Float[Tensor, "B H T K"],
    mask: Bool[Tensor, "B 1 _ T"] | None,
    causal: bool,
) -> Float[Tensor, "B H S K"]:
    """Softmax attention over the positions of `mask` (None: all), by PyTorch's fused kernel.

    Training on a CPU uses three plain operations instead: the fused kernel's backward pass takes
    twice their time there, a quarter of a bf16 training step. They need memory quadratic in S.
    """
    if query.is_cuda or not (torch.is_grad_enabled() and query.requires_grad):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    weight = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if causal:
        future = weight.new_full(weight.shape[-2:], -torch.inf).triu(1)
        weight = weight + future
    if mask is not None:
        weight = weight.masked_fill(~mask, -torch.inf)
    return torch.softmax(weight, -1, dtype=weight.dtype) @ value


class AdaptiveNorm(nn.Module):
    """Layer norm with a gain and bias per level (AdaLN, VALL-E section 4.2.2).

    All levels are one stacked parameter. With separate modules, those whose level is not in a batch
    would have no gradient, which breaks DDP and, silently, DeepSpeed's ZeRO.
    """

    def __init__(self, n_levels: int, width: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(n_levels, 2, width))
        self._shape = (width,)

    def forward(
        self, x: Float[Tensor, "B S D"], level: Int[Tensor, " B"]
    ) -> Float[Tensor, "B S D"]:
        """Normalises `x` with the gain and bias of each row's level."""
        if len(self.modulation) == 1:  # one kernel instead of three: matters in decoding steps
            gain, bias = self.modulation[0]
            return F.layer_norm(x, self._shape, 1 + gain, bias)
        gain, bias = self.modulation[level][:, :, None].unbind(1)
        normal = F.layer_norm(x, self._shape)
        return normal * (1 + gain) + bias


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        # with a bias a head can attend by position alone, from which text alignment is learnt
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        cos_sin: Float[Tensor, "2 B 1 S half"],
        mask: Bool[Tensor, "B S S"] | None,
        cache: Cache | None,
        layer: int,
    ) -> Float[Tensor, "B S D"]:
        """Attention of `x` `[B, S, D]` to itself: causal if `mask` is None.

        With a `cache`, `x` follows the cached positions, and the cache provides the mask.
        """
        assert mask is None or cache is None, "a cache has a mask of its own"
        # [3, B, H, S, K]; queries and keys are rotated together
        parts = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        (query, key), value = apply_rotary(parts[:2], cos_sin), parts[2]
        causal = mask is None
        head_mask = None if mask is None else mask[:, None]
        if cache is not None:
            causal = cache.causal
            key, value, head_mask = cache.append(layer, key, value)
        mixed = dot_product_attention(query, key, value, head_mask, causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, n_levels: int) -> None:
        super().__init__()
        self.attention_norm = AdaptiveNorm(n_levels, config.width)
        self.attention = Attention(config)
        self.ffn_norm = AdaptiveNorm(n_levels, config.width)
        self.ffn = nn.Sequential(
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * config.width, config.width),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        cos_sin: Float[Tensor, "2 B 1 S half"],
        level: Int[Tensor, " B"],
        mask: Bool[Tensor, "B S S"] | None,
        cache: Cache | None,
        layer: int,
    ) -> Float[Tensor, "B S D"]:
        x = x + self.dropout(
            self.attention(self.attention_norm(x, level), cos_sin, mask, cache, layer)
        )
        return x + self.dropout(self.ffn(self.ffn_norm(x, level)))


class Transformer(nn.Module):
    """The stack of blocks and the last norm."""

    def __init__(self, config: ModelConfig, n_levels: int) -> None:
        super().__init__()
        self.head_width = config.width // config.n_heads
        self.blocks = nn.ModuleList(Block(config, n_levels) for _ in range(config.n_layers))
        self.norm = AdaptiveNorm(n_levels, config.width)
        self.apply(_initialize)
        for block in self.blocks:  # keeps the residual stream's variance constant in depth (GPT-2)
            for last in (block.attention.out, block.ffn[2]):  # type: ignore[union-attr, index]
                nn.init.normal_(last.weight, std=0.02 / (2 * config.n_layers) ** 0.5)  # type: ignore[union-attr, arg-type]

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        positions: Float[Tensor, "B S"],
        level: Int[Tensor, " B"],
        mask: Bool[Tensor, "B S S"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Hidden states. Attention is causal without a `mask`, whose last axis is the positions
        that each position may attend to."""
        cos_sin = rotary_cos_sin(positions, self.head_width)
        for number, block in enumerate(self.blocks):
            x = block(x, cos_sin, level, mask, cache, number)
        if cache is not None:
            cache.advance(positions.shape[1])
        return self.norm(x, level)


class CodeEmbedding(nn.Module):
    """Embeds frames: the sum of their codes' embeddings over codebooks, from one stacked table."""

    def __init__(self, n_codebooks: int, width: int) -> None:
        super().__init__()
        self.tables = nn.Parameter(torch.empty(n_codebooks, CODEBOOK_SIZE, width))
        nn.init.normal_(self.tables, std=0.02)

    def forward(
        self, codes: Int[Tensor, "B Q T"], below: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Embeds `codes`; with `below`, only the first `below[b]` codebooks of row b."""
        n_codebooks = codes.shape[1]
        offsets = torch.arange(n_codebooks, device=codes.device)[None, :, None] * CODEBOOK_SIZE
        table = self.tables.flatten(0, 1)
        embedded = F.embedding(codes + offsets, table)
        if below is not None:
            mask = torch.arange(n_codebooks, device=codes.device) < below[:, None]
            embedded = embedded * mask[:, :, None, None]
        return embedded.sum(1)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
