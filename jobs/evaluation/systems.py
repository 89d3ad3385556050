"""The systems of an evaluation: ways to produce the audio of an item.

`cross` and `chunked` are the whole model; the others show which part of the chain loses what.
"""

from dataclasses import replace

from valle.jobs.evaluation.items import EvaluationItem, item_seed
from valle.model.chunks import Chunking, nar_decode_chunks
from valle.model.codec.interface import Codes, Wave
from valle.model.nar_decoding import NARDecoder, NARRequest, nar_decode
from valle.model.text import phoneme_ids
from valle.model.tokens import SAMPLE_RATE
from valle.model.valle import Synthesis, SynthesisResult, Synthesizer

SYSTEMS = ("recording", "codec", "nar", "cross", "continuation")
"""recording: the reference recording. codec: the reference, encoded and decoded. nar: the NAR model
on the reference's first codebook. cross: AR and NAR, prompted with another recording of the
speaker. continuation: AR and NAR, prompted with the first seconds of the reference. All but `cross`
need a reference."""

CHUNKED = "chunked"
"""As `cross`, but the NAR model decodes chunk by chunk, as the endpoint does when it streams within
a sentence. Evaluated on request only."""

WITHOUT_REFERENCE = ("cross", CHUNKED)


class Systems:
    """All systems over one synthesizer, with the same sampling."""

    def __init__(self, synthesizer: Synthesizer, synthesis: Synthesis) -> None:
        self._synthesizer, self._synthesis = synthesizer, synthesis
        self._nar_decoder = NARDecoder(synthesizer.nar)

    def synthesize(
        self, system: str, item: EvaluationItem, prompt: Wave, reference: Wave | None
    ) -> SynthesisResult:
        """What `system` makes of an item, with the item's own seed and language."""
        synthesis = replace(
            self._synthesis,
            language=item.language,
            seed=item_seed(item.id, self._synthesis.seed),
        )
        if system == "cross":
            return self._synthesizer.synthesize(item.text, prompt, synthesis)
        if system == CHUNKED:
            return self._chunked(item, prompt, synthesis)

        assert reference is not None, f"system {system} needs a reference"
        if system == "continuation":
            # at most half of a short sentence, so that some text is left to synthesize
            prefix_seconds = min(synthesis.prompt_seconds, len(reference) / SAMPLE_RATE / 2)
            return self._synthesizer.continue_speech(
                item.text, reference, replace(synthesis, prompt_seconds=prefix_seconds)
            )
        codes = self._synthesizer.codec.encode([reference])[0]
        if system == "recording":
            return SynthesisResult(reference, codes, hit_limit=False)
        if system == "nar":
            request = self._nar_request(item, prompt, synthesis, codes)
            codes = nar_decode(self._synthesizer.nar, request, synthesis.nar_decoding)
        return SynthesisResult(self._decode(codes), codes, hit_limit=False)

    def _chunked(self, item: EvaluationItem, prompt: Wave, synthesis: Synthesis) -> SynthesisResult:
        """`cross` with the NAR model's codes as they are when each chunk is due."""
        result = self._synthesizer.synthesize(item.text, prompt, synthesis)
        if not result.codes.size:
            return result
        request = self._nar_request(item, prompt, synthesis, result.codes)
        codes = nar_decode_chunks(
            lambda chunk: self._nar_decoder.decode([chunk], synthesis.nar_decoding)[0],
            replace(request, complete=not result.hit_limit),
            Chunking(),
            self._synthesizer.ar.config.group_size,
        )
        return replace(result, wave=self._decode(codes), codes=codes)

    def _nar_request(
        self, item: EvaluationItem, prompt: Wave, synthesis: Synthesis, codes: Codes
    ) -> NARRequest:
        """The NAR model's input: the item's phonemes, the prompt, the first codebook of `codes`."""
        phonemes = phoneme_ids(item.text, synthesis.language)
        return NARRequest(phonemes, self._synthesizer.encode_prompt(prompt, synthesis), codes[0])

    def _decode(self, codes: Codes) -> Wave:
        return self._synthesizer.codec.decode([codes])[0]
