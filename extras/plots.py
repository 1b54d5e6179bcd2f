"""Draw the curves of runs in two panels: against tokens and against minutes. Needs the package matplotlib."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm.files import atomic_write
from tinyllm.optional import require_package

Points = Sequence[tuple[float, float]]
SMOOTHING = 0.05            # fraction of a noisy curve that is averaged on each side of a point
Y_ZOOM_AFTER = 0.1          # the y axis fits a run after this fraction of it; the steep part before may be cut off
FONT_SIZE = 15              # points; 10 pixels on a phone, where the picture is 390 pixels wide
NAME_GAP = 0.08             # least distance between the names of curves, as a fraction of the panel's height


def draw_losses(path: Path, entries: list[dict[str, Any]], clock: list[dict[str, Any]], expected: Points) -> None:
    """Draw the training and validation loss of a run, from the entries of log.jsonl and clock.jsonl.

    `expected` has (minutes, bits per byte) of the run's preset, drawn in gray. Raises UserError without matplotlib.
    """
    figure, token_panel, minute_panel = new_figure(path, "loss (nats per token)")
    bpb_per_nat = next((entry["bpb"] / entry["val_loss"] for entry in entries if entry.get("val_loss")), 1.0)
    expected = [(minutes, bpb / bpb_per_nat) for minutes, bpb in expected]
    tokens = {entry["iter"]: entry["tokens"] for entry in entries if "tokens" in entry}
    minutes = {entry["iter"]: entry["seconds"] / 60 for entry in clock}
    for panel, x_by_step in ((token_panel, tokens), (minute_panel, minutes)):
        plot_smoothed(panel, curve(entries, "loss", x_by_step), "train", "C1")
        plot_evals(panel, curve(entries, "val_loss", x_by_step), "val", "C0")
    if expected:
        minute_panel.plot(*zip(*expected), color="0.5", label="expected")
    zoom_y_axis(token_panel, [curve(entries, "loss", tokens), curve(entries, "val_loss", tokens), expected])
    for panel in (token_panel, minute_panel):
        name_curves(panel)
    if losses := [entry["val_loss"] for entry in entries if "val_loss" in entry]:
        best = f"best {min(losses):.3f}\n{min(losses) * bpb_per_nat:.3f} bpb"
        token_panel.text(0.04, 0.04, best, transform=token_panel.transAxes, color="C0", fontsize=FONT_SIZE)
    add_bpb_axis(minute_panel, bpb_per_nat)
    save(figure, path)


def draw_comparison(path: Path, labels: list[str], by_tokens: list[Points], by_minutes: list[Points]) -> None:
    """Draw the validation curves of several runs. Raises UserError without matplotlib."""
    figure, *panels = new_figure(path, "val, bits per byte")
    for panel, curves in zip(panels, (by_tokens, by_minutes)):
        for i, (label, points) in enumerate(zip(labels, curves)):
            plot_evals(panel, points, label, f"C{i}")
        panel.legend(fontsize=0.6 * FONT_SIZE)
    zoom_y_axis(panels[0], by_tokens)
    save(figure, path)


def new_figure(path: Path, ylabel: str) -> tuple[Any, Any, Any]:
    """Return a figure and its panels, for curves against tokens and against minutes."""
    require_package("matplotlib", path.name)
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter
    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.set_xlabel("tokens", fontsize=FONT_SIZE)
    left.set_ylabel(ylabel, fontsize=FONT_SIZE)
    left.xaxis.set_major_formatter(EngFormatter(sep=""))           # 1,500,000 as 1.5M
    right.set_xlabel("minutes", fontsize=FONT_SIZE)
    for panel in (left, right):
        panel.grid(color="0.9")
        panel.tick_params(labelsize=FONT_SIZE)
        panel.locator_params(axis="x", nbins=4)
        panel.locator_params(axis="y", nbins=5)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, left, right


def curve(entries: list[dict[str, Any]], key: str, x_by_step: dict[int, float]) -> list[tuple[float, float]]:
    """Return the points of a log entry's key; x_by_step maps a step to its tokens or minutes."""
    return [(x_by_step[entry["iter"]], entry[key]) for entry in entries if key in entry and entry["iter"] in x_by_step]


def plot_smoothed(panel: Any, points: Points, label: str, color: str) -> None:
    """Plot the moving average of a noisy curve over the pale curve."""
    x, y = np.array(points, float).reshape(-1, 2).T
    panel.plot(x, y, color=color, alpha=0.3, linewidth=0.8)
    panel.plot(x, smooth(y), color=color, label=label)


def plot_evals(panel: Any, points: Points, label: str, color: str) -> None:
    """Plot a curve of evaluations with a star at the lowest."""
    if not points:
        return
    panel.plot(*zip(*points), "o-", markersize=3.5, color=color, label=label)
    x, y = min(points, key=lambda point: point[1])
    panel.plot([x], [y], "*", markersize=15, color=color, markeredgecolor="white", zorder=3)


def name_curves(panel: Any) -> None:
    """Write the label of each curve at its end, in its color. Labels that would overlap move apart."""
    low, high = panel.get_ylim()
    lines = [line for line in panel.lines if len(line.get_ydata()) and not line.get_label().startswith("_")]
    lines.sort(key=lambda line: line.get_ydata()[-1])
    height = -NAME_GAP                                              # of the last name, as a fraction of the panel
    for n_above, line in zip(reversed(range(len(lines))), lines):
        end = (line.get_ydata()[-1] - low) / (high - low)
        height = min(max(end, height + NAME_GAP), 1 - n_above * NAME_GAP)
        panel.annotate(line.get_label(), (line.get_xdata()[-1], low + height * (high - low)), (9, 0),
                       textcoords="offset points", va="center", color=line.get_color(), fontsize=FONT_SIZE)


def add_bpb_axis(panel: Any, bpb_per_nat: float) -> None:
    """Give a panel of losses in nats per token an axis in bits per byte."""
    axis = panel.secondary_yaxis("left", (lambda y: y * bpb_per_nat, lambda y: y / bpb_per_nat))
    axis.set_ylabel("bits per byte (bpb)", fontsize=FONT_SIZE)
    axis.tick_params(labelsize=FONT_SIZE)
    axis.locator_params(axis="y", nbins=6, steps=(1, 2, 5, 10))
    panel.tick_params(left=False)
    panel.grid(visible=False, axis="y")                             # its lines are at round numbers of nats


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the mean of each value and its neighbors on both sides."""
    indices = np.arange(len(values))
    reach = round(SMOOTHING * len(values))
    starts = np.maximum(indices - reach, 0)
    ends = np.minimum(indices + reach + 1, len(values))
    sums = np.concatenate([[0], np.cumsum(values)])
    return (sums[ends] - sums[starts]) / (ends - starts)


def zoom_y_axis(panel: Any, curves: Sequence[Points]) -> None:
    """Fit the y axis, which the panels share, to the curves after their first, steep part."""
    visible = [y for points in curves for x, y in points if x >= Y_ZOOM_AFTER * points[-1][0]]
    if visible and min(visible) < max(visible):
        margin = 0.1 * (max(visible) - min(visible))
        panel.set_ylim(min(visible) - margin, max(visible) + margin)


def save(figure: Any, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)
