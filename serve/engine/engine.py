"""Continuous batching: requests join and leave the batch at every step of the AR model.

A step prefills at most one chunk of one new request, so that running requests never wait longer
than that; samples the next frames of all running requests; ends those that are finished; and feeds
the sampled frames to the model. `Scheduler` decides which requests run, `Slots` where in the
key-value cache, `ChunkedPrefill` and `Runner` compute.

The codes of a request do not depend on the batch: they are those of `model.ar.AR.generate`.
"""

from collections.abc import Sequence

from valle.model.tokens import EOS
from valle.serve.engine.request import FinishReason, Request, RequestState, StepOutput
from valle.serve.engine.runner import Runner
from valle.serve.engine.scheduler import Scheduler


class Engine:
    """One AR model and its requests. Not thread-safe: one thread owns it."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._to_erase: set[str] = set()
        """Requests whose slots are erased when they end."""

    @property
    def idle(self) -> bool:
        """No request waits, is in prefill or runs."""
        return self._scheduler.idle

    @property
    def n_running(self) -> int:
        """Requests with a slot."""
        return len(self._scheduler.slots.request_ids)

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError for one that cannot run."""
        self._runner.validate(request)
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """Removes a request in any state; an id that has ended is ignored."""
        if self._scheduler.has_request(request_id):
            self._remove(request_id)

    def forget_prompts(self) -> None:
        """Overwrites the cached keys and values of ended requests at once, and those of the present
        requests when they end. Called when a voice has been deleted."""
        self._to_erase = self._scheduler.request_ids()
        self._runner.erase_free(prefill=self._scheduler.prefilling is None)

    def step(self) -> list[StepOutput]:
        """Runs one step; returns the new frames of each running request."""
        self._prefill()
        states = self._scheduler.running()  # a request whose prefill is now complete included
        if not states:
            return []
        groups = self._runner.sample().tolist()
        outputs = [_append_group(state, group) for state, group in zip(states, groups, strict=True)]
        for output in outputs:
            if output.finish_reason is not None:
                self._remove(output.request_id)
        # the hidden states that the next step samples from
        if self.n_running:
            self._runner.decode_step()
        return outputs

    def _prefill(self) -> None:
        """Prefills a chunk of the next request, which gets a slot when all of it is prefilled."""
        if (new := self._scheduler.admit()) is not None:
            self._runner.prefill.start(new.request)
        if self._scheduler.prefilling is None:
            return
        if (hidden := self._runner.prefill.step()) is not None:
            state = self._scheduler.activate()
            assert state.slot is not None, "activate() sets the slot"
            self._runner.insert(state.request, state.slot, hidden)
            if self._to_erase:
                self._runner.prefill.erase()

    def _remove(self, request_id: str) -> None:
        slot = self._scheduler.slot(request_id)
        move = self._scheduler.remove(request_id)
        if slot is not None:
            self._runner.release(slot, move)
        if request_id in self._to_erase:
            self._to_erase.remove(request_id)
            self._runner.erase_free(prefill=self._scheduler.prefilling is None)

    def check_integrity(self) -> None:
        """Raises AssertionError when scheduler and runner disagree."""
        self._scheduler.check_integrity()
        assert self._runner.batch_size == self.n_running, "runner and scheduler disagree"


def _append_group(state: RequestState, group: Sequence[int]) -> StepOutput:
    """Appends a group of codes to its request, up to EOS or the length limit."""
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
