"""The quality gate: which figures let a candidate become champion."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from valle.jobs.evaluation.report import COLUMNS, Report, mlflow_metrics
from valle.jobs.evaluation.scores import paired_difference
from valle.platform.recipe import formerly


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A metric of the report and what it must reach."""

    metric: str = field(metadata=formerly("figure"))
    """`system/metric` or `system/group/metric`, as MLflow shows it: codec/distillmos, cross/unseen
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
            if name.rpartition("/")[2] not in COLUMNS:
                raise ValueError(
                    f"gate: {name!r} is no metric; expected system/metric or system/group/metric, "
                    f"the metric one of {', '.join(COLUMNS)}"
                )


REGRESSION_SIGNS = {"word_errors": +1, "distillmos": -1, "cosine_own": -1}
"""What a candidate is compared with its champion by; +1 where less is better."""


def violations(report: Report, bounds: Sequence[Bound], champion: Report | None) -> list[str]:
    """Why this report does not open the gate; empty when it does."""
    return [*_out_of_bounds(report, bounds), *_regressions(report, champion)]


def _out_of_bounds(report: Report, bounds: Sequence[Bound]) -> Iterator[str]:
    metrics = mlflow_metrics(report)
    for bound in bounds:
        names = [bound.metric] + ([bound.minus] if bound.minus else [])
        if missing := [name for name in names if name not in metrics]:
            yield f"{missing[0]} is not in the report"
            continue
        value = metrics[bound.metric] - (metrics[bound.minus] if bound.minus else 0.0)
        label = bound.metric + (f" minus {bound.minus}" if bound.minus else "")
        if bound.at_most is not None and value > bound.at_most:
            yield f"{label} is {value:.3f}, at most {bound.at_most:g} is allowed"
        if bound.at_least is not None and value < bound.at_least:
            yield f"{label} is {value:.3f}, at least {bound.at_least:g} is needed"


def _regressions(report: Report, champion: Report | None) -> Iterator[str]:
    """Figures that are worse than the champion's by more than noise, item by item."""
    if champion is None:
        return
    for name, sign in REGRESSION_SIGNS.items():
        difference = paired_difference(report["records"], champion["records"], "cross", name)
        if difference is None:
            yield "the champion was judged on other items: evaluate it on this set first"
            return
        worse = difference["low"] > 0 if sign > 0 else difference["high"] < 0
        if worse:
            yield (
                f"{name} loses to the champion by {abs(difference['value']):.3f} "
                f"(95 % interval {difference['low']:.3f} to {difference['high']:.3f})"
            )
