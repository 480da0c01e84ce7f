"""The list of features: complete, unique, stable."""

from __future__ import annotations

import pytest

from clinical_orchestration.features.definitions import (
    FAMILIES,
    definitions,
    feature_names,
    feature_set_id,
    interaction_terms,
    window_names,
)
from clinical_orchestration.settings import Variables
from clinical_orchestration.stores.online import META_FIELDS
from clinical_orchestration.tables import FEATURE_KEY_COLUMNS
from clinical_orchestration.trials import available_trials, load_trial


@pytest.mark.parametrize("trial", available_trials())
def test_every_family_of_the_contract_is_there_and_names_are_unique(trial: str) -> None:
    profile = load_trial(trial)
    names = feature_names(profile)
    assert len(names) == len(set(names))
    assert {definition.family for definition in definitions(profile)} == set(FAMILIES)
    assert len(names) >= Variables().feature_count_threshold
    assert not set(names) & {*FEATURE_KEY_COLUMNS, *META_FIELDS, "label", "site", "sex", "arm"}


@pytest.mark.parametrize("trial", available_trials())
def test_names_are_plain_identifiers_and_every_feature_says_what_it_is(trial: str) -> None:
    for definition in definitions(load_trial(trial)):
        assert definition.name.isidentifier()
        assert definition.name == definition.name.lower()
        assert definition.description
        assert definition.unit


def test_each_vital_has_every_statistic_over_every_window() -> None:
    profile = load_trial("simulated")
    names = set(feature_names(profile))
    for vital in profile.features.vitals:
        for window in ("1h", "6h", "24h"):
            for statistic in ("mean", "std", "min", "max", "trend"):
                assert f"{vital}_{statistic}_{window}" in names


def test_windows_are_ordered_by_length_not_by_name() -> None:
    assert window_names(load_trial("simulated")) == ("1h", "6h", "24h")
    assert window_names(load_trial("cdisc-pilot")) == ("7d", "30d", "90d")


def test_interactions_refer_to_features_that_exist() -> None:
    for trial in available_trials():
        profile = load_trial(trial)
        names = set(feature_names(profile))
        for name, (_, left, right) in interaction_terms(tuple(profile.features.vitals), profile.features.labs).items():
            assert {name, left, right} <= names


def test_the_feature_set_id_follows_the_profile_and_nothing_else() -> None:
    profile = load_trial("cdisc-pilot")
    assert feature_set_id(profile) == feature_set_id(profile.model_copy())
    other = profile.model_copy(update={"features": profile.features.model_copy(update={"labs": ("ALB",)})})
    assert feature_set_id(other) != feature_set_id(profile)
    stricter = profile.features.model_copy(update={"high_risk_drugs": ()})  # same names, other numbers
    assert feature_set_id(profile.model_copy(update={"features": stricter})) != feature_set_id(profile)


def test_no_feature_uses_the_end_of_treatment_or_the_final_arm() -> None:
    """A guard by text: the computation must not even read these columns."""
    from inspect import getsource

    from clinical_orchestration.features import compute

    source = getsource(compute)
    for column in ("treatment_end", "actual_arm", "death_time", "outcome", "screen_failure"):
        assert f'"{column}"' not in source
