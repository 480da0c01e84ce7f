"""The search for hyper-parameters: repeatable, bounded, honest about time, and of use."""

from __future__ import annotations

import pytest

from clinical_orchestration.modeling.train import (
    HYPER_PARAMETERS,
    MEMBERS,
    TrainingData,
    cross_validate,
    fingerprint,
    fit_final,
    hyper_parameters,
    parse_hyper_parameters,
    with_defaults,
)
from clinical_orchestration.modeling.tuning import SEARCHED, Search, search_plot, tune
from clinical_orchestration_tests.modeling_frames import FEATURES, training_frame


@pytest.fixture(scope="module")
def data() -> TrainingData:
    return TrainingData.from_frame(training_frame(40, 6), FEATURES)


@pytest.fixture(scope="module")
def search(data: TrainingData) -> Search:
    return tune(data, trials=3, seed=3, folds=3)


def test_the_defaults_come_first_and_are_never_lost(search: Search) -> None:
    for member in MEMBERS:
        own = [trial for trial in search.trials if trial.member == member]
        assert len(own) == 3
        assert all(own[0].parameters[name] == HYPER_PARAMETERS[member][name] for name in SEARCHED[member])
        assert search.best[member] <= search.default[member] == own[0].loss
        assert set(search.parameters[member]) == set(HYPER_PARAMETERS[member])
    assert not search.stopped_by_time
    assert search.metrics()["hpo/trials"] == 9
    assert search_plot(search).startswith(b"\x89PNG")


def test_equal_seeds_find_the_same(data: TrainingData, search: Search) -> None:
    again = tune(data, trials=3, seed=3, folds=3)
    assert again.parameters == search.parameters
    assert [trial.loss for trial in again.trials] == [trial.loss for trial in search.trials]


def test_time_ends_a_search_and_is_told(data: TrainingData) -> None:
    short = tune(data, trials=200, seed=3, folds=3, timeout_seconds=0.5)
    assert short.stopped_by_time
    assert len(short.trials) < 600
    assert set(short.parameters) == set(MEMBERS)
    with pytest.raises(ValueError, match="at least 1"):
        tune(data, trials=0, seed=1)


def test_found_parameters_are_those_of_the_fitted_models(data: TrainingData) -> None:
    parameters = {"xgboost": {"n_estimators": 7, "max_depth": 1}}
    model = fit_final(data, name="xgboost", seed=1, parameters=parameters).estimator
    assert (model.n_estimators, model.max_depth) == (7, 1)
    assert model.learning_rate == HYPER_PARAMETERS["xgboost"]["learning_rate"]
    other = cross_validate(data, seed=1, folds=3, importances=0, parameters=parameters)
    default = cross_validate(data, seed=1, folds=3, importances=0)
    assert other.scores["xgboost"] != default.scores["xgboost"]
    assert other.scores["logistic_regression"] == default.scores["logistic_regression"]


def test_parameters_survive_the_experiment_tracker_as_text() -> None:
    parameters = with_defaults({"random_forest": {"min_samples_leaf": 3, "sampled_share": 0.123456789}})
    texts = {**hyper_parameters(parameters), "seed": "1", "trial": "x", "xgboost.unknown": "3"}
    assert parse_hyper_parameters(texts) == parameters
    with pytest.raises(ValueError, match=r"xgboost\.colour"):
        with_defaults({"xgboost": {"colour": 1}})
    with pytest.raises(ValueError, match="forest"):
        with_defaults({"forest": {}})


def test_what_else_decides_changes_the_fingerprint_and_nothing_leaves_it_alone(data: TrainingData) -> None:
    plain = fingerprint(data, trial="t", seed=1, folds=5)
    assert fingerprint(data, trial="t", seed=1, folds=5, extra={}) == plain
    assert fingerprint(data, trial="t", seed=1, folds=5, extra={"hpo_trials": 3}) != plain
