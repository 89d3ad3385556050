"""The quality gate: which figures let a candidate become champion."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from valle.jobs.evaluation import report, scores


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A figure of the report and what it must reach."""

    figure: str
    """`system/figure` or `system/group/figure`, as MLflow shows it: codec/distillmos, cross/unseen
    people/wer ... Shares are 0 to 1."""

    at_most: float | None = None
    """Upper bound."""

    at_least: float | None = None
    """Lower bound."""

    above: str | None = None
    """Another figure: the bounds then hold for the difference to it (codec/wer above
    recording/wer)."""

    def __post_init__(self) -> None:
        if self.at_most is None and self.at_least is None:
            raise ValueError(f"gate: {self.figure} needs at_most or at_least")
        for name in (self.figure, self.above or "cross/wer"):
            figure = name.rpartition("/")[2]
            if figure not in report.COLUMNS:
                raise ValueError(
                    f"gate: {name!r} is no figure; expected system/figure or system/group/figure, "
                    f"the figure one of {', '.join(report.COLUMNS)}"
                )


COMPARED = {"word_errors": +1, "distillmos": -1, "cosine_own": -1}
"""What a candidate is compared with its champion by; +1 where less is better."""


def refusals(
    content: dict[str, Any], bounds: Sequence[Bound], champion: dict[str, Any] | None
) -> list[str]:
    """Why this report does not open the gate; empty when it does."""
    return [*_out_of_bounds(content, bounds), *_losses(content, champion)]


def _out_of_bounds(content: dict[str, Any], bounds: Sequence[Bound]) -> Iterator[str]:
    found = report.metrics(content)
    for bound in bounds:
        names = [bound.figure] + ([bound.above] if bound.above else [])
        if missing := [name for name in names if name not in found]:
            yield f"{missing[0]} is not in the report"
            continue
        value = found[bound.figure] - (found[bound.above] if bound.above else 0.0)
        label = bound.figure + (f" minus {bound.above}" if bound.above else "")
        if bound.at_most is not None and value > bound.at_most:
            yield f"{label} is {value:.3f}, at most {bound.at_most:g} is allowed"
        if bound.at_least is not None and value < bound.at_least:
            yield f"{label} is {value:.3f}, at least {bound.at_least:g} is needed"


def _losses(content: dict[str, Any], champion: dict[str, Any] | None) -> Iterator[str]:
    """Figures that are worse than the champion's by more than noise, item by item."""
    if champion is None:
        return
    for field, sign in COMPARED.items():
        found = scores.difference(content["records"], champion["records"], "cross", field)
        if found is None:
            yield "the champion was judged on other items: evaluate it on this set first"
            return
        worse = found["low"] > 0 if sign > 0 else found["high"] < 0
        if worse:
            yield (
                f"{field} loses to the champion by {abs(found['value']):.3f} "
                f"(95 % interval {found['low']:.3f} to {found['high']:.3f})"
            )
