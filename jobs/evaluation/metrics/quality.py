"""Predicted mean opinion scores, without a reference."""

import numpy as np

from valle.jobs.evaluation.metrics import METRIC_SAMPLE_RATE
from valle.model.codec.interface import Wave
from valle.model.codec.torchaudio_stub import ensure_torchaudio
from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio


class DistillMos:
    """DistillMOS: mean opinion score, 1 to 5."""

    def __init__(self) -> None:
        ensure_torchaudio()
        from distillmos import ConvTransformerSQAModel

        self._model = ConvTransformerSQAModel().eval()

    def score(self, wave: Wave) -> float:
        import torch

        with torch.inference_mode():
            samples = torch.from_numpy(audio.resample(wave, SAMPLE_RATE, METRIC_SAMPLE_RATE))
            return float(self._model(samples[None]).item())


class Dnsmos:
    """DNSMOS P.835, overall quality, 1 to 5; trained on the output of noise suppressors."""

    def score(self, wave: Wave) -> float:
        """Score of a 24 kHz recording; short ones are repeated up to nine seconds."""
        from speechmos import dnsmos

        samples = audio.resample(wave, SAMPLE_RATE, METRIC_SAMPLE_RATE)
        return float(dnsmos.run(np.clip(samples, -1, 1), METRIC_SAMPLE_RATE)["ovrl_mos"])
