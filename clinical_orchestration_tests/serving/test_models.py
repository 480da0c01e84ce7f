import os
import warnings
from typing import Any

import numpy as np
import pytest

from clinical_orchestration.modeling.train import candidates
from clinical_orchestration.serving import models
from clinical_orchestration.serving.ports import ModelLoadError

os.environ.setdefault("OMP_NUM_THREADS", "1")
NAMES = tuple(f"feature_{number}" for number in range(12))


@pytest.fixture(scope="module")
def data() -> tuple[Any, Any]:
    import pandas as pd

    rng = np.random.default_rng(1)
    rows = rng.normal(size=(300, len(NAMES)))
    labels = (rows[:, 0] + rng.normal(size=300) > 0.5).astype(int)
    rows[rng.random(rows.shape) < 0.1] = np.nan
    rows[:, 11] = np.nan  # a feature that was never seen
    return pd.DataFrame(rows, columns=list(NAMES)), labels


@pytest.mark.parametrize("name", ["logistic_regression", "random_forest", "xgboost", "ensemble"])
def test_the_rebuilt_form_gives_the_model_s_own_probabilities(name: str, data: tuple[Any, Any]) -> None:
    frame, labels = data
    estimator = candidates(0)[name]().fit(frame, labels)
    served = models.served_model(estimator, NAMES, frame.to_numpy()[:1])
    assert served.predict_proba.__qualname__.startswith(("compiled", "_forest"))
    own = estimator.predict_proba(frame)[:, 1]
    np.testing.assert_allclose(served.predict_proba(frame.to_numpy()), own, rtol=0, atol=1e-9)
    for start in range(0, 96, 4):  # few rows take another way through a forest
        few = served.predict_proba(frame.to_numpy()[start : start + 4])
        np.testing.assert_allclose(few, own[start : start + 4], rtol=0, atol=1e-9)


def test_unknown_estimators_are_asked_themselves(data: tuple[Any, Any]) -> None:
    from sklearn.ensemble import HistGradientBoostingClassifier

    frame, labels = data
    frame = frame.assign(feature_11=1.0)  # it cannot be fitted on an empty column
    estimator = HistGradientBoostingClassifier(max_iter=5, random_state=0).fit(frame, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        served = models.served_model(estimator, NAMES, frame.to_numpy()[:1])
        assert served.predict_proba.__qualname__.startswith("_through_array")
        own = estimator.predict_proba(frame)[:, 1]
        np.testing.assert_allclose(served.predict_proba(frame.to_numpy()), own)


def test_estimators_that_pick_columns_by_name_get_a_frame(data: tuple[Any, Any]) -> None:
    from sklearn.compose import ColumnTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    frame, labels = data
    estimator = make_pipeline(
        ColumnTransformer([("kept", "passthrough", ["feature_3", "feature_0"])]), LogisticRegression()
    ).fit(frame.fillna(0.0), labels)
    served = models.served_model(estimator, NAMES, frame.fillna(0.0).to_numpy()[:1])
    assert served.predict_proba.__qualname__.startswith("_through_frame")
    rows = frame.fillna(0.0)
    np.testing.assert_allclose(served.predict_proba(rows.to_numpy()), estimator.predict_proba(rows)[:, 1])


def test_a_rebuilt_form_that_answers_otherwise_is_not_used(
    data: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    frame, labels = data
    estimator = candidates(0)["logistic_regression"]().fit(frame, labels)
    monkeypatch.setattr(models, "compiled", lambda estimator, column: lambda rows: np.full(len(rows), 0.123))
    served = models.served_model(estimator, NAMES, frame.to_numpy()[:1])
    np.testing.assert_allclose(
        served.predict_proba(frame.to_numpy()), estimator.predict_proba(frame)[:, 1], rtol=0, atol=1e-12
    )


def test_the_event_is_class_one_wherever_it_stands(data: tuple[Any, Any]) -> None:
    from sklearn.linear_model import LogisticRegression

    frame, labels = data
    rows = frame.fillna(0.0)
    text = np.where(labels == 1, "1", "9")
    estimator = LogisticRegression().fit(rows, text)
    served = models.served_model(estimator, NAMES, rows.to_numpy()[:1])
    np.testing.assert_allclose(served.predict_proba(rows.to_numpy()), estimator.predict_proba(rows)[:, 0], atol=1e-9)


def test_what_cannot_be_served_says_why(data: tuple[Any, Any]) -> None:
    from sklearn.linear_model import LinearRegression, LogisticRegression

    frame, labels = data
    rows = frame.fillna(0.0)
    with pytest.raises(ModelLoadError, match="no probabilities"):
        models.served_model(LinearRegression().fit(rows, labels), NAMES)
    with pytest.raises(ModelLoadError, match="3 classes"):
        models.served_model(LogisticRegression().fit(rows, np.arange(300) % 3), NAMES)
    with pytest.raises(ModelLoadError, match="signature"):
        models.served_model(LogisticRegression().fit(rows, labels), NAMES, rows.to_numpy()[:1, 1:])
    with pytest.raises(ModelLoadError, match="input example"):
        models.served_model(LogisticRegression().fit(rows, labels), NAMES[:5])
