"""Speaker embeddings, speaker identification and equal error rate.

Names of speaker encoders: `resemblyzer` (the default), `wespeaker` (separates speakers better), or
`package.module:Class` for another one, such as a class around WavLM-SV.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from valle.jobs.evaluation.metrics import METRIC_SAMPLE_RATE, load_class
from valle.jobs.evaluation.metrics.wespeaker import WeSpeaker
from valle.model.codec.interface import Wave
from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio

Embedding = NDArray[np.float32]


class SpeakerEncoder(Protocol):
    """A model from a recording to an embedding of its speaker."""

    def embed(self, wave: Wave) -> Embedding | None:
        """Embedding `[D]` of length one of a 24 kHz recording; None where it holds no voice."""


class Resemblyzer:
    """Resemblyzer's GE2E encoder, 256 dimensions.

    The cosine of two recordings is about 0.87 for the same speaker, 0.58 for different ones.
    """

    def __init__(self) -> None:
        try:
            from resemblyzer import VoiceEncoder
        except ImportError as error:
            raise ImportError(
                "speaker_encoder: resemblyzer is not installed (pip install --no-deps resemblyzer; "
                "its own dependency webrtcvad no longer imports, webrtcvad-wheels stands in)"
            ) from error

        self._encoder = VoiceEncoder("cpu", verbose=False)

    def embed(self, wave: Wave) -> Embedding | None:
        from resemblyzer import preprocess_wav  # normalizes the level and cuts out silence

        samples = preprocess_wav(
            audio.resample(wave, SAMPLE_RATE, METRIC_SAMPLE_RATE), source_sr=METRIC_SAMPLE_RATE
        )
        if len(samples) < METRIC_SAMPLE_RATE // 4:
            return None
        return np.asarray(self._encoder.embed_utterance(samples), np.float32)


def load_speaker_encoder(name: str) -> SpeakerEncoder:
    """The encoder of this name (see the module's docstring). Raises ValueError or ImportError."""
    if name == "resemblyzer":
        return Resemblyzer()
    if name == "wespeaker":
        return WeSpeaker()
    encoder: SpeakerEncoder = load_class(name)()
    return encoder


def top1_correct(cosines: NDArray[np.float64], own: NDArray[np.int64]) -> NDArray[np.bool_]:
    """For each output (row of `cosines`): whether the nearest prompt is its own (column `own`)."""
    return cosines.argmax(1) == own


def equal_error_rate(same: NDArray[np.float64], different: NDArray[np.float64]) -> float:
    """The rate at the threshold with equal shares of `same` below and `different` above it.

    `same` and `different` are cosines of pairs of the same speaker and of different speakers.
    """
    thresholds = np.sort(np.concatenate([same, different]))
    rejected = np.searchsorted(np.sort(same), thresholds, side="left") / len(same)
    accepted = 1 - np.searchsorted(np.sort(different), thresholds, side="left") / len(different)
    nearest = int(np.abs(rejected - accepted).argmin())
    return float((rejected[nearest] + accepted[nearest]) / 2)
