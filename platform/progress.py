"""Progress bars, on a terminal and in a log file."""

from typing import Any

from tqdm import tqdm

from valle.platform import console


def progress_bar(
    *, total: int, label: str, unit: str, initial: int = 0, enabled: bool = True
) -> "tqdm[Any]":
    """A tqdm bar: refreshed five times a second on a terminal, every 20 s elsewhere.

    `initial` is where a resumed run starts. Workers other than the first pass `enabled=False`.
    """
    stream = console.terminal()
    interval = 0.2 if stream.isatty() else 20.0
    return tqdm(
        file=stream,
        total=total,
        desc=label,
        unit=unit,
        initial=initial,
        mininterval=interval,
        maxinterval=interval * 2,
        disable=not enabled,
    )
