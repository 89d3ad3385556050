"""An evaluation as JSON for machines, Markdown for the repository, HTML to listen to."""

import re
from pathlib import Path
from typing import Any

from valle.jobs.evaluation import scores
from valle.platform import audio, storage
from valle.platform.spectrogram import spectrogram

Content = dict[str, Any]

TEMPLATE = Path(__file__).parent / "report.html.j2"
WORST = 10

COLUMNS = {
    "items": "items", "wer": "WER %", "second_wer": "WER 2 %", "cer": "CER %",
    "cosine_own": "own voice", "cosine_other": "other voices", "identified": "identified %",
    "equal_error_rate": "EER %", "distillmos": "DistillMOS", "dnsmos": "DNSMOS",
    "speech_fraction": "speech %", "faults": "faults %", "real_time_factor": "RTF",
}  # fmt: skip
"""Figures of a row, in the order shown. A `%` in the title multiplies by a hundred."""


NOT_IN_NAMES = re.compile(r"[^\w ./:-]")
"""What MLflow does not take in the name of a figure."""


def write(content: Content, out: str, earlier: Content | None) -> None:
    """Puts `report.json`, `report.md`, `report.html` and the worst spectrograms into `out`."""
    storage.write_json(storage.join(out, "report.json"), content)
    bad = worst(content)
    for record in bad:
        _draw(record, out)
    text = markdown(content, bad, earlier)
    storage.write_bytes(storage.join(out, "report.md"), text.encode())
    page = html(content, bad, earlier)
    storage.write_bytes(storage.join(out, "report.html"), page.encode())


def worst(content: Content, count: int = WORST) -> list[Content]:
    """The model's own sentences (`cross`) with the most word errors per word."""
    rows = [row for row in content["records"] if row["system"] == "cross"]
    return sorted(rows, key=lambda row: -row["word_errors"] / row["words"])[:count]


def _draw(record: Content, out: str) -> None:
    for system in ("cross", "recording"):
        path = storage.join(out, "audio", system, f"{record['id']}.wav")
        if storage.exists(path):
            wave = audio.read(storage.read_bytes(path), max_seconds=120)
            picture = spectrogram(wave, f"{system}: {record['text'][:70]}")
            storage.write_bytes(path.removesuffix(".wav") + ".png", picture)


def cell(figures: Content, name: str) -> str:
    """One figure as text, with its 95 % interval where it has one; empty when not measured."""
    value = figures.get(name)
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


def markdown_table(content: Content, key: str | None = None) -> str:
    """Systems against figures; with `key` (group, language, speaker), the model's own parts."""
    rows = content["systems"]
    if key is not None:
        rows = rows["cross"]["by"][key] if "cross" in rows else {}
    names = [n for n in COLUMNS if any(cell(figures, n) for figures in rows.values())]
    head = f"| | {' | '.join(COLUMNS[n] for n in names)} |\n|---|{'---|' * len(names)}\n"
    lines = [
        f"| {row} | {' | '.join(cell(figures, n) for n in names)} |\n"
        for row, figures in rows.items()
    ]
    return head + "".join(lines)


def markdown(content: Content, bad: list[Content], earlier: Content | None) -> str:
    """The report as a page of Markdown."""
    checked = (
        "No sentence and no unseen voice of the set is in the training data (checked)."
        if content["training_data_checked"]
        else "Whether sentences or voices of the set were trained on was **not checked**."
    )
    among = content["identified_among"]
    if among:
        checked += f" Voices are identified among {', '.join(among)}."
    parts = [
        f"# Evaluation of {content['model']} on {content['items']}\n",
        f"Code {content['code_version']}; codec {content['bundle']['codec']['name']}; "
        f"{content['precision']}. Judges: "
        f"{', '.join(filter(None, content['judges']))}. {checked} In brackets: 95 % bootstrap "
        "interval over items.\n",
        markdown_table(content),
    ]
    if earlier is not None:
        parts.append(_comparison(content, earlier))
    for key in ("group", "language", "speaker"):
        parts.append(f"## The model by {key}\n\n{markdown_table(content, key)}")
    lines = [
        f"| {row['id']} | {row['text']} | {row['heard']} | {row['word_errors']}/{row['words']} |"
        for row in bad
    ]
    parts.append(
        "## Worst\n\n| id | text | heard | errors |\n|---|---|---|---|\n" + "\n".join(lines)
    )
    return "\n".join(parts) + "\n"


def _comparison(content: Content, earlier: Content) -> str:
    """Against an earlier report, on the items both have."""
    lines = []
    for system in content["systems"]:
        found = scores.difference(content["records"], earlier["records"], system)
        if found is not None:
            lines.append(f"| {system} | {cell({'wer': found}, 'wer')} |\n")
    return (
        f"## Against {earlier['model']}\n\nWER minus the earlier model's, in points; an interval "
        "that holds 0 is noise.\n\n| | points |\n|---|---|\n" + "".join(lines)
    )


def html(content: Content, bad: list[Content], earlier: Content | None) -> str:
    """The report as a page with players; it expects `audio/` beside it."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["cell"] = cell
    by_item: dict[str, dict[str, Content]] = {}
    for record in content["records"]:
        by_item.setdefault(record["id"], {})[record["system"]] = record
    return environment.from_string(TEMPLATE.read_text()).render(
        content=content, columns=COLUMNS, bad=bad, items=by_item,
        comparison=_comparison(content, earlier) if earlier else None,
    )  # fmt: skip


def metrics(content: Content) -> dict[str, float]:
    """Figures as flat names for MLflow: `cross/wer`, `cross/unseen people/wer` ..."""
    flat: dict[str, float] = {}
    for system, figures in content["systems"].items():
        parts = {f"{system}/{group}": part for group, part in figures["by"]["group"].items()}
        for path, row in {system: figures, **parts}.items():
            for name in COLUMNS:
                value = row.get(name)
                value = value["value"] if isinstance(value, dict) else value
                if value is not None:
                    flat[f"{NOT_IN_NAMES.sub('', path)}/{name}"] = float(value)
    return flat
