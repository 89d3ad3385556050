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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
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
    report = _read_json("release/nano/report.json")
    second_recognizer = report["judges"][1]
    head = (
        f"{report['systems']['cross']['items']} sentences, "
        f"{len({row['speaker'] for row in report['records']})} speakers",
        "WER (95 %)", f"WER, {second_recognizer}", "similarity to the prompt, to other speakers",
        "speaker ID accuracy", "DistillMOS", "loops, empty, length limit",
    )  # fmt: skip
    return _table(
        head,
        (
            _nano_row(label, report["systems"][system])
            for system, label in NANO_SYSTEMS.items()
            if system in report["systems"]
        ),
    )


def _nano_row(label: str, metrics: dict[str, Any]) -> tuple[str, ...]:
    own, other = (metrics[name]["value"] for name in ("cosine_own", "cosine_other"))
    return (
        label,
        _percent_with_interval(metrics["wer"]),
        _percent(metrics["second_wer"]["value"], digits=1),
        f"{own:.2f}, {other:.2f}",
        f"{_percent(metrics['identified']['value'])} of {metrics['voices']}",
        f"{metrics['distillmos']['value']:.2f}",
        _percent(metrics["faults"]),
    )


def nano_summary() -> str:
    """Nano's word error rate and speaker ID accuracy in two sentences."""
    model = _read_json("release/nano/report.json")["systems"]["cross"]
    seen, unseen, people = (
        model["by"]["group"][name] for name in ("seen voices", "unseen voices", "unseen people")
    )
    text = (
        f"Word error rate {_percent_with_interval(model['wer'])}: "
        f"{_percent_with_interval(seen['wer'])} in voices of the training data, "
        f"{_percent_with_interval(unseen['wer'])} in other synthetic voices, "
        f"{_percent_with_interval(people['wer'])} in the voices of {people['voices']} people. "
        f"Speaker ID accuracy {_percent(model['identified']['value'])} among {model['voices']} "
        f"speakers, {_percent(people['identified']['value'])} among the {people['voices']} people."
    )
    return textwrap.fill(text, 99) + "\n"


def codec_results() -> str:
    """Table of nano's codec: the recordings and their reconstruction."""
    report = _read_json("release/nano/codec/evaluation.json")
    usage = ", ".join(f"{share * 100:.0f}" for share in report["codebook_use"])
    wer, mos = (
        [report[f"{metric}_{system}"] for system in ("original", "reconstruction")]
        for metric in ("wer", "distillmos")
    )
    return _table(
        (
            f"{report['recordings']} English prompts by Allison Smith, {report['seconds']:.0f} s",
            "recording",
            "through the codec",
        ),
        [
            ("WER, whisper tiny.en", *(_percent(value, digits=1) for value in wer)),
            ("DistillMOS", *(f"{value:.2f}" for value in mos)),
            (f"entries in use, codebooks 1 to {len(report['codebook_use'])}", "", f"{usage} %"),
        ],
    )


def nano2_codec_results() -> str:
    """Table of nano 2's codec: languages and numbers of codebooks."""
    rows = []
    for suffix, label in CODEC_RECORDINGS.items():
        report = _read_json(f"release/nano2/codec/evaluation-{suffix}.json")
        recordings = f"{label}, {report['recordings']} prompts, {report['seconds']:.0f} s"
        for system, metrics in report["versions"].items():
            rows.append(
                (
                    recordings,
                    "the vocoder alone, unquantised" if system == "unquantised" else system,
                    _percent(metrics["wer"], digits=1) if "wer" in metrics else "",
                    f"{metrics['distillmos']:.2f}",
                    f"{metrics['similarity']:.2f}",
                )
            )
            recordings = ""
    head = "recordings", "system", "WER, whisper tiny.en", "DistillMOS", "similarity (WeSpeaker)"
    return _table(head, rows)


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


def _read_json(path: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / path).read_text())
    return content


def _percent(share: float, digits: int = 0) -> str:
    return f"{share * 100:.{digits}f} %"


def _percent_with_interval(interval: dict[str, float]) -> str:
    low, high = (f"{interval[end] * 100:.0f}" for end in ("low", "high"))
    return f"{_percent(interval['value'], digits=1)} ({low} to {high})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = "|---" * len(head) + "|\n"
    first, *others = (f"| {' | '.join(cells)} |\n" for cells in (head, *rows))
    return first + rule + "".join(others)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see above."""
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
