"""Text and a recording to speech: the slow, obvious reference path.

VALL-E section 4: phonemes of the text, codes of the prompt, AR for the first codebook, NAR for
the other seven, codec decoder. One request at a time, nothing shared between calls.
"""

from dataclasses import dataclass, field

import torch

from valle.model.ar import AR
from valle.model.codec.interface import Codes, SpeechCodec, Wave
from valle.model.nar import NAR
from valle.model.nar_decoding import NARDecoding, NARRequest, nar_decode
from valle.model.sampling import Sampling, validate_seed
from valle.model.text import phoneme_ids

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
    """Same seed, same speech; 0 to 2**63 - 1."""

    def __post_init__(self) -> None:
        validate_seed(self.seed)

    @property
    def nar_decoding(self) -> NARDecoding:
        """The NAR model's part of it."""
        return NARDecoding(sampling=self.nar, guided_levels=self.guided_levels, seed=self.seed)


@dataclass(frozen=True)
class SynthesisResult:
    """What `synthesize` returns."""

    wave: Wave
    """Samples at 24 kHz."""

    codes: Codes
    """`[8, T]`."""

    hit_limit: bool
    """True when the length limit cut it off."""


@dataclass(frozen=True)
class Synthesizer:
    """The three networks of a voice on one device."""

    ar: AR
    nar: NAR
    codec: SpeechCodec

    def synthesize(self, text: str, prompt: Wave, synthesis: Synthesis) -> SynthesisResult:
        """Says `text` in the voice of `prompt` (24 kHz samples, no transcript needed).

        Raises ValueError for a text without a pronounceable symbol or an empty prompt.
        """
        return self.synthesize_phonemes(
            phoneme_ids(text, synthesis.language), self.encode_prompt(prompt, synthesis), synthesis
        )

    def encode_prompt(self, prompt: Wave, synthesis: Synthesis) -> Codes:
        """Codes of the recording's first seconds."""
        if not len(prompt):
            raise ValueError("prompt: the recording is empty")
        identity = self.codec.identity
        start = prompt[: identity.frames(synthesis.prompt_seconds) * identity.hop]
        return self.codec.encode([start])[0]

    def continue_speech(self, text: str, prefix: Wave, synthesis: Synthesis) -> SynthesisResult:
        """VALL-E's continuation: `prefix` (24 kHz samples) says the first words of `text`, the
        answer is the whole sentence, prefix included.

        The prefix is cut to `prompt_seconds`; it serves as prompt as well.
        """
        prompt = self.encode_prompt(prefix, synthesis)
        group_size = self.ar.config.group_size
        prompt = prompt[:, : prompt.shape[1] // group_size * group_size]
        return self.synthesize_phonemes(
            phoneme_ids(text, synthesis.language), prompt, synthesis, prefix=prompt
        )

    def synthesize_phonemes(
        self, ids: list[int], prompt: Codes, synthesis: Synthesis, prefix: Codes | None = None
    ) -> SynthesisResult:
        """The same from phoneme ids and prompt codes `[8, P]`, after the codes of `prefix`."""
        device = self.codec.device
        text = torch.tensor(ids, device=device)
        prompt_codes = torch.from_numpy(prompt).long().to(device)
        prefix_codes = None if prefix is None else torch.from_numpy(prefix).long().to(device)
        ar_output = self.ar.generate(
            text, prompt_codes, sampling=synthesis.ar, seed=synthesis.seed,
            max_frames=self.codec.identity.frames(synthesis.max_seconds),
            prefix=None if prefix_codes is None else prefix_codes[0],
        )  # fmt: skip
        first_codebook = ar_output.codes.to("cpu", torch.int16).numpy()
        nar_request = NARRequest(
            ids, prompt, first_codebook, prefix=prefix, complete=not ar_output.hit_limit
        )
        codes = nar_decode(self.nar, nar_request, synthesis.nar_decoding)
        return SynthesisResult(self.codec.decode([codes])[0], codes, ar_output.hit_limit)
