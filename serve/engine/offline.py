"""The engine without Serve: many sentences in one process, as fast as they go together."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from valle.model.batches import by_length
from valle.model.codec.interface import Codes
from valle.model.nar_decoding import Filler, Unfilled
from valle.model.tokens import FRAME_RATE
from valle.model.valle import Spoken, Synthesis, Voice
from valle.serve.engine.engine import Engine
from valle.serve.engine.request import Finish, Request
from valle.serve.engine.runner import Runner
from valle.serve.engine.scheduler import Scheduler


class Offline:
    """A voice model with an engine of its own."""

    def __init__(
        self, voice: Voice, how: Synthesis, *, slots: int, max_phonemes: int,
        batch_seconds: float = 40.0,
    ) -> None:  # fmt: skip
        """`max_phonemes` and the length limit of `how` bound a sentence; `batch_seconds` the padded
        speech that the NAR model fills in at a time."""
        self.voice = voice
        self.max_frames = int(how.max_seconds * FRAME_RATE)
        self._filler, self._filling = Filler(voice.nar), how.filling
        self._batch_frames = int(batch_seconds * FRAME_RATE)
        positions = voice.ar.capacity(
            max_phonemes, int(how.prompt_seconds * FRAME_RATE), self.max_frames
        )
        guided = how.ar.guided
        self._runner = Runner(voice.ar, slots=slots, positions=positions, guided=guided)
        self._engine = Engine(self._runner, Scheduler(slots))
        self._limited: set[str] = set()  # ids that ended at their length limit, the last time

    def speak(self, requests: Sequence[Request]) -> list[Spoken | ValueError]:
        """Each request said, or what is wrong with it, in the order given."""
        wrong: dict[str, ValueError] = {}
        possible = []
        for request in requests:
            try:
                self._runner.check(request)
                possible.append(request)
            except ValueError as error:
                wrong[request.id] = error
        first = self.first_codebooks(possible)
        codes = self._fill_in(
            [
                Unfilled(r.phonemes, r.prompt, first[r.id], ended=r.id not in self._limited)
                for r in possible
            ]
        )
        waves = self.voice.codec.decode(codes)
        said = {
            request.id: Spoken(wave, code, request.id in self._limited)
            for request, wave, code in zip(possible, waves, codes, strict=True)
        }
        return [wrong.get(request.id) or said[request.id] for request in requests]

    def first_codebooks(self, requests: Sequence[Request]) -> dict[str, NDArray[np.int16]]:
        """The engine's part of it: frames of the first codebook of each."""
        codes: dict[str, list[int]] = {}
        self._limited = set()
        for request in requests:
            self._engine.add(request)
            codes[request.id] = []
        while not self._engine.idle:
            for event in self._engine.step():
                codes[event.id] += event.codes
                if event.finish is Finish.LENGTH:
                    self._limited.add(event.id)
        return {name: np.array(found, np.int16) for name, found in codes.items()}

    def _fill_in(self, items: Sequence[Unfilled]) -> list[Codes]:
        filled: dict[int, Codes] = {}
        for group in by_length([item.positions for item in items], self._batch_frames):
            batch = self._filler.fill_in([items[i] for i in group], self._filling)
            filled |= dict(zip(group, batch, strict=True))
        return [filled[i] for i in range(len(items))]
