"""The files of an evaluation: JSON for machines, Markdown for the repository, HTML with audio."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import get_args

from valle.jobs.evaluation.intervals import Interval
from valle.jobs.evaluation.results import EvaluationReport, ItemResult, Metrics, Part
from valle.jobs.evaluation.scores import paired_difference
from valle.platform import audio, storage
from valle.platform.spectrogram import spectrogram_png

TEMPLATE = Path(__file__).parent / "report.html.j2"
N_WORST = 10

COLUMNS = {
    "items": "items", "wer": "WER %", "second_wer": "WER 2 %", "cer": "CER %",
    "speaker_similarity": "similarity", "impostor_similarity": "impostors",
    "speaker_id_accuracy": "speaker ID %", "equal_error_rate": "EER %",
    "distillmos": "DistillMOS", "dnsmos": "DNSMOS", "speech_fraction": "speech %",
    "faults": "faults %", "real_time_factor": "RTF",
}  # fmt: skip
"""Metrics of a row and their titles, in the order shown. `%` in a title multiplies by a hundred."""

INVALID_METRIC_CHARACTERS = re.compile(r"[^\w ./:-]")
"""Characters that MLflow refuses in the name of a metric."""


def read_report(uri: str) -> EvaluationReport:
    """The `report.json` at `uri`, of this format or an earlier one. Raises ValueError."""
    try:
        return EvaluationReport.from_json(storage.read_json(uri))
    except ValueError as error:
        raise ValueError(f"{uri}: {error}") from error


def write_report(report: EvaluationReport, out: str, baseline: EvaluationReport | None) -> None:
    """Puts `report.json`, `report.md`, `report.html` and the worst spectrograms into `out`."""
    storage.write_json(storage.join(out, "report.json"), report.to_json())
    worst_results = worst(report)
    for result in worst_results:
        _draw(result, out)
    text = markdown(report, worst_results, baseline)
    storage.write_bytes(storage.join(out, "report.md"), text.encode())
    page = html(report, worst_results, baseline)
    storage.write_bytes(storage.join(out, "report.html"), page.encode())


def worst(report: EvaluationReport, count: int = N_WORST) -> list[ItemResult]:
    """The results of system `cross` with the most word errors per word."""
    results = [result for result in report.results if result.system == "cross"]
    return sorted(results, key=lambda result: -result.word_errors / result.words)[:count]


def _draw(result: ItemResult, out: str) -> None:
    """Spectrograms of the output and of its reference, beside their audio."""
    for system in ("cross", "recording"):
        path = storage.join(out, "audio", system, f"{result.id}.wav")
        if storage.exists(path):
            wave = audio.read_file(path, max_seconds=120)
            picture = spectrogram_png(wave, f"{system}: {result.text[:70]}")
            storage.write_bytes(path.removesuffix(".wav") + ".png", picture)


def cell(value: Interval | float | None, name: str) -> str:
    """A value of the metric `name` as text, with its interval; empty when not measured."""
    if value is None or isinstance(value, int):
        return "" if value is None else str(value)
    scale, digits = (100, 1) if "%" in COLUMNS[name] else (1, 2)
    if isinstance(value, Interval):
        mean, low, high = (
            f"{end * scale:.{digits}f}" for end in (value.value, value.low, value.high)
        )
        return f"{mean} ({low} to {high})"
    return f"{value * scale:.{digits}f}"


def markdown_table(rows: Mapping[str, Metrics]) -> str:
    """A row for each entry, a column for each metric that any of them has."""
    names = [name for name in COLUMNS if any(row.get(name) is not None for row in rows.values())]
    lines = [(label, *(cell(row.get(name), name) for name in names)) for label, row in rows.items()]
    return table(["", *(COLUMNS[name] for name in names)], lines)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    first, *others = (f"| {' | '.join(cells)} |\n" for cells in (head, *rows))
    return first + "|---" * len(head) + "|\n" + "".join(others)


def markdown(
    report: EvaluationReport, worst_results: Sequence[ItemResult], baseline: EvaluationReport | None
) -> str:
    """The report as a page of Markdown."""
    parts = [
        f"# Evaluation of {report.model} on {report.items}\n",
        _conditions(report),
        markdown_table(report.systems),
    ]
    if baseline is not None:
        parts.append(_comparison(report, baseline))
    if "cross" in report.systems:
        for part in get_args(Part):
            rows = report.systems["cross"].by.get(part)
            parts.append(f"## System cross by {part}\n\n{markdown_table(rows)}")
    lines = [
        (result.id, result.text, result.hypothesis, f"{result.word_errors}/{result.words}")
        for result in worst_results
    ]
    head = ("id", "text", "hypothesis", "word errors")
    parts.append(f"## Most word errors\n\n{table(head, lines)}")
    return "\n".join(parts)


def _conditions(report: EvaluationReport) -> str:
    """What the metrics were measured with."""
    sentences = [
        f"Code {report.code_version}; codec {report.bundle.codec.name}; {report.precision}.",
        f"Metric models: {report.metric_models}.",
        "No sentence and no unseen voice of the set is in the training data (checked)."
        if report.training_data_checked
        else "The set was **not compared** with the training data.",
    ]
    if candidates := report.speaker_id_candidates:
        sentences.append(f"Speaker ID candidates: {', '.join(candidates)}.")
    sentences.append("In brackets: 95 % bootstrap interval over items.")
    return " ".join(sentences) + "\n"


def _comparison(report: EvaluationReport, baseline: EvaluationReport) -> str:
    """Word error rates against an earlier report, on the items both have."""
    lines = [
        (system, cell(difference, "wer"))
        for system in report.systems
        if (difference := paired_difference(report.results, baseline.results, system)) is not None
    ]
    return (
        f"## Against {baseline.model}\n\nWER minus the earlier model's, in points; an interval "
        f"that holds 0 is noise.\n\n{table(('', 'points'), lines)}"
    )


def html(
    report: EvaluationReport, worst_results: Sequence[ItemResult], baseline: EvaluationReport | None
) -> str:
    """The report as a page with players, which reads the files of `audio/` beside it."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["cell"] = cell
    by_item: dict[str, dict[str, ItemResult]] = {}
    for result in report.results:
        by_item.setdefault(result.id, {})[result.system] = result
    return environment.from_string(TEMPLATE.read_text()).render(
        report=report,
        columns=COLUMNS,
        worst_results=worst_results,
        results=by_item,
        comparison=_comparison(report, baseline) if baseline else None,
    )


def mlflow_metrics(report: EvaluationReport) -> dict[str, float]:
    """Metrics by flat names for MLflow: `cross/wer`, `cross/unseen people/wer` ..."""
    flat: dict[str, float] = {}
    for system, metrics in report.systems.items():
        groups = {f"{system}/{group}": part for group, part in metrics.by.group.items()}
        for path, row in {system: metrics, **groups}.items():
            for name in COLUMNS:
                value = row.get(name)
                value = value.value if isinstance(value, Interval) else value
                if value is not None:
                    flat[f"{INVALID_METRIC_CHARACTERS.sub('', path)}/{name}"] = float(value)
    return flat
