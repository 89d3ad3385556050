"""Signal layers of the bandwidth extension, each with an explicit streaming state.

All layers are causal. A state holds what the layer needs of the past; each call returns the next
state.

Legend: B batch, S subframes of 5 ms, L samples of a subframe at the layer's rate, N = S L samples,
C channels, K taps, P outputs of a run, W samples of a run's window.
"""

import math
from typing import Final, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

N_LATENTS: Final = 128
_GAIN_RANGE: Final = 1.381551
"""Natural logarithm of the largest gain of a filter: 12 dB."""
_FOLDS: Final = math.pi**2 / 4
_RUN: Final = 8
"""P, outputs of an adaptive filter that one matrix product computes from one window."""


class FilterState(NamedTuple):
    """Streaming state of an `AdaptiveFilter`."""

    samples: Tensor
    """`[B, C_in, K - 1]`: last inputs."""
    kernel: Tensor
    """`[B, C_out, C_in, K]`: kernel of the last subframe."""


class AdaptiveFilter(nn.Module):
    """Convolution with a kernel per subframe, computed from the latents.

    A kernel has norm one (over inputs and taps), times a gain of -12 to 12 dB. In the first half of
    a subframe the output fades from the last kernel's to the new one's.
    """

    def __init__(self, n_in: int, n_out: int, n_taps: int, length: int) -> None:
        super().__init__()
        self.n_in, self.n_out, self.n_taps, self.length = n_in, n_out, n_taps, length
        self.kernel = nn.Linear(N_LATENTS, n_out * n_in * n_taps)
        self.gain = nn.Linear(N_LATENTS, n_out)
        phase = math.pi * (torch.arange(length // 2) + 0.5) / (length // 2)
        fade = (0.5 + 0.5 * phase.cos()).view(-1, _RUN).flip(1)
        self.register_buffer("_fade", fade.repeat(1, n_out), False)
        self._fade: Tensor

    def start(self, batch: int) -> FilterState:
        """The state before the first subframe: silence, and a kernel of zeros."""
        zeros = self._fade.new_zeros
        return FilterState(
            zeros(batch, self.n_in, self.n_taps - 1),
            zeros(batch, self.n_out, self.n_in, self.n_taps),
        )

    def forward(
        self,
        signal: Float[Tensor, "B C_in N"],
        latents: Float[Tensor, "B S 128"],
        state: FilterState,
    ) -> tuple[Float[Tensor, "B C_out N"], FilterState]:
        """The filtered signal and the state after it."""
        # kernels as matrices, each of which maps a window of inputs to a run of outputs
        batch, n_subframes = latents.shape[:2]
        n_runs = self.length // _RUN
        kernels = self._kernels(latents)
        matrices = self._matrices(torch.cat([state.kernel[:, None], kernels], dim=1))
        # overlapping windows of the signal, without a copy
        signal = torch.cat([state.samples, signal], dim=2)
        width = self.n_taps + _RUN - 1
        shape = (n_subframes, batch, n_runs, self.n_in, width)
        strides = (self.length, signal.stride(0), _RUN, signal.stride(1), 1)
        windows = signal.as_strided(shape, strides).reshape(-1, n_runs, self.n_in * width)
        # all runs by the new kernel; those of the first half also by the last one, to fade
        filtered = windows @ matrices[1:].flatten(0, 1).mT
        fading = windows[:, : n_runs // 2] @ matrices[:-1].flatten(0, 1).mT
        first_half = filtered[:, : n_runs // 2]
        first_half += self._fade * (fading - first_half)
        runs = filtered.view(n_subframes, batch, n_runs, self.n_out, _RUN)
        after = FilterState(signal[:, :, -(self.n_taps - 1) :].clone(), kernels[:, -1].clone())
        return runs.flip(4).permute(1, 3, 0, 2, 4).flatten(2), after

    def _kernels(self, latents: Tensor) -> Tensor:
        """Kernels `[B, S, C_out, C_in, K]` of the subframes."""
        kernels = self.kernel(latents).unflatten(2, (self.n_out, self.n_in * self.n_taps))
        gains = torch.exp(_GAIN_RANGE * torch.tanh(self.gain(latents)))
        kernels = kernels * (gains[..., None] / (1e-6 + kernels.norm(dim=3, keepdim=True)))
        return kernels.unflatten(3, (self.n_in, self.n_taps))

    def _matrices(self, kernels: Tensor) -> Tensor:
        """`[S, B, C_out * P, C_in * W]`: matrices from windows to runs of outputs, reversed.

        Each row is the kernel, shifted by one sample; a strided view of the padded kernel yields
        the rows in reverse order.
        """
        padded = nn.functional.pad(kernels, (_RUN - 1, _RUN - 1))
        moved = padded.unfold(4, self.n_taps + _RUN - 1, 1)  # [B, S, C_out, C_in, P, W]
        return moved.permute(1, 0, 2, 4, 3, 5).flatten(4).flatten(2, 3)


class ShapingState(NamedTuple):
    """Streaming state of a `Shaping`: values of the last subframe."""

    latents: Tensor
    """`[B, 128]`."""
    envelope: Tensor
    """`[B, 21]`."""
    hidden: Tensor
    """`[B, L / 2]`."""
    log_gain: Tensor
    """`[B, 1]`: the last gain."""


class Shaping(nn.Module):
    """Multiplies a signal by gains, one per two samples, from the latents and its envelope."""

    _POOLS = 20

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.from_latents = nn.Linear(2 * N_LATENTS, length // 2)
        """Its input, as that of the two below, is the last subframe and this one."""
        self.from_envelope = nn.Linear(2 * (self._POOLS + 1), length // 2)
        self.exit = nn.Linear(length, length // 2)

    def start(self, batch: int) -> ShapingState:
        """The state before the first subframe: zeros."""
        widths = (N_LATENTS, self._POOLS + 1, self.length // 2, 1)
        zeros = [self.exit.bias.new_zeros(batch, width) for width in widths]
        return ShapingState(*zeros)

    def forward(
        self,
        signal: Float[Tensor, "B N"],
        latents: Float[Tensor, "B S 128"],
        state: ShapingState,
    ) -> tuple[Float[Tensor, "B N"], ShapingState]:
        """The shaped signal and the state after it."""
        envelope = self._envelope(signal)
        x = self.from_latents(_with_last(state.latents, latents))
        x = x + self.from_envelope(_with_last(state.envelope, envelope))
        hidden = nn.functional.leaky_relu(x, 0.2)
        log_gain = self.exit(_with_last(state.hidden, hidden)).flatten(1)
        # a gain is predicted for every second sample; between two, their mean
        before = torch.cat([state.log_gain, log_gain[:, :-1]], dim=1)
        gain = torch.stack([0.5 * (before + log_gain), log_gain], dim=2).flatten(1).exp()
        last = (latents[:, -1], envelope[:, -1], hidden[:, -1], log_gain[:, -1:])
        return gain * signal, ShapingState(*(value.clone() for value in last))

    def _envelope(self, signal: Tensor) -> Tensor:
        """`[B, S, 21]`: log mean magnitudes of 20 parts, minus their mean; and the mean."""
        parts = signal.abs().view(len(signal), -1, self._POOLS, self.length // self._POOLS)
        levels = torch.log(parts.mean(dim=3) + 2.0**-16)
        mean = levels.mean(dim=2, keepdim=True)
        return torch.cat([levels - mean, mean], dim=2)


def _with_last(last: Tensor, now: Tensor) -> Tensor:
    """`[B, S, 2 * width]`: values of the subframe before, then of the subframe."""
    return torch.cat([torch.cat([last[:, None], now[:, :-1]], dim=1), now], dim=2)


class Resampler(nn.Module):
    """Polyphase resampling, `up` outputs for `down` inputs, as a matrix over short blocks.

    `taps[p]` are the coefficients of output p of `up`. They cover the `span` samples before a
    block and its `down` samples.
    """

    def __init__(self, taps: Tensor, down: int, blocks: int) -> None:
        super().__init__()
        up, width = taps.shape
        self.span = width - down
        """Past samples in the state."""
        self.hop = down * blocks
        matrix = torch.zeros(self.span + self.hop, up * blocks)
        for block in range(blocks):
            matrix[block * down : block * down + width, block * up : (block + 1) * up] = taps.T
        self.register_buffer("_matrix", matrix, False)
        self._matrix: Tensor

    def start(self, *shape: int) -> Tensor:
        """The state before the first sample of signals `[*shape, time]`: silence."""
        return self._matrix.new_zeros(*shape, self.span)

    def forward(
        self, signal: Float[Tensor, "... N"], past: Float[Tensor, "... K"]
    ) -> tuple[Float[Tensor, "... M"], Float[Tensor, "... K"]]:
        """The resampled signal, and the new state. `N` is a multiple of `hop`."""
        signal = torch.cat([past, signal], dim=-1)
        windows = signal.unfold(-1, self.span + self.hop, self.hop)
        resampled = windows.reshape(-1, self.span + self.hop) @ self._matrix
        return resampled.view(*signal.shape[:-1], -1), signal[..., -self.span :].clone()


def fold(signal: Tensor) -> Tensor:
    """`x sin(c log |x|)`: adds harmonics to a signal, independent of its level.

    c is pi**2 / 4, as in libopus' sine function; the training program has c = 1. With libopus' c
    the output equals libopus', and the upper band (8 to 12 kHz) is as near to recordings (8.7 dB
    against 9.0).
    """
    return signal * torch.sin(_FOLDS * torch.log(signal.abs() + 1e-6))


def doubling_taps() -> Tensor:
    """`[2, 96]`: impulse responses of the filters with which BBWENet doubles a rate.

    Each of the two outputs is a cascade of three all-pass sections `(a + 1/z) / (1 + a/z)`. After
    96 samples, 3e-7 of the response is left (the slowest pole is 0.8475).
    """
    sections = (
        (0.026641845703125, 0.228668212890625, 1 - 0.4036407470703125),
        (0.104583740234375, 0.3932037353515625, 1 - 0.152496337890625),
    )
    n_taps = 96
    taps = torch.zeros(2, n_taps, dtype=torch.float64)
    for phase, coefficients in enumerate(sections):
        response = [1.0] + [0.0] * (n_taps - 1)
        for a in coefficients:
            past_in = past_out = 0.0
            for index, value in enumerate(response):
                past_out = a * value + past_in - a * past_out
                past_in = value
                response[index] = past_out
        taps[phase] = torch.tensor(response[::-1])
    return taps.float()


def three_halves_taps() -> Tensor:
    """`[3, 10]`: BBWENet's interpolation, three outputs for two inputs; the last tap is 0."""
    taps = torch.zeros(3, 10)
    # fmt: off
    taps[0, :8] = torch.tensor([
        0.00576782, -0.01831055, 0.01882935, 0.9328308,
        0.09143066, -0.04196167, 0.01296997, -0.00140381,
    ])
    taps[1, :8] = torch.tensor([
        -0.00314331055, 0.0273437500, -0.106414795, 0.364685059,
        0.803863525, -0.102233887, 0.0161437988, -0.000122070312,
    ])
    taps[2, 1:9] = torch.tensor([
        -0.00146484, 0.02313232, -0.12072754, 0.7315979,
        0.4621277, -0.12075806, 0.0295105, -0.00326538,
    ])
    # fmt: on
    return taps


def halving_taps(n_taps: int) -> Tensor:
    """`[1, n_taps + 1]`: half-band low-pass for decimation by two.

    A sinc with a Kaiser window (beta 7). It is symmetric, so that all frequencies lag by
    `(n_taps - 1) / 2` samples.
    """
    time = torch.arange(n_taps, dtype=torch.float64) - (n_taps - 1) / 2
    window = torch.kaiser_window(n_taps, periodic=False, beta=7.0, dtype=torch.float64)
    taps = torch.sinc(time / 2) * window
    return nn.functional.pad(taps / taps.sum(), (0, 1))[None].float()
