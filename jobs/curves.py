"""Draws the losses and word error rates of training runs against hours of training, as a PNG.

    python -m valle.jobs.curves nano-nar nano-ar --out docs/nano-curves.png

The metrics come from MLflow. Pauses between two starts of a run are cut out.
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
"""Label of a panel: its metrics in MLflow and their labels."""
PAUSE_HOURS = 0.25
"""Hours; a longer time without a metric is a pause."""

Curve = list[tuple[float, float]]
"""(hours of training, value), in order."""


def training_hours(history: Sequence[tuple[float, float]], clock: Sequence[float]) -> Curve:
    """The curve of `history`, (time in hours, value) pairs, without the pauses of the run.

    `clock` holds the times of all metrics of the run, in order.
    """
    hours, total = {clock[0]: 0.0}, 0.0
    for previous, current in itertools.pairwise(clock):
        total += current - previous if current - previous < PAUSE_HOURS else 0.0
        hours[current] = total
    return [(hours[time], value) for time, value in history]


def read_curves(names: Sequence[str]) -> dict[str, dict[str, Curve]]:
    """Curves by run and metric. Raises ValueError for a run without metrics."""
    metrics = [metric for panel in PANELS.values() for metric in panel]
    curves: dict[str, dict[str, Curve]] = {}
    for name in names:
        histories = {metric: tracking.metric_history(name, metric) for metric in metrics}
        clock = sorted({time for history in histories.values() for time, _ in history})
        if not clock:
            raise ValueError(f"no run {name!r} with metrics in MLflow")
        curves[name] = {
            metric: training_hours(history, clock) for metric, history in histories.items()
        }
    return curves


def draw(curves: dict[str, dict[str, Curve]], out: Path) -> None:
    """Writes a PNG with a row of panels for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4 * len(curves)), layout="constrained")
    grid = figure.subplots(len(curves), len(PANELS), squeeze=False)
    for row, (name, by_metric) in zip(grid, curves.items(), strict=True):
        for axes, (label, panel) in zip(row, PANELS.items(), strict=True):
            for metric, title in panel.items():
                if curve := by_metric[metric]:
                    style = "o-" if len(curve) < 40 else "-"  # dots would merge to a band
                    axes.plot(*zip(*curve, strict=True), style, label=title, markersize=3)
            axes.set(title=name, xlabel="hours of training", ylabel=label)
            axes.grid(alpha=0.3)
            if axes.has_data():
                axes.legend()
    figure.savefig(out, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.curves`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="names of MLflow runs, such as nano-ar")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    arguments = parser.parse_args(argv)
    try:
        curves = read_curves(arguments.runs)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    draw(curves, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
