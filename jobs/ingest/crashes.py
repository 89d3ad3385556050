"""Rows that end the process of a worker, by a crash of native code or for lack of memory.

Ray then starts the work on the shard again. From the second attempt on, each row is noted before it
is processed. The third attempt therefore knows the row during which the second one ended, and
leaves it out. So every attempt gets further, and the number of attempts is bounded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from valle.platform import storage
from valle.platform.retries import Retrier

NOTES = "in-flight"
"""Folder of the notes, below the output."""

MAX_ATTEMPTS = 16
"""Attempts on one stage of one shard."""


class RowFaultError(ValueError):
    """A fault of one row, which becomes a reject; the message is its reason."""


@dataclass
class Attempt:
    """One attempt of a worker on a shard."""

    uri: str
    run: str
    retrier: Retrier
    number: int = 1
    crashed: list[str] = field(default_factory=list)
    """Rows that were in flight when attempts ended."""

    @property
    def is_careful(self) -> bool:
        """True after a crash: rows are noted, and processed one by one."""
        return self.number > 1

    def enter(self, row: str) -> None:
        """Notes that a row is being processed. Raises RowFaultError for a row that has ended
        workers."""
        if row in self.crashed:
            raise RowFaultError("ends the worker: its process ended twice while at this input")
        if self.is_careful:
            self.save(row)

    def save(self, row: str | None) -> None:
        """Writes the state that the next attempt reads if this one crashes."""
        state = {"run": self.run, "number": self.number, "crashed": self.crashed, "row": row}
        self.retrier.call(storage.write_json, self.uri, state)


@contextmanager
def attempt(out: str, stage: str, shard: str, run: str, retrier: Retrier) -> Iterator[Attempt]:
    """An attempt of a stage on a shard, during the block. `run` identifies the present run.

    Raises RuntimeError after `MAX_ATTEMPTS` crashes.
    """
    uri = storage.join(out, NOTES, f"{shard}-{stage}.json")
    present = Attempt(uri, run, retrier)
    try:
        former = retrier.call(storage.read_json, uri)
    except (FileNotFoundError, ValueError):  # none, or cut off by the crash
        former = {}
    if former.get("run") == run:
        present.number = former["number"] + 1
        present.crashed = former["crashed"] + ([former["row"]] if former["row"] else [])
    if present.number > MAX_ATTEMPTS:
        raise RuntimeError(
            f"{stage} of shard {shard} ended its worker {MAX_ATTEMPTS} times; give workers more "
            "memory, or lower seconds_per_shard and batch_seconds"
        )
    present.save(None)
    try:
        yield present
    finally:
        retrier.call(storage.delete, uri)


def sweep(out: str, retrier: Retrier) -> None:
    """Removes the notes of a run that was killed; no other run may be writing."""
    folder = storage.join(out, NOTES)
    for name in retrier.call(lambda: list(storage.list_files(folder))):
        retrier.call(storage.delete, storage.join(folder, name))
