"""From one record per spoken sentence to figures with confidence intervals."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from valle.jobs.evaluation.metrics.likeness import equal_error_rate, identified
from valle.model.tokens import FRAME_RATE

Record = dict[str, Any]

SHORTEST = 0.2
"""Seconds below which there is nothing to judge: the model stopped at once."""

LOOP_SECONDS = 1.5
"""A stretch this long that repeats itself, token by token, is a loop."""

RESAMPLES = 2_000
VECTORS = ("voice", "prompt_voice")


def faults(codes: NDArray[np.int16] | None, hit_limit: bool) -> Record:
    """What can go wrong in decoding, seen from the first codebook `[T]`."""
    frames = 0 if codes is None else len(codes)
    return {
        "hit_limit": hit_limit,
        "stopped": frames < SHORTEST * FRAME_RATE,
        "looped": codes is not None and longest_repetition(codes) >= LOOP_SECONDS * FRAME_RATE,
    }


def longest_repetition(codes: NDArray[np.int16], longest_period: int = FRAME_RATE) -> int:
    """Frames of the longest stretch that equals what came `period` frames before it."""
    best = 0
    for period in range(1, min(longest_period, len(codes) - 1) + 1):
        same = np.concatenate([[False], codes[period:] == codes[:-period], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1])
        if len(edges):
            best = max(best, int((edges[1::2] - edges[::2]).max()))
    return best


def without_vectors(record: Record) -> Record:
    """The record as it is kept in a report."""
    return {key: value for key, value in record.items() if key not in VECTORS}


def summarise(
    records: Sequence[Record], identified_among: Collection[str] = ()
) -> dict[str, Record]:
    """Figures per system, with the same by group, language and speaker below `by`.

    `identified_among`: the speakers whose outputs are identified, among each other, in a system's
    own figure; none: all. A part's is among the voices of that part.
    """
    result: dict[str, Record] = {}
    for system in dict.fromkeys(record["system"] for record in records):
        rows = [record for record in records if record["system"] == system]
        result[system] = {
            **figures(rows),
            **_identified([row for row in rows if row["speaker"] in identified_among]),
            "by": {
                key: {name: figures(part) for name, part in _parts(rows, key)}
                for key in ("group", "language", "speaker")
            },
        }
    return result


def _identified(rows: Sequence[Record]) -> Record:
    found = likeness(rows)
    return {name: found[name] for name in ("voices", "identified") if name in found}


def _parts(rows: Sequence[Record], key: str) -> Iterable[tuple[str, list[Record]]]:
    for name in sorted({row[key] for row in rows}):
        yield name, [row for row in rows if row[key] == name]


def figures(rows: Sequence[Record]) -> Record:
    """All figures of some records of one system."""
    result: Record = {
        "items": len(rows),
        "wer": ratio(rows, "word_errors", "words"),
        "cer": ratio(rows, "character_errors", "characters"),
    }
    if "second_word_errors" in rows[0]:
        result["second_wer"] = ratio(rows, "second_word_errors", "words")
    for name in ("distillmos", "dnsmos", "speech_fraction"):
        result[name] = mean([row[name] for row in rows if name in row])
    for name in ("hit_limit", "stopped", "looped"):
        result[name] = float(np.mean([row[name] for row in rows]))
    broken = [row["hit_limit"] or row["stopped"] or row["looped"] for row in rows]
    result["faults"] = float(np.mean(broken))
    seconds = sum(row["seconds"] for row in rows)
    if seconds:
        result["real_time_factor"] = sum(row["synthesis_seconds"] for row in rows) / seconds
    return result | likeness(rows)


def likeness(rows: Sequence[Record]) -> Record:
    """Each output against its own prompt and against one prompt of every other voice."""
    prompts = {row["speaker"]: row["prompt_voice"] for row in rows if row.get("prompt_voice")}
    judged = [row for row in rows if row.get("voice") and row.get("prompt_voice")]
    if len(prompts) < 2 or not judged:
        return {}
    speakers = sorted(prompts)
    own = np.array([speakers.index(row["speaker"]) for row in judged])
    outputs = np.array([row["voice"] for row in judged])
    cosines = outputs @ np.array([prompts[name] for name in speakers]).T
    cosines[np.arange(len(judged)), own] = [
        float(np.dot(row["voice"], row["prompt_voice"])) for row in judged
    ]
    same = cosines[np.arange(len(judged)), own]
    different = cosines[np.arange(len(speakers)) != own[:, None]]
    return {
        "voices": len(speakers),
        "cosine_own": mean(same.tolist()),
        "cosine_other": mean(different.tolist()),
        "identified": mean(identified(cosines, own).astype(float).tolist()),
        "equal_error_rate": equal_error_rate(same, different),
    }


def mean(values: Sequence[float]) -> Record:
    """Mean with its 95 % bootstrap interval."""
    if not len(values):
        return {"value": None, "low": None, "high": None}
    drawn = np.asarray(values, float)[_resamples(len(values))].mean(1)
    return _interval(float(np.mean(values)), drawn)


def ratio(rows: Sequence[Record], above: str, below: str) -> Record:
    """Sum of one field over the sum of another, with its 95 % bootstrap interval over items."""
    top, bottom = (np.array([row[name] for row in rows], float) for name in (above, below))
    chosen = _resamples(len(rows))
    return _interval(top.sum() / bottom.sum(), top[chosen].sum(1) / bottom[chosen].sum(1))


def difference(
    ours: Sequence[Record], theirs: Sequence[Record], system: str, field: str = "word_errors"
) -> Record | None:
    """`ours` minus `theirs` on the items both have, with the paired 95 % interval.

    Word errors are divided by words (a difference of error rates); other fields are averaged.
    """
    mine, other = (
        {row["id"]: row for row in rows if row["system"] == system and row.get(field) is not None}
        for rows in (ours, theirs)
    )
    common = sorted(mine.keys() & other.keys())
    if not common:
        return None
    more = np.array([mine[name][field] - other[name][field] for name in common], float)
    words = [mine[name]["words"] if field == "word_errors" else 1.0 for name in common]
    weight = np.array(words, float)
    chosen = _resamples(len(common))
    return _interval(more.sum() / weight.sum(), more[chosen].sum(1) / weight[chosen].sum(1))


def _resamples(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def _interval(value: float, drawn: NDArray[np.float64]) -> Record:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"value": float(value), "low": float(low), "high": float(high)}
