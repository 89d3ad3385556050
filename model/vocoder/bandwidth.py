"""BBWENet: extends speech at 16 kHz to 48 kHz, here decimated to 24 kHz.

A network over frames of 10 ms reads features of the narrowband signal (log magnitudes in 32 bands,
and the phase differences of the lowest 41 bins to the frame before) and computes 128 latents for
each subframe of 5 ms. The latents control the signal path: a filter splits the signal into three
channels; two stages upsample it (to 32, then 48 kHz), in each of which the first channel stays, the
second is shaped by gains and the third is folded, which adds the harmonics of the upper band;
filters mix the channels.

All steps are causal. The output lags by `DELAY` samples at 24 kHz (the delay of the resamplers);
`forward` compensates it, streaming does not.

Legend: B batch, N samples, F frames of 160 samples at 16 kHz, S = 2 F subframes.
"""

from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from valle.model.vocoder.bandwidth_layers import (
    N_LATENTS,
    AdaptiveFilter,
    FilterState,
    Resampler,
    Shaping,
    ShapingState,
    doubling_taps,
    fold,
    halving_taps,
    three_halves_taps,
)
from valle.model.vocoder.gru import run_gru
from valle.model.vocoder.weights import load_weights

FRAME: Final = 160
"""Samples of a frame at 16 kHz; the length of a chunk is a multiple of it."""
DELAY: Final = 22
"""Samples at 24 kHz by which a stream lags."""

_WINDOW: Final = 2 * FRAME
_N_PHASES: Final = 41
_EDGES: Final = (*range(0, 151, 5), 160)  # centers of the bands, in bins of 50 Hz
_N_FEATURES: Final = len(_EDGES) + 2 * _N_PHASES
_TINY: Final = 1e-9
_BLOCK: Final = 128  # frames of all streams per block: bounds memory, and fits in CPU caches


@dataclass(frozen=True, kw_only=True)
class NetworkState:
    """Streaming state of a `_FrameNetwork`."""

    samples: Tensor
    """`[B, 160]`: the last frame."""
    spectrum: Tensor
    """complex `[B, 41]`: lowest bins of the last frame."""
    features: Tensor
    """`[B, 114, 2]`: features of the last two frames."""
    hidden1: Tensor
    """`[B, 128, 2]`: the first convolution's output for the last two frames."""
    hidden: Tensor
    """`[1, B, 128]`: hidden state of the GRU."""


@dataclass(frozen=True, kw_only=True)
class BandwidthState:
    """State of a stream between calls of `BandwidthExtension.decode`."""

    network: NetworkState
    filters: tuple[FilterState, ...]
    shapings: tuple[ShapingState, ...]
    resamplers: tuple[Tensor, ...]
    """Last samples of the three resamplers' inputs: `[B, 3, 95]`, `[B, 3, 8]`, `[B, 1, K]`."""


class BandwidthExtension(nn.Module):
    """Extends the bandwidth of speech from 8 to 12 kHz."""

    def __init__(self) -> None:
        super().__init__()
        self.network = _FrameNetwork()
        self.filter1 = AdaptiveFilter(1, 3, n_taps=16, length=80)
        self.to_32k = Resampler(doubling_taps(), down=1, blocks=40)
        self.shaping1 = Shaping(160)
        self.filter2 = AdaptiveFilter(3, 3, n_taps=32, length=160)
        self.to_48k = Resampler(three_halves_taps(), down=2, blocks=8)
        self.shaping2 = Shaping(240)
        self.filter3 = AdaptiveFilter(3, 1, n_taps=16, length=240)
        self.to_24k = Resampler(halving_taps(63), down=2, blocks=20)

    @classmethod
    def load(cls) -> "BandwidthExtension":
        """The network with the repository's weights, on the CPU, in evaluation mode."""
        model = cls()
        model.load_state_dict(load_weights("bandwidth"))
        return model.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, wave: Tensor) -> Tensor:
        """Speech `[B, N * 3 / 2]` at 24 kHz, aligned with `wave` `[B, N]` at 16 kHz in [-1, 1].

        Raises ValueError for another shape, or if N is odd.
        """
        if wave.ndim != 2 or wave.shape[1] % 2:
            raise ValueError(f"wave: expected [B, N] with an even N, got {tuple(wave.shape)}")
        length = wave.shape[1] * 3 // 2
        padding = -wave.shape[1] % FRAME + FRAME  # one more frame: room for the delay
        wide, _ = self.decode(nn.functional.pad(wave, (0, padding)), self.start(len(wave)))
        return wide[:, DELAY : DELAY + length]

    def start(self, batch: int) -> BandwidthState:
        """The state before the first sample: silence."""
        filters = (self.filter1, self.filter2, self.filter3)
        shapings = (self.shaping1, self.shaping2)
        resamplers = ((self.to_32k, 3), (self.to_48k, 3), (self.to_24k, 1))
        return BandwidthState(
            network=self.network.start(batch),
            filters=tuple(layer.start(batch) for layer in filters),
            shapings=tuple(layer.start(batch) for layer in shapings),
            resamplers=tuple(layer.start(batch, n) for layer, n in resamplers),
        )

    @torch.inference_mode()
    def decode(self, wave: Tensor, state: BandwidthState) -> tuple[Tensor, BandwidthState]:
        """Speech `[B, N * 3 / 2]` of a stream's next `wave` `[B, N]`, and the new state.

        N is a multiple of 160. The output lags by `DELAY` samples. Chunks decoded in turn give the
        same samples as the whole. Raises ValueError for another shape.
        """
        if wave.ndim != 2 or wave.shape[1] % FRAME:
            raise ValueError(f"wave: expected [B, N], N in 160s, got {tuple(wave.shape)}")
        if len(wave) != len(state.network.samples):
            raise ValueError(
                f"wave: {len(wave)} rows, but the state has {len(state.network.samples)}"
            )
        wide = wave.new_empty(len(wave), wave.shape[1] * 3 // 2)
        step = max(1, _BLOCK // max(1, len(wave))) * FRAME
        for start in range(0, wave.shape[1], step):
            block, state = self._block(wave[:, start : start + step], state)
            wide[:, start * 3 // 2 : start * 3 // 2 + block.shape[1]] = block
        return wide, state

    def _block(self, wave: Tensor, state: BandwidthState) -> tuple[Tensor, BandwidthState]:
        """`decode` of a short chunk: the whole signal path."""
        latents, network = self.network(wave, state.network)
        x, filter1 = self.filter1(wave[:, None], latents, state.filters[0])
        x, past1 = self.to_32k(x, state.resamplers[0])
        x, shaping1 = _branch(x, self.shaping1, latents, state.shapings[0])
        x, filter2 = self.filter2(x, latents, state.filters[1])
        x, past2 = self.to_48k(x, state.resamplers[1])
        x, shaping2 = _branch(x, self.shaping2, latents, state.shapings[1])
        x, filter3 = self.filter3(x, latents, state.filters[2])
        x, past3 = self.to_24k(x, state.resamplers[2])
        after = BandwidthState(
            network=network,
            filters=(filter1, filter2, filter3),
            shapings=(shaping1, shaping2),
            resamplers=(past1, past2, past3),
        )
        return x[:, 0], after


def _branch(
    x: Float[Tensor, "B 3 N"], shaping: Shaping, latents: Tensor, state: ShapingState
) -> tuple[Float[Tensor, "B 3 N"], ShapingState]:
    """The first channel unchanged, the second shaped, the third folded."""
    shaped, after = shaping(x[:, 1], latents, state)
    return torch.stack([x[:, 0], shaped, fold(x[:, 2])], dim=1), after


class _FrameNetwork(nn.Module):
    """Latents of each subframe, from the narrowband signal."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(_N_FEATURES, N_LATENTS, 3)
        self.conv2 = nn.Conv1d(N_LATENTS, N_LATENTS, 3)
        self.halves = nn.Linear(N_LATENTS, 2 * N_LATENTS)
        """Splits a frame into its two subframes."""
        self.gru = nn.GRU(N_LATENTS, N_LATENTS, batch_first=True)
        phase = torch.pi * (torch.arange(_WINDOW, dtype=torch.float64) + 0.5) / _WINDOW
        self.register_buffer("_window", phase.sin().float(), False)
        self.register_buffer("_bands", _band_matrix(), False)
        self._window: Tensor
        self._bands: Tensor

    def start(self, batch: int) -> NetworkState:
        """The state before the first sample: silence of phase zero."""
        zeros = self._window.new_zeros
        return NetworkState(
            samples=zeros(batch, FRAME),
            spectrum=torch.complex(zeros(batch, _N_PHASES) + _TINY, zeros(batch, _N_PHASES)),
            features=zeros(batch, _N_FEATURES, 2),
            hidden1=zeros(batch, N_LATENTS, 2),
            hidden=zeros(1, batch, N_LATENTS),
        )

    def forward(
        self, wave: Float[Tensor, "B N"], state: NetworkState
    ) -> tuple[Float[Tensor, "B S 128"], NetworkState]:
        """Latents of each subframe, and the state after them."""
        features, spectrum = self.features(wave, state)
        features = torch.cat([state.features, features.transpose(1, 2)], dim=2)
        hidden1 = torch.cat([state.hidden1, torch.tanh(self.conv1(features))], dim=2)
        x = torch.tanh(self.conv2(hidden1)).transpose(1, 2)
        x = torch.tanh(self.halves(x)).reshape(len(wave), -1, N_LATENTS)
        run = run_gru if x.device.type == "cpu" else nn.GRU.__call__
        latents, hidden = run(self.gru, x, state.hidden)
        after = NetworkState(
            samples=wave[:, -FRAME:].clone(),
            spectrum=spectrum,
            features=features[:, :, -2:].clone(),
            hidden1=hidden1[:, :, -2:].clone(),
            hidden=hidden,
        )
        return latents, after

    def features(
        self, wave: Float[Tensor, "B N"], state: NetworkState
    ) -> tuple[Float[Tensor, "B F 114"], Tensor]:
        """Features of each frame with the frame before it, and the last spectrum `[B, 41]`."""
        windows = torch.cat([state.samples, wave], dim=1).unfold(1, _WINDOW, FRAME)
        spectrum = torch.fft.rfft(windows * self._window)
        levels = torch.log(spectrum.abs() @ self._bands + _TINY)
        low = spectrum[:, :, :_N_PHASES] + _TINY
        # unit phasors of the phase difference to the frame before
        phasor = low * torch.cat([state.spectrum[:, None], low[:, :-1]], dim=1).conj()
        phasor = phasor / (phasor.abs() + _TINY)
        return torch.cat([levels, phasor.real, phasor.imag], dim=2), low[:, -1].clone()


def _band_matrix() -> Tensor:
    """`[161, 32]`: triangles between the centers of neighbouring bands, each of sum one."""
    bins = torch.arange(_WINDOW // 2 + 1, dtype=torch.float64)
    edges = torch.tensor([-1, *_EDGES, 161], dtype=torch.float64)
    rows = []
    for low, center, high in zip(edges, edges[1:], edges[2:], strict=False):
        rising, falling = (bins - low) / (center - low), (high - bins) / (high - center)
        triangle = torch.minimum(rising, falling).clamp(min=0)
        rows.append(triangle / triangle.sum())
    return torch.stack(rows, dim=1).float()
