from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest

from clinical_orchestration.modeling import plots
from clinical_orchestration.modeling.evaluate import curves, evaluate, score
from clinical_orchestration.modeling.promotion import decide
from clinical_orchestration.modeling.results import Estimate, Evaluation
from clinical_orchestration.modeling.train import CrossValidation, FeatureImportance
from clinical_orchestration.trials import load_trial

pytestmark = pytest.mark.filterwarnings("error")


def result(rows: int = 400) -> tuple[CrossValidation, Evaluation]:
    rng = np.random.default_rng(0)
    p = rng.random(rows)
    y = (rng.random(rows) < p).astype(np.int8)
    subjects = np.arange(rows, dtype=np.int64) % 50
    site = np.where(subjects < 3, "tiny", "a|b").astype(np.str_)
    cross_validation = CrossValidation(
        seed=0, folds=2, feature_names=("x",), labels=y, subjects=subjects, groups={"site": site},
        fold=(subjects % 2).astype(np.int8), probabilities={"random_forest": p, "xgboost": 1 - p},
        scores={"random_forest": score(y, p), "xgboost": score(y, 1 - p)}, chosen="random_forest",
        auroc_without_choice=0.8,
        importance=(FeatureImportance("heart_rate_mean_7d", 0.1, 0.02), FeatureImportance("age", -0.01, 0.01)),
    )  # fmt: skip
    return cross_validation, evaluate(
        y, p, subjects, groups=cross_validation.groups, thresholds={"high": 0.5}, replicates=100
    )


def is_png(content: bytes) -> bool:
    width, height = struct.unpack(">II", content[16:24])
    return content.startswith(b"\x89PNG\r\n\x1a\n") and width > 400 and height > 200 and len(content) > 5000


def test_every_plot_is_a_picture() -> None:
    cross_validation, evaluation = result()
    found = plots.all_plots(
        cross_validation, evaluation, curves(cross_validation.labels, cross_validation.chosen_probabilities,
                                             cross_validation.subjects, replicates=20)
    )  # fmt: skip
    assert set(found) == {"roc.png", "precision_recall.png", "calibration.png", "feature_importance.png"}
    assert all(is_png(content) for content in found.values())


def test_plots_are_labelled_with_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    cross_validation, evaluation = result()
    texts: list[str] = []

    def note(draw, size, caption):  # type: ignore[no-untyped-def]
        from matplotlib.figure import Figure

        ax = Figure().add_subplot()
        draw(ax)
        legend = ax.get_legend()
        texts.extend(text.get_text() for text in [*ax.texts, *(legend.get_texts() if legend else [])])
        texts.extend([caption, ax.get_xlabel(), ax.get_ylabel(), ax.get_title(loc="left"), ax.get_title()])
        return b""

    monkeypatch.setattr(plots, "png", note)
    found = curves(cross_validation.labels, cross_validation.chosen_probabilities, cross_validation.subjects)
    plots.all_plots(cross_validation, evaluation, found)
    text = "\n".join(texts)
    for estimate in (evaluation.auroc, evaluation.auprc, evaluation.ece, evaluation.calibration_slope):
        assert str(estimate) in text
    assert "400 rows, 50 subjects" in text
    assert "sensitivity" in text


def test_plots_cope_with_what_is_not_determined() -> None:
    _, evaluation = result()
    bins = tuple(replace(item, observed=Estimate(item.observed.value)) for item in evaluation.bins)
    assert is_png(plots.calibration_plot(replace(evaluation, calibration_slope=Estimate(None), bins=bins), "x"))
    assert is_png(plots.importance_plot([], "x"))


def test_tables_are_markdown_with_the_figures() -> None:
    cross_validation, evaluation = result()
    decision = decide(evaluation, None, load_trial("cdisc-pilot").promotion)
    tables = [
        plots.evaluation_table(evaluation), plots.groups_table(evaluation), plots.operating_points_table(evaluation),
        plots.candidates_table(cross_validation), plots.importance_table(cross_validation.importance),
        plots.decision_table(decision),
    ]  # fmt: skip
    for table in tables:
        lines = table.splitlines()
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
        assert set(lines[1]) == {"|", "-", " "}
    assert str(evaluation.auroc) in tables[0]
    assert "a\\|b" in tables[1]
    assert "fewer than 5 subjects: not shown" in tables[1]
    assert "**random_forest** (chosen)" in tables[3]
    assert "heart_rate_mean_7d" in tables[4]
    assert "**fail**" not in tables[5]
