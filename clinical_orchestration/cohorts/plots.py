"""The flow of a cohort as a PNG."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

from clinical_orchestration.cohorts.cohort import AttritionStep

_BLUE, _RED, _AMBER, _INK, _GREY = "#1f5fa8", "#b3452c", "#c98a1b", "#22262b", "#c4c8ce"


def attrition_plot(steps: Sequence[AttritionStep], title: str) -> bytes:
    """Return the flow as a PNG: a bar a step with those who remain, and beside it who was removed and why.

    Args:
        steps: as :class:`clinical_orchestration.cohorts.cohort.Cohort` counts them.
        title: the cohort's title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    screened = max(1, steps[0].entered if steps else 1)
    figure = Figure(figsize=(9.5, 1.4 + 0.62 * max(1, len(steps))), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, step in enumerate(steps):
        left = 0
        for count, color in ((step.remaining, _BLUE), (step.removed, _RED), (step.removed_unknown, _AMBER)):
            axes.barh(row, count, left=left, height=0.58, color=color)
            left += count
        words = f"{step.remaining:,}"
        if step.removed:
            words += f"   {'excluded' if step.part == 'exclusion' else 'not met'} {step.removed:,}"
        if step.removed_unknown:
            words += f"   unknown {step.removed_unknown:,}"
        if step.kept_unknown:
            words += f"   kept though unknown {step.kept_unknown:,}"
        axes.text(left + screened * 0.012, row, words, va="center", color=_INK, fontsize=9)
    labels = []
    for step in steps:
        name = {"screened": "Screened", "cohort": "Cohort", "index": "Index"}.get(step.part, step.criterion)
        what = (
            ""
            if step.part in ("screened", "cohort")
            else "\n" + textwrap.shorten(step.description, 46, placeholder=" ...")
        )
        labels.append(name + what)
    axes.set_yticks(range(len(steps)), labels, fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, screened * 1.42)
    axes.set_xlabel("patients", color=_INK)
    figure.suptitle(
        "\n".join(textwrap.wrap(title, 84)), x=0.01, ha="left", fontsize=11.5, fontweight="bold", color=_INK
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GREY)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
