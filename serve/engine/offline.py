"""The engine without Serve: many sentences in one process, for throughput."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from valle.model.batches import batch_by_length
from valle.model.codec.interface import Codes
from valle.model.nar_decoding import NARDecoder, NARRequest
from valle.model.tokens import FRAME_RATE
from valle.model.valle import Synthesis, SynthesisResult, Synthesizer
from valle.serve.engine.engine import Engine
from valle.serve.engine.request import FinishReason, Request
from valle.serve.engine.runner import Runner
from valle.serve.engine.scheduler import Scheduler


class OfflineSynthesizer:
    """AR engine, NAR decoder and codec of one model, without Serve."""

    def __init__(
        self,
        synthesizer: Synthesizer,
        synthesis: Synthesis,
        *,
        slots: int,
        max_phonemes: int,
        batch_seconds: float = 40.0,
    ) -> None:
        """`max_phonemes` and `synthesis.max_seconds` bound a sentence, `batch_seconds` the padded
        speech in a NAR batch."""
        self.synthesizer = synthesizer
        self.max_frames = int(synthesis.max_seconds * FRAME_RATE)
        self._nar_decoder, self._nar_decoding = NARDecoder(synthesizer.nar), synthesis.nar_decoding
        self._batch_frames = int(batch_seconds * FRAME_RATE)
        max_positions = synthesizer.ar.capacity(
            max_phonemes, int(synthesis.prompt_seconds * FRAME_RATE), self.max_frames
        )
        guided = synthesis.ar.guided
        self._runner = Runner(
            synthesizer.ar, slots=slots, max_positions=max_positions, guided=guided
        )
        self._engine = Engine(self._runner, Scheduler(slots))
        self._limited: set[str] = set()
        """Ids of the last call that ended at their length limit."""

    def synthesize(self, requests: Sequence[Request]) -> list[SynthesisResult | ValueError]:
        """The speech of each request, or the error of one that cannot run, in their order."""
        errors: dict[str, ValueError] = {}
        valid = []
        for request in requests:
            try:
                self._runner.validate(request)
                valid.append(request)
            except ValueError as error:
                errors[request.id] = error
        first_codebooks = self.first_codebooks(valid)
        codes = self._nar_decode(
            [
                NARRequest(
                    request.phonemes,
                    request.prompt,
                    first_codebooks[request.id],
                    complete=request.id not in self._limited,
                )
                for request in valid
            ]
        )
        waves = self.synthesizer.codec.decode(codes)
        results = {
            request.id: SynthesisResult(wave, code, request.id in self._limited)
            for request, wave, code in zip(valid, waves, codes, strict=True)
        }
        return [errors.get(request.id) or results[request.id] for request in requests]

    def first_codebooks(self, requests: Sequence[Request]) -> dict[str, NDArray[np.int16]]:
        """First codebook `[T]` of each request by its id, from the engine alone."""
        codes: dict[str, list[int]] = {}
        self._limited = set()
        for request in requests:
            self._engine.add(request)
            codes[request.id] = []
        while not self._engine.idle:
            for output in self._engine.step():
                codes[output.request_id] += output.codes
                if output.finish_reason is FinishReason.LENGTH:
                    self._limited.add(output.request_id)
        return {request_id: np.array(frames, np.int16) for request_id, frames in codes.items()}

    def _nar_decode(self, items: Sequence[NARRequest]) -> list[Codes]:
        decoded: dict[int, Codes] = {}
        for indices in batch_by_length([item.n_positions for item in items], self._batch_frames):
            batch = self._nar_decoder.decode([items[i] for i in indices], self._nar_decoding)
            decoded |= dict(zip(indices, batch, strict=True))
        return [decoded[i] for i in range(len(items))]
