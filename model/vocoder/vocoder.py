"""The whole vocoder: features at 100 Hz to speech at 24 kHz, at once or as they come.

Of a stream, the first frame makes no sound, and what a frame makes lies a frame and a half plus 22
samples (15.9 ms) before the frame's own time: that is all there is of look-ahead. Chunks joined are
`T * 240` samples in time with the recording, the same as `forward` gives for the whole.

B batch, T frames.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from valle.model.vocoder import bandwidth, fargan
from valle.model.vocoder.bandwidth import BandwidthExtension, BandwidthState
from valle.model.vocoder.fargan import Fargan, FarganState

HOP: Final = fargan.FRAME * 3 // 2
"""Samples of a frame."""

_DELAY: Final = fargan.DELAY * 3 // 2 + bandwidth.DELAY


@dataclass(frozen=True, kw_only=True)
class VocoderState:
    """What a stream keeps between calls of `Vocoder.decode`."""

    fargan: FarganState
    bandwidth: BandwidthState
    samples_to_skip: int
    """Samples to come that lie before the recording's first."""


class Vocoder(nn.Module):
    """FARGAN and its bandwidth extension."""

    def __init__(self) -> None:
        super().__init__()
        self.fargan = Fargan()
        self.bandwidth = BandwidthExtension()

    @classmethod
    def load(cls) -> "Vocoder":
        """With the weights that the repository holds, ready to be run on the CPU."""
        model = cls()
        model.fargan = Fargan.load()
        model.bandwidth = BandwidthExtension.load()
        return model.eval()

    def forward(self, features: Tensor) -> Tensor:
        """Speech `[B, T * 240]` of `features` `[B, T, 20]`, in time with the recording.

        Raises ValueError for another shape, or for no frames.
        """
        wave, _ = self.decode(features, None, last=True)
        return wave

    @torch.inference_mode()
    def decode(
        self, features: Tensor, state: VocoderState | None, *, last: bool = False
    ) -> tuple[Tensor, VocoderState]:
        """The next samples of a stream, given its next `features` `[B, T, 20]`; and the state.

        `state` is None for the first chunk, which needs a frame. `T * 240` samples come of a chunk,
        of the first 382 fewer (none of a single frame); the chunk that is `last` brings the rest.
        Raises ValueError for another shape.
        """
        if state is None:
            if features.ndim != 3 or features.shape[1] == 0:
                shape = tuple(features.shape)
                raise ValueError(f"features: expected [B, T, 20] of a frame or more, got {shape}")
            state = self._start(features[:, 0])
            features = features[:, 1:]
        narrow, fargan_state = self.fargan.decode(features, state.fargan)
        if last:
            tail, fargan_state = self.fargan.decode(
                fargan_state.features[:, None].expand(-1, 2, -1), fargan_state
            )
            narrow = torch.cat([narrow, tail], dim=1)
        wave, bandwidth_state = self.bandwidth.decode(narrow, state.bandwidth)
        end = wave.shape[1] - (HOP - _DELAY if last else 0)
        after = VocoderState(
            fargan=fargan_state,
            bandwidth=bandwidth_state,
            samples_to_skip=max(0, state.samples_to_skip - wave.shape[1]),
        )
        return wave[:, state.samples_to_skip : end], after

    def _start(self, first: Tensor) -> VocoderState:
        return VocoderState(
            fargan=self.fargan.start(first),
            bandwidth=self.bandwidth.start(len(first)),
            samples_to_skip=_DELAY,
        )
