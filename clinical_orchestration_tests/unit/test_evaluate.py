from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clinical_orchestration.modeling.evaluate import EvaluationError, _bootstrap, _weights, curves, evaluate, score
from clinical_orchestration.modeling.results import Evaluation

pytestmark = pytest.mark.filterwarnings("error")


def sample(rows: int = 800, subjects: int = 100, seed: int = 0, skill: float = 1.0) -> tuple[np.ndarray, ...]:
    """Labels drawn from the probabilities, so that these are perfectly calibrated."""
    rng = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(-(skill * rng.normal(size=rows) - 0.8)))
    return (rng.random(rows) < p).astype(int), p, np.arange(rows) % subjects


@settings(max_examples=60, deadline=None)
@given(
    y=hnp.arrays(np.int8, 40, elements=st.integers(0, 1)),
    # few distinct values, so that ties are common
    p=hnp.arrays(np.float64, 40, elements=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.500001, 0.9, 1.0])),
)
def test_metrics_are_those_of_scikit_learn_with_ties(y: np.ndarray, p: np.ndarray) -> None:
    from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

    assume(0 < y.sum() < len(y))
    found = score(y, p)
    assert found.auroc == pytest.approx(roc_auc_score(y, p))
    assert found.auprc == pytest.approx(average_precision_score(y, p))
    assert found.brier == pytest.approx(brier_score_loss(y, p))


def test_replicates_are_the_weighted_metrics() -> None:
    from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

    y, p, subjects = sample(120, 30)
    p = np.round(p, 1)
    values = _bootstrap(
        y.astype(float), p, subjects, np.zeros(120, dtype=np.int64), seed=4, replicates=5, calibration=True
    )
    weights = np.concatenate(list(_weights(subjects, 4, 5, include_point=True)))
    for number, w in enumerate(weights):
        # a subject is drawn whole
        assert all(len(set(w[subjects == subject])) == 1 for subject in range(30))
        assert values["auroc"][number] == pytest.approx(roc_auc_score(y, p, sample_weight=w))
        assert values["auprc"][number] == pytest.approx(average_precision_score(y, p, sample_weight=w))
        assert values["brier"][number] == pytest.approx(brier_score_loss(y, p, sample_weight=w))


def test_intervals_hold_the_value_and_know_that_rows_of_a_subject_are_alike() -> None:
    y, p, _ = sample(100, 100, seed=3)
    ten_times = np.tile(y, 10), np.tile(p, 10)
    by_subject = evaluate(*ten_times, np.tile(np.arange(100), 10), seed=1, replicates=400).auroc
    by_row = evaluate(*ten_times, np.arange(1000), seed=1, replicates=400).auroc
    assert by_subject.value == by_row.value
    assert by_subject.lower < by_subject.value < by_subject.upper
    assert by_subject.upper - by_subject.lower > 2.5 * (by_row.upper - by_row.lower)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    truth = score(*sample(200_000, 200_000, seed=99)[:2]).auroc
    covered = 0
    for seed in range(60):
        y, p, subjects = sample(400, 100, seed=seed)
        interval = evaluate(y, p, subjects, seed=seed, replicates=200).auroc
        covered += interval.lower <= truth <= interval.upper
    assert covered >= 51


def test_the_seed_decides_the_intervals() -> None:
    y, p, subjects = sample()
    first, again, other = (evaluate(y, p, subjects, seed=seed, replicates=100) for seed in (1, 1, 2))
    assert first == again
    assert first.auroc.value == other.auroc.value
    assert first.auroc.lower != other.auroc.lower


def test_many_rows_are_computed_in_blocks_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    y, p, subjects = sample()
    whole = evaluate(y, p, subjects, seed=1, replicates=50)
    monkeypatch.setattr("clinical_orchestration.modeling.evaluate._CHUNK", 3000)
    assert evaluate(y, p, subjects, seed=1, replicates=50).metrics() == pytest.approx(whole.metrics())


@pytest.mark.parametrize(
    ("stretch", "shift", "slope", "intercept"),
    [(1, 0, 1.0, 0.0), (2, 0, 0.5, None), (0.5, 0, 2.0, None), (1, 1, 1.0, -1.0)],
)
def test_calibration_slope_and_intercept(stretch: float, shift: float, slope: float, intercept: float | None) -> None:
    y, p, subjects = sample(6000, 600)
    log_odds = stretch * np.log(p / (1 - p)) + shift
    found = evaluate(y, 1 / (1 + np.exp(-log_odds)), subjects, replicates=100)
    assert found.calibration_slope.value == pytest.approx(slope, rel=0.08)
    if intercept is not None:
        assert found.calibration_intercept.value == pytest.approx(intercept, abs=0.08)


def test_separated_classes_have_no_slope() -> None:
    y = np.repeat([0, 1], 50)
    found = evaluate(y, np.where(y == 1, 0.9, 0.1) + np.linspace(0, 0.05, 100), np.arange(100), replicates=50)
    assert found.calibration_slope.value is None
    assert str(found.calibration_slope) == "not determined"
    assert found.auroc.value == 1.0
    assert "calibration_slope" not in found.metrics()


def test_calibration_error() -> None:
    y, p, subjects = sample(6000, 600)
    good = evaluate(y, p, subjects, replicates=50)
    assert good.ece.value < 0.03
    assert sum(item.rows for item in good.bins) == 6000
    assert len(good.bins) == 10
    for item in good.bins:
        assert item.lower <= item.mean_probability <= item.upper
        assert item.observed.value == pytest.approx(item.mean_probability, abs=0.06)
    constant = evaluate(y, np.full(6000, 0.9), subjects, replicates=50)
    assert constant.ece.value == pytest.approx(abs(0.9 - y.mean()))
    assert constant.auroc.value == 0.5
    assert len(constant.bins) == 1


def test_operating_points_mean_what_they_are_called() -> None:
    y, p, subjects = sample(2000)
    found = {
        item.name: item
        for item in evaluate(y, p, subjects, thresholds={"medium": 0.25, "never": 1.1}, replicates=20).operating_points
    }
    assert set(found) == {"medium", "never", "sensitivity_80", "specificity_90"}
    alert = p >= 0.25
    assert found["medium"].sensitivity == pytest.approx(alert[y == 1].mean())
    assert found["medium"].specificity == pytest.approx(1 - alert[y == 0].mean())
    assert found["medium"].ppv == pytest.approx(y[alert].mean())
    assert found["medium"].npv == pytest.approx(1 - y[~alert].mean())
    assert found["medium"].alert_rate == pytest.approx(alert.mean())
    assert 0.8 <= found["sensitivity_80"].sensitivity < 0.805
    assert 0.9 <= found["specificity_90"].specificity < 0.905
    assert found["never"].ppv is None


def test_groups_have_numbers_or_say_why_not() -> None:
    y, p, subjects = sample(800, 100)
    site = np.where(subjects < 3, "tiny", np.where(subjects < 10, "small", np.where(subjects < 22, "few", "large")))
    y = np.where(site == "few", 0, y)
    arm = [None if subject % 2 else "placebo" for subject in subjects]
    found = evaluate(y, p, subjects, groups={"site": site, "arm": arm}, replicates=100)
    groups = {(item.attribute, item.value): item for item in found.groups}
    assert set(groups) == {("site", name) for name in ("tiny", "small", "few", "large")} | {
        ("arm", "placebo"),
        ("arm", "unknown"),
    }
    tiny = groups["site", "tiny"]
    assert tiny.note == "fewer than 5 subjects: not shown"
    assert {tiny.rows, tiny.events, tiny.subjects, tiny.auroc, tiny.prevalence} == {None}
    assert groups["site", "small"].note.startswith("too small: 7 subjects")
    assert groups["site", "small"].auroc is None
    assert groups["site", "few"].note.startswith("too small: 0 rows with")
    large = groups["site", "large"]
    assert (large.note, large.subjects) == ("", 78)
    assert large.auroc.lower < large.auroc.value < large.auroc.upper
    assert large.auroc.value == pytest.approx(score(y[site == "large"], p[site == "large"]).auroc)
    with pytest.raises(EvaluationError, match="another number of rows"):
        evaluate(y, p, subjects, groups={"site": ["x"]}, replicates=10)


def test_an_evaluation_survives_storage_and_holds_no_identifier() -> None:
    y, p, subjects = sample(300, 40)
    identifiers = np.array([f"SECRET-{subject}" for subject in subjects])
    found = evaluate(y, p, identifiers, groups={"sex": np.where(subjects % 2, "F", "M")}, replicates=50)
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert Evaluation.from_dict(json.loads(text)) == found
    assert "SECRET" not in text + repr(found) + str(found.metrics())
    for rubbish in ({}, {"auroc": 1}, {**found.to_dict(), "extra": 1}):
        with pytest.raises(ValueError, match="no stored evaluation"):
            Evaluation.from_dict(rubbish)


def test_metric_names_suit_mlflow() -> None:
    y, p, subjects = sample(600, 60)
    found = evaluate(y, p, subjects, groups={"site": np.where(subjects % 2, "Clinic (A/B)", "Ünïcode")}, replicates=50)
    metrics = found.metrics()
    assert {"auroc", "auroc_lower", "auroc_upper", "auprc", "brier", "ece", "prevalence", "auprc_lift"} <= set(metrics)
    assert all(re.fullmatch(r"[\w./ :-]{1,250}", name, re.ASCII) for name in metrics)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["auprc_lift"] == pytest.approx(metrics["auprc"] / y.mean())
    assert len({name for name in metrics if name.startswith("site/")}) == 2 * 13


def test_curves_belong_to_the_metrics() -> None:
    y, p, subjects = sample(1000)
    found = curves(y, p, subjects, seed=1, replicates=100)
    assert found.sensitivity[0] >= 0
    assert found.sensitivity[-1] == 1
    assert (np.diff(found.sensitivity) >= -1e-12).all()
    assert np.trapezoid(found.sensitivity, found.false_positive_rate) == pytest.approx(score(y, p).auroc, abs=0.003)
    assert found.precision[-1] == pytest.approx(y.mean(), abs=0.02)
    inside = (found.sensitivity_lower <= found.sensitivity + 1e-9) & (
        found.sensitivity <= found.sensitivity_upper + 1e-9
    )
    assert inside.mean() > 0.9


@pytest.mark.parametrize(
    ("y", "p", "subjects", "message"),
    [
        ([], [], [], "no rows"),
        ([0, 1], [0.1], [1, 2], "one length"),
        ([0, 2], [0.1, 0.2], [1, 2], "labels must be 0 or 1"),
        ([0, 1], [0.1, 1.2], [1, 2], "between 0 and 1"),
        ([0, 1], [0.1, float("nan")], [1, 2], "between 0 and 1"),
        ([0, 0], [0.1, 0.2], [1, 2], "one of them is absent"),
        ([1, 1], [0.1, 0.2], [1, 2], "one of them is absent"),
    ],
)
def test_unusable_input_is_a_clear_error(y: list[int], p: list[float], subjects: list[int], message: str) -> None:
    for function in (evaluate, curves):
        with pytest.raises(EvaluationError, match=message):
            function(y, p, subjects)


def test_few_subjects_do_not_break_the_bootstrap() -> None:
    """Some replicates hold one class only: then the interval rests on the others, or there is none."""
    y, p = np.array([1, 0, 0, 0, 0, 0]), np.array([0.9, 0.1, 0.2, 0.3, 0.4, 0.5])
    found = evaluate(y, p, np.arange(6), seed=1, replicates=200)
    assert found.auroc.value == 1.0
    assert found.auroc.lower is None
    assert str(found.auroc) == "1.000"
