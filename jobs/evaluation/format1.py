"""Format 1 of `report.json`, which has no `format`: its keys as those of format 2."""

from collections.abc import Mapping
from typing import Any

from valle.jobs.evaluation.items import RENAMED_SETS

RENAMED_METRICS = {
    "cosine_own": "speaker_similarity",
    "cosine_other": "impostor_similarity",
    "identified": "speaker_id_accuracy",
    "voices": "n_speakers",
    "stopped": "empty",
}
"""Metric of format 1: its name in format 2."""

_RENAMED_IN_RESULTS = {
    "cosine_own": "speaker_similarity",
    "stopped": "empty",
    "heard": "hypothesis",
    "second_heard": "second_hypothesis",
}
_RENAMED_IN_REPORT = {"identified_among": "speaker_id_candidates", "records": "results"}


def upgrade(content: Mapping[str, Any]) -> dict[str, Any]:
    """A report of format 1 with the keys of format 2; raises ValueError where it is neither."""
    if missing := sorted({"judges", "systems", "records"} - content.keys()):
        raise ValueError(f"no evaluation report: {missing[0]!r} is missing")
    report = _rename(content, _RENAMED_IN_REPORT)
    recognizer, second_recognizer, speaker_encoder = report.pop("judges")
    return report | {
        "format": 2,
        "items": RENAMED_SETS.get(report["items"], report["items"]),
        "metric_models": {
            "recognizer": recognizer,
            "second_recognizer": second_recognizer,
            "speaker_encoder": speaker_encoder,
        },
        "systems": {system: _metrics(metrics) for system, metrics in report["systems"].items()},
        "results": [_rename(result, _RENAMED_IN_RESULTS) for result in report["results"]],
    }


def _metrics(content: Mapping[str, Any]) -> dict[str, Any]:
    metrics = _rename(content, RENAMED_METRICS)
    for name, value in metrics.items():
        if isinstance(value, dict) and value.get("value", 0.0) is None:
            metrics[name] = None  # an interval over no items
    if "by" in metrics:
        metrics["by"] = {
            part: {name: _metrics(value) for name, value in parts.items()}
            for part, parts in metrics["by"].items()
        }
    return metrics


def _rename(content: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in content.items()}
