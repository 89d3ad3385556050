"""Measurements and reports of evaluations, made up."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from valle.jobs import evaluate
from valle.jobs.evaluate import EvaluateRecipe
from valle.jobs.evaluation.report import write_report
from valle.jobs.evaluation.results import EvaluationReport, ItemResult, MetricModels
from valle.jobs.evaluation.scores import Measurement, summarize
from valle.model.codec.interface import CodecIdentity
from valle.platform import registry, storage
from valle.platform.bundle import Bundle, read_bundle


def measurement(number: int, errors: int = 0, speaker: str = "a", **fields: Any) -> Measurement:
    """Item `number` by system cross: ten words, and an embedding that is the speaker's own axis."""
    axis = np.eye(3, dtype=np.float32)["abc".index(speaker)]
    values = {
        "id": f"i{number}", "system": "cross", "group": "g", "language": "en-us",
        "speaker": speaker, "prompt": "p.wav", "text": "t", "hypothesis": "h",
        "words": 10, "word_errors": errors, "characters": 50, "character_errors": errors,
        "seconds": 2.0, "synthesis_seconds": 1.0,
        "hit_limit": False, "empty": False, "looped": False,
        "distillmos": 3.0, "dnsmos": 2.0, "speech_fraction": 0.9, "speaker_similarity": 1.0,
    }  # fmt: skip
    return Measurement(ItemResult(**(values | fields)), axis, axis)


def make_report(measurements: Sequence[Measurement]) -> EvaluationReport:
    """The report of these measurements."""
    identity = CodecIdentity(
        name="tiny", sha256="0", n_codebooks=8, frame_rate=75, sample_rate=24_000
    )
    return EvaluationReport(
        model="models:/valle/1",
        bundle=Bundle(codec=identity, official_codec=False, ar="runs/ar", nar="runs/nar"),
        items="standard",
        training_data_checked=True,
        metric_models=MetricModels(
            recognizer="whisper", second_recognizer=None, speaker_encoder="resemblyzer"
        ),
        synthesis={"seed": 0},
        precision="fp32",
        code_version="0.1.0",
        speaker_id_candidates=(),
        systems=summarize(measurements),
        results=tuple(row.result for row in measurements),
    )


def replace_evaluation(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Evaluations need no models from now on; returns a list of one number, the word errors of each
    item in those to come, for the test to set."""
    errors = [1]

    def fake(recipe: EvaluateRecipe, allocation: object = None) -> EvaluationReport:
        measured = read_bundle(registry.resolve(recipe.model))  # fills the node's cache
        report = make_report([measurement(n, errors=errors[0]) for n in range(40)])
        report = replace(report, model=recipe.model, bundle=measured)
        write_report(report, storage.absolute(recipe.out), None)
        return report

    monkeypatch.setattr(evaluate, "evaluate", fake)
    monkeypatch.setattr(evaluate, "allocation_for", lambda *_: object())
    return errors
