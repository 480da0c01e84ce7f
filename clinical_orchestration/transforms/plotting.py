"""How plots look, and how one becomes a PNG: shared by models, monitoring and cohorts."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

BLUE, ORANGE, RED, GREY, INK = "#1f5fa8", "#d9731a", "#b3261e", "#8a8f98", "#22262b"

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#c4c8ce",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8eaee",
    "grid.linewidth": 0.8,
    "xtick.color": "#4a4f57",
    "ytick.color": "#4a4f57",
    "legend.frameon": False,
    "figure.dpi": 110,
}


def png(
    draw: Callable[[Any], None],
    size: tuple[float, float],
    *,
    rows: int = 1,
    columns: int = 1,
    share_x: bool = False,
    caption: str = "",
) -> bytes:
    """Return what `draw` draws as a PNG.

    The figure is one of its own: pyplot would keep every figure of a long-lived process.

    Args:
        draw: gets the axes, or the list of them where there are several.
        size: width and height in inches.
        rows, columns: of panels.
        share_x: panels have one horizontal axis, whose labels are times.
        caption: small print below.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(rows, columns, squeeze=False, sharex=share_x).ravel().tolist()
        draw(panels[0] if len(panels) == 1 else panels)
        if share_x:
            panels[-1].tick_params(axis="x", labelrotation=20)
        figure.supxlabel(caption, fontsize=7, color="#6a7079")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
