"""nano 2: a codec that quantises the features of a vocoder.

Encoding computes the vocoder features of a recording (`model/vocoder/features.py`) and quantises
them (`quantizer.py`). Decoding restores features from codes and synthesizes speech from them with
libopus' FARGAN (`model/vocoder/vocoder.py`). The codes carry spectrum, pitch and voicing; the
natural sound comes from the vocoder.

Decoding looks ahead by the quantiser's `lookahead` frames and by 16 ms for the vocoder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import valle
from valle.model.batches import batch_by_length
from valle.model.codec.interface import CodecIdentity, Codes, Wave
from valle.model.codec.quantizer import FEATURE_RATE, N_FEATURES, Quantizer
from valle.model.codec.weights import inference_weights, load_quantizer, weights_hash
from valle.model.tokens import SAMPLE_RATE
from valle.model.vocoder.features import FeatureExtractor
from valle.model.vocoder.vocoder import HOP as FEATURE_HOP
from valle.model.vocoder.vocoder import Vocoder
from valle.model.vocoder.weights import WEIGHTS_FILE as VOCODER_WEIGHTS

NANO2_CODEC_FOLDER: Final = (
    Path(valle.__file__).resolve().parent.parent / "release" / "nano2" / "codec"
)


class Nano2Codec:
    """A `SpeechCodec`: quantiser, feature extractor and vocoder on a device."""

    def __init__(self, quantizer: Quantizer, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.quantizer = quantizer.eval().to(self.device)
        self.extractor = FeatureExtractor.load(VOCODER_WEIGHTS.parent).eval().to(self.device)
        self.vocoder = Vocoder.load().to(self.device)
        config = quantizer.config
        self.identity = CodecIdentity(
            name="nano2",
            sha256=weights_hash(inference_weights(quantizer)),
            n_codebooks=config.n_codebooks,
            frame_rate=config.frame_rate,
            sample_rate=SAMPLE_RATE,
        )

    @classmethod
    def load(cls, folder: Path = NANO2_CODEC_FOLDER, device: str = "cpu") -> "Nano2Codec":
        """The codec with the quantiser in `folder`. Raises FileNotFoundError or ValueError."""
        return cls(load_quantizer(folder), device)

    @torch.inference_mode()
    def encode(self, waves: Sequence[Wave], batch_seconds: float = 160.0) -> list[Codes]:
        """Codes `[Q, ceil(samples / hop)]` of 24 kHz waveforms `[samples]`, in input order.

        A batch of the quantiser holds at most `batch_seconds` of padded audio.
        """
        features = self.extractor.extract(waves, SAMPLE_RATE)
        lengths = [len(item) for item in features]
        block = self.quantizer.config.features_per_block
        result: list[Codes] = [np.empty((0, 0), np.int16)] * len(waves)
        for indices in batch_by_length(lengths, int(batch_seconds * FEATURE_RATE)):
            longest = -(-max(lengths[index] for index in indices) // block) * block
            batch = torch.zeros(len(indices), longest, N_FEATURES)
            for row, index in enumerate(indices):
                batch[row, : lengths[index]] = torch.from_numpy(features[index])
            n_features = torch.tensor([lengths[index] for index in indices], device=self.device)
            codes = self.quantizer.encode(batch.to(self.device), n_features).to("cpu", torch.int16)
            for row, index in enumerate(indices):
                n_frames = -(-len(waves[index]) // self.identity.hop)
                result[index] = codes[row, :, :n_frames].numpy().copy()
        return result

    @torch.inference_mode()
    def decode(self, codes: Sequence[Codes], batch_seconds: float = 160.0) -> list[Wave]:
        """24 kHz waveforms `[T * hop]` of each `[Q, T]`, in input order.

        Q may be less than the codec's codebooks: the first ones are used. Raises ValueError as
        `check` does.
        """
        for number, item in enumerate(codes):
            self.check(item, f"codes[{number}]")
        frames = [item.shape[1] for item in codes]
        result: list[Wave] = [np.empty(0, np.float32)] * len(codes)
        budget = int(batch_seconds * self.quantizer.config.frame_rate)
        for indices in batch_by_length(frames, budget):
            features = self.features([codes[index] for index in indices])
            waves = self.vocoder(features).cpu().numpy()
            for row, index in enumerate(indices):
                result[index] = waves[row, : frames[index] * self.identity.hop].copy()
        return result

    def features(self, codes: Sequence[Codes]) -> Tensor:
        """Vocoder features `[B, S, 20]` of codes `[Q, T]`, padded with each row's last feature.

        The vocoder reads two frames beyond the one it synthesizes. After a row's end it reads the
        same padding as for the row alone, so that neighbours do not change the result.
        """
        lengths = torch.tensor([item.shape[1] for item in codes])
        batch = torch.zeros(len(codes), codes[0].shape[0], int(lengths.max()), dtype=torch.long)
        for row, item in enumerate(codes):
            batch[row, :, : item.shape[1]] = torch.from_numpy(item.astype(np.int64))
        restored = self.quantizer.decode(batch.to(self.device), lengths.to(self.device))
        for row, length in enumerate(lengths.tolist()):
            n_features = -(-length * self.identity.hop // FEATURE_HOP)
            restored[row, n_features:] = restored[row, n_features - 1].clone()
        return restored

    def check(self, codes: Codes, name: str = "codes") -> None:
        """Raises ValueError for codes of a wrong shape, without frames, or out of range."""
        n_codebooks, entries = self.identity.n_codebooks, self.quantizer.config.codebook_size
        if codes.ndim != 2 or not 1 <= codes.shape[0] <= n_codebooks or codes.shape[1] == 0:
            raise ValueError(f"{name}: expected [1..{n_codebooks}, T], got {codes.shape}")
        if not (codes.min() >= 0 and codes.max() < entries):
            raise ValueError(f"{name}: values must lie in 0 .. {entries - 1}")

    def resynthesize(self, wave: NDArray[np.float32]) -> Wave:
        """The vocoder's version of a recording, without quantisation: the codec's upper bound."""
        features = torch.from_numpy(self.extractor.extract([wave], SAMPLE_RATE)[0])
        resynthesis: Tensor = self.vocoder(features[None].to(self.device))
        return resynthesis[0, : len(wave)].cpu().numpy()
