"""Plot the results of a study."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from larskit.app.results import Curves, Point
from larskit.state import atomic

COLORS = {"lars": "C3", "larc": "C1", "sgd": "C0", "adamw": "C2"}


def plot(curves: Curves, path: Path) -> None:
    """Plot test accuracy against learning rate and save a PNG.

    Parameters
    ----------
    curves : Curves
        One panel per model (rows) and batch size (columns). Each optimizer is a line
        through the means, with a band from its worst to its best seed.
    path : Path
        The file, written atomically.
    """
    models = list(dict.fromkeys(model for model, _ in curves))
    batch_sizes = list(dict.fromkeys(batch_size for _, batch_size in curves))
    rows, columns = len(models), len(batch_sizes)
    size = (1 + 3.6 * columns, 0.8 + 2.8 * rows)
    figure = Figure(size, dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False)
    for (model, batch_size), optimizers in curves.items():
        ax = axes[models.index(model), batch_sizes.index(batch_size)]
        ax.set_title(f"{model}, batch {batch_size}", fontsize="medium")
        ax.grid(alpha=0.3)
        for optimizer, points in optimizers.items():
            _plot_optimizer(ax, points, label=optimizer, color=COLORS[optimizer])
    for ax in axes[-1]:
        ax.set_xscale("log")
        ax.set_xlabel("learning rate")
    for ax in axes[:, 0]:
        ax.set_ylabel("test accuracy / %")
    lines, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=len(labels))
    with atomic(path) as file:
        figure.savefig(file, format="png")


def _plot_optimizer(ax: Axes, points: list[Point], *, label: str, color: str) -> None:
    lrs = [point.lr for point in points]
    means, lows, highs = (
        [100 * getattr(point, name) for point in points]
        for name in ("mean", "low", "high")
    )
    ax.plot(lrs, means, "o-", markersize=3, label=label, color=color)
    ax.fill_between(lrs, lows, highs, alpha=0.2, linewidth=0, color=color)
