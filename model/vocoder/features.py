"""Features of speech for FARGAN, libopus' vocoder: 20 values every 10 ms.

A frame has 18 cepstra of the power in Bark-like bands up to 8 kHz, pitch and voicing, computed as
in libopus 1.6.1, here for batches of whole recordings.

Time. Frame t, counted from 0, describes samples 160 t - 80 to 160 t + 80 of the recording at
16 kHz. Pitch and voicing compare them with up to 256 samples before; the window of the spectrum is
160 t - 160 to 160 t + 160, with the same center. A frame thus needs 80 samples (5 ms) after those
that it describes, and nothing later. Silence precedes the recording. The last frame is the last
whose window ends within the recording.

Given frames one by one, FARGAN outputs for frame t the samples that frame t - 1 describes:
160 t - 240 to 160 t - 80. libopus' demo drops the first 80 samples, which precede the recording,
and repeats the last frame; its output is aligned with the recording and T * 160 samples long. The
delay of a live stream is 15 to 25 ms.

Legend: B batch, N samples, T = N // 160 frames, F features, K bands, D width of the pitch network.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from valle.model import batches
from valle.model.codec.interface import Wave
from valle.model.vocoder import lpc, pitch
from valle.model.vocoder.lpc import HOP, ORDER
from valle.model.vocoder.pitch import PitchNet

Features = NDArray[np.float32]
"""Shape [T, 20]."""

ANALYSIS_RATE = 16_000
N_BANDS = 18
PITCH, VOICING = 18, 19
"""Indices of pitch and voicing, after the cepstra."""
N_FEATURES = 20
PRE_EMPHASIS = 0.85
WEIGHTS = "pitch.safetensors"
"""File of the pitch network in a vocoder's folder."""

_WINDOW = 2 * HOP
_EDGES = (0, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 136, 160)
"""Centers of the bands, in steps of 50 Hz."""
_FULL_SCALE = 32_768  # libopus computes on samples of 16 bits
_BLOCK_FRAMES = 2_000  # frames of all recordings per block of the analysis
_CONTEXT = 10  # frames before a block that it depends on: eight, and two to spare
_LEAST_BLOCK = 5 * _CONTEXT  # every block computes its context again
_BATCH_SAMPLES = 16 * 10 * ANALYSIS_RATE


class FeatureExtractor(nn.Module):
    """Computes vocoder features `[B, T, 20]` of waves `[B, N]` at 16 kHz in [-1, 1]."""

    window: Tensor
    bands: Tensor
    cosines: Tensor
    autocorrelation: Tensor

    def __init__(self, pitch_net: PitchNet) -> None:
        super().__init__()
        self.pitch_net = pitch_net
        for name, array in _constants().items():
            self.register_buffer(name, torch.from_numpy(array).float(), persistent=False)

    @classmethod
    def load(cls, folder: Path) -> "FeatureExtractor":
        """The extractor with the pitch network of a vocoder's folder."""
        return cls(PitchNet.load(folder / WEIGHTS))

    def extract(self, waves: Sequence[Wave], sample_rate: int) -> list[Features]:
        """Features `[T, 20]` of each recording, T = ceil(seconds * 100).

        Recordings are resampled to 16 kHz, padded with silence to whole frames and analysed in
        batches of similar length. Raises ValueError for an empty recording.
        """
        resampled = [_at_16_khz(wave, sample_rate) for wave in waves]
        sizes = [len(wave) for wave in resampled]
        if 0 in sizes:
            raise ValueError(f"waves[{sizes.index(0)}]: no samples at {ANALYSIS_RATE} Hz")
        result: list[Features] = [np.zeros((0, N_FEATURES), np.float32)] * len(waves)
        for indices in batches.batch_by_length(sizes, _BATCH_SAMPLES):
            frames = [-(-sizes[index] // HOP) for index in indices]
            batch = np.zeros((len(indices), max(frames) * HOP), np.float32)
            for row, index in enumerate(indices):
                batch[row, : sizes[index]] = resampled[index]
            features = self(torch.from_numpy(batch).to(self.window.device)).cpu().numpy()
            for row, index in enumerate(indices):
                result[index] = features[row, : frames[row]].copy()
        return result

    @torch.no_grad()
    def forward(
        self, wave: Float[Tensor, "B N"], block_frames: int | None = None
    ) -> Float[Tensor, "B T F"]:
        """Features of every whole frame of 160 samples.

        Recordings of unequal length may be padded at their ends with anything: later samples do not
        affect a recording's first N // 160 frames. `block_frames`, the frames of each recording per
        block (default: 2,000 / B, at least 50), bounds memory and changes no value. Raises
        ValueError for less than a frame of samples, and for samples that are not finite.
        """
        rows, n_samples = wave.shape
        n_frames = n_samples // HOP
        if not rows or not n_frames:
            raise ValueError(f"wave: {rows} recordings of {n_samples} samples, need at least {HOP}")
        if not torch.isfinite(wave).all():
            raise ValueError("wave: samples that are NaN or infinite")
        wave = wave[:, : n_frames * HOP].float() * _FULL_SCALE
        emphasized = wave - PRE_EMPHASIS * F.pad(wave, (1, 0))[:, :-1]
        emphasized = F.pad(emphasized, (HOP, 0))  # silence in the first window

        # block by block; only the pitch network's state is recurrent, all else needs a context
        state = emphasized.new_zeros(rows, self.pitch_net.width)
        blocks = []
        step = block_frames or max(_LEAST_BLOCK, _BLOCK_FRAMES // rows)
        for begin in range(0, n_frames, step):
            first = max(0, begin - _CONTEXT)
            end = min(begin + step, n_frames)
            block, state = self._block(
                emphasized[:, first * HOP : (end + 1) * HOP], begin - first, state
            )
            blocks.append(block)
        return torch.cat(blocks, dim=1)

    def _block(
        self, samples: Float[Tensor, "B N"], context: int, state: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "B T F"], Float[Tensor, "B D"]]:
        """Features of the frames after the first `context` ones, and the pitch network's state.

        `samples` begin one frame before the first frame.
        """
        windows = samples.unfold(-1, _WINDOW, HOP) * self.window
        spectrum = torch.fft.rfft(windows)[..., :HOP] / _WINDOW
        levels = self._levels(spectrum)
        cepstra = levels @ self.cosines
        cepstra[..., 0] -= 4

        # the residual is that of the middle of the window, half a frame before its end
        power = 10**levels
        weights = lpc.lpc_coefficients(power @ self.autocorrelation)
        aligned = samples[:, HOP // 2 - ORDER :].unfold(-1, ORDER + HOP, HOP)
        residual = lpc.residual(aligned, weights)
        excitation = lpc.with_past(lpc.excitation(residual))
        low = lpc.with_past(lpc.low_pass(residual))[:, context:]

        encoded = self.pitch_net.encode(pitch.phases(spectrum), pitch.correlations(excitation))
        tone, state = self.pitch_net.predict(encoded[:, context:], state)
        tail = torch.stack([tone, pitch.voicing(low, tone)], dim=-1)
        return torch.cat([cepstra[:, context:], tail], dim=-1), state

    def _levels(self, spectrum: Tensor) -> Float[Tensor, "B T K"]:
        """Logarithms (base 10) of the bands' power, limited from below.

        A band is at most 8 below the loudest band of lower frequency, and at most 2.5 below the
        band before it.
        """
        power = (spectrum.real.square() + spectrum.imag.square()) @ self.bands
        levels = torch.log10(1e-2 + power)
        loudest = follow = torch.full_like(levels[..., 0], -2)
        for band in range(N_BANDS):
            falling = follow - 2.5
            level = torch.maximum(torch.maximum(levels[..., band], falling), loudest - 8)
            loudest, follow = torch.maximum(loudest, level), torch.maximum(falling, level)
            levels[..., band] = level
        return levels


def _at_16_khz(wave: Wave, sample_rate: int) -> Wave:
    """`wave` resampled to the vocoder's rate by soxr (20 bits, without delay)."""
    if sample_rate == ANALYSIS_RATE:
        return wave
    return soxr.resample(wave, sample_rate, ANALYSIS_RATE).astype(np.float32)


@functools.cache
def _constants() -> dict[str, NDArray[np.float64]]:
    """Window and matrices of the analysis."""
    quarter = np.sin(0.5 * np.pi * (np.arange(HOP) + 0.5) / HOP)
    half = np.sin(0.5 * np.pi * quarter**2)  # Vorbis' window
    triangles = lpc.interpolation(_EDGES, HOP)
    bands = triangles.T.copy()
    bands[:, [0, -1]] *= 2  # the outer bands are half triangles
    index = np.arange(N_BANDS)
    cosines = np.cos(np.pi * np.outer(index + 0.5, index) / N_BANDS) * np.sqrt(2 / N_BANDS)
    cosines[:, 0] *= np.sqrt(0.5)
    # from the power of a band to its mean; 1.25 and 5.75 are libopus' constants
    steps = np.diff(_EDGES) / 4
    widths = np.array([1.25, *((steps[1:] + steps[:-1]) / 2), 5.75])
    return {
        "window": np.concatenate([half, half[::-1]]),
        "bands": bands,
        "cosines": cosines,
        "autocorrelation": lpc.autocorrelation_of_bands(_EDGES, HOP) / widths[:, None],
    }
