"""FARGAN's subframe network in numpy: the same samples as `Fargan.run_plain`, faster.

A second of speech takes 400 steps of about fifty small operations, whose overhead dominates. With
preallocated results numpy's overhead is a third of PyTorch's. Arrays have the layout `[width, B]`:
slices of the width are contiguous, results are written where the next operation reads them, and one
code serves any batch size.

Arrays of gates hold twice the gate (see `gru`); the weights that multiply them are halved.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from valle.model.vocoder.gru import HALF, ONE, Array, Gru
from valle.model.vocoder.one_thread import one_thread

if TYPE_CHECKING:
    from valle.model.vocoder.fargan import Fargan, Subframes, SubframeState

_SUBFRAME = 40
_PULSE = 44
_HISTORY = 256


class _Dense(NamedTuple):
    weight: Array
    """`[out, in]`."""
    bias: Array
    """`[out, 1]`."""

    def __call__(self, x: Array, out: Array) -> None:
        np.matmul(self.weight, x, out=out)
        np.add(out, self.bias, out=out)

    def opening(self, x: Array, out: Array) -> None:
        """Twice the sigmoid of the layer, whose weights are already halved."""
        self(x, out)
        np.tanh(out, out=out)
        np.add(out, ONE, out=out)


class _GruWeights(NamedTuple):
    inputs: Array
    """`[3 N, in]`: reset, update, candidate."""
    recurrent: Array
    """`[3 N, N]`, in the same order."""
    gate: _Dense


class Recurrence:
    """The weights of a `Fargan` in the loop's layout; without state, so that threads share it."""

    def __init__(self, model: "Fargan") -> None:
        entry = _array(model.entry.weight)
        n_condition = entry.shape[1] // 2 - _PULSE - _SUBFRAME
        past, now = np.split(entry, 2, axis=1)
        self._entry = np.hstack([past[:, n_condition:], now[:, n_condition:]])
        self._entry_gate = _dense(model.entry_gate, rows=0.5)
        self._pitch_gates = _dense(model.pitch_gates, rows=0.5, columns=0.5)
        self._grus = [_gru(gru, gate) for gru, gate in zip(model.grus, model.gates, strict=True)]
        self._skip = _dense(model.skip, columns=0.5, last=1.0)
        self._skip_gate = _dense(model.skip_gate, rows=0.5)
        self._exit = _dense(model.exit, columns=0.5)

    def run(self, subframes: "Subframes", state: "SubframeState") -> tuple[Tensor, "SubframeState"]:
        """Samples `[B, S * 40]` before de-emphasis, and the new state."""
        batch, n_steps = subframes.gain.shape
        # inputs as [S, width, B]: the values of a step are contiguous
        entry = _array(subframes.entry.permute(1, 2, 0))
        gain = _array(subframes.gain.T[:, None])
        scale = _array(subframes.scale.T[:, None])
        samples = np.empty((_HISTORY + n_steps * _SUBFRAME, batch), np.float32)
        samples[:_HISTORY] = state.samples.T.numpy()
        # generated samples follow the history in one array, where the pulses are looked up
        positions = _positions(subframes.lags)
        work = _Workspace(self._grus, state, batch)
        with one_thread():
            for step in range(n_steps):
                end = _HISTORY + step * _SUBFRAME
                work.excite(samples, positions[step], end, scale[step])
                self._enter(work, entry[step])
                for index, weights in enumerate(self._grus):
                    work.grus[index].step(weights, work, index)
                self._leave(work, gain[step], out=samples[end : end + _SUBFRAME])
        return _out(samples[_HISTORY:]), state._replace(
            excitation=_out(work.excitation),
            samples=_out(samples[-_HISTORY:]),
            hidden=tuple(_out(gru.hidden) for gru in work.grus),
        )

    def _enter(self, work: "_Workspace", entry: Array) -> None:
        """The first layer, its gate, and the gates of the pulse."""
        x, opened = work.entered, work.entry_gate
        np.matmul(self._entry, work.two, out=x)
        np.add(x, entry, out=x)
        np.tanh(x, out=x)
        self._entry_gate.opening(x, out=opened)
        np.multiply(x, opened, out=x)
        self._pitch_gates.opening(x, out=work.pitch_gates)

    def _leave(self, work: "_Workspace", gain: Array, out: Array) -> None:
        """The last layers: all outputs so far to 40 samples."""
        np.multiply(work.pulse, work.pitch_gates[3:], out=work.skip_pulse)
        work.skip_last[:] = work.last
        x, opened = work.mixed, work.skip_gate
        self._skip(work.skip, out=x)
        np.tanh(x, out=x)
        self._skip_gate.opening(x, out=opened)
        np.multiply(x, opened, out=x)
        self._exit(x, out=out)
        np.tanh(out, out=out)
        np.multiply(out, gain, out=out)


class _Workspace:
    """The preallocated arrays of one run, and views of their parts."""

    def __init__(self, grus: list[_GruWeights], state: "SubframeState", batch: int) -> None:
        def empty(width: int) -> Array:
            return np.empty((width, batch), np.float32)

        self.two = empty(2 * (_PULSE + _SUBFRAME))
        """Inputs of the last and this subframe, each the pulse, then the last samples."""
        self.before, self.excitation = np.split(self.two, 2)
        self.excitation[:] = state.excitation.T.numpy()
        self.wide_pulse = self.excitation[:_PULSE]
        self.pulse = self.wide_pulse[2:-2]
        self.last = self.excitation[_PULSE:]
        widths = [weights.recurrent.shape[1] for weights in grus]
        n_entered = grus[0].inputs.shape[1] - 2 * _SUBFRAME
        self.skip = empty(sum(widths) + n_entered + 2 * _SUBFRAME)
        ends = np.cumsum([*widths, n_entered, _SUBFRAME])
        *outputs, self.entered, self.skip_pulse, self.skip_last = np.split(self.skip, ends)
        self.entry_gate = empty(n_entered)
        self.pitch_gates = empty(4)
        self.mixed, self.skip_gate = empty(128), empty(128)
        sources = [self.entered, *outputs]
        self.grus = [
            _GatedGru(hidden.T.numpy().copy(), source, output)
            for hidden, source, output in zip(state.hidden, sources, outputs, strict=False)
        ]

    def excite(self, samples: Array, positions: Any, end: int, scale: Array) -> None:
        """Reads the pulse and the last samples before `end`, scaled and clamped."""
        self.before[:] = self.excitation
        samples.take(positions, out=self.wide_pulse, mode="clip")
        self.last[:] = samples[end - _SUBFRAME : end]
        x = self.excitation
        np.multiply(x, scale, out=x)
        np.minimum(x, ONE, out=x)
        np.maximum(x, -ONE, out=x)


class _GatedGru(Gru):
    """A GRU with its input arrays and the gate of its output."""

    def __init__(self, hidden: Array, source: Array, output: Array) -> None:
        super().__init__(hidden)
        self.source, self.output = source, output
        self.gru_input = np.empty((len(source) + 2 * _SUBFRAME, hidden.shape[1]), np.float32)
        self.from_source, self.pulse, self.last = np.split(
            self.gru_input, [len(source), len(source) + _SUBFRAME]
        )
        self.gate = np.empty_like(hidden)

    def step(self, weights: _GruWeights, work: _Workspace, index: int) -> None:
        """Updates the hidden state and the gated output."""
        self.from_source[:] = self.source
        np.multiply(work.pulse, work.pitch_gates[index : index + 1], out=self.pulse)
        self.last[:] = work.last
        np.matmul(weights.inputs, self.gru_input, out=self.inputs)
        np.matmul(weights.recurrent, self.hidden, out=self.recurrent)
        self.advance()
        weights.gate.opening(self.hidden, out=self.gate)
        np.multiply(self.hidden, self.gate, out=self.output)


def _gru(cell: nn.Module, gate: nn.Module) -> _GruWeights:
    assert isinstance(cell, nn.GRUCell) and isinstance(gate, nn.Linear)
    inputs, recurrent = _array(cell.weight_ih).copy(), _array(cell.weight_hh).copy()
    inputs[:, :-_SUBFRAME] *= HALF  # source and pulse are doubled by gates
    inputs[: 2 * cell.hidden_size] *= HALF  # sigmoids
    recurrent *= HALF  # sigmoids; the candidate's part is doubled by the reset gate
    return _GruWeights(inputs, recurrent, _dense(gate, rows=0.5))


def _dense(
    layer: nn.Linear, *, rows: float = 1.0, columns: float = 1.0, last: float | None = None
) -> _Dense:
    """The weights of `layer`, scaled by `rows` (for sigmoids: 0.5) and by `columns` (for doubled
    inputs: 0.5), in the columns of the last samples by `last`."""
    weight = _array(layer.weight) * np.float32(rows)
    bias = _array(layer.bias)[:, None] * np.float32(rows)
    factors = np.full(weight.shape[1], columns, np.float32)
    if last is not None:
        factors[-_SUBFRAME:] = last
    return _Dense(np.ascontiguousarray(weight * factors), bias)


def _array(tensor: Tensor) -> Array:
    return np.ascontiguousarray(tensor.detach().numpy(), dtype=np.float32)


def _positions(lags: Tensor) -> NDArray[np.int64]:
    """`[S, 44, B]`: positions of the pulses in flattened samples `[time, B]`."""
    batch, n_steps, _ = lags.shape
    times = lags.permute(1, 2, 0) + _SUBFRAME * torch.arange(n_steps)[:, None, None]
    return np.ascontiguousarray((times * batch + torch.arange(batch)).numpy())


def _out(x: Array) -> Tensor:
    """A copy of `[width, B]` as a tensor `[B, width]`."""
    return torch.from_numpy(x.T.copy(order="C"))
