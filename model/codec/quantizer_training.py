"""Training nano 2's quantiser: the reconstruction error of vocoder features, and the objective.

Shapes: B batch, S features (100 a second).
"""

from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from valle.model.codec.quantizer import Quantizer

PITCH: Final = 18
"""Index of the pitch (octaves) in a feature vector."""

VOICING: Final = 19
"""Index of the voicing (correlation less 0.5) in a feature vector."""


def error_weights(
    deviation: Float[Tensor, "20 1"], *, pitch: float, voicing: float
) -> Float[Tensor, "20"]:
    """Weight of each normalised feature's squared error: `pitch`, `voicing`, and of a cepstral
    coefficient its deviation, in units of the mean deviation."""
    weights = deviation.flatten() / deviation[:PITCH].mean()
    weights[PITCH], weights[VOICING] = pitch, voicing
    return weights


def reconstruction_error(
    restored: Float[Tensor, "B S 20"],
    features: Float[Tensor, "B S 20"],
    deviation: Float[Tensor, "20 1"],
    weights: Float[Tensor, "20"],
) -> Float[Tensor, ""]:
    """Weighted mean square of the normalised difference.

    The pitch of a frame is weighted by its voicing: in unvoiced frames it is noise, on which the
    codebooks would be spent.
    """
    squared = ((restored - features) / deviation.flatten()).square() * weights
    voiced = 0.1 + 0.9 * torch.sigmoid(15 * features[..., VOICING])
    pitch = squared[..., PITCH] * voiced
    others = squared.sum(-1) - squared[..., PITCH]
    return ((others + pitch) / len(weights)).mean()


@dataclass(frozen=True)
class QuantizerLoss:
    """Loss of a batch."""

    loss: Tensor
    """Reconstruction error plus weighted commitment, a scalar."""

    terms: dict[str, Tensor]
    """`error` and `commitment`, scalars."""


class QuantizerObjective(nn.Module):
    """The quantiser and its loss as one module.

    The weights are those of the commitment loss and of the squared errors of pitch and voicing.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        *,
        commitment_weight: float,
        pitch_weight: float,
        voicing_weight: float,
    ) -> None:
        super().__init__()
        self.quantizer = quantizer
        self._commitment_weight = commitment_weight
        self._pitch_weight, self._voicing_weight = pitch_weight, voicing_weight

    def forward(self, features: Float[Tensor, "B S 20"], n_codebooks: int | None) -> QuantizerLoss:
        """Loss with the first `n_codebooks`; None: without quantisation."""
        restored, commitment = self.quantizer(features, n_codebooks)
        error = self._error(restored, features)
        loss = error + self._commitment_weight * commitment
        terms = {"error": error.detach(), "commitment": commitment.detach()}
        return QuantizerLoss(loss, terms)

    @torch.no_grad()
    def errors_by_codebooks(self, features: Float[Tensor, "B S 20"]) -> dict[int, float]:
        """Reconstruction error by number of codebooks, in evaluation mode."""
        self.quantizer.eval()
        maximum = self.quantizer.config.n_codebooks
        counts = sorted({n for n in (2, 4, 6, maximum) if n <= maximum})
        return {n: self._error(self.quantizer(features, n)[0], features).item() for n in counts}

    def _error(
        self, restored: Float[Tensor, "B S 20"], features: Float[Tensor, "B S 20"]
    ) -> Float[Tensor, ""]:
        deviation = self.quantizer.deviation
        weights = error_weights(deviation, pitch=self._pitch_weight, voicing=self._voicing_weight)
        return reconstruction_error(restored, features, deviation, weights)
