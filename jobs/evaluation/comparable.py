"""Whether two evaluation reports can be compared: the same conditions, items and metrics."""

from collections.abc import Iterator
from dataclasses import dataclass

from valle.jobs.evaluation.results import EvaluationReport, ItemResult
from valle.jobs.evaluation.scores import ComparedField
from valle.platform.tracking import flatten

REMEDY = (
    "evaluate the champion under the candidate's conditions (`valle evaluate --recipe ... "
    "model=models:/valle/N`) and attach the report (`valle model-versions attach-report N "
    "report.json`)"
)


@dataclass(frozen=True)
class Violation:
    """One reason why the gate refuses a candidate."""

    metric: str
    reason: str
    """What follows the metric's name in a sentence."""

    def __str__(self) -> str:
        return f"{self.metric} {self.reason}"


def differences(report: EvaluationReport, champion: EvaluationReport) -> Iterator[Violation]:
    """Yields each difference that makes two reports incomparable. The last one also says how to
    evaluate the champion again."""
    reasons = [*_conditions(report, champion), *_items(report, champion)]
    if not reasons:
        reasons = [*_missing_metrics(report, champion)]
    for number, (name, reason) in enumerate(reasons):
        last = number == len(reasons) - 1
        yield Violation(name, reason + (f"; {REMEDY}" if last else ""))


def _conditions(report: EvaluationReport, champion: EvaluationReport) -> Iterator[tuple[str, str]]:
    """(name, difference) of metric models, precision, text normalization and sampling."""
    pairs: dict[str, tuple[object, object]] = {
        "recognizer": (report.metric_models.recognizer, champion.metric_models.recognizer),
        "speaker_encoder": (
            report.metric_models.speaker_encoder,
            champion.metric_models.speaker_encoder,
        ),
        "precision": (report.precision, champion.precision),
        "text_version": (report.text_version, champion.text_version),
    }
    ours, theirs = (_comparable_settings(r) for r in (report, champion))
    for key in sorted(ours.keys() | theirs.keys()):
        pairs[f"synthesis.{key}"] = (ours.get(key), theirs.get(key))
    for name, (own, other) in pairs.items():
        if own != other:
            yield name, f"is {own}, but {other} in the champion's report"


def _comparable_settings(report: EvaluationReport) -> dict[str, object]:
    """The synthesis settings by name; tuples as lists, which is how a report read back has them."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in flatten(report.synthesis)
    }


def _items(report: EvaluationReport, champion: EvaluationReport) -> Iterator[tuple[str, str]]:
    """(items, difference) where the outputs of `cross` are not of the same sentences."""
    ours, theirs = (_by_item(r) for r in (report, champion))
    for missing, what in (
        (theirs.keys() - ours.keys(), "lacks"),
        (ours.keys() - theirs.keys(), "has, beyond the champion's report,"),
    ):
        if missing:
            some = ", ".join(sorted(missing)[:3]) + (", ..." if len(missing) > 3 else "")
            yield (
                "items",
                f"of {report.items} ({len(ours)}; the champion's {len(theirs)} of "
                f"{champion.items}): the report {what} {len(missing)}: {some}",
            )
    changed = [
        item
        for item in sorted(ours.keys() & theirs.keys())
        if (ours[item].text, ours[item].prompt) != (theirs[item].text, theirs[item].prompt)
    ]
    if changed:
        yield "items", f"have another text or prompt than the champion's: {', '.join(changed[:3])}"


COMPARED_FIELDS: tuple[ComparedField, ...] = ("word_errors", "distillmos", "speaker_similarity")


def _missing_metrics(
    report: EvaluationReport, champion: EvaluationReport
) -> Iterator[tuple[str, str]]:
    """(metric, reason) where an output that is not empty was not measured in one report only."""
    ours, theirs = (_by_item(r) for r in (report, champion))
    for name in COMPARED_FIELDS:
        for have, lack, whose in (
            (theirs, ours, "the candidate's"),
            (ours, theirs, "the champion's"),
        ):
            items = [
                item
                for item, result in have.items()
                if getattr(result, name) is not None
                and getattr(lack[item], name) is None
                and not lack[item].empty
            ]
            if items:
                yield (
                    name,
                    f"is missing in {whose} report for {len(items)} of {len(have)} items "
                    f"({', '.join(sorted(items)[:3])}); is its metric model installed?",
                )


def empty_outputs(
    report: EvaluationReport, champion: EvaluationReport, name: ComparedField
) -> list[str]:
    """Ids of the items whose `name` cannot be compared, because an output is empty."""
    ours, theirs = (_by_item(r) for r in (report, champion))
    return [
        item
        for item in sorted(ours.keys() & theirs.keys())
        if None in (getattr(ours[item], name), getattr(theirs[item], name))
        and (ours[item].empty or theirs[item].empty)
    ]


def _by_item(report: EvaluationReport) -> dict[str, ItemResult]:
    return {result.id: result for result in report.results if result.system == "cross"}
