"""The quality gate: the metrics that a candidate must reach to become champion."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from valle.jobs.evaluation.comparable import Violation, differences, empty_outputs
from valle.jobs.evaluation.format1 import RENAMED_METRICS
from valle.jobs.evaluation.report import COLUMNS, mlflow_metrics
from valle.jobs.evaluation.results import EvaluationReport
from valle.jobs.evaluation.scores import ComparedField, paired_difference
from valle.platform.recipe import formerly


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A metric of the report and the value it must reach."""

    metric: str = field(metadata=formerly("figure"))
    """`system/metric` or `system/group/metric`, as in MLflow: codec/distillmos, cross/unseen
    people/wer ... Shares are 0 to 1."""

    at_most: float | None = None
    """Upper bound."""

    at_least: float | None = None
    """Lower bound."""

    minus: str | None = field(default=None, metadata=formerly("above"))
    """Another metric: the bounds then hold for the difference to it (codec/wer minus
    recording/wer)."""

    def __post_init__(self) -> None:
        if self.at_most is None and self.at_least is None:
            raise ValueError(f"gate: {self.metric} needs at_most or at_least")
        for name in (self.metric, self.minus or "cross/wer"):
            path, _, metric = name.rpartition("/")
            if metric in RENAMED_METRICS:
                raise ValueError(f"gate: {name!r} is called {path}/{RENAMED_METRICS[metric]} now")
            if metric not in COLUMNS:
                raise ValueError(
                    f"gate: {name!r} is no metric; expected system/metric or system/group/metric, "
                    f"the metric one of {', '.join(COLUMNS)}"
                )


@dataclass(frozen=True)
class Verdict:
    """The gate's decision about one candidate."""

    violations: tuple[Violation, ...]
    notes: tuple[str, ...] = ()
    """What the comparison left out, and why that is no violation."""

    @property
    def passed(self) -> bool:
        """True if there is no violation."""
        return not self.violations

    def __str__(self) -> str:
        notes = f" ({'; '.join(self.notes)})" if self.notes else ""
        return ("; ".join(map(str, self.violations)) or "passed the gate") + notes


REGRESSION_SIGNS: dict[ComparedField, int] = {
    "word_errors": +1, "distillmos": -1, "speaker_similarity": -1,
}  # fmt: skip
"""Fields by which a candidate is compared with the champion; +1 where less is better."""


def decide(
    report: EvaluationReport, bounds: Sequence[Bound], champion: EvaluationReport | None
) -> Verdict:
    """Whether the model of `report` may become champion: measured on the whole set, within all
    bounds, and no regression.

    A champion's report that was made under other conditions is not compared. That is a violation,
    which names the difference and says how to evaluate the champion again.
    """
    violations = [*_out_of_bounds(report, bounds)]
    if report.limit:
        violations.append(
            Violation("limit", f"is {report.limit}: the gate is for the whole set; leave it out")
        )
    if not any(result.system == "cross" for result in report.results):
        violations.append(Violation("cross", "was not evaluated: it is the model's own speech"))
    notes: list[str] = []
    if champion is not None:
        unlike = [*differences(report, champion)]
        violations += unlike or _regressions(report, champion, notes)
    return Verdict(tuple(violations), tuple(notes))


def _out_of_bounds(report: EvaluationReport, bounds: Sequence[Bound]) -> Iterator[Violation]:
    metrics = mlflow_metrics(report)
    for bound in bounds:
        names = [bound.metric] + ([bound.minus] if bound.minus else [])
        if missing := [name for name in names if name not in metrics]:
            yield Violation(missing[0], "is not in the report")
            continue
        value = metrics[bound.metric] - (metrics[bound.minus] if bound.minus else 0.0)
        label = bound.metric + (f" minus {bound.minus}" if bound.minus else "")
        if bound.at_most is not None and value > bound.at_most:
            yield Violation(label, f"is {value:.3f}, at most {bound.at_most:g} is allowed")
        if bound.at_least is not None and value < bound.at_least:
            yield Violation(label, f"is {value:.3f}, at least {bound.at_least:g} is needed")


def _regressions(
    report: EvaluationReport, champion: EvaluationReport, notes: list[str]
) -> Iterator[Violation]:
    """Metrics that are worse than the champion's beyond noise; `notes` gets what is left out."""
    for name, sign in REGRESSION_SIGNS.items():
        left_out = empty_outputs(report, champion, name)
        if left_out:
            notes.append(
                f"{name} compared without {len(left_out)} items with an empty output: "
                f"{', '.join(left_out[:5])}"
            )
        difference = paired_difference(report.results, champion.results, "cross", name)
        if difference is None:
            yield Violation(name, "was measured on no item of both reports")
            continue
        # beyond noise: the whole interval lies on the side of the champion
        worse = difference.low > 0 if sign > 0 else difference.high < 0
        if worse:
            yield Violation(
                name,
                f"is worse than the champion's by {abs(difference.value):.3f} "
                f"(95 % interval {difference.low:.3f} to {difference.high:.3f})",
            )
