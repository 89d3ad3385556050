"""Pitch and voicing of speech by PitchDNN, the small network of libopus.

The network sees two things every 10 ms: by how much the phase of each low frequency has turned
since the frame before (88 values), and how the prediction residual agrees with itself at every
period (224 values). Layers of one frame each, two causal convolutions over period and time and a
GRU lead to scores of 180 pitches, sixty an octave.

The layers' weights are 8-bit integers, and what they multiply, within [-1, 1], is rounded to 127ths
as in libopus, so that two pitches which are about as likely are decided alike (but for libopus'
approximate tanh). Sums of such products are exact in float32, in any order and batch.

Legend: B batch, T frames, P periods, everything at 16 kHz.
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
"""Lowest bins of a spectrum of 50 Hz steps, whose phases the network sees."""
N_CONTEXT = 4
"""Frames before a frame that the convolutions see."""
PER_OCTAVE = 60
N_PITCHES = 180

_ROUNDING = 127.0


class QuantizedLinear(nn.Module):
    """A linear layer of integer weights, on inputs in [-1, 1] that are rounded to 127ths."""

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(outputs, inputs))
        self.register_buffer("scale", torch.zeros(outputs))
        self.register_buffer("bias", torch.zeros(outputs))

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """`x` in [-1, 1] to outputs of any size."""
        return F.linear(torch.round(x * _ROUNDING), self.weight) * self.scale + self.bias


class PitchNet(nn.Module):
    """PitchDNN: from phases and correlations of frames to their pitch."""

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
        self.bins = QuantizedLinear(width, 192)  # the last twelve mean nothing

    @classmethod
    def load(cls, path: Path) -> "PitchNet":
        """The network with the weights of a safetensors file. Raises ValueError for others."""
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
        """What the recurrent layer hears of each frame; it sees the four frames before it too.

        Frames before the first are none: both convolutions begin with zeros.
        """
        x = torch.tanh(self.frequency_2(torch.tanh(self.frequency_1(phases))))
        y = correlations[:, None]
        for convolution in (self.correlation_1, self.correlation_2):
            y = torch.tanh(convolution(F.pad(y, (1, 1, 2, 0))))
        return torch.tanh(self.joint(torch.cat([y[:, 0], x], dim=-1)))

    def predict(
        self, encoded: Float[Tensor, "B T D"], state: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B D"]]:
        """Pitch of each frame, `log2(256 / period) - 1.5`, and the state after the last.

        The one part that goes frame by frame.
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
    """Mean pitch of the five bins about the best one, weighted by their probabilities."""
    best, peak = scores.max(dim=-1)
    peak = torch.where(best > -1, peak, 0)  # libopus begins its search at a score of -1
    near = peak[..., None] + torch.arange(-2, 3, device=scores.device)
    inside = (near >= 0) & (near < N_PITCHES)
    near = near.clamp(0, N_PITCHES - 1)
    weights = torch.exp(scores.gather(-1, near) - best[..., None]) * inside
    return (weights * near).sum(-1) / weights.sum(-1) / PER_OCTAVE - 1.5


def phases(spectrum: Complex[Tensor, "B T F"]) -> Float[Tensor, "B T N"]:
    """Level of the lowest bins, and cosine and sine of their turn since the frame before.

    The first bin has a level only; the others turn, turn, level. Levels are decibels over 64,
    within [-1, 1]. Before the first frame there is silence.
    """
    low = spectrum[..., :N_FREQUENCIES]
    low_power = low.real.square() + low.imag.square()
    power = torch.cat([low.real[..., :1].square(), low_power[..., 1:]], dim=-1)
    level = ((10 * torch.log10(1e-15 + power) - 6) / 64).clamp(-1, 1)
    turn = low * F.pad(low, (0, 0, 1, 0))[:, :-1].conj()
    length = torch.rsqrt(1e-15 + turn.real.square() + turn.imag.square())
    rest = torch.stack([turn.real * length, turn.imag * length, level], dim=-1)[..., 1:, :]
    return torch.cat([level[..., :1], rest.flatten(-2)], dim=-1)


def correlations(frames: Float[Tensor, "B T N"]) -> Float[Tensor, "B T P"]:
    """Likeness in [-1, 1] of a frame to what lies 256, 255, ... 33 samples before it.

    `frames [B, T, 416]` hold the 256 samples before a frame and the frame. Twice the inner product
    over the sum of both energies.
    """
    now = frames[..., MAX_PERIOD:]
    size = MAX_PERIOD + 128  # no sample is met twice: 160 + 223 of them
    past = torch.fft.rfft(frames[..., :size], n=size)
    product = torch.fft.irfft(past * torch.fft.rfft(now, n=size).conj(), n=size)[..., :N_PERIODS]
    squares = F.pad(frames.square(), (1, 0)).cumsum(dim=-1, dtype=torch.float64)
    energy = (squares[..., HOP:] - squares[..., :-HOP])[..., :N_PERIODS]
    own = now.square().sum(dim=-1, keepdim=True)
    return 2 * product / (1 + own + energy).to(product)


def periods(pitch: Float[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Whole samples of a pitch's period at 16 kHz, 32 to 256."""
    return torch.floor(0.5 + MAX_PERIOD / 2 ** (pitch + 1.5)).long().clamp(MIN_PERIOD, MAX_PERIOD)


def voicing(frames: Float[Tensor, "B T N"], pitch: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """How alike a frame of the low-passed residual is to the period before it: -0.36 to 0.5.

    `frames [B, T, 416]` hold the 256 samples before a frame and the frame. The cosine c of the two
    is bent: log(1 + exp(5 c)) / log(1 + exp(5)) - 0.5, so that unlike and opposite are near.
    """
    now = frames[..., MAX_PERIOD:]
    begin = MAX_PERIOD - periods(pitch)[..., None]
    past = frames.gather(-1, begin + torch.arange(HOP, device=frames.device))
    both = (now * past).sum(-1)
    cosine = both / torch.sqrt(1 + now.square().sum(-1) * past.square().sum(-1))
    return F.softplus(5 * cosine) / math.log1p(math.exp(5)) - 0.5
