"""Continuous batching: streams join and leave at every step of the AR model.

Five nouns: a `Request`, the `Scheduler` that says who runs, the cache's `Slots`, the `Reader` that
takes texts in, and the `Runner` that computes. A step reads at most a piece of one new text (so
that those who speak already are never held up by more than that), draws the next frames of all
streams, and ends those that have finished.
Whatever runs beside it, a stream says what `model.ar.AR.generate` would have said alone.
"""

from collections.abc import Sequence

from valle.model.tokens import EOS
from valle.serve.engine.request import Event, Finish, Request, Stream
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
    def running(self) -> int:
        """Streams that are being spoken."""
        return len(self._scheduler.slots.owners)

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError for one that can never run."""
        self._runner.check(request)
        self._scheduler.add(request)

    def abort(self, name: str) -> None:
        """Ends a stream at once, wherever it is; of one already ended it takes no notice."""
        if self._scheduler.knows(name):
            self._remove(name)

    def step(self) -> list[Event]:
        """One tick; returns what it brought each running stream."""
        self._read()
        streams = self._scheduler.running()
        if not streams:
            return []
        drawn = self._runner.sample().tolist()
        events = [_take(stream, group) for stream, group in zip(streams, drawn, strict=True)]
        for event in events:
            if event.finish is not None:
                self._remove(event.id)
        if self.running:
            self._runner.advance()
        return events

    def _read(self) -> None:
        """A piece of the text that is next, which has a slot when it is read."""
        if (new := self._scheduler.admit()) is not None:
            self._runner.reader.begin(new.request)
        if self._scheduler.reading is None:
            return
        if (hidden := self._runner.reader.go_on()) is not None:
            stream = self._scheduler.seat()
            assert stream.slot is not None, "seat() gives one"
            self._runner.seat(stream.request, stream.slot, hidden)

    def _remove(self, name: str) -> None:
        slot = self._scheduler.slot(name)
        move = self._scheduler.remove(name)
        if slot is not None:
            self._runner.release(slot, move)

    def check_integrity(self) -> None:
        """Raises AssertionError when the books do not agree."""
        self._scheduler.check_integrity()
        assert self._runner.streams == self.running, "runner and scheduler count differently"


def _take(stream: Stream, group: Sequence[int]) -> Event:
    """Appends a group to its stream, up to EOS or the length limit."""
    new: list[int] = []
    finish = None
    for code in group:
        if code == EOS:
            finish = Finish.STOP
            break
        new.append(code)
        if len(stream.codes) + len(new) == stream.request.max_frames:
            finish = Finish.LENGTH
            break
    stream.codes += new
    return Event(stream.request.id, new, finish)
