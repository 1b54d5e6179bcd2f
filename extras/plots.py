"""Pictures of trainings, in two panels: against tokens, and against minutes. They need the package matplotlib."""
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm.files import atomic_write

Points = Sequence[tuple[float, float]]
SHARE = 0.05        # of a noisy curve, so much of it to each side is averaged to smooth it
Y_ZOOM_AFTER = 0.1         # the y axis shows what comes after this part of a run whole; losses before it may be cut off


def new_figure(ylabel: str) -> tuple[Any, Any, Any]:
    """A figure and its panels, for curves against tokens and against minutes. Raises ImportError."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.set(xlabel="tokens", ylabel=ylabel)
    left.xaxis.set_major_formatter(lambda count, _: format_si(count))
    right.set(xlabel="minutes")
    for panel in (left, right):
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    return figure, left, right


def plot_smoothed(panel: Any, points: Points, label: str, color: str) -> None:
    """A curve in pale, and its average over it."""
    x, y = np.array(points, float).reshape(-1, 2).T
    panel.plot(x, y, color=color, alpha=0.3, linewidth=0.8)
    panel.plot(x, smooth(y), color=color, label=label)


def plot_evals(panel: Any, points: Points, label: str, color: str, text: Callable[[float], str] | None = None) -> None:
    """A curve of evaluations, with a star at the lowest, and beside it what `text` says of it, if anything."""
    if not points:
        return
    panel.plot(*zip(*points), "o-", markersize=3.5, color=color, label=label)
    x, y = min(points, key=lambda point: point[1])
    panel.plot([x], [y], "*", markersize=15, color=color, markeredgecolor="white", zorder=3)
    if text:
        panel.annotate(text(y), (x, y), (6, 12), textcoords="offset points", ha="right", color=color,
                       bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})


def plot_reference(panel: Any, points: Points, label: str) -> None:
    if points:
        panel.plot(*zip(*points), color="0.6", label=label)


def add_right_axis(panel: Any, ratio: float, label: str) -> None:
    """A scale on the right side of a panel, of numbers that are `ratio` times those on the left."""
    panel.secondary_yaxis("right", functions=(lambda y: y * ratio, lambda y: y / ratio)).set_ylabel(label)


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of each value and its neighbours on both sides, as far as there are any."""
    places, reach = np.arange(len(values)), round(SHARE * len(values))
    begins, ends = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    sums = np.concatenate([[0], np.cumsum(values)])
    return (sums[ends] - sums[begins]) / (ends - begins)


def zoom_y_axis(panel: Any, curves: Sequence[Points]) -> None:
    """Give the y axis, which the panels share, to what comes after the first, steep part of the curves."""
    seen = [y for points in curves for x, y in points if x >= Y_ZOOM_AFTER * points[-1][0]]
    if seen and (room := 0.1 * (max(seen) - min(seen))):
        panel.set_ylim(min(seen) - room, max(seen) + room)


def save(figure: Any, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def format_si(count: float) -> str:
    """1,500,000 as 1.5M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= unit:
            return f"{count / unit:g}{name}"
    return f"{count:g}"
