"""One look for the figures of all studies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito: distinguishable for colour-blind readers, and in print by their order.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, QUIET = "#222222", "#8a8a8a"

_STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 8,
    "axes.edgecolor": QUIET, "axes.labelcolor": INK, "xtick.color": QUIET, "ytick.color": QUIET,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "lines.linewidth": 1.6, "lines.solid_capstyle": "round",
    "svg.fonttype": "none", "svg.hashsalt": "dmm_fast", "figure.dpi": 100,
}  # fmt: skip


@contextmanager
def figure(path: Path, rows: int, columns: int, width: float, height: float) -> Iterator[list[Axes]]:
    """Panels `rows` x `columns`, row by row, written to `path` (.svg, .png or .pdf) at the end; inches."""
    with matplotlib.rc_context(_STYLE):
        made = Figure((width, height), layout="constrained")
        made.get_layout_engine().set(  # type: ignore[union-attr, call-arg]
            w_pad=0.1, h_pad=0.1
        )
        yield list(made.subplots(rows, columns, squeeze=False).flat)
        made.savefig(path, **({"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 130}))


def label_ends(axes: Axes, labels: list[tuple[float, float, str, str]], apart: float = 0.06) -> None:
    """Names lines at their right ends in place of a legend: (x, y, text, colour), moved so that none hides another.

    Call it when all is drawn and the scales are set; `apart` is the least distance, as a share of the axes' height.
    """
    axes.autoscale_view()  # else limits are set when drawn, too late for the transforms
    at, height = axes.transAxes.inverted(), -1.0
    for x, y, text, colour in sorted(labels, key=lambda label: label[1]):
        right, own = at.transform(axes.transData.transform((x, y)))
        height = max(own, height + apart * (text.count("\n") + 1))
        axes.annotate(text, (right, height), (4, 0), "axes fraction", "offset points", color=colour, va="center")
