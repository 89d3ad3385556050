"""Whose voice it is: speaker embeddings, identification, equal error rate.

An encoder is named by `resemblyzer` (the default), `wespeaker` (the better judge of the two) or
`package.module:Class` for one's own, for instance one around WavLM-SV.
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
    """Something that tells voices apart."""

    def embed(self, wave: Wave) -> Embedding | None:
        """A vector of length one for a 24 kHz recording; None when it holds no voice."""


class Resemblyzer:
    """Resemblyzer's GE2E encoder (256 numbers; same voice about 0.87, another about 0.58)."""

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
        """The voice of a 24 kHz recording, silence cut out."""
        from resemblyzer import preprocess_wav

        samples = preprocess_wav(
            audio.resample(wave, SAMPLE_RATE, METRIC_SAMPLE_RATE), source_sr=METRIC_SAMPLE_RATE
        )
        if len(samples) < METRIC_SAMPLE_RATE // 4:
            return None
        return np.asarray(self._encoder.embed_utterance(samples), np.float32)


def load_speaker_encoder(name: str) -> SpeakerEncoder:
    """The encoder that `name` stands for."""
    if name == "resemblyzer":
        return Resemblyzer()
    if name == "wespeaker":
        return WeSpeaker()
    encoder: SpeakerEncoder = load_class(name)()
    return encoder


def top1_correct(cosines: NDArray[np.float64], own: NDArray[np.int64]) -> NDArray[np.bool_]:
    """For each output (row), whether its own prompt (column `own`) is the nearest of all."""
    return cosines.argmax(1) == own


def equal_error_rate(same: NDArray[np.float64], different: NDArray[np.float64]) -> float:
    """Where as many of `same` fall below a threshold as of `different` reach it."""
    thresholds = np.sort(np.concatenate([same, different]))
    missed = np.searchsorted(np.sort(same), thresholds, side="left") / len(same)
    accepted = 1 - np.searchsorted(np.sort(different), thresholds, side="left") / len(different)
    nearest = int(np.abs(missed - accepted).argmin())
    return float((missed[nearest] + accepted[nearest]) / 2)
