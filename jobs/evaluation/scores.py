"""From one record per spoken sentence to figures with confidence intervals."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from valle.jobs.evaluation.metrics.speaker_similarity import equal_error_rate, top1_correct
from valle.model.tokens import FRAME_RATE

ItemResult = dict[str, Any]
"""What was measured of one system on one item: a record of `report.json`."""

Metrics = dict[str, Any]
"""Metrics by name: numbers, counts, intervals."""

Interval = dict[str, Any]
"""`value`, `low`, `high`: a metric with its 95 % bootstrap interval."""

MIN_SECONDS = 0.2
"""Seconds below which there is nothing to judge: the model stopped at once."""

LOOP_SECONDS = 1.5
"""A stretch this long that repeats itself, token by token, is a loop."""

RESAMPLES = 2_000
EMBEDDING_KEYS = ("embedding", "prompt_embedding")


def faults(codes: NDArray[np.int16] | None, hit_limit: bool) -> Metrics:
    """What can go wrong in decoding, seen from the first codebook `[T]`."""
    frames = 0 if codes is None else len(codes)
    return {
        "hit_limit": hit_limit,
        "stopped": frames < MIN_SECONDS * FRAME_RATE,
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


def without_embeddings(record: ItemResult) -> ItemResult:
    """The record as it is kept in a report."""
    return {key: value for key, value in record.items() if key not in EMBEDDING_KEYS}


def summarize(
    records: Sequence[ItemResult], speaker_id_candidates: Collection[str] = ()
) -> dict[str, Metrics]:
    """Figures per system, with the same by group, language and speaker below `by`.

    `speaker_id_candidates`: the speakers whose outputs are identified, among each other, in a
    system's own figure; none: all. A part's is among the voices of that part.
    """
    result: dict[str, Metrics] = {}
    for system in dict.fromkeys(record["system"] for record in records):
        rows = [record for record in records if record["system"] == system]
        result[system] = {
            **compute_metrics(rows),
            **_speaker_id([row for row in rows if row["speaker"] in speaker_id_candidates]),
            "by": {
                key: {name: compute_metrics(part) for name, part in _parts(rows, key)}
                for key in ("group", "language", "speaker")
            },
        }
    return result


def _speaker_id(rows: Sequence[ItemResult]) -> Metrics:
    metrics = speaker_metrics(rows)
    return {name: metrics[name] for name in ("voices", "identified") if name in metrics}


def _parts(rows: Sequence[ItemResult], key: str) -> Iterable[tuple[str, list[ItemResult]]]:
    for name in sorted({row[key] for row in rows}):
        yield name, [row for row in rows if row[key] == name]


def compute_metrics(rows: Sequence[ItemResult]) -> Metrics:
    """All figures of some records of one system."""
    metrics: Metrics = {
        "items": len(rows),
        "wer": bootstrap_ratio(rows, "word_errors", "words"),
        "cer": bootstrap_ratio(rows, "character_errors", "characters"),
    }
    if "second_word_errors" in rows[0]:
        metrics["second_wer"] = bootstrap_ratio(rows, "second_word_errors", "words")
    for name in ("distillmos", "dnsmos", "speech_fraction"):
        metrics[name] = bootstrap_mean([row[name] for row in rows if name in row])
    for name in ("hit_limit", "stopped", "looped"):
        metrics[name] = float(np.mean([row[name] for row in rows]))
    faulty = [row["hit_limit"] or row["stopped"] or row["looped"] for row in rows]
    metrics["faults"] = float(np.mean(faulty))
    seconds = sum(row["seconds"] for row in rows)
    if seconds:
        metrics["real_time_factor"] = sum(row["synthesis_seconds"] for row in rows) / seconds
    return metrics | speaker_metrics(rows)


def speaker_metrics(rows: Sequence[ItemResult]) -> Metrics:
    """Each output against its own prompt and against one prompt of every other voice."""
    prompts = {
        row["speaker"]: row["prompt_embedding"] for row in rows if row.get("prompt_embedding")
    }
    usable = [row for row in rows if row.get("embedding") and row.get("prompt_embedding")]
    if len(prompts) < 2 or not usable:
        return {}
    speakers = sorted(prompts)
    own = np.array([speakers.index(row["speaker"]) for row in usable])
    outputs = np.array([row["embedding"] for row in usable])
    cosines = outputs @ np.array([prompts[name] for name in speakers]).T
    cosines[np.arange(len(usable)), own] = [
        float(np.dot(row["embedding"], row["prompt_embedding"])) for row in usable
    ]
    same = cosines[np.arange(len(usable)), own]
    different = cosines[np.arange(len(speakers)) != own[:, None]]
    return {
        "voices": len(speakers),
        "cosine_own": bootstrap_mean(same.tolist()),
        "cosine_other": bootstrap_mean(different.tolist()),
        "identified": bootstrap_mean(top1_correct(cosines, own).astype(float).tolist()),
        "equal_error_rate": equal_error_rate(same, different),
    }


def bootstrap_mean(values: Sequence[float]) -> Interval:
    """Mean with its 95 % bootstrap interval."""
    if not len(values):
        return {"value": None, "low": None, "high": None}
    resampled = np.asarray(values, float)[_resamples(len(values))].mean(1)
    return _interval(float(np.mean(values)), resampled)


def bootstrap_ratio(rows: Sequence[ItemResult], numerator: str, denominator: str) -> Interval:
    """Sum of one field over the sum of another, with its 95 % bootstrap interval over items."""
    top, bottom = (
        np.array([row[name] for row in rows], float) for name in (numerator, denominator)
    )
    indices = _resamples(len(rows))
    return _interval(top.sum() / bottom.sum(), top[indices].sum(1) / bottom[indices].sum(1))


def paired_difference(
    candidate: Sequence[ItemResult],
    baseline: Sequence[ItemResult],
    system: str,
    field: str = "word_errors",
) -> Interval | None:
    """`candidate` minus `baseline` on the items both have, with the paired 95 % interval.

    Word errors are divided by words (a difference of error rates); other fields are averaged.
    """
    candidate_rows, baseline_rows = (
        {row["id"]: row for row in rows if row["system"] == system and row.get(field) is not None}
        for rows in (candidate, baseline)
    )
    common = sorted(candidate_rows.keys() & baseline_rows.keys())
    if not common:
        return None
    differences = np.array(
        [candidate_rows[name][field] - baseline_rows[name][field] for name in common], float
    )
    words = [candidate_rows[name]["words"] if field == "word_errors" else 1.0 for name in common]
    weight = np.array(words, float)
    indices = _resamples(len(common))
    return _interval(
        differences.sum() / weight.sum(), differences[indices].sum(1) / weight[indices].sum(1)
    )


def _resamples(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def _interval(value: float, resampled: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"value": float(value), "low": float(low), "high": float(high)}
