"""Figures of measurements, drawn without a display and without matplotlib's global state."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of a size in inches; `savefig` writes it with 110 dots per inch."""
    from matplotlib.figure import Figure  # a bare machine with a GPU has no matplotlib

    return Figure(figsize=(width, height), dpi=110, layout="constrained")
