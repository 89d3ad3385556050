"""Streaming EnCodec decoder: chunks of codes to samples, with explicit state between calls.

The decoder is causal: a layer's state is a fixed number of past inputs (convolutions) or a hidden
state (LSTM). Chunks decoded in turn give the waveform that `Encodec.decode` gives for the whole.
The state is a value, so that each chunk may be decoded in a different process.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from valle.model.codec.encodec import Encodec
from valle.model.codec.interface import Codes, Wave

MIN_FIRST_CHUNK = 8
"""Least frames of a first chunk: the convolutions mirror the start of their input."""


@dataclass(frozen=True)
class EncodecState:
    """The layers' states in execution order; tens of kilobytes."""

    tensors: tuple[NDArray[np.float32], ...]


@torch.inference_mode()
def decode_next(
    codec: Encodec, codes: Codes, state: EncodecState | None
) -> tuple[Wave, EncodecState]:
    """Samples `[T * 320]` of a stream's next codes `[Q, T]`, and the state after them.

    `state` is None for the first chunk, which needs `MIN_FIRST_CHUNK` frames. Raises ValueError for
    a shorter one, and as `Encodec.check` does.
    """
    if state is None and codes.shape[1] < MIN_FIRST_CHUNK:
        raise ValueError(
            f"codes: a first chunk of {codes.shape[1]} frames; it needs {MIN_FIRST_CHUNK}"
        )
    codec.check(codes)
    device = codec.device
    # the package's layout is [Q, batch, T]
    indices = torch.from_numpy(codes.astype(np.int64)).to(device)[:, None]
    decoder_pass = _DecoderPass(state, device)
    wave = decoder_pass(codec.network.decoder.model, codec.network.quantizer.decode(indices))
    new_state = EncodecState(tuple(x.cpu().numpy() for x in decoder_pass.new_state))
    return wave[0, 0].cpu().numpy(), new_state


class _DecoderPass:
    """One pass through the decoder that consumes the old state and collects the new one."""

    def __init__(self, state: EncodecState | None, device: torch.device) -> None:
        self._old_state = iter(
            [torch.from_numpy(x).to(device) for x in state.tensors] if state else ()
        )
        self._is_first = state is None
        self.new_state: list[Tensor] = []

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        """Output of a layer, nested layers included, for `x [1, channels, time]`."""
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
        if self._is_first:
            past = pad1d(x, (n_past, 0), mode=module.pad_mode)[..., :n_past]
        else:
            past = next(self._old_state)
        x = torch.cat([past, x], dim=-1)
        self.new_state.append(x[..., -n_past:])
        return module.conv(x)

    def _transposed(self, module: Any, x: Tensor) -> Tensor:
        stride = module.convtr.convtr.stride[0]
        # a kernel is two strides long: a sample depends on one input and the one before it
        past = torch.zeros_like(x[..., :1]) if self._is_first else next(self._old_state)
        self.new_state.append(x[..., -1:])
        samples = module.convtr(torch.cat([past, x], dim=-1))
        return samples[..., stride : stride + x.shape[-1] * stride]

    def _lstm(self, module: Any, x: Tensor) -> Tensor:
        steps = x.permute(2, 0, 1)
        past = None if self._is_first else (next(self._old_state), next(self._old_state))
        output, hidden = module.lstm(steps, past)
        self.new_state += hidden
        return (output + steps if module.skip else output).permute(1, 2, 0)
