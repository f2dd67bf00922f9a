"""Plots of the benches, as PNG beside their JSON. Matplotlib is only asked for when a plot is saved.

A bench hands over a function that draws on the axes of one figure; without matplotlib there is a line that says so. It
draws after its document is out: a plot that fails costs no figure.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's, told apart by all eyes
GREY = "#999999"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def save(
    json_file: Path | None, title: str, columns: int, size: tuple[float, float], draw: Callable[..., None]
) -> None:
    """Draws on `columns` axes, draw(axes, ...), and writes the PNG beside the JSON file; nothing without that."""
    if json_file is None:
        return
    try:
        import matplotlib
    except ImportError:
        print("plot: matplotlib is not installed; pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot

    path = json_file.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
        draw(*axes[0])
        figure.suptitle(title, fontsize=11)
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
    print(f"plot: {path}", file=sys.stderr)


def ranges(
    axes: Any, names: Sequence[str], values: Sequence[Sequence[float] | None], colours: Sequence[str], unit: str
) -> None:
    """Horizontal bars from top to bottom: the median, a whisker over the range, the figure; None where nothing is."""
    for row, (seen, colour) in enumerate(zip(values, colours, strict=True)):
        if not seen:
            axes.text(0, row, " -", va="center", color=GREY)
            continue
        middle = statistics.median(seen)
        axes.barh(row, middle, color=colour, height=0.7)
        axes.plot([min(seen), max(seen)], [row, row], color="black", linewidth=1.2)
        axes.text(max(seen), row, f"  {middle:.3g}", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(unit)
    axes.margins(x=0.15)
    axes.grid(axis="y", visible=False)


def times(axes: Any, curves: Mapping[str, Sequence[tuple[float, float]]], own: Sequence[str]) -> None:
    """A line of (MiB, seconds) for each name, both axes logarithmic; those in `own` in black."""
    marks = "os^D"
    for k, (name, points) in enumerate(curves.items()):
        style = {"color": COLOURS[k % len(COLOURS)]}
        if name in own:
            style = {"color": "black", "linestyle": ("-", "--")[own.index(name) % 2]}
        axes.plot(*zip(*points, strict=True), marker=marks[k % len(marks)], label=name, markersize=4, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes = sorted({size for points in curves.values() for size, _ in points})
    axes.set_xticks(sizes, [f"{size:.3g}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("budget, MiB")
    axes.set_ylabel("seconds")
    axes.legend(fontsize=7)
