"""A GRU in numpy, for loops of many small steps, in which PyTorch's overhead dominates.

A sigmoid is `(1 + tanh(x / 2)) / 2`. The factors 1/2 are multiplied into the weights (exactly,
since they are powers of two), so that the arrays of gates here hold twice the gate. Arrays have the
layout `[width, B]`, in which slices of the width are contiguous.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from valle.model.vocoder.one_thread import one_thread

Array = NDArray[np.float32]

ONE = np.float32(1)
HALF = np.float32(0.5)


class Gru:
    """The hidden state `[N, B]` of a GRU, and the preallocated arrays of its step."""

    def __init__(self, hidden: Array) -> None:
        width, batch = hidden.shape
        self.hidden = hidden
        self.inputs = np.empty((3 * width, batch), np.float32)
        """Contribution of the inputs to reset, update and candidate, in torch's order."""
        self.recurrent = np.empty((3 * width, batch), np.float32)
        """Contribution of the hidden state to them."""
        self._gates, self._recurrent_gates = self.inputs[: 2 * width], self.recurrent[: 2 * width]
        self._reset, self._update, self._candidate = np.split(self.inputs, 3)
        self._recurrent_candidate = self.recurrent[2 * width :]

    def advance(self) -> None:
        """Updates the hidden state from `inputs` and `recurrent`, computed by halved weights."""
        np.add(self._gates, self._recurrent_gates, out=self._gates)
        np.tanh(self._gates, out=self._gates)
        np.add(self._gates, ONE, out=self._gates)
        candidate = self._recurrent_candidate
        np.multiply(candidate, self._reset, out=candidate)
        np.add(candidate, self._candidate, out=candidate)
        np.tanh(candidate, out=candidate)
        # candidate + update * (hidden - candidate)
        np.subtract(self.hidden, candidate, out=self.hidden)
        np.multiply(self.hidden, self._update, out=self.hidden)
        np.multiply(self.hidden, HALF, out=self.hidden)
        np.add(self.hidden, candidate, out=self.hidden)


def run_gru(module: nn.GRU, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """`module(x, hidden)` of a one-layer GRU, batch first, on the CPU: the same values, faster.

    `x` is `[B, S, in]`, `hidden` `[1, B, N]`. Returns all states `[B, S, N]` and the last
    `[1, B, N]`.
    """
    # inputs of all steps by one product, with the halves of the gates' sigmoids
    width = module.hidden_size
    halves = torch.ones(3 * width)
    halves[: 2 * width] = 0.5
    weights: dict[str, Tensor] = dict(module.named_parameters())
    inputs = (x @ weights["weight_ih_l0"].T + weights["bias_ih_l0"]) * halves
    values_per_step = np.ascontiguousarray(inputs.permute(1, 2, 0).numpy())
    weight, bias = ((0.5 * weights[name]).numpy() for name in ("weight_hh_l0", "bias_hh_l0"))
    # the recurrent part step by step
    gru = Gru(np.ascontiguousarray(hidden[0].T.numpy()).copy())
    outputs = np.empty((x.shape[1], width, len(x)), np.float32)
    with one_thread():
        for step, values in enumerate(values_per_step):
            gru.inputs[:] = values
            np.matmul(weight, gru.hidden, out=gru.recurrent)
            np.add(gru.recurrent, bias[:, None], out=gru.recurrent)
            gru.advance()
            outputs[step] = gru.hidden
    result = torch.from_numpy(outputs).permute(2, 0, 1).contiguous()
    return result, result[None, :, -1].clone()
