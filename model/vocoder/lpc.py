"""What of speech its envelope does not explain: the residual of a linear prediction.

The vocoder's pitch is looked for in this residual. Each frame of 10 ms has its own predictor of
order 16, computed from the frame's smoothed spectrum and not from the samples.

Legend: B batch, T frames, everything at 16 kHz.
"""

import functools

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

ORDER = 16
"""Past samples that a predictor weighs."""
HOP = 160
"""Samples of a frame, and from one frame to the next."""
MAX_PERIOD = 256
"""Samples of the longest pitch period."""

_NOISE_FLOOR = 1e-4  # of the energy, 40 dB below it
_LEAST_FLOOR = 26 / 38  # samples at the scale of 16 bits
_ENOUGH = 1e-3  # share of the energy that is left when a predictor stops to grow, 30 dB
_LOW_PASS = ((1.0, -0.84946, 1.0), (1.0, -1.54220, 0.70781))
"""Numerator and denominator of an elliptic low-pass: order 2, 1,200 Hz, 20 dB down."""


@functools.cache
def autocorrelation_of_bands(edges: tuple[int, ...], n_bins: int) -> Float[np.ndarray, "K L"]:
    """Matrix from the power of K bands to their spectrum's autocorrelation at lags 0 to `ORDER`.

    Between two `edges`, bins of a spectrum of `2 * n_bins` points, the power is interpolated.
    """
    shape = interpolation(edges, n_bins)
    lags, bins = np.arange(ORDER + 1), np.arange(n_bins)
    cosines = 2 * np.cos(np.pi * np.outer(bins, lags) / n_bins)
    cosines[0] /= 2  # all bins but the first stand for two of the whole spectrum
    matrix = shape @ cosines * (1 - 6e-5 * lags.astype(np.float64) ** 2)
    matrix[:, 0] *= 1 + _NOISE_FLOOR
    return matrix


@functools.cache
def interpolation(edges: tuple[int, ...], n_bins: int) -> Float[np.ndarray, "K F"]:
    """Triangles that overlap by half: weight of each of K bands in each of `n_bins` bins."""
    bins = np.arange(n_bins)
    return np.stack([np.interp(bins, edges, row) for row in np.eye(len(edges))])


def lpc_coefficients(correlation: Float[Tensor, "B T L"]) -> Float[Tensor, "B T K"]:
    """Weights `[B, T, 16]` of the 16 last samples, latest first, by Levinson and Durbin.

    They are signed so that sample + weights * past is the residual. A predictor that leaves less
    than 30 dB keeps the order that it has reached; the weights after it are zero.
    """
    lags = correlation.movedim(-1, 0).clone()  # recursion by lag: each lag contiguous
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
    """What `weights` do not predict of frames that begin with the 16 samples before them.

    `samples [B, T, 176]` gives `[B, T * 160]`.
    """
    answer = samples[..., ORDER:].clone()
    for past in range(ORDER):
        before = ORDER - 1 - past
        answer.addcmul_(samples[..., before : before + HOP], weights[..., past, None])
    return answer.flatten(1)


def excitation(residual: Float[Tensor, "B M"]) -> Float[Tensor, "B M"]:
    """The residual with its high frequencies lowered, in which periods are compared."""
    answer = residual.clone()
    answer[:, 1:] += 0.7 * residual[:, :-1]
    return answer


def low_pass(residual: Float[Tensor, "B M"]) -> Float[Tensor, "B M"]:
    """The residual below 1,200 Hz, in which voicing is measured; whole frames of samples."""
    filter_ = torch.from_numpy(_low_pass_of_a_frame()).to(residual)
    frames = torch.nn.functional.pad(residual, (HOP, 0)).unfold(-1, 2 * HOP, HOP)
    return (frames @ filter_).flatten(1)


@functools.cache
def _low_pass_of_a_frame() -> Float[np.ndarray, "N M"]:
    """The recursive filter as a matrix: a frame and the one before it `[320]` to a frame `[160]`.

    Of what came more than 160 samples before, 0.84 ** 160 is left: less than float32 resolves.
    """
    (_, b1, b2), (_, a1, a2) = _LOW_PASS
    response = np.zeros(HOP + 1)
    for n in range(HOP + 1):
        impulse = 1.0 if n == 0 else b1 if n == 1 else b2 if n == 2 else 0.0
        response[n] = impulse - a1 * response[n - 1] * (n > 0) - a2 * response[n - 2] * (n > 1)
    lag = HOP + np.arange(HOP)[None] - np.arange(2 * HOP)[:, None]
    return np.where((lag >= 0) & (lag <= HOP), response[lag.clip(0, HOP)], 0)


def with_past(signal: Float[Tensor, "B M"]) -> Float[Tensor, "B T N"]:
    """Each frame of `signal` behind the longest period before it: `[B, T, 256 + 160]`."""
    return torch.nn.functional.pad(signal, (MAX_PERIOD, 0)).unfold(-1, MAX_PERIOD + HOP, HOP)
