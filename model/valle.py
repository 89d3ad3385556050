"""Text and a recording to speech: the slow, obvious reference path.

VALL-E section 4: phonemes of the text, codes of the prompt, AR for the first codebook, NAR for
the other seven, codec decoder. One request at a time, nothing shared between calls.
"""

from dataclasses import dataclass, field

import torch

from valle.model import text as phonemes
from valle.model.ar import AR
from valle.model.codec.interface import Codes, SpeechCodec, Wave
from valle.model.nar import NAR
from valle.model.nar_decoding import Filling, Unfilled, fill_in
from valle.model.sampling import Sampling
from valle.model.sentences import split

GUIDANCE_SCALE = 1.5
"""Of both models, unless told otherwise."""

GUIDED_LEVELS = 2
"""Codebooks from the second on that are filled in with guidance, unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """How a sentence is spoken."""

    ar: Sampling = field(
        default_factory=lambda: Sampling(
            top_p=0.9, repetition_threshold=0.1, guidance_scale=GUIDANCE_SCALE
        )
    )
    """Sampling of the first codebook (VALL-E 2's repetition-aware sampling)."""

    nar: Sampling = field(
        default_factory=lambda: Sampling(temperature=0.0, guidance_scale=GUIDANCE_SCALE)
    )
    """Sampling of the other codebooks; a temperature of 0 is the paper's greedy choice."""

    guided_levels: int = GUIDED_LEVELS
    """Codebooks from the second on that are filled in with guidance: low ones carry the words."""

    max_seconds: float = 20.0
    """Length limit of the answer."""

    prompt_seconds: float = 3.0
    """How much of the recording serves as prompt, from its start."""

    language: str = "en-us"
    """espeak voice name of the text."""

    seed: int = 0
    """Same seed, same speech."""

    @property
    def filling(self) -> Filling:
        """The NAR model's part of it."""
        return Filling(sampling=self.nar, guided_levels=self.guided_levels, seed=self.seed)


@dataclass(frozen=True)
class Spoken:
    """What `speak` returns."""

    wave: Wave
    """Samples at 24 kHz."""

    codes: Codes
    """`[8, T]`."""

    hit_limit: bool
    """True when the length limit cut it off."""


@dataclass(frozen=True)
class Voice:
    """The three networks of a voice on one device."""

    ar: AR
    nar: NAR
    codec: SpeechCodec

    def speak(self, text: str, prompt: Wave, how: Synthesis) -> Spoken:
        """Says `text` in the voice of `prompt` (24 kHz samples, no transcript needed).

        Raises ValueError for a text without a pronounceable symbol or an empty prompt.
        """
        return self.speak_codes(text_ids(text, how.language), self.encode_prompt(prompt, how), how)

    def encode_prompt(self, prompt: Wave, how: Synthesis) -> Codes:
        """Codes of the recording's first seconds."""
        if not len(prompt):
            raise ValueError("prompt: the recording is empty")
        identity = self.codec.identity
        start = prompt[: identity.frames(how.prompt_seconds) * identity.hop]
        return self.codec.encode([start])[0]

    def go_on(self, text: str, beginning: Wave, how: Synthesis) -> Spoken:
        """VALL-E's continuation: `beginning` (24 kHz samples) says the first words of `text`, the
        answer is the whole sentence, beginning included.

        The beginning is cut to `prompt_seconds`; it serves as prompt as well.
        """
        prompt = self.encode_prompt(beginning, how)
        group = self.ar.config.group
        prompt = prompt[:, : prompt.shape[1] // group * group]
        return self.speak_codes(text_ids(text, how.language), prompt, how, prefix=prompt)

    def speak_codes(
        self, ids: list[int], prompt: Codes, how: Synthesis, prefix: Codes | None = None
    ) -> Spoken:
        """The same from phoneme ids and prompt codes `[8, P]`, after the codes of `prefix`."""
        device = self.codec.device
        generator = torch.Generator(device).manual_seed(how.seed)
        text = torch.tensor(ids, device=device)
        prompt_codes = torch.from_numpy(prompt).long().to(device)
        said = None if prefix is None else torch.from_numpy(prefix).long().to(device)
        first = self.ar.generate(
            text, prompt_codes, sampling=how.ar, generator=generator,
            max_frames=self.codec.identity.frames(how.max_seconds),
            prefix=None if said is None else said[0],
        )  # fmt: skip
        codes = first.codes.to("cpu", torch.int16).numpy()
        unfilled = Unfilled(ids, prompt, codes, spoken=prefix, ended=not first.hit_limit)
        stored = fill_in(self.nar, unfilled, how.filling)
        return Spoken(self.codec.decode([stored])[0], stored, first.hit_limit)


def text_ids(text: str, language: str) -> list[int]:
    """Phoneme ids of a text. Raises ValueError when nothing in it can be spoken."""
    spoken = phonemes.phonemize([text], language)[0]
    if not any(symbol.isalpha() for symbol in spoken):
        raise ValueError("text: nothing to say in it")
    return phonemes.encode(spoken)


def sentence_ids(text: str, language: str) -> list[list[int]]:
    """Phoneme ids of each sentence of a long text that has something to say. Raises ValueError when
    none has."""
    found, silent = [], None
    for sentence in split(text, language):
        try:
            found.append(text_ids(sentence, language))
        except ValueError as error:
            silent = error
    if not found:
        raise silent or ValueError("text: nothing to say in it")
    return found
