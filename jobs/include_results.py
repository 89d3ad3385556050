"""Writes the results of the shipped models into the documents that show them.

    python -m valle.jobs.include_results            # after a new evaluation
    python -m valle.jobs.include_results --check    # what `make check` runs

The results are the JSON files in `release/`. A document marks a place for them with two lines,
`<!-- begin:nano-results -->` and `<!-- end:nano-results -->`; the text between them is replaced.
Documents are README.md, docs/*.md and every README.md below release/.
"""

import argparse
import json
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from valle.jobs.evaluation.codec_report import CodecReport
from valle.jobs.evaluation.intervals import Interval
from valle.jobs.evaluation.report import read_report, table
from valle.jobs.evaluation.results import Metrics

ROOT = Path(__file__).resolve().parents[1]
RELEASE = ROOT / "release"
NANO_REPORT = RELEASE / "nano" / "report.json"
DOCUMENTS = ("README.md", "docs/*.md", "release/**/README.md")
REGION = re.compile(r"<!-- begin:([\w-]+) -->\n(.*?)<!-- end:\1 -->", re.DOTALL)
MARKER = re.compile(r"<!-- (?:begin|end):[\w-]+ -->")

NANO_SYSTEMS = {
    "recording": "recording",
    "codec": "through the codec",
    "nar": "NAR on the true first codebook",
    "cross": "**AR + NAR, prompted by another recording**",
    "chunked": "the same, NAR decoded chunk by chunk (`chunked`)",
    "continuation": "AR + NAR, prompted by the reference's first half",
}
"""System of the report and its label in the table, in the order shown."""

CODEC_RECORDINGS = {
    "en": "English, Allison Smith",
    "es": "Spanish, Allison Smith",
    "fr": "French, June Wallack",
}
"""Suffix of `evaluation-*.json`: language and speaker of the recordings."""


def nano_results() -> str:
    """Table of nano's report: systems by metrics."""
    report = read_report(str(NANO_REPORT))
    speakers = {result.speaker for result in report.results}
    head = (
        f"{report.systems['cross'].items} sentences, {len(speakers)} speakers",
        "WER (95 %)",
        f"WER, {report.metric_models.second_recognizer}",
        "similarity to the prompt, to other speakers",
        "speaker ID accuracy",
        "DistillMOS",
        "loops, empty, length limit",
    )
    rows = [
        (label, *_nano_cells(report.systems[system]))
        for system, label in NANO_SYSTEMS.items()
        if system in report.systems
    ]
    return table(head, rows)


def _nano_cells(metrics: Metrics) -> tuple[str, ...]:
    return (
        _percent_with_interval(metrics.wer),
        _percent(metrics.second_wer, digits=1),
        f"{_number(metrics.speaker_similarity)}, {_number(metrics.impostor_similarity)}",
        f"{_percent(metrics.speaker_id_accuracy)} of {metrics.n_speakers}",
        _number(metrics.distillmos),
        _percent(metrics.faults),
    )


def nano_summary() -> str:
    """Nano's word error rate and speaker ID accuracy in two sentences."""
    model = read_report(str(NANO_REPORT)).systems["cross"]
    seen, unseen, people = (
        model.by.group[name] for name in ("seen voices", "unseen voices", "unseen people")
    )
    text = (
        f"Word error rate {_percent_with_interval(model.wer)}: "
        f"{_percent_with_interval(seen.wer)} in voices of the training data, "
        f"{_percent_with_interval(unseen.wer)} in other synthetic voices, "
        f"{_percent_with_interval(people.wer)} in the voices of {people.n_speakers} people. "
        f"Speaker ID accuracy {_percent(model.speaker_id_accuracy)} among {model.n_speakers} "
        f"speakers, {_percent(people.speaker_id_accuracy)} among the {people.n_speakers} people."
    )
    return textwrap.fill(text, 99) + "\n"


def codec_results() -> str:
    """Table of nano's codec: the recordings and their reconstruction."""
    report = _read_codec_report("nano/codec/evaluation.json")
    n_codebooks = len(report.codebook_usage)
    systems = report.systems["recording"], report.systems[f"{n_codebooks} codebooks"]
    usage = ", ".join(f"{share * 100:.0f}" for share in report.codebook_usage)
    recordings = f"{report.recordings} English prompts by Allison Smith, {report.seconds:.0f} s"
    return table(
        (recordings, "recording", "through the codec"),
        [
            ("WER, whisper tiny.en", *(_percent(metrics.wer, digits=1) for metrics in systems)),
            ("DistillMOS", *(_number(metrics.distillmos) for metrics in systems)),
            (f"entries in use, codebooks 1 to {n_codebooks}", "", f"{usage} %"),
        ],
    )


def nano2_codec_results() -> str:
    """Table of nano 2's codec: languages and numbers of codebooks."""
    rows = []
    for suffix, label in CODEC_RECORDINGS.items():
        report = _read_codec_report(f"nano2/codec/evaluation-{suffix}.json")
        recordings = f"{label}, {report.recordings} prompts, {report.seconds:.0f} s"
        for system, metrics in report.systems.items():
            name = "the vocoder alone, unquantised" if system == "unquantised" else system
            numbers = _number(metrics.distillmos), _number(metrics.speaker_similarity)
            rows.append((recordings, name, _percent(metrics.wer, digits=1), *numbers))
            recordings = ""  # in the first row of a language only
    head = "recordings", "system", "WER, whisper tiny.en", "DistillMOS", "similarity (WeSpeaker)"
    return table(head, rows)


REGIONS: dict[str, Callable[[], str]] = {
    "nano-results": nano_results,
    "nano-summary": nano_summary,
    "codec-results": codec_results,
    "nano2-codec-results": nano2_codec_results,
}
"""Name of a region: the function that makes its text."""


def fill_regions(document: str) -> str:
    """`document` with the present results between its markers.

    Raises ValueError for an unknown region and for a marker without its partner.
    """

    def fill(region: re.Match[str]) -> str:
        name = region.group(1)
        if name not in REGIONS:
            raise ValueError(f"no region {name!r}; expected one of {', '.join(REGIONS)}")
        return f"<!-- begin:{name} -->\n{REGIONS[name]()}<!-- end:{name} -->"

    if stray := MARKER.search(REGION.sub("", document)):
        raise ValueError(f"{stray.group()} has no partner")
    return REGION.sub(fill, document)


def stale_documents(root: Path = ROOT) -> dict[Path, str]:
    """Documents below `root` whose regions are out of date, with the text that they should have.

    Raises ValueError with the document's name where a region is wrong.
    """
    stale = {}
    for path in sorted(path for pattern in DOCUMENTS for path in root.glob(pattern)):
        document = path.read_text()
        try:
            current = fill_regions(document)
        except ValueError as error:
            raise ValueError(f"{path.relative_to(root)}: {error}") from error
        if current != document:
            stale[path] = current
    return stale


def _read_codec_report(path: str) -> CodecReport:
    return CodecReport.from_json(json.loads((RELEASE / path).read_text()))


def _number(value: Interval | float | None) -> str:
    value = value.value if isinstance(value, Interval) else value
    return "" if value is None else f"{value:.2f}"


def _percent(share: Interval | float | None, digits: int = 0) -> str:
    share = share.value if isinstance(share, Interval) else share
    return "" if share is None else f"{share * 100:.{digits}f} %"


def _percent_with_interval(share: Interval) -> str:
    return f"{_percent(share, digits=1)} ({share.low * 100:.0f} to {share.high * 100:.0f})"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.include_results`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; status 1 where a document is stale"
    )
    check = parser.parse_args(argv).check
    try:
        stale = stale_documents()
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    for path, current in stale.items():
        print(f"{'stale' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            path.write_text(current)
    if check and stale:
        parser.exit(1, "run python -m valle.jobs.include_results\n")


if __name__ == "__main__":
    main()
