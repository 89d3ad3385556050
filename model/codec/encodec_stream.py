"""Decoding codes as they come: EnCodec's decoder with its state between calls.

All of it is causal, so what a layer needs of the past is a fixed number of inputs (convolutions)
or its hidden state (LSTM). Chunks decoded in turn are the waveform that `Codec.decode` gives for
the whole. The state travels by value: a chunk may be decoded in another process than the last.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from valle.model.codec.encodec import Codec
from valle.model.codec.interface import Codes, Wave

FIRST = 8
"""Frames of a first chunk, at least: the convolutions mirror the start of what they see."""


@dataclass(frozen=True)
class DecoderState:
    """What the layers keep, in the order in which they are run; tens of kilobytes."""

    kept: tuple[NDArray[np.float32], ...]


@torch.inference_mode()
def decode_next(
    codec: Codec, codes: Codes, state: DecoderState | None
) -> tuple[Wave, DecoderState]:
    """Samples `[T * 320]` of the next codes `[8, T]` of a stream, and the state for those after.

    `state` is None for the first chunk, which needs `FIRST` frames. Raises ValueError for less.
    """
    if state is None and codes.shape[1] < FIRST:
        raise ValueError(f"codes: {codes.shape[1]} frames in a first chunk, at least {FIRST}")
    codec.check(codes)
    device = codec.device
    # the package wants [Q, batch, T]
    indices = torch.from_numpy(codes.astype(np.int64)).to(device)[:, None]
    walk = _Walk(state, device)
    wave = walk(codec.network.decoder.model, codec.network.quantizer.decode(indices))
    kept = tuple(left.cpu().numpy() for left in walk.left)
    return wave[0, 0].cpu().numpy(), DecoderState(kept)


class _Walk:
    """One pass through the layers that reads the old state and collects the new one."""

    def __init__(self, state: DecoderState | None, device: torch.device) -> None:
        self._old = iter(
            [torch.from_numpy(kept).to(device) for kept in state.kept] if state else ()
        )
        self._begins = state is None
        self.left: list[Tensor] = []

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        """`x [1, channels, time]` through a layer, with all that is inside it."""
        from encodec.modules import SLSTM, SConv1d, SConvTranspose1d
        from encodec.modules.seanet import SEANetResnetBlock

        if isinstance(module, nn.Sequential):
            for layer in module:
                x = self(layer, x)
            return x
        if isinstance(module, SEANetResnetBlock):
            return self(module.shortcut, x) + self(module.block, x)
        if isinstance(module, SConv1d):
            return self._convolution(module, x)
        if isinstance(module, SConvTranspose1d):
            return self._transposed(module, x)
        if isinstance(module, SLSTM):
            return self._lstm(module, x)
        return module(x)

    def _convolution(self, module: Any, x: Tensor) -> Tensor:
        from encodec.modules.conv import pad1d

        conv = module.conv.conv
        n_past = (conv.kernel_size[0] - 1) * conv.dilation[0]
        if n_past == 0:
            return module.conv(x)
        if self._begins:
            past = pad1d(x, (n_past, 0), mode=module.pad_mode)[..., :n_past]
        else:
            past = next(self._old)
        x = torch.cat([past, x], dim=-1)
        self.left.append(x[..., -n_past:])
        return module.conv(x)

    def _transposed(self, module: Any, x: Tensor) -> Tensor:
        stride = module.convtr.convtr.stride[0]
        # kernels of two strides: a sample depends on one input and the one before it
        past = torch.zeros_like(x[..., :1]) if self._begins else next(self._old)
        self.left.append(x[..., -1:])
        samples = module.convtr(torch.cat([past, x], dim=-1))
        return samples[..., stride : stride + x.shape[-1] * stride]

    def _lstm(self, module: Any, x: Tensor) -> Tensor:
        steps = x.permute(2, 0, 1)
        past = None if self._begins else (next(self._old), next(self._old))
        answer, hidden = module.lstm(steps, past)
        self.left += hidden
        return (answer + steps if module.skip else answer).permute(1, 2, 0)
