"""The complete vocoder: features at 100 Hz to speech at 24 kHz, at once or streaming.

In a stream, the first frame yields no samples, and the samples of a frame lie a frame and a half
plus 22 samples (15.9 ms) before the frame: that is the whole look-ahead. Joined chunks are
`T * 240` samples, aligned with the recording and equal to the output of `forward`.

Legend: B batch, T frames.
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
    """State of a stream between calls of `Vocoder.decode`."""

    fargan: FarganState
    bandwidth: BandwidthState
    samples_to_skip: int
    """Next samples that precede the recording's first."""


class Vocoder(nn.Module):
    """FARGAN and its bandwidth extension."""

    def __init__(self) -> None:
        super().__init__()
        self.fargan = Fargan()
        self.bandwidth = BandwidthExtension()

    @classmethod
    def load(cls) -> "Vocoder":
        """The vocoder with the repository's weights, on the CPU, in evaluation mode."""
        model = cls()
        model.fargan = Fargan.load()
        model.bandwidth = BandwidthExtension.load()
        return model.eval()

    def forward(self, features: Tensor) -> Tensor:
        """Speech `[B, T * 240]` of `features` `[B, T, 20]`, aligned with the recording.

        Raises ValueError for another shape, or for no frames.
        """
        wave, _ = self.decode(features, None, last=True)
        return wave

    @torch.inference_mode()
    def decode(
        self, features: Tensor, state: VocoderState | None, *, last: bool = False
    ) -> tuple[Tensor, VocoderState]:
        """The next samples of a stream, given its next `features` `[B, T, 20]`, and the new state.

        `state` is None for the first chunk, which needs at least one frame. A chunk yields
        `T * 240` samples; the first yields 382 fewer (none for a single frame), and the `last` one
        yields the rest. Raises ValueError for another shape.
        """
        # the first frame only initialises the state
        if state is None:
            if features.ndim != 3 or features.shape[1] == 0:
                shape = tuple(features.shape)
                raise ValueError(f"features: expected [B, T, 20] of a frame or more, got {shape}")
            state = self._start(features[:, 0])
            features = features[:, 1:]
        narrow, fargan_state = self.fargan.decode(features, state.fargan)
        # the last frame, repeated twice, brings out the samples still due
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
