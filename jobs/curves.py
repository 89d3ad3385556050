"""Draws what training runs logged, loss and word error rate against hours of training, as a PNG.

    python -m valle.jobs.curves nano-nar nano-ar --out docs/nano-curves.png

Hours in which a run stood still, between two sittings, are left out.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from valle.platform import tracking

PANELS = {
    "nats per code": {
        "train/loss": "training",
        "validation/loss": "held out",
        "validation/loss_wrong_text": "held out, another's text",
    },
    "WER of 20 sentences": {"validation/wer": "whisper tiny.en"},
}
PAUSE = 0.25
"""Hours without a metric that count as a pause."""

Curve = list[tuple[float, float]]


def hours(history: Sequence[tuple[float, float]], clock: Sequence[float]) -> Curve:
    """(hours of training, value) of (time in hours, value), pauses of the run's `clock` cut out."""
    trained, since = {clock[0]: 0.0}, 0.0
    for before, now in itertools.pairwise(clock):
        since += now - before if now - before < PAUSE else 0.0
        trained[now] = since
    return [(trained[time], value) for time, value in history]


def read(names: Sequence[str]) -> dict[str, dict[str, Curve]]:
    """Curves by run and metric. Raises ValueError for a run that is not there."""
    figures = [metric for panel in PANELS.values() for metric in panel]
    curves: dict[str, dict[str, Curve]] = {}
    for name in names:
        found = {metric: tracking.history(name, metric) for metric in figures}
        clock = sorted({time for history in found.values() for time, _ in history})
        if not clock:
            raise ValueError(f"no run {name!r} with metrics in MLflow")
        curves[name] = {metric: hours(history, clock) for metric, history in found.items()}
    return curves


def draw(curves: dict[str, dict[str, Curve]], out: Path) -> None:
    """A row of panels per run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4 * len(curves)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(curves), len(PANELS), squeeze=False)
    for row, (name, found) in zip(grid, curves.items(), strict=True):
        for axes, (label, panel) in zip(row, PANELS.items(), strict=True):
            for metric, title in panel.items():
                if found[metric]:
                    style = "o-" if len(found[metric]) < 40 else "-"
                    axes.plot(*zip(*found[metric], strict=True), style, label=title, markersize=3)
            axes.set(title=name, xlabel="hours of training", ylabel=label)
            axes.grid(alpha=0.3)
            if axes.has_data():
                axes.legend()
    figure.savefig(out, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="names of MLflow runs, such as nano-ar")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    arguments = parser.parse_args(argv)
    try:
        curves = read(arguments.runs)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    draw(curves, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
