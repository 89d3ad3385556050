"""Pitch and voicing of speech at 16 kHz by PitchDNN, a small network of libopus.

The network has two inputs every 10 ms: level and phase difference to the frame before of each low
frequency (88 values), and the correlation of the prediction residual with itself at each period
(224 values). Layers over single frames, two causal convolutions over period and time, and a GRU
compute scores of 180 pitches, 60 per octave.

Weights are 8-bit integers, and their inputs, within [-1, 1], are rounded to multiples of 1/127 as
in libopus, so that close scores are decided as there (except for libopus' approximate tanh). Sums
of such products are exact in float32, in any order and batch.

Legend: B batch, T frames, P periods, D width, N samples or values of a frame.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from valle.model.vocoder.lpc import HOP, MAX_PERIOD

MIN_PERIOD = 32
"""Samples of the shortest pitch period, 500 Hz."""
N_PERIODS = MAX_PERIOD - MIN_PERIOD
N_FREQUENCIES = 30
"""Lowest bins of a spectrum in steps of 50 Hz, whose phases are inputs."""
N_CONTEXT = 4
"""Past frames in the receptive field of the convolutions."""
PER_OCTAVE = 60
N_PITCHES = 180

_ROUNDING = 127.0


class QuantizedLinear(nn.Module):
    """A linear layer with integer weights, whose inputs in [-1, 1] are rounded to n / 127."""

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(outputs, inputs))
        self.register_buffer("scale", torch.zeros(outputs))
        self.register_buffer("bias", torch.zeros(outputs))

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """The layer's output; `x` must lie in [-1, 1]."""
        return F.linear(torch.round(x * _ROUNDING), self.weight) * self.scale + self.bias


class PitchNet(nn.Module):
    """PitchDNN: pitch of frames from their phases and correlations."""

    def __init__(self) -> None:
        super().__init__()
        width = 64
        self.width = width
        self.frequency_1 = QuantizedLinear(3 * N_FREQUENCIES - 2, width)
        self.frequency_2 = QuantizedLinear(width, width)
        self.correlation_1 = nn.Conv2d(1, 4, 3)
        self.correlation_2 = nn.Conv2d(4, 1, 3)
        self.joint = QuantizedLinear(N_PERIODS + width, width)
        self.gru_input = QuantizedLinear(width, 3 * width)
        self.gru_state = QuantizedLinear(width, 3 * width)
        self.bins = QuantizedLinear(width, 192)  # the last twelve are unused

    @classmethod
    def load(cls, path: Path) -> "PitchNet":
        """The network with the weights of a safetensors file; ValueError if they do not fit."""
        if not path.is_file():
            raise ValueError(f"no weights of the pitch network at {path}")
        network = cls()
        try:
            network.load_state_dict({k: v.float() for k, v in load_file(path).items()})
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"{path} does not hold the pitch network: {error}") from error
        return network.eval().requires_grad_(False)

    def encode(
        self, phases: Float[Tensor, "B T F"], correlations: Float[Tensor, "B T P"]
    ) -> Float[Tensor, "B T D"]:
        """Input of the recurrent layer for each frame, with a context of the four frames before.

        Before the first frame both convolutions are padded with zeros.
        """
        x = torch.tanh(self.frequency_2(torch.tanh(self.frequency_1(phases))))
        y = correlations[:, None]
        for convolution in (self.correlation_1, self.correlation_2):
            y = torch.tanh(convolution(F.pad(y, (1, 1, 2, 0))))
        return torch.tanh(self.joint(torch.cat([y[:, 0], x], dim=-1)))

    def predict(
        self, encoded: Float[Tensor, "B T D"], state: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B D"]]:
        """Pitch of each frame, `log2(256 / period) - 1.5`, and the state after the last frame.

        This is the only part that is computed frame by frame.
        """
        width, states = self.width, []
        for x in self.gru_input(encoded).unbind(1):
            h = self.gru_state(state)
            update, reset = torch.sigmoid(x[:, : 2 * width] + h[:, : 2 * width]).chunk(2, dim=-1)
            candidate = torch.tanh(torch.addcmul(x[:, 2 * width :], h[:, 2 * width :], reset))
            state = torch.lerp(candidate, state, update)
            states.append(state)
        return _expected(self.bins(torch.stack(states, dim=1))[..., :N_PITCHES]), state


def _expected(scores: Float[Tensor, "B T N"]) -> Float[Tensor, "B T"]:
    """Mean pitch of the five bins around the best one, weighted by their probabilities."""
    best, peak = scores.max(dim=-1)
    peak = torch.where(best > -1, peak, 0)  # libopus' search starts at a score of -1
    near = peak[..., None] + torch.arange(-2, 3, device=scores.device)
    inside = (near >= 0) & (near < N_PITCHES)
    near = near.clamp(0, N_PITCHES - 1)
    weights = torch.exp(scores.gather(-1, near) - best[..., None]) * inside
    return (weights * near).sum(-1) / weights.sum(-1) / PER_OCTAVE - 1.5


def phases(spectrum: Complex[Tensor, "B T F"]) -> Float[Tensor, "B T N"]:
    """Levels of the lowest bins, and cosine and sine of their phase difference to the frame before.

    The first bin has a level only, the others cosine, sine and level. A level is in units of 64 dB,
    within [-1, 1]. Silence precedes the first frame.
    """
    low = spectrum[..., :N_FREQUENCIES]
    low_power = low.real.square() + low.imag.square()
    power = torch.cat([low.real[..., :1].square(), low_power[..., 1:]], dim=-1)
    level = ((10 * torch.log10(1e-15 + power) - 6) / 64).clamp(-1, 1)
    phasor = low * F.pad(low, (0, 0, 1, 0))[:, :-1].conj()
    scale = torch.rsqrt(1e-15 + phasor.real.square() + phasor.imag.square())
    rest = torch.stack([phasor.real * scale, phasor.imag * scale, level], dim=-1)[..., 1:, :]
    return torch.cat([level[..., :1], rest.flatten(-2)], dim=-1)


def correlations(frames: Float[Tensor, "B T N"]) -> Float[Tensor, "B T P"]:
    """Correlation in [-1, 1] of a frame with the samples 256, 255, ... 33 before it.

    `frames [B, T, 416]` hold the 256 samples before a frame and the frame. The value is twice the
    inner product over the sum of both energies.
    """
    now = frames[..., MAX_PERIOD:]
    size = MAX_PERIOD + 128  # at least 160 + 223: no circular overlap
    past = torch.fft.rfft(frames[..., :size], n=size)
    product = torch.fft.irfft(past * torch.fft.rfft(now, n=size).conj(), n=size)[..., :N_PERIODS]
    squares = F.pad(frames.square(), (1, 0)).cumsum(dim=-1, dtype=torch.float64)
    energy = (squares[..., HOP:] - squares[..., :-HOP])[..., :N_PERIODS]
    own = now.square().sum(dim=-1, keepdim=True)
    return 2 * product / (1 + own + energy).to(product)


def periods(pitch: Float[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Period of a pitch in whole samples at 16 kHz, 32 to 256."""
    return torch.floor(0.5 + MAX_PERIOD / 2 ** (pitch + 1.5)).long().clamp(MIN_PERIOD, MAX_PERIOD)


def voicing(frames: Float[Tensor, "B T N"], pitch: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Correlation of a frame of the low-passed residual with one period before, in [-0.5, 0.5].

    `frames [B, T, 416]` hold the 256 samples before a frame and the frame. The value is
    log(1 + exp(5 c)) / log(1 + exp(5)) - 0.5 of the cosine c of the two, which compresses negative
    correlations.
    """
    now = frames[..., MAX_PERIOD:]
    begin = MAX_PERIOD - periods(pitch)[..., None]
    past = frames.gather(-1, begin + torch.arange(HOP, device=frames.device))
    both = (now * past).sum(-1)
    cosine = both / torch.sqrt(1 + now.square().sum(-1) * past.square().sum(-1))
    return F.softplus(5 * cosine) / math.log1p(math.exp(5)) - 0.5
