"""Continuous batching: streams join and leave at every step of the AR model.

Five nouns: a `Request`, the `Scheduler` that says who runs, the cache's `Slots`, the
`ChunkedPrefill` that takes texts in, and the `Runner` that computes. A step reads at most a chunk
of one new text (so that those who speak already are never held up by more than that), draws the
next frames of all streams, and ends those that have finished.
Whatever runs beside it, a stream says what `model.ar.AR.generate` would have said alone.
"""

from collections.abc import Sequence

from valle.model.tokens import EOS
from valle.serve.engine.request import FinishReason, Request, RequestState, StepOutput
from valle.serve.engine.runner import Runner
from valle.serve.engine.scheduler import Scheduler


class Engine:
    """One AR model and the streams it speaks. Not thread-safe: one thread owns it."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self._runner = runner
        self._scheduler = scheduler

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self._scheduler.idle

    @property
    def n_running(self) -> int:
        """Streams that are being spoken."""
        return len(self._scheduler.slots.request_ids)

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError for one that can never run."""
        self._runner.validate(request)
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """Ends a stream at once, wherever it is; of one already ended it takes no notice."""
        if self._scheduler.has_request(request_id):
            self._remove(request_id)

    def step(self) -> list[StepOutput]:
        """One tick; returns what it brought each running stream."""
        self._prefill()
        states = self._scheduler.running()
        if not states:
            return []
        groups = self._runner.sample().tolist()
        outputs = [_append_group(state, group) for state, group in zip(states, groups, strict=True)]
        for output in outputs:
            if output.finish_reason is not None:
                self._remove(output.request_id)
        if self.n_running:
            self._runner.decode_step()
        return outputs

    def _prefill(self) -> None:
        """A chunk of the text that is next, which has a slot when it is read."""
        if (new := self._scheduler.admit()) is not None:
            self._runner.prefill.start(new.request)
        if self._scheduler.prefilling is None:
            return
        if (hidden := self._runner.prefill.step()) is not None:
            state = self._scheduler.activate()
            assert state.slot is not None, "activate() gives one"
            self._runner.insert(state.request, state.slot, hidden)

    def _remove(self, request_id: str) -> None:
        slot = self._scheduler.slot(request_id)
        move = self._scheduler.remove(request_id)
        if slot is not None:
            self._runner.release(slot, move)

    def check_integrity(self) -> None:
        """Raises AssertionError when the books do not agree."""
        self._scheduler.check_integrity()
        assert self._runner.batch_size == self.n_running, "runner and scheduler count differently"


def _append_group(state: RequestState, group: Sequence[int]) -> StepOutput:
    """Appends a group to its stream, up to EOS or the length limit."""
    new: list[int] = []
    finish_reason = None
    for code in group:
        if code == EOS:
            finish_reason = FinishReason.STOP
            break
        new.append(code)
        if len(state.codes) + len(new) == state.request.max_frames:
            finish_reason = FinishReason.LENGTH
            break
    state.codes += new
    return StepOutput(state.request.id, new, finish_reason)
