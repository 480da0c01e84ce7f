"""Plots of an evaluation as PNG bytes, and the same as Markdown tables. No subject-level data in either."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from clinical_orchestration.transforms.plotting import BLUE, GREY, INK, ORANGE, png

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clinical_orchestration.modeling.evaluate import Curves
    from clinical_orchestration.modeling.promotion import Decision
    from clinical_orchestration.modeling.results import Estimate, Evaluation
    from clinical_orchestration.modeling.train import CrossValidation, FeatureImportance


def all_plots(cross_validation: CrossValidation, evaluation: Evaluation, curves: Curves) -> dict[str, bytes]:
    """Return file name -> PNG of the four plots of a chosen model."""
    name = cross_validation.chosen.replace("_", " ")
    return {
        "roc.png": roc_plot(curves, evaluation, name),
        "precision_recall.png": precision_recall_plot(curves, evaluation, name),
        "calibration.png": calibration_plot(evaluation, name),
        "feature_importance.png": importance_plot(cross_validation.importance, name),
    }


def roc_plot(curves: Curves, evaluation: Evaluation, name: str) -> bytes:
    """Return the ROC curve with its 95 % band; the label carries AUROC and interval."""

    def draw(ax: Any) -> None:
        x = curves.false_positive_rate
        ax.fill_between(x, curves.sensitivity_lower, curves.sensitivity_upper, color=BLUE, alpha=0.16, lw=0)
        ax.plot(x, curves.sensitivity, color=BLUE, lw=2, label=f"AUROC {evaluation.auroc}")
        ax.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--", label="no skill, 0.500")
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="1 - specificity", ylabel="sensitivity", aspect="equal")
        ax.set_title(f"ROC, {name}")
        ax.legend(loc="lower right")

    return png(draw, (5.2, 5.0), caption=_caption(evaluation))


def precision_recall_plot(curves: Curves, evaluation: Evaluation, name: str) -> bytes:
    """Return the precision-recall curve with its 95 % band and the prevalence as reference."""

    def draw(ax: Any) -> None:
        x = curves.recall[1:]
        ax.fill_between(x, curves.precision_lower[1:], curves.precision_upper[1:], color=BLUE, alpha=0.16, lw=0)
        ax.plot(x, curves.precision[1:], color=BLUE, lw=2, label=f"AUPRC {evaluation.auprc}")
        ax.axhline(evaluation.prevalence, color=GREY, lw=1, ls="--", label=f"prevalence {evaluation.prevalence:.3f}")
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall (sensitivity)", ylabel="precision (PPV)", aspect="equal")
        ax.set_title(f"Precision-recall, {name}")
        ax.legend(loc="upper right")

    return png(draw, (5.2, 5.0), caption=_caption(evaluation))


def calibration_plot(evaluation: Evaluation, name: str) -> bytes:
    """Return predicted against observed risk by bin, with 95 % intervals."""

    def draw(ax: Any) -> None:
        bins = [item for item in evaluation.bins if item.observed.value is not None]
        x = np.array([item.mean_probability for item in bins])
        y = np.array([item.observed.value for item in bins], dtype=float)
        low = np.array([_or(item.observed.lower, item.observed.value) for item in bins])
        high = np.array([_or(item.observed.upper, item.observed.value) for item in bins])
        top = min(1.0, 1.1 * max(0.1, float(max(high.max(initial=0), x.max(initial=0)))))
        ax.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--", label="perfect")
        ax.errorbar(x, y, yerr=[y - low, high - y], color=BLUE, marker="o", ms=5, lw=1.6, elinewidth=1.1, capsize=2.5,
                    label="observed, by tenth of rows")  # fmt: skip
        ax.set(xlim=(0, top), ylim=(0, top), xlabel="predicted probability", ylabel="observed share", aspect="equal")
        ax.set_title(f"Calibration, {name}")
        text = (
            f"ECE {evaluation.ece}\nslope {evaluation.calibration_slope}\n"
            f"intercept {evaluation.calibration_intercept}\nBrier {evaluation.brier}"
        )
        ax.text(0.97, 0.03, text, transform=ax.transAxes, ha="right", va="bottom", fontsize=8.5, color=INK)
        ax.legend(loc="upper left")

    return png(draw, (5.2, 5.0), caption=_caption(evaluation))


def importance_plot(importance: Sequence[FeatureImportance], name: str, top: int = 20) -> bytes:
    """Return the strongest features as bars: AUROC lost when shuffled, with the deviation over folds."""
    shown = list(importance[:top])[::-1]

    def draw(ax: Any) -> None:
        if not shown:
            ax.text(0.5, 0.5, "no importance could be computed", ha="center", va="center", transform=ax.transAxes)
            ax.set_axis_off()
            return
        drops = [item.drop for item in shown]
        ax.barh(
            [item.feature.replace("_", " ") for item in shown], drops, xerr=[item.deviation for item in shown],
            color=[BLUE if drop > 0 else GREY for drop in drops], height=0.66, ecolor=ORANGE,
            error_kw={"elinewidth": 1.1},
        )  # fmt: skip
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", labelsize=8.5, length=0)
        ax.set_xlabel("drop in AUROC when shuffled among held-out rows")
        ax.set_title(f"Feature importance, {name}")

    size = (7.2, max(2.4, 0.28 * len(shown) + 1.2))
    return png(draw, size, caption="Mean and standard deviation over folds by subject")


def _or(value: float | None, other: float | None) -> float:
    if value is not None:
        return value
    return float("nan") if other is None else other


def _caption(evaluation: Evaluation) -> str:
    return (
        f"Out-of-fold, grouped by subject: {evaluation.rows:,} rows, {evaluation.subjects:,} subjects, "
        f"{evaluation.events:,} events. 95 % intervals over subjects"
    )


def evaluation_table(evaluation: Evaluation) -> str:
    """Return the main metrics with intervals as a Markdown table."""
    lift = evaluation.auprc_lift
    rows = [
        ("AUROC", evaluation.auroc),
        ("AUPRC", evaluation.auprc),
        ("Brier score", evaluation.brier),
        ("expected calibration error", evaluation.ece),
        ("calibration slope", evaluation.calibration_slope),
        ("calibration intercept", evaluation.calibration_intercept),
        ("AUPRC / prevalence", "not determined" if lift is None else f"{lift:.2f}"),
        ("prevalence", f"{evaluation.prevalence:.3f}"),
        ("rows, subjects, events", f"{evaluation.rows:,}, {evaluation.subjects:,}, {evaluation.events:,}"),
    ]
    return _table(("metric", "value (95 % interval)"), [(name, str(value)) for name, value in rows])


def groups_table(evaluation: Evaluation) -> str:
    """Return the metrics by site, sex and arm as a Markdown table; a group that is too small says so."""
    rows = [
        (
            item.attribute, item.value, _count(item.rows), _count(item.events), item.note or _estimate(item.auroc),
            _share(item.mean_probability), _share(item.prevalence),
        )
        for item in evaluation.groups
    ]  # fmt: skip
    return _table(("by", "group", "rows", "events", "AUROC", "mean predicted", "observed"), rows)


def operating_points_table(evaluation: Evaluation) -> str:
    """Return the operating points as a Markdown table."""
    rows = [
        (
            item.name, f"{item.threshold:.3f}", _share(item.sensitivity), _share(item.specificity), _share(item.ppv),
            _share(item.npv), _share(item.alert_rate),
        )
        for item in evaluation.operating_points
    ]  # fmt: skip
    return _table(("point", "threshold", "sensitivity", "specificity", "PPV", "NPV", "alerts"), rows)


def candidates_table(cross_validation: CrossValidation) -> str:
    """Return the candidates with their cross-validated metrics as a Markdown table; the chosen one is marked."""
    rows = [
        (
            f"**{name}** (chosen)" if name == cross_validation.chosen else name,
            f"{item.auroc:.3f}", f"{item.auprc:.3f}", f"{item.brier:.3f}", f"{item.ece:.3f}",
        )
        for name, item in cross_validation.scores.items()
    ]  # fmt: skip
    return _table(("candidate", "AUROC", "AUPRC", "Brier", "ECE"), rows)


def importance_table(importance: Sequence[FeatureImportance], top: int = 10) -> str:
    """Return the strongest features as a Markdown table."""
    rows = [(item.feature, f"{item.drop:.4f}", f"{item.deviation:.4f}") for item in importance[:top]]
    return _table(("feature", "AUROC drop", "deviation over folds"), rows)


def decision_table(decision: Decision) -> str:
    """Return the checks of a promotion decision as a Markdown table."""
    rows = [
        (
            check.description, "not determined" if check.value is None else f"{check.value:.4f}",
            f"{check.comparison} {check.bound:.4f}",
            # a benefit that is not shown refuses nothing: it only makes the difference between challenger and champion
            "pass" if check.passed else "no" if check.name.endswith("_benefit") else "**fail**",
        )
        for check in decision.checks
    ]  # fmt: skip
    return _table(("check", "value", "bound", "result"), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _estimate(value: Estimate | None) -> str:
    return "" if value is None else str(value)
