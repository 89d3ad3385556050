"""Text and a prompt recording to speech: the slow reference path.

VALL-E (Wang et al. 2023) section 4: phonemes of the text, codes of the prompt, the AR model for the
first codebook, the NAR model for the others, the codec's decoder. One request at a time; calls
share no state.

Legend: Q codebooks, T frames, P prompt frames.
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
"""Default scale of both models."""

GUIDED_LEVELS = 2
"""Default number of codebooks decoded with guidance, from the second on."""


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """Settings of one synthesis."""

    ar: Sampling = field(
        default_factory=lambda: Sampling(
            top_p=0.9, repetition_threshold=0.1, guidance_scale=GUIDANCE_SCALE
        )
    )
    """Sampling of the first codebook; repetition-aware by default (VALL-E 2)."""

    nar: Sampling = field(
        default_factory=lambda: Sampling(temperature=0.0, guidance_scale=GUIDANCE_SCALE)
    )
    """Sampling of the other codebooks; a temperature of 0 is greedy, as in the paper."""

    guided_levels: int = GUIDED_LEVELS
    """Number of codebooks decoded with guidance, from the second on: low ones carry the words."""

    max_seconds: float = 20.0
    """Length limit of the generated speech."""

    prompt_seconds: float = 3.0
    """Length of the prompt, taken from the start of the recording."""

    language: str = "en-us"
    """Language of the text: a BCP 47 tag, or an espeak voice."""

    seed: int = 0
    """Same seed, same speech; 0 to 2**63 - 1."""

    def __post_init__(self) -> None:
        validate_seed(self.seed)

    @property
    def nar_decoding(self) -> NARDecoding:
        """The settings that concern the NAR model."""
        return NARDecoding(sampling=self.nar, guided_levels=self.guided_levels, seed=self.seed)


@dataclass(frozen=True)
class SynthesisResult:
    """Speech and how it ended."""

    wave: Wave
    """Samples at 24 kHz."""

    codes: Codes
    """`[Q, T]`."""

    hit_limit: bool
    """True if the length limit cut the speech off."""


@dataclass(frozen=True)
class Synthesizer:
    """The three networks that synthesis needs, on one device."""

    ar: AR
    nar: NAR
    codec: SpeechCodec

    def synthesize(self, text: str, prompt: Wave, synthesis: Synthesis) -> SynthesisResult:
        """Synthesizes `text` in the voice of `prompt` (24 kHz samples, no transcript needed).

        Raises ValueError for a text without a pronounceable symbol or an empty prompt.
        """
        return self.synthesize_phonemes(
            phoneme_ids(text, synthesis.language), self.encode_prompt(prompt, synthesis), synthesis
        )

    def encode_prompt(self, prompt: Wave, synthesis: Synthesis) -> Codes:
        """Codes `[Q, P]` of the recording's first `prompt_seconds`. Raises ValueError if it is
        empty."""
        if not len(prompt):
            raise ValueError("prompt: the recording is empty")
        identity = self.codec.identity
        start = prompt[: identity.frames(synthesis.prompt_seconds) * identity.hop]
        return self.codec.encode([start])[0]

    def continue_speech(self, text: str, prefix: Wave, synthesis: Synthesis) -> SynthesisResult:
        """VALL-E's continuation: `prefix` (24 kHz samples) is speech of the first words of `text`.

        The result is the whole sentence, prefix included. The prefix is cut to `prompt_seconds`, in
        whole groups of the AR model, and is the prompt as well.
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
        """`synthesize` from phoneme ids and prompt codes `[Q, P]`; the result begins with the codes
        of `prefix`."""
        device = self.codec.device
        text = torch.tensor(ids, device=device)
        prompt_codes = torch.from_numpy(prompt).long().to(device)
        prefix_codes = None if prefix is None else torch.from_numpy(prefix).long().to(device)
        ar_output = self.ar.generate(
            text,
            prompt_codes,
            sampling=synthesis.ar,
            seed=synthesis.seed,
            max_frames=self.codec.identity.frames(synthesis.max_seconds),
            prefix=None if prefix_codes is None else prefix_codes[0],
        )
        first_codebook = ar_output.codes.to("cpu", torch.int16).numpy()
        nar_request = NARRequest(
            ids, prompt, first_codebook, prefix=prefix, complete=not ar_output.hit_limit
        )
        codes = nar_decode(self.nar, nar_request, synthesis.nar_decoding)
        return SynthesisResult(self.codec.decode([codes])[0], codes, ar_output.hit_limit)
