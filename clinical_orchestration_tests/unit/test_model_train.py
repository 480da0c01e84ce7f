from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinical_orchestration.modeling import train
from clinical_orchestration.modeling.evaluate import Scores, evaluate
from clinical_orchestration.modeling.promotion import decide
from clinical_orchestration.modeling.train import (
    ENSEMBLE,
    MEMBERS,
    CrossValidation,
    TrainingData,
    TrainingDataError,
    assign_folds,
    candidates,
    choose,
    cross_validate,
    fingerprint,
    fit_final,
)
from clinical_orchestration.trials import load_trial
from clinical_orchestration_tests.modeling_frames import FEATURES, training_frame

if TYPE_CHECKING:
    import polars as pl

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    return training_frame()


@pytest.fixture(scope="module")
def data(frame: pl.DataFrame) -> TrainingData:
    return TrainingData.from_frame(frame, FEATURES)


@pytest.fixture(scope="module")
def result(data: TrainingData) -> CrossValidation:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return cross_validate(data, seed=7)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000), folds=st.integers(2, 8), visits=st.integers(3, 9))
def test_no_subject_is_on_both_sides_of_a_split(seed: int, folds: int, visits: int) -> None:
    data = TrainingData.from_frame(training_frame(60, visits, seed=seed, signal=0.5), FEATURES)
    fold = assign_folds(data, seed, folds)
    for subject in np.unique(data.subjects):
        assert len(np.unique(fold[data.subjects == subject])) == 1
    assert set(fold) == set(range(folds))


def test_models_never_see_the_subjects_they_are_asked_about(
    data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watches what the estimators are given, not what the fold numbers say."""
    seen: list[set[float]] = []

    class Spy:
        def fit(self, features: Any, labels: Any) -> Spy:
            self.known = set(features[:, 1])  # noise_1 identifies the subject
            return self

        def predict_proba(self, features: Any) -> Any:
            seen.append(self.known & set(features[:, 1]))
            rising = 1 / (1 + np.exp(-features[:, 0]))
            return np.column_stack([1 - rising, rising])

        feature_importances_ = np.ones(len(FEATURES))

    monkeypatch.setattr(train, "candidates", lambda *sizes: dict.fromkeys([*MEMBERS, ENSEMBLE], Spy))
    cross_validate(data, seed=3, folds=4)
    assert len(seen) >= 4 * len(MEMBERS)
    assert not any(seen)


def test_what_identifies_a_subject_gives_no_skill() -> None:
    """Labels depend only on who the subject is. By row, a forest finds that (leakage); by subject it must not."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import KFold, cross_val_predict

    data = TrainingData.from_frame(training_frame(80, 8, seed=5, signal=0.0, subject_effect=3.0), FEATURES[1:4])
    forest = RandomForestClassifier(50, random_state=0)
    leaking = cross_val_predict(
        forest, data.features, data.labels, cv=KFold(5, shuffle=True, random_state=0), method="predict_proba"
    )
    assert roc_auc_score(data.labels, leaking[:, 1]) > 0.75
    honest = cross_validate(data, seed=0, importances=3)
    assert all(scores.auroc < 0.6 for scores in honest.scores.values())


def test_shuffled_labels_give_no_skill_and_are_not_promoted(frame: pl.DataFrame) -> None:
    import polars as pl

    shuffled = frame.with_columns(pl.col("label").shuffle(seed=11))
    result = cross_validate(shuffled, FEATURES, seed=0, importances=3)
    assert all(0.4 < scores.auroc < 0.6 for scores in result.scores.values())
    evaluation = evaluate(result.labels, result.chosen_probabilities, result.subjects, seed=0, replicates=300)
    for trial in ("cdisc-pilot", "simulated"):
        decision = decide(evaluation, None, load_trial(trial).promotion)
        assert not decision.promote
        assert any("auroc" in reason for reason in decision.reasons)


def test_skill_that_is_there_is_found_and_explained(result: CrossValidation) -> None:
    assert result.scores[result.chosen].auroc > 0.72
    assert result.auroc_without_choice is not None
    assert result.auroc_without_choice > 0.7
    assert result.importance[0].feature == "risk"
    assert result.importance[0].drop > 0.1
    assert {item.feature for item in result.importance} <= set(FEATURES)


def test_probabilities_are_calibrated_enough_for_the_rule(result: CrossValidation) -> None:
    assert result.scores[result.chosen].ece < load_trial("cdisc-pilot").promotion.max_calibration_error


def test_the_ensemble_is_the_mean_of_its_members(result: CrossValidation) -> None:
    mean = np.mean([result.probabilities[name] for name in MEMBERS], axis=0)
    np.testing.assert_allclose(result.probabilities[ENSEMBLE], mean)


def test_the_fitted_ensemble_votes_softly(data: TrainingData) -> None:
    fitted = fit_final(data, name=ENSEMBLE, seed=3)
    members = [fit_final(data, name=name, seed=3).probabilities(data.frame()) for name in MEMBERS]
    np.testing.assert_allclose(fitted.probabilities(data.frame()), np.mean(members, axis=0), atol=1e-6)


def test_same_rows_in_another_order_give_the_same_result(frame: pl.DataFrame, result: CrossValidation) -> None:
    again = cross_validate(frame.sample(fraction=1.0, shuffle=True, seed=3), FEATURES, seed=7)
    assert again.chosen == result.chosen
    for name, values in result.probabilities.items():
        np.testing.assert_array_equal(values, again.probabilities[name])
    assert again.importance == result.importance


def test_a_result_survives_storage_and_holds_no_identifier(result: CrossValidation) -> None:
    content = result.to_bytes()
    again = CrossValidation.from_bytes(content)
    assert again.metrics() == result.metrics()
    assert again.importance == result.importance
    np.testing.assert_array_equal(again.chosen_probabilities, result.chosen_probabilities)
    np.testing.assert_array_equal(again.fold, result.fold)
    with np.load(io.BytesIO(content)) as arrays:
        text = "".join(str(arrays[name].tolist()) for name in arrays.files) + arrays["head"].tobytes().decode()
    assert "SECRET" not in text
    assert "SECRET" not in repr(result)
    with pytest.raises(ValueError, match="no stored cross-validation"):
        CrossValidation.from_bytes(b"something else")


def test_every_candidate_takes_gaps_and_empty_features(data: TrainingData) -> None:
    rows = data.frame()
    rows.iloc[0] = np.nan
    for name in candidates(0):
        probabilities = fit_final(data, name=name, seed=0).probabilities(rows)
        assert np.isfinite(probabilities).all()
        assert ((probabilities >= 0) & (probabilities <= 1)).all()


def test_a_fitted_model_takes_columns_in_any_order(data: TrainingData) -> None:
    fitted = fit_final(data, name="xgboost", seed=0)
    rows = data.frame()
    np.testing.assert_array_equal(fitted.probabilities(rows), fitted.probabilities(rows[list(reversed(FEATURES))]))
    assert (fitted.rows, fitted.subjects) == (480, 60)


def test_the_input_example_is_nobodys_row(data: TrainingData) -> None:
    example = data.typical_row()
    assert list(example.columns) == list(FEATURES)
    assert example["never_there"].tolist() == [0.0]
    assert example["risk"].tolist() == [pytest.approx(np.median(data.features[:, 0]), abs=1e-3)]
    assert not (data.features[:, :4] == example.to_numpy()[0, :4]).all(axis=1).any()


def scores(auroc: float, auprc: float = 0.4, brier: float = 0.2) -> Scores:
    return Scores(auroc, auprc, brier, 0.05)


@pytest.mark.parametrize(
    ("given_scores", "expected"),
    [
        ({"a": scores(0.70), "b": scores(0.68, auprc=0.9)}, "a"),  # clearly better AUROC wins
        ({"a": scores(0.70, 0.40), "b": scores(0.698, 0.42)}, "b"),  # equal AUROC: AUPRC decides
        ({"a": scores(0.70, 0.40, 0.20), "b": scores(0.698, 0.40, 0.19)}, "b"),  # then Brier
        ({"b": scores(0.70), "a": scores(0.70)}, "a"),  # then the name, so that the choice is deterministic
    ],
)
def test_choice_of_the_model(given_scores: dict[str, Scores], expected: str) -> None:
    assert choose(given_scores) == expected


def test_fingerprint_tells_what_changes_a_model(frame: pl.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    import polars as pl

    def mark(rows: pl.DataFrame, names: tuple[str, ...] = FEATURES, **changes: Any) -> str:
        return fingerprint(TrainingData.from_frame(rows, names), **{"trial": "a", "seed": 1, "folds": 5, **changes})

    base = mark(frame)
    assert mark(frame.sample(fraction=1.0, shuffle=True, seed=1)) == base
    assert mark(frame.with_columns(site=pl.lit("elsewhere"))) == base
    # what parallel sums may do to the last digit
    assert mark(frame.with_columns(pl.col("risk", "with_gaps") * (1 + 4e-16))) == base
    different = [
        mark(frame.with_columns(label=1 - pl.col("label"))),
        mark(frame.with_columns(risk=pl.col("risk") * 1.000001)),
        mark(frame.with_columns(patient_id=pl.lit("one"))),
        mark(frame.head(100)),
        mark(frame, FEATURES[:3]),
        mark(frame, trial="b"),
        mark(frame, seed=2),
        mark(frame, folds=4),
    ]
    monkeypatch.setitem(train.HYPER_PARAMETERS["xgboost"], "max_depth", 3)
    different.append(mark(frame))
    assert len({base, *different}) == 10


def test_degenerate_rows_are_a_clear_error(frame: pl.DataFrame) -> None:
    import polars as pl

    cases: list[tuple[pl.DataFrame, tuple[str, ...], str]] = [
        (frame.head(0), FEATURES, "0 training rows"),
        (frame.head(40), FEATURES, "40 training rows"),
        (frame.with_columns(label=pl.lit(0)), FEATURES, "0 of 480 rows have the event"),
        (frame.with_columns(label=pl.lit(1)), FEATURES, "480 of 480 rows have the event"),
        (frame.with_columns(patient_id=pl.lit("one")), FEATURES, "1 subjects for 5 folds"),
        (
            frame.with_columns(label=(pl.col("patient_id") == "SECRET-0003").cast(pl.Int64)),
            FEATURES,
            "1 subjects have rows with the event",
        ),
        (frame.with_columns(label=pl.lit(None, dtype=pl.Int64)), FEATURES, "label must be 0 or 1"),
        (frame.with_columns(label=pl.lit(2)), FEATURES, "label must be 0 or 1"),
        (frame.with_columns(risk=pl.lit(float("inf"))), FEATURES, "infinite values, such as risk"),
        (frame.drop("risk"), FEATURES, "lack 1 columns, such as risk"),
        (frame, (), "no features"),
    ]
    for rows, names, message in cases:
        with pytest.raises(TrainingDataError, match=message) as error:
            cross_validate(rows, names, seed=0)
        assert "SECRET" not in str(error.value)
    with pytest.raises(TrainingDataError, match="at least 2"):
        cross_validate(frame, FEATURES, folds=1)
    with pytest.raises(TrainingDataError, match="one is absent"):
        fit_final(frame.with_columns(label=pl.lit(0)), FEATURES)
    with pytest.raises(ValueError, match="no candidate 'magic'"):
        fit_final(frame, FEATURES, name="magic")


def test_large_trials_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert candidates(0, rows=60_000)["random_forest"]().max_samples == 0.1
    assert candidates(0, rows=2_000)["random_forest"]().max_samples == 0.7
    data = TrainingData.from_frame(training_frame(), FEATURES)
    monkeypatch.setattr(train, "_IMPORTANCE_ROWS", 40)
    monkeypatch.setattr(train, "_CELLS", 300)
    fold = assign_folds(data, 0, 3)
    fitted = []
    for number in range(3):
        model = candidates(0)["xgboost"]().fit(data.features[fold != number], data.labels[fold != number])
        fitted.append({"xgboost": model})
    found = train._importance(data, fold, fitted, ("xgboost",), 0, 4)
    assert len(found) == 4
    assert found[0].feature == "risk"
