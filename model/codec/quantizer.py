"""nano 2's quantiser: vocoder features to residual codes and back.

A convolutional encoder maps features (20 values every 10 ms: Bark cepstra, pitch, voicing) to
latents at the codec's frame rate, a residual vector quantiser maps latents to codes, and a
convolutional decoder maps quantised latents back to features for the vocoder. Context from
neighbouring frames lets eight codebooks represent what independent frames would need more for.

The encoder sees the whole recording. The decoder is causal except for `lookahead` frames, so that
it can stream; its state between calls is a value (`DecoderState`).

Legend: B batch, S features (100 a second), T frames (`frame_rate` a second), Q codebooks, W width,
D dimension of the quantised space, F feature values.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from valle.model.codec.torchaudio_stub import ensure_torchaudio

if TYPE_CHECKING:
    from encodec.quantization.core_vq import EuclideanCodebook

N_FEATURES: Final = 20
FEATURE_RATE: Final = 100
"""Feature vectors a second."""


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Rates and sizes of a `Quantizer`."""

    frame_rate: int = 50
    """Frames a second: 100, 75, 50 or 25."""

    n_codebooks: int = 8
    """Residual codebooks; a prefix of them may be used."""

    codebook_size: int = 1024
    """Entries of each codebook."""

    dimension: int = 48
    """Width of the quantised space."""

    width: int = 192
    """Channels of the convolutions."""

    blocks: int = 2
    """Residual blocks before and after each change of rate, in encoder and decoder."""

    lookahead: int = 1
    """Frames that the decoder sees beyond the one it decodes."""

    def __post_init__(self) -> None:
        if self.frame_rate not in (100, 75, 50, 25):
            raise ValueError(f"frame_rate: {self.frame_rate} is none of 100, 75, 50, 25")
        if not 0 <= self.lookahead < KERNEL:
            raise ValueError(f"lookahead: {self.lookahead} is not in 0 .. {KERNEL - 1}")

    @property
    def features_per_block(self) -> int:
        """Features of a block, the shortest span that is whole in both rates."""
        return Fraction(FEATURE_RATE, self.frame_rate).numerator

    @property
    def frames_per_block(self) -> int:
        """Frames of a block: 3 at 75 frames a second, else 1."""
        return Fraction(FEATURE_RATE, self.frame_rate).denominator


KERNEL: Final = 5
"""Taps of every convolution."""


class Convolution(nn.Module):
    """A convolution over time, of whose taps `ahead` lie in the future."""

    def __init__(self, inputs: int, outputs: int, ahead: int, dilation: int = 1) -> None:
        super().__init__()
        self.taps = nn.Conv1d(inputs, outputs, KERNEL, dilation=dilation)
        self.padding = ((KERNEL - 1 - ahead) * dilation, ahead * dilation)
        """Padding before and after the input."""

    def forward(self, x: Float[Tensor, "B C T"]) -> Float[Tensor, "B D T"]:
        """The whole input at once, padded with zeros."""
        return self.taps(F.pad(x, self.padding))

    def advance(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs for the next frames `[B, C, n]` of a stream, and the new state.

        `past` is None at the start. Outputs lag by the taps ahead, so that the first call returns
        fewer.
        """
        if past is None:
            past = x.new_zeros(x.shape[0], x.shape[1], self.padding[0])
        seen = torch.cat([past, x], 2)
        reach = sum(self.padding)
        if seen.shape[2] <= reach:
            return x.new_zeros(x.shape[0], self.taps.out_channels, 0), seen
        return self.taps(seen), seen[:, :, seen.shape[2] - reach :]


class Pointwise(nn.Conv1d):
    """A convolution of one tap that also accepts chunks without frames."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, x: Float[Tensor, "B C T"]) -> Float[Tensor, "B D T"]:
        """A linear map of each frame."""
        if x.shape[2] == 0:
            return x.new_zeros(x.shape[0], self.out_channels, 0)
        return super().forward(x)


class ResidualBlock(nn.Module):
    """RMS norm over channels, convolution, GELU, pointwise convolution, added to the input."""

    def __init__(self, width: int, ahead: int, dilation: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, 1))
        self.mix = Convolution(width, width, ahead, dilation)
        self.out = Pointwise(width, width)

    def forward(self, x: Float[Tensor, "B W T"]) -> Float[Tensor, "B W T"]:
        """The whole input at once, padded with zeros."""
        return x + self.out(F.gelu(self.mix(self._normed(x))))

    def advance(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next frames of a stream, as many as go in; for causal blocks only."""
        mixed, new_past = self.mix.advance(self._normed(x), past)
        return x + self.out(F.gelu(mixed)), new_past

    def _normed(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5) * self.scale


class Encoder(nn.Module):
    """Features of a whole recording to latents at the frame rate."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self._config = config
        ahead, width = (KERNEL - 1) // 2, config.width
        dilations = [2**i for i in range(config.blocks)]
        self.first = Convolution(N_FEATURES, width, ahead)
        self.fine = nn.ModuleList(ResidualBlock(width, ahead, d) for d in dilations)
        self.join = nn.Linear(width * config.features_per_block, width * config.frames_per_block)
        self.coarse = nn.ModuleList(ResidualBlock(width, ahead, d) for d in dilations)
        self.last = Pointwise(width, config.dimension)

    def forward(
        self, features: Float[Tensor, "B F S"], mask: Bool[Tensor, "B 1 S"]
    ) -> Float[Tensor, "B D T"]:
        """Latents of normalised features; S is whole blocks, and `mask` marks real features.

        The mask is applied before every convolution: after the end of a recording there are zeros,
        whatever it is batched with.
        """
        x = self.first(features * mask)
        for block in self.fine:
            x = block(x * mask)
        batch, width, length = (x * mask).shape
        blocks = length // self._config.features_per_block
        grouped = (x * mask).transpose(1, 2).reshape(batch, blocks, -1)
        x = self.join(grouped).reshape(batch, -1, width).transpose(1, 2)
        frame_mask = self._frame_mask(mask)
        for block in self.coarse:
            x = block(x * frame_mask)
        return self.last(x * frame_mask)

    def _frame_mask(self, mask: Tensor) -> Tensor:
        """`[B, 1, T]`: frames of blocks with at least one real feature."""
        first = mask[:, :, :: self._config.features_per_block]
        return first.repeat_interleave(self._config.frames_per_block, dim=2)


@dataclass(frozen=True)
class DecoderState:
    """State of a streaming `Decoder`."""

    past: tuple[Tensor | None, ...]
    """Past inputs of each convolution, in execution order."""
    partial_block: Tensor | None
    """Frames of a block that is not complete yet."""


class Decoder(nn.Module):
    """Quantised latents to normalised features, causal except for the look-ahead."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self._config = config
        width = config.width
        dilations = [2**i for i in range(config.blocks)]
        self.first = Convolution(config.dimension, width, config.lookahead)
        self.coarse = nn.ModuleList(ResidualBlock(width, 0, d) for d in dilations)
        self.split = nn.Linear(width * config.frames_per_block, width * config.features_per_block)
        self.fine = nn.ModuleList(ResidualBlock(width, 0, d) for d in dilations)
        self.last = Pointwise(width, N_FEATURES)

    def forward(self, latents: Float[Tensor, "B D T"]) -> Float[Tensor, "B F S"]:
        """Features of whole blocks of frames."""
        x = self.first(latents)
        for block in self.coarse:
            x = block(x)
        x = self._upsample(x)
        for block in self.fine:
            x = block(x)
        return self.last(x)

    def start(self) -> DecoderState:
        """The state before the first frame of a stream."""
        return DecoderState((None,) * (1 + len(self.coarse) + len(self.fine)), None)

    def advance(self, latents: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Features `[B, F, s]` that the next latents `[B, D, n]` complete, and the new state.

        Features lag by the look-ahead; `Quantizer.flush` returns the last ones.
        """
        past = iter(state.past)
        new_past: list[Tensor | None] = []
        x, tail = self.first.advance(latents, next(past))
        new_past.append(tail)
        for block in self.coarse:
            assert isinstance(block, ResidualBlock)
            x, tail = block.advance(x, next(past))
            new_past.append(tail)
        if state.partial_block is not None:
            x = torch.cat([state.partial_block, x], 2)
        end = x.shape[2] - x.shape[2] % self._config.frames_per_block
        x, partial_block = self._upsample(x[:, :, :end]), x[:, :, end:]
        for block in self.fine:
            assert isinstance(block, ResidualBlock)
            x, tail = block.advance(x, next(past))
            new_past.append(tail)
        return self.last(x), DecoderState(tuple(new_past), partial_block)

    def _upsample(self, x: Tensor) -> Tensor:
        batch, width, length = x.shape
        blocks = length // self._config.frames_per_block
        grouped = x.transpose(1, 2).reshape(batch, blocks, width * self._config.frames_per_block)
        features = self.split(grouped).reshape(batch, -1, width)
        return features.transpose(1, 2)


class Quantizer(nn.Module):
    """Features to codes and back: encoder, residual codebooks, decoder."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        ensure_torchaudio()
        from encodec.quantization.core_vq import ResidualVectorQuantization

        self.config = config
        self.encoder = Encoder(config)
        self.books = ResidualVectorQuantization(
            num_quantizers=config.n_codebooks,
            dim=config.dimension,
            codebook_size=config.codebook_size,
            decay=0.98,
            kmeans_init=True,
            kmeans_iters=10,
            threshold_ema_dead_code=0.05,
        )
        self.decoder = Decoder(config)
        self.register_buffer("mean", torch.zeros(N_FEATURES, 1))
        self.register_buffer("deviation", torch.ones(N_FEATURES, 1))
        self.mean: Tensor
        self.deviation: Tensor

    def codebooks(self) -> "list[EuclideanCodebook]":
        """The residual codebooks in order."""
        return [layer._codebook for layer in self.books.layers]

    def forward(
        self, features: Float[Tensor, "B S F"], n_codebooks: int | None
    ) -> tuple[Float[Tensor, "B S F"], Tensor]:
        """Reconstructed features and the commitment loss (a scalar), for training.

        S is whole blocks. The first `n_codebooks` are used; None skips quantisation.
        """
        x = self._normalized(features)
        latents = self.encoder(x, torch.ones_like(x[:, :1], dtype=torch.bool))
        loss = latents.new_zeros(())
        if n_codebooks is not None:
            latents, _, losses = self.books(latents, n_codebooks)
            loss = losses.sum()
        return self._restored(self.decoder(latents)), loss

    def encode(
        self, features: Float[Tensor, "B S F"], lengths: Int[Tensor, " B"]
    ) -> Int[Tensor, "B Q T"]:
        """Codes of a batch of recordings, padded to whole blocks, of `lengths` features each."""
        positions = torch.arange(features.shape[1], device=features.device)
        mask = (positions < lengths[:, None])[:, None]
        latents = self.encoder(self._normalized(features), mask)
        return self.books.encode(latents).transpose(0, 1)

    def latents(self, codes: Int[Tensor, "B Q T"]) -> Float[Tensor, "B D T"]:
        """Entries of the codes, summed over the first Q codebooks."""
        return self.books.decode(codes.transpose(0, 1))

    def decode(
        self, codes: Int[Tensor, "B Q T"], lengths: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B S F"]:
        """Features of all blocks that the frames begin. Rows have `lengths` frames (None: T)."""
        latents = self.latents(codes)
        if lengths is not None:  # the look-ahead must see zeros after a row's end
            positions = torch.arange(codes.shape[2], device=codes.device)
            latents = latents * (positions < lengths[:, None])[:, None]
        missing = -latents.shape[2] % self.config.frames_per_block
        return self._restored(self.decoder(F.pad(latents, (0, missing))))

    def advance(
        self, codes: Int[Tensor, "B Q n"], state: DecoderState
    ) -> tuple[Float[Tensor, "B s F"], DecoderState]:
        """Features that the next codes of a stream complete, and the new state; see
        `Decoder.advance`."""
        features, state = self.decoder.advance(self.latents(codes), state)
        return self._restored(features), state

    def flush(self, state: DecoderState) -> Float[Tensor, "B s F"]:
        """The remaining features at the end of a stream, up to its last block."""
        first = state.past[0]
        assert first is not None, "flush() needs a stream that has begun"
        n_frames = self.config.lookahead + self.config.frames_per_block - 1
        behind = first.new_zeros(first.shape[0], first.shape[1], n_frames)
        return self._restored(self.decoder.advance(behind, state)[0])

    def _normalized(self, features: Tensor) -> Tensor:
        return (features.transpose(1, 2) - self.mean) / self.deviation

    def _restored(self, features: Tensor) -> Tensor:
        return (features * self.deviation + self.mean).transpose(1, 2)
