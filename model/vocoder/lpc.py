"""Linear prediction of speech at 16 kHz: coefficients, and the residual.

The pitch analysis works on the residual, from which the spectral envelope is removed. Each frame of
10 ms has its own predictor of order 16, computed from the frame's smoothed spectrum instead of its
samples.

Legend: B batch, T frames, M samples of all frames, N samples of a frame with its past, K bands or
coefficients, L lags.
"""

import functools

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

ORDER = 16
"""Coefficients of a predictor."""
HOP = 160
"""Samples of a frame, and between frames."""
MAX_PERIOD = 256
"""Samples of the longest pitch period."""

_NOISE_FLOOR = 1e-4  # of the energy, 40 dB below it
_LEAST_FLOOR = 26 / 38  # samples at the scale of 16 bits
_ENOUGH = 1e-3  # residual share of the energy at which the order stops growing, -30 dB
_LOW_PASS = ((1.0, -0.84946, 1.0), (1.0, -1.54220, 0.70781))
"""Numerator and denominator of an elliptic low-pass: order 2, 1,200 Hz, 20 dB attenuation."""


@functools.cache
def autocorrelation_of_bands(edges: tuple[int, ...], n_bins: int) -> Float[np.ndarray, "K L"]:
    """Matrix from the power of K bands to the autocorrelation at lags 0 to `ORDER`.

    `edges` are the bands' bins in a spectrum of `2 * n_bins` points; between them the power is
    interpolated.
    """
    shape = interpolation(edges, n_bins)
    lags, bins = np.arange(ORDER + 1), np.arange(n_bins)
    cosines = 2 * np.cos(np.pi * np.outer(bins, lags) / n_bins)
    cosines[0] /= 2  # every other bin stands for two of the full spectrum
    matrix = shape @ cosines * (1 - 6e-5 * lags.astype(np.float64) ** 2)
    matrix[:, 0] *= 1 + _NOISE_FLOOR
    return matrix


@functools.cache
def interpolation(edges: tuple[int, ...], n_bins: int) -> Float[np.ndarray, "K F"]:
    """Triangles that overlap by half: weights of the K bands in each of `n_bins` bins."""
    bins = np.arange(n_bins)
    return np.stack([np.interp(bins, edges, row) for row in np.eye(len(edges))])


def lpc_coefficients(correlation: Float[Tensor, "B T L"]) -> Float[Tensor, "B T K"]:
    """Predictor weights `[B, T, 16]` of the last 16 samples, the newest first (Levinson-Durbin).

    The sign is such that sample + weights * past is the residual. Once the residual is below -30 dB
    the order stops growing, and the remaining weights are zero.
    """
    lags = correlation.movedim(-1, 0).clone()  # the recursion is over lags: make each contiguous
    lags[0] += _LEAST_FLOOR
    weights: list[Tensor] = []
    error = lags[0]
    grows = torch.ones_like(error, dtype=torch.bool)
    for order in range(ORDER):
        explained = lags[order + 1].clone()
        for past, weight in enumerate(weights):
            explained += weight * lags[order - past]
        reflection = torch.where(grows, -explained / error, 0)
        weights = [
            weight + reflection * mirrored
            for weight, mirrored in zip(weights, weights[::-1], strict=True)
        ]
        weights.append(reflection)
        error = error * (1 - reflection * reflection)
        grows = grows & (error >= _ENOUGH * lags[0])
    return torch.stack(weights, dim=-1)


def residual(
    samples: Float[Tensor, "B T N"], weights: Float[Tensor, "B T K"]
) -> Float[Tensor, "B M"]:
    """Prediction residual `[B, T * 160]` of frames.

    `samples [B, T, 176]` are the frames, each with the 16 samples before it.
    """
    result = samples[..., ORDER:].clone()
    for past in range(ORDER):
        before = ORDER - 1 - past
        result.addcmul_(samples[..., before : before + HOP], weights[..., past, None])
    return result.flatten(1)


def excitation(residual: Float[Tensor, "B M"]) -> Float[Tensor, "B M"]:
    """The residual with high frequencies attenuated, for the search of periods."""
    result = residual.clone()
    result[:, 1:] += 0.7 * residual[:, :-1]
    return result


def low_pass(residual: Float[Tensor, "B M"]) -> Float[Tensor, "B M"]:
    """The residual below 1,200 Hz, for voicing; M is whole frames."""
    filter_ = torch.from_numpy(_low_pass_of_a_frame()).to(residual)
    frames = torch.nn.functional.pad(residual, (HOP, 0)).unfold(-1, 2 * HOP, HOP)
    return (frames @ filter_).flatten(1)


@functools.cache
def _low_pass_of_a_frame() -> Float[np.ndarray, "N M"]:
    """The recursive filter as a matrix from a frame and the one before it `[320]` to the frame
    `[160]`.

    The response decays to 0.84 ** 160 after 160 samples, below the resolution of float32.
    """
    (_, b1, b2), (_, a1, a2) = _LOW_PASS
    response = np.zeros(HOP + 1)
    for n in range(HOP + 1):
        impulse = 1.0 if n == 0 else b1 if n == 1 else b2 if n == 2 else 0.0
        response[n] = impulse - a1 * response[n - 1] * (n > 0) - a2 * response[n - 2] * (n > 1)
    lag = HOP + np.arange(HOP)[None] - np.arange(2 * HOP)[:, None]
    return np.where((lag >= 0) & (lag <= HOP), response[lag.clip(0, HOP)], 0)


def with_past(signal: Float[Tensor, "B M"]) -> Float[Tensor, "B T N"]:
    """Each frame of `signal` with the longest period before it: `[B, T, 256 + 160]`."""
    return torch.nn.functional.pad(signal, (MAX_PERIOD, 0)).unfold(-1, MAX_PERIOD + HOP, HOP)
