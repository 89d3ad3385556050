"""From measurements of items to metrics of systems."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from valle.jobs.evaluation.intervals import Interval, bootstrap_mean, bootstrap_ratio
from valle.jobs.evaluation.metrics.speaker_similarity import (
    Embedding,
    equal_error_rate,
    top1_correct,
)
from valle.jobs.evaluation.results import Breakdown, ItemResult, Metrics, Part, SystemMetrics
from valle.model.codec.interface import Wave
from valle.model.tokens import FRAME_RATE, SAMPLE_RATE

MIN_SECONDS = 0.2
"""Seconds; shorter audio is not measured, and an output with fewer frames is `empty`."""

LOOP_SECONDS = 1.5
"""Seconds; a stretch this long that repeats itself, token by token, is a loop."""

ComparedField = Literal["word_errors", "distillmos", "speaker_similarity"]
"""Field of an item result by which two reports are compared."""


@dataclass(frozen=True)
class Measurement:
    """An item result with the speaker embeddings `[D]` of length one, which no report keeps."""

    result: ItemResult
    embedding: Embedding | None
    """Of the output; None where it holds no voice."""
    prompt_embedding: Embedding | None


@dataclass(frozen=True)
class Faults:
    """What can go wrong in decoding."""

    hit_limit: bool
    empty: bool
    looped: bool


@dataclass(frozen=True)
class SpeakerMetrics:
    """The fields of `Metrics` that compare outputs with the prompts of several speakers."""

    n_speakers: int
    speaker_similarity: Interval | None
    impostor_similarity: Interval | None
    speaker_id_accuracy: Interval | None
    equal_error_rate: float


def is_long_enough(wave: Wave) -> bool:
    """Whether a recording is long enough to be measured."""
    return len(wave) / SAMPLE_RATE >= MIN_SECONDS


def find_faults(codes: NDArray[np.int16] | None, hit_limit: bool) -> Faults:
    """Faults of an output by its first codebook `[T]`; None: there is no output."""
    frames = 0 if codes is None else len(codes)
    return Faults(
        hit_limit=hit_limit,
        empty=frames < MIN_SECONDS * FRAME_RATE,
        looped=codes is not None and longest_repetition(codes) >= LOOP_SECONDS * FRAME_RATE,
    )


def longest_repetition(codes: NDArray[np.int16], longest_period: int = FRAME_RATE) -> int:
    """Frames of the longest stretch that equals what precedes it by one period of any length."""
    longest = 0
    for period in range(1, min(longest_period, len(codes) - 1) + 1):
        same = np.concatenate([[False], codes[period:] == codes[:-period], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1])  # starts and ends of stretches, in turn
        if len(edges):
            longest = max(longest, int((edges[1::2] - edges[::2]).max()))
    return longest


def summarize(
    measurements: Sequence[Measurement], speaker_id_candidates: Collection[str] = ()
) -> dict[str, SystemMetrics]:
    """Metrics of each system, and of its items by group, language and speaker.

    A system's outputs are identified among `speaker_id_candidates` (empty: all speakers), the
    outputs of a part among the speakers of that part.
    """
    systems: dict[str, SystemMetrics] = {}
    for system in dict.fromkeys(row.result.system for row in measurements):
        rows = [row for row in measurements if row.result.system == system]
        metrics = compute_metrics(rows)
        of_candidates = speaker_metrics(
            [row for row in rows if row.result.speaker in speaker_id_candidates]
        )
        if of_candidates is not None:
            metrics = replace(
                metrics,
                n_speakers=of_candidates.n_speakers,
                speaker_id_accuracy=of_candidates.speaker_id_accuracy,
            )
        parts = {part: _metrics_by(rows, part) for part in get_args(Part)}
        systems[system] = SystemMetrics(**vars(metrics), by=Breakdown(**parts))
    return systems


def _metrics_by(rows: Sequence[Measurement], part: Part) -> dict[str, Metrics]:
    names: list[str] = [getattr(row.result, part) for row in rows]
    return {
        name: compute_metrics(
            [row for row, other in zip(rows, names, strict=True) if other == name]
        )
        for name in sorted(set(names))
    }


def compute_metrics(rows: Sequence[Measurement]) -> Metrics:
    """Metrics over measurements of one system."""
    results = [row.result for row in rows]
    words = [result.words for result in results]
    second_word_errors = [
        result.second_word_errors for result in results if result.second_word_errors is not None
    ]
    seconds = sum(result.seconds for result in results)
    metrics = Metrics(
        items=len(results),
        wer=bootstrap_ratio([result.word_errors for result in results], words),
        cer=bootstrap_ratio(
            [result.character_errors for result in results],
            [result.characters for result in results],
        ),
        second_wer=bootstrap_ratio(second_word_errors, words) if second_word_errors else None,
        distillmos=bootstrap_mean([r.distillmos for r in results if r.distillmos is not None]),
        dnsmos=bootstrap_mean([r.dnsmos for r in results if r.dnsmos is not None]),
        speech_fraction=bootstrap_mean(
            [r.speech_fraction for r in results if r.speech_fraction is not None]
        ),
        hit_limit=float(np.mean([result.hit_limit for result in results])),
        empty=float(np.mean([result.empty for result in results])),
        looped=float(np.mean([result.looped for result in results])),
        faults=float(np.mean([result.faulty for result in results])),
        real_time_factor=(
            sum(result.synthesis_seconds for result in results) / seconds if seconds else None
        ),
    )
    speakers = speaker_metrics(rows)
    return metrics if speakers is None else replace(metrics, **vars(speakers))


def speaker_metrics(rows: Sequence[Measurement]) -> SpeakerMetrics | None:
    """Each output against its own prompt and against one prompt of every other speaker.

    None with fewer than two speakers, or without an output that holds a voice.
    """
    prompts = {
        row.result.speaker: row.prompt_embedding for row in rows if row.prompt_embedding is not None
    }
    pairs = [
        (row.result.speaker, row.embedding.astype(float), row.prompt_embedding.astype(float))
        for row in rows
        if row.embedding is not None and row.prompt_embedding is not None
    ]
    if len(prompts) < 2 or not pairs:
        return None

    # cosines [outputs, speakers]; in an output's own column, that of the very prompt it had
    speakers = sorted(prompts)
    own = np.array([speakers.index(speaker) for speaker, _, _ in pairs])
    outputs = np.array([output for _, output, _ in pairs])
    cosines = outputs @ np.array([prompts[speaker] for speaker in speakers], float).T
    cosines[np.arange(len(pairs)), own] = [float(output @ prompt) for _, output, prompt in pairs]

    same = cosines[np.arange(len(pairs)), own]
    different = cosines[np.arange(len(speakers)) != own[:, None]]
    return SpeakerMetrics(
        n_speakers=len(speakers),
        speaker_similarity=bootstrap_mean(same.tolist()),
        impostor_similarity=bootstrap_mean(different.tolist()),
        speaker_id_accuracy=bootstrap_mean(top1_correct(cosines, own).astype(float).tolist()),
        equal_error_rate=equal_error_rate(same, different),
    )


def paired_difference(
    candidate: Sequence[ItemResult],
    baseline: Sequence[ItemResult],
    system: str,
    field: ComparedField = "word_errors",
) -> Interval | None:
    """`candidate` minus `baseline` on the items both have, with the paired 95 % interval.

    Word errors are divided by words (a difference of error rates); other fields are averaged.
    None where the two have no item of `system` in common.
    """
    candidate_results, baseline_results = (
        {
            result.id: result
            for result in results
            if result.system == system and getattr(result, field) is not None
        }
        for results in (candidate, baseline)
    )
    common = sorted(candidate_results.keys() & baseline_results.keys())
    if not common:
        return None
    differences = [
        getattr(candidate_results[item], field) - getattr(baseline_results[item], field)
        for item in common
    ]
    if field != "word_errors":
        return bootstrap_mean(differences)
    return bootstrap_ratio(differences, [candidate_results[item].words for item in common])
