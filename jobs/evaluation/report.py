"""An evaluation as JSON for machines, Markdown for the repository, HTML to listen to."""

import re
from pathlib import Path
from typing import Any

from valle.jobs.evaluation.scores import ItemResult, Metrics, paired_difference
from valle.platform import audio, storage
from valle.platform.spectrogram import spectrogram_png

Report = dict[str, Any]

TEMPLATE = Path(__file__).parent / "report.html.j2"
N_WORST = 10

COLUMNS = {
    "items": "items", "wer": "WER %", "second_wer": "WER 2 %", "cer": "CER %",
    "cosine_own": "own voice", "cosine_other": "other voices", "identified": "identified %",
    "equal_error_rate": "EER %", "distillmos": "DistillMOS", "dnsmos": "DNSMOS",
    "speech_fraction": "speech %", "faults": "faults %", "real_time_factor": "RTF",
}  # fmt: skip
"""Figures of a row, in the order shown. A `%` in the title multiplies by a hundred."""


INVALID_METRIC_CHARACTERS = re.compile(r"[^\w ./:-]")
"""What MLflow does not take in the name of a figure."""


def write_report(report: Report, out: str, baseline: Report | None) -> None:
    """Puts `report.json`, `report.md`, `report.html` and the worst spectrograms into `out`."""
    storage.write_json(storage.join(out, "report.json"), report)
    worst_results = worst(report)
    for result in worst_results:
        _draw(result, out)
    text = markdown(report, worst_results, baseline)
    storage.write_bytes(storage.join(out, "report.md"), text.encode())
    page = html(report, worst_results, baseline)
    storage.write_bytes(storage.join(out, "report.html"), page.encode())


def worst(report: Report, count: int = N_WORST) -> list[ItemResult]:
    """The model's own sentences (`cross`) with the most word errors per word."""
    rows = [row for row in report["records"] if row["system"] == "cross"]
    return sorted(rows, key=lambda row: -row["word_errors"] / row["words"])[:count]


def _draw(result: ItemResult, out: str) -> None:
    for system in ("cross", "recording"):
        path = storage.join(out, "audio", system, f"{result['id']}.wav")
        if storage.exists(path):
            wave = audio.read(storage.read_bytes(path), max_seconds=120)
            picture = spectrogram_png(wave, f"{system}: {result['text'][:70]}")
            storage.write_bytes(path.removesuffix(".wav") + ".png", picture)


def cell(metrics: Metrics, name: str) -> str:
    """One figure as text, with its 95 % interval where it has one; empty when not measured."""
    value = metrics.get(name)
    scale = 100 if "%" in COLUMNS[name] else 1
    digits = 1 if scale == 100 else 2
    if isinstance(value, dict):
        if value["value"] is None:
            return ""
        low, high = (f"{value[end] * scale:.{digits}f}" for end in ("low", "high"))
        return f"{value['value'] * scale:.{digits}f} ({low} to {high})"
    if value is None or isinstance(value, int):
        return "" if value is None else str(value)
    return f"{value * scale:.{digits}f}"


def markdown_table(report: Report, key: str | None = None) -> str:
    """Systems against figures; with `key` (group, language, speaker), the model's own parts."""
    rows = report["systems"]
    if key is not None:
        rows = rows["cross"]["by"][key] if "cross" in rows else {}
    names = [n for n in COLUMNS if any(cell(metrics, n) for metrics in rows.values())]
    head = f"| | {' | '.join(COLUMNS[n] for n in names)} |\n|---|{'---|' * len(names)}\n"
    lines = [
        f"| {row} | {' | '.join(cell(metrics, n) for n in names)} |\n"
        for row, metrics in rows.items()
    ]
    return head + "".join(lines)


def markdown(report: Report, worst_results: list[ItemResult], baseline: Report | None) -> str:
    """The report as a page of Markdown."""
    checked = (
        "No sentence and no unseen voice of the set is in the training data (checked)."
        if report["training_data_checked"]
        else "Whether sentences or voices of the set were trained on was **not checked**."
    )
    if candidates := report["identified_among"]:
        checked += f" Voices are identified among {', '.join(candidates)}."
    parts = [
        f"# Evaluation of {report['model']} on {report['items']}\n",
        f"Code {report['code_version']}; codec {report['bundle']['codec']['name']}; "
        f"{report['precision']}. Judges: "
        f"{', '.join(filter(None, report['judges']))}. {checked} In brackets: 95 % bootstrap "
        "interval over items.\n",
        markdown_table(report),
    ]
    if baseline is not None:
        parts.append(_comparison(report, baseline))
    for key in ("group", "language", "speaker"):
        parts.append(f"## The model by {key}\n\n{markdown_table(report, key)}")
    lines = [
        f"| {row['id']} | {row['text']} | {row['heard']} | {row['word_errors']}/{row['words']} |"
        for row in worst_results
    ]
    parts.append(
        "## Worst\n\n| id | text | heard | errors |\n|---|---|---|---|\n" + "\n".join(lines)
    )
    return "\n".join(parts) + "\n"


def _comparison(report: Report, baseline: Report) -> str:
    """Against an earlier report, on the items both have."""
    lines = []
    for system in report["systems"]:
        difference = paired_difference(report["records"], baseline["records"], system)
        if difference is not None:
            lines.append(f"| {system} | {cell({'wer': difference}, 'wer')} |\n")
    return (
        f"## Against {baseline['model']}\n\nWER minus the earlier model's, in points; an interval "
        "that holds 0 is noise.\n\n| | points |\n|---|---|\n" + "".join(lines)
    )


def html(report: Report, worst_results: list[ItemResult], baseline: Report | None) -> str:
    """The report as a page with players; it expects `audio/` beside it."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["cell"] = cell
    by_item: dict[str, dict[str, ItemResult]] = {}
    for result in report["records"]:
        by_item.setdefault(result["id"], {})[result["system"]] = result
    return environment.from_string(TEMPLATE.read_text()).render(
        report=report, columns=COLUMNS, worst_results=worst_results, items=by_item,
        comparison=_comparison(report, baseline) if baseline else None,
    )  # fmt: skip


def mlflow_metrics(report: Report) -> dict[str, float]:
    """Figures as flat names for MLflow: `cross/wer`, `cross/unseen people/wer` ..."""
    flat: dict[str, float] = {}
    for system, metrics in report["systems"].items():
        parts = {f"{system}/{group}": part for group, part in metrics["by"]["group"].items()}
        for path, row in {system: metrics, **parts}.items():
            for name in COLUMNS:
                value = row.get(name)
                value = value["value"] if isinstance(value, dict) else value
                if value is not None:
                    flat[f"{INVALID_METRIC_CHARACTERS.sub('', path)}/{name}"] = float(value)
    return flat
