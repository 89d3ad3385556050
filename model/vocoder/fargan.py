"""FARGAN: features at 100 Hz to speech at 16 kHz, in four subframes of 40 samples per frame.

A network over frames computes a condition for each subframe. A network over subframes predicts the
next 40 samples from the condition, the last 40 samples and the samples one pitch period ago (all
divided by the subframe's gain). Its output is speech with pre-emphasis, which a one-pole filter
removes.

Time. The samples of a frame depend on its features and those of two frames before, and on the pitch
of the frame before; on nothing later. They lag behind the recording: the features of frame t are
centered on sample 160 t, and the network generates samples 160 t - 240 to 160 t - 80 from them. The
first frame therefore only initialises the state (`start`), and the output of the second begins 80
samples before the recording. `forward` is aligned with the recording. In a stream the caller drops
the first `DELAY` samples, and `flush` returns the last ones.

Legend: B batch, T frames, S = 4 T subframes.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from valle.model.vocoder.recurrence import Recurrence
from valle.model.vocoder.weights import load_weights

N_FEATURES: Final = 20
FRAME: Final = 160
"""Samples at 16 kHz of a frame of features."""
SUBFRAME: Final = 40
DELAY: Final = 80
"""Samples of a stream before the recording's first."""

_SUBFRAMES: Final = FRAME // SUBFRAME
_CONDITION = 80
_MAX_PERIOD: Final = 256
_MIN_PERIOD: Final = 32
_PITCH = 18  # index among the features
_AROUND = 2  # samples on each side of the 40 that lie one period ago
_PULSE = SUBFRAME + 2 * _AROUND
_DE_EMPHASIS: Final = 0.85
_BLOCK: Final = 100  # frames per block: bounds the memory of the conditions


@dataclass(frozen=True, kw_only=True)
class FarganState:
    """State of a stream between calls of `Fargan.decode`; a few kilobytes per row."""

    features: Tensor
    """`[B, 20]` of the last frame: the next frame uses its pitch, and `flush` repeats it."""
    frames: Tensor
    """`[B, 2, 64]`: the last two inputs of the convolution over frames."""
    condition: Tensor
    """`[B, 80]`: condition of the last subframe."""
    excitation: Tensor
    """`[B, 84]`: past samples that the last subframe read, divided by its gain."""
    samples: Tensor
    """`[B, 256]`: the last samples, before de-emphasis."""
    hidden: tuple[Tensor, ...]
    """Hidden states of the three GRUs, `[B, 160]`, `[B, 128]`, `[B, 128]`."""
    emphasis: Tensor
    """`[B]`: the last sample after de-emphasis."""


class Subframes(NamedTuple):
    """Inputs of the subframe network that do not depend on generated samples."""

    entry: Tensor
    """`[B, S, 192]`: contribution of the conditions to the first layer, with its bias."""
    gain: Tensor
    """`[B, S]`: factor of the network's output."""
    scale: Tensor
    """`[B, S]`: factor of past samples, the inverse of the gain."""
    lags: Tensor
    """int64 `[B, S, 44]`: positions of the pulse one period ago in the last 256 samples."""


class SubframeState(NamedTuple):
    """State between subframes; the fields are those of `FarganState`."""

    excitation: Tensor
    samples: Tensor
    hidden: tuple[Tensor, ...]


class Fargan(nn.Module):
    """The vocoder. On a CPU `Recurrence` runs the subframes, elsewhere `run_plain`."""

    def __init__(self) -> None:
        super().__init__()
        self.pitch_embedding = nn.Embedding(224, 12)
        self.frame_dense1 = nn.Linear(N_FEATURES + 12, 64)
        self.frame_conv = nn.Linear(3 * 64, 128)
        """A convolution over three frames, the oldest first."""
        self.frame_dense2 = nn.Linear(128, _SUBFRAMES * _CONDITION)
        self.gain = nn.Linear(_CONDITION, 1)
        self.entry = nn.Linear(2 * (_CONDITION + _PULSE + SUBFRAME), 192)
        """Its input is two subframes, the older first; each is condition, pulse, last samples."""
        self.entry_gate = nn.Linear(192, 192)
        self.pitch_gates = nn.Linear(192, 4)
        widths = (192, 160, 128, 128)
        self.grus = nn.ModuleList(
            nn.GRUCell(before + 2 * SUBFRAME, after, bias=False)
            for before, after in pairwise(widths)
        )
        self.gates = nn.ModuleList(nn.Linear(width, width) for width in widths[1:])
        self._widths = widths[1:]
        self.skip = nn.Linear(sum(widths) + 2 * SUBFRAME, 128)
        self.skip_gate = nn.Linear(128, 128)
        self.exit = nn.Linear(128, SUBFRAME)
        powers = torch.arange(FRAME)[:, None] - torch.arange(FRAME)
        self.register_buffer("_filter", (_DE_EMPHASIS ** powers.double()).tril().float(), False)
        self._filter: Tensor
        self._recurrence: Recurrence | None = None

    @classmethod
    def load(cls) -> "Fargan":
        """The network with the repository's weights, on the CPU, in evaluation mode."""
        model = cls()
        model.load_state_dict(load_weights("fargan"))
        return model.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, features: Tensor) -> Tensor:
        """Speech `[B, T * 160]` at 16 kHz of `features` `[B, T, 20]`, aligned with the recording.

        Raises ValueError for another shape, or for no frames.
        """
        _check(features)
        if features.shape[1] == 0:
            raise ValueError("features: no frames; give at least one")
        state = self.start(features[:, 0])
        wave, state = self.decode(features[:, 1:], state)
        return torch.cat([wave, self.flush(state)], dim=1)[:, DELAY:]

    @torch.inference_mode()
    def start(self, first: Tensor) -> FarganState:
        """The state of a stream after its first frame `first` `[B, 20]`, which has no samples.

        The state is that of a repeated first frame whose samples are silence: the subframe network
        runs once over the frame, and its samples are replaced by zeros.
        """
        _check(first[:, None])
        batch = len(first)
        repeated = first[:, None].expand(batch, 3, N_FEATURES)
        frames = self._frames(repeated)
        silence = FarganState(
            features=first,
            frames=frames[:, :2],
            condition=first.new_zeros(batch, _CONDITION),
            excitation=first.new_zeros(batch, _PULSE + SUBFRAME),
            samples=first.new_zeros(batch, _MAX_PERIOD),
            hidden=tuple(first.new_zeros(batch, width) for width in self._widths),
            emphasis=first.new_zeros(batch),
        )
        subframes, state = self._subframes(repeated[:, :1], silence)
        _, subframe_state = self._run(
            subframes._replace(gain=torch.zeros_like(subframes.gain)), silence
        )
        return replace(state, **subframe_state._asdict())

    @torch.inference_mode()
    def decode(self, features: Tensor, state: FarganState) -> tuple[Tensor, FarganState]:
        """Speech `[B, T * 160]` of a stream's next `features` `[B, T, 20]`, and the new state.

        Chunks decoded in turn give the same samples as the whole. Raises ValueError for another
        shape.
        """
        _check(features)
        if len(features) != len(state.features):
            raise ValueError(
                f"features: {len(features)} rows, but the state has {len(state.features)}"
            )
        wave = features.new_empty(len(features), features.shape[1] * FRAME)
        for start in range(0, features.shape[1], _BLOCK):
            block = features[:, start : start + _BLOCK]
            subframes, state = self._subframes(block, state)
            samples, subframe_state = self._run(subframes, state)
            samples, emphasis = self._de_emphasis(samples, state.emphasis)
            state = replace(state, emphasis=emphasis, **subframe_state._asdict())
            wave[:, start * FRAME : start * FRAME + samples.shape[1]] = samples
        return wave, state

    def flush(self, state: FarganState) -> Tensor:
        """The last `[B, 240]` samples of a stream, from two repetitions of its last frame."""
        wave, _ = self.decode(state.features[:, None].expand(-1, 2, -1), state)
        return wave[:, : FRAME + DELAY]

    def run_plain(
        self, subframes: Subframes, subframe_state: SubframeState
    ) -> tuple[Tensor, SubframeState]:
        """Samples `[B, S * 40]` before de-emphasis, in PyTorch on any device: the reference of
        `Recurrence`."""
        excitation, samples, hidden = subframe_state
        columns = self.entry.weight.split([_CONDITION, _PULSE + SUBFRAME] * 2, dim=1)
        entry_weight = torch.cat([columns[1], columns[3]], dim=1)
        wave = []
        for step in range(subframes.gain.shape[1]):
            gain, scale = subframes.gain[:, step, None], subframes.scale[:, step, None]
            # input: one period ago and the last samples, in units of the gain
            pulse = samples.gather(1, subframes.lags[:, step])
            before = excitation
            excitation = torch.cat([pulse, samples[:, -SUBFRAME:]], 1).mul(scale).clamp(-1, 1)
            pulse, last = excitation[:, _AROUND : SUBFRAME + _AROUND], excitation[:, _PULSE:]
            x = torch.cat([before, excitation], 1) @ entry_weight.T + subframes.entry[:, step]
            x = _gated(torch.tanh(x), self.entry_gate)
            # three gated GRUs, each of which reads the gated pulse again
            pulses = torch.sigmoid(self.pitch_gates(x))[:, :, None] * pulse[:, None]
            outputs, states = [x], []
            for index, (gru, gate) in enumerate(zip(self.grus, self.gates, strict=True)):
                state = gru(torch.cat([outputs[-1], pulses[:, index], last], 1), hidden[index])
                states.append(state)
                outputs.append(_gated(state, gate))
            hidden = tuple(states)
            # all layers' outputs to the next 40 samples
            x = torch.cat([*outputs[1:], outputs[0], pulses[:, 3], last], 1)
            x = _gated(torch.tanh(self.skip(x)), self.skip_gate)
            wave.append(torch.tanh(self.exit(x)) * gain)
            samples = torch.cat([samples[:, SUBFRAME:], wave[-1]], 1)
        return torch.cat(wave, 1), SubframeState(excitation, samples, hidden)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._recurrence = None  # it holds a copy of the former weights
        super()._load_from_state_dict(*args, **kwargs)

    def _run(self, subframes: Subframes, state: FarganState) -> tuple[Tensor, SubframeState]:
        subframe_state = SubframeState(state.excitation, state.samples, state.hidden)
        if subframes.gain.device.type != "cpu":
            return self.run_plain(subframes, subframe_state)
        if self._recurrence is None:
            self._recurrence = Recurrence(self)
        return self._recurrence.run(subframes, subframe_state)

    def _subframes(self, features: Tensor, state: FarganState) -> tuple[Subframes, FarganState]:
        """Inputs of the subframe network, and the state with its frame part updated."""
        frames = torch.cat([state.frames, self._frames(features)], dim=1)
        windows = torch.cat([frames[:, :-2], frames[:, 1:-1], frames[:, 2:]], dim=2)
        x = torch.tanh(self.frame_conv(windows))
        conditions = (
            torch.tanh(self.frame_dense2(x)).unflatten(2, (_SUBFRAMES, _CONDITION)).flatten(1, 2)
        )
        gain = torch.exp(self.gain(conditions)[:, :, 0])
        columns = self.entry.weight.split([_CONDITION, _PULSE + SUBFRAME] * 2, dim=1)
        before = torch.cat([state.condition[:, None], conditions[:, :-1]], dim=1)
        entry = before @ columns[0].T + conditions @ columns[2].T + self.entry.bias
        pitch = torch.cat([state.features[:, None], features[:, :-1]], dim=1)[:, :, _PITCH]
        lags = _lags(_periods(pitch)).repeat_interleave(_SUBFRAMES, dim=1)
        after = replace(
            state,
            features=features[:, -1].clone(),
            frames=frames[:, -2:].clone(),
            condition=conditions[:, -1].clone(),
        )
        return Subframes(entry, gain, 1 / (1e-5 + gain), lags), after

    def _frames(self, features: Tensor) -> Tensor:
        """Output `[B, T, 64]` of the first layer over frames."""
        periods = _periods(features[:, :, _PITCH])
        embedded = self.pitch_embedding((periods - _MIN_PERIOD).clamp(max=223))
        return torch.tanh(self.frame_dense1(torch.cat([features, embedded], dim=2)))

    def _de_emphasis(self, samples: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """`y[n] = x[n] + 0.85 y[n - 1]` for all frames at once, and the last sample.

        The pole decays to 5e-12 over a frame, so that a frame depends only on the one before it.
        """
        frames = samples.view(len(samples), -1, FRAME) @ self._filter.T
        carried = torch.cat([last[:, None], frames[:, :-1, -1]], dim=1)
        frames = frames + carried[:, :, None] * (_DE_EMPHASIS * self._filter[:, 0])
        return frames.flatten(1), frames[:, -1, -1].clone()


def _check(features: Tensor) -> None:
    if features.ndim != 3 or features.shape[2] != N_FEATURES:
        raise ValueError(f"features: expected [B, T, {N_FEATURES}], got {tuple(features.shape)}")


def _gated(x: Tensor, gate: nn.Module) -> Tensor:
    return x * torch.sigmoid(gate(x))


def _periods(pitch: Tensor) -> Tensor:
    """Period in samples (int64) of a pitch feature, clamped to the range of training."""
    periods = torch.floor(0.5 + 256 / 2 ** (pitch + 1.5))
    return periods.clamp(_MIN_PERIOD, _MAX_PERIOD).long()


def _lags(periods: Tensor) -> Tensor:
    """Positions `[B, T, 44]` in the last 256 samples: 40 one period ago, and two on each side. If
    the period is shorter, they wrap around by one more period."""
    within = torch.arange(_PULSE, device=periods.device) - _AROUND
    lags = _MAX_PERIOD - periods[:, :, None] + within
    return torch.where(lags >= _MAX_PERIOD, lags - periods[:, :, None], lags).clamp(min=0)
