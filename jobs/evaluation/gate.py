"""The quality gate: the metrics that a candidate must reach to become champion."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

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
class Violation:
    """One reason why the gate refuses a candidate."""

    metric: str
    reason: str
    """What follows the metric's name in a sentence."""

    def __str__(self) -> str:
        return f"{self.metric} {self.reason}"


@dataclass(frozen=True)
class Verdict:
    """The gate's decision about one candidate."""

    violations: tuple[Violation, ...]

    @property
    def passed(self) -> bool:
        """True if there is no violation."""
        return not self.violations

    def __str__(self) -> str:
        return "; ".join(map(str, self.violations)) or "passed the gate"


REGRESSION_SIGNS: dict[ComparedField, int] = {
    "word_errors": +1, "distillmos": -1, "speaker_similarity": -1,
}  # fmt: skip
"""Fields by which a candidate is compared with the champion; +1 where less is better."""


def decide(
    report: EvaluationReport, bounds: Sequence[Bound], champion: EvaluationReport | None
) -> Verdict:
    """Whether the model of `report` may become champion: within all bounds, and no regression."""
    violations = [*_out_of_bounds(report, bounds)]
    if champion is not None:
        violations += _regressions(report, champion)
    return Verdict(tuple(violations))


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


def _regressions(report: EvaluationReport, champion: EvaluationReport) -> Iterator[Violation]:
    """Metrics that are worse than the champion's beyond noise, on the items both have."""
    for name, sign in REGRESSION_SIGNS.items():
        difference = paired_difference(report.results, champion.results, "cross", name)
        if difference is None:
            yield Violation(
                name,
                "has no item in common with the champion's report: "
                "evaluate the champion on this set",
            )
            return
        # beyond noise: the whole interval lies on the side of the champion
        worse = difference.low > 0 if sign > 0 else difference.high < 0
        if worse:
            yield Violation(
                name,
                f"is worse than the champion's by {abs(difference.value):.3f} "
                f"(95 % interval {difference.low:.3f} to {difference.high:.3f})",
            )
