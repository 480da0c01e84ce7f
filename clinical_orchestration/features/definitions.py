"""The features of a trial: names, meaning, unit and order.

The list follows from the trial's profile alone, never from data, so that two runs, the model's signature and the
online store agree. The order is: vitals (by vital, window, statistic), derived, labs (by test), medications,
adverse event history, context, interactions. How each is computed is in :mod:`clinical_orchestration.features.compute`.

Rules for all: a feature at time t uses records with ``event_time <= t`` and ``received_at <= t``; a window ``w`` is
``(t - w, t]``; counts are 0 where nothing is known, every other feature is null then. Slopes are per day.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clinical_orchestration.trials import TrialProfile

# part of feature_set_id: raise it when a feature of an unchanged name is computed in another way
LOGIC_VERSION = "1"

FAMILIES = ("vitals", "derived", "labs", "medications", "adverse_events", "context", "interactions")

WINDOW_STATISTICS = ("mean", "std", "min", "max", "trend")
LAB_STATISTICS = ("latest", "mean", "trend", "change_from_baseline", "out_of_range_count")

# MedDRA system organ classes (part of their name, lower case) whose adverse events are counted apart
BODY_SYSTEMS: dict[str, str] = {
    "skin": "skin",
    "application_site": "administration site",
    "nervous": "nervous system",
    "cardiac": "cardiac",
    "gastrointestinal": "gastrointestinal",
    "psychiatric": "psychiatric",
    "infections": "infections",
    "respiratory": "respiratory",
}


@dataclass(frozen=True)
class FeatureDefinition:
    """One feature.

    Attributes:
        name: column of ``gold/patient_features`` and field of the online store.
        family: one of :data:`FAMILIES`.
        description: what it says, in words.
        unit: unit of the number, ``1`` for ratios, indicators and codes.
        counted_days: of what is counted over a window: its length in days. Such a feature changes its meaning when the
            window no longer reaches back to the subject's start in the trial, where much begins at once.
    """

    name: str
    family: str
    description: str
    unit: str
    counted_days: float | None = None


VITAL_UNITS = {
    "heart_rate": "beats/min",
    "systolic_bp": "mmHg",
    "diastolic_bp": "mmHg",
    "temperature": "C",
    "spo2": "%",
    "weight": "kg",
    "respiratory_rate": "breaths/min",
}

_STATISTIC_WORDS = {
    "mean": "mean",
    "std": "sample standard deviation",
    "min": "lowest value",
    "max": "highest value",
    "trend": "least-squares slope",
}


def window_names(profile: TrialProfile) -> tuple[str, ...]:
    """Return the names of the profile's windows, shortest first."""
    windows = profile.features.windows
    return tuple(sorted(windows, key=lambda name: (windows[name], name)))


def longest_window(profile: TrialProfile) -> str:
    """Return the name of the profile's longest window."""
    return window_names(profile)[-1]


@cache
def feature_definitions(profile_key: _ProfileKey) -> tuple[FeatureDefinition, ...]:
    """Return the definitions for what a profile asks; see :func:`definitions`."""
    return tuple(_build(profile_key))


@dataclass(frozen=True)
class _ProfileKey:
    """The part of a profile that decides which features there are."""

    windows: tuple[str, ...]
    vitals: tuple[str, ...]
    labs: tuple[str, ...]
    lab_window_days: float
    lookback_days: float


def _key(profile: TrialProfile) -> _ProfileKey:
    settings = profile.features
    return _ProfileKey(
        windows=window_names(profile),
        vitals=tuple(settings.vitals),
        labs=settings.labs,
        lab_window_days=settings.lab_trend_window.total_seconds() / 86400,
        lookback_days=settings.adverse_event_lookback.total_seconds() / 86400,
    )


def definitions(profile: TrialProfile) -> tuple[FeatureDefinition, ...]:
    """Return the definitions of a profile's features, in the documented order."""
    return feature_definitions(_key(profile))


def feature_names(profile: TrialProfile) -> tuple[str, ...]:
    """Return the names of a profile's features, in the documented order."""
    return tuple(definition.name for definition in definitions(profile))


def feature_set_id(profile: TrialProfile) -> str:
    """Return 16 hex digits that differ when the features, their order or how they are computed differ."""
    text = "\n".join((LOGIC_VERSION, profile.features.model_dump_json(), *feature_names(profile)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def counted_days(profile: TrialProfile) -> dict[str, float]:
    """Return the features that count over a window, products of such included, with the length of it in days."""
    found = {one.name: one.counted_days for one in definitions(profile) if one.counted_days is not None}
    settings = profile.features
    for name, (_, *sides) in interaction_terms(tuple(settings.vitals), settings.labs).items():
        windows = [found[side] for side in sides if side in found]
        if windows:
            found[name] = max(windows)
    return found


def lab_name(test_code: str, statistic: str) -> str:
    """Return the feature name of a lab test's statistic, such as ``lab_alt_latest``."""
    return f"lab_{test_code.lower()}_{statistic}"


def derived_suffixes(windows: tuple[str, ...]) -> tuple[str, ...]:
    """Return the suffixes of derived features: from the latest values, and from each window's means."""
    return ("latest", *(f"mean_{window}" for window in windows))


def _build(key: _ProfileKey) -> list[FeatureDefinition]:
    return [
        *_vitals(key),
        *_derived(key),
        *_labs(key),
        *_medications(key),
        *_adverse_events(key),
        *_context(key),
        *_interactions(key),
    ]


def _vitals(key: _ProfileKey) -> list[FeatureDefinition]:
    rows = []
    longest = key.windows[-1]
    for vital in key.vitals:
        unit = VITAL_UNITS.get(vital, "standard unit")
        words = vital.replace("_", " ")
        for window in key.windows:
            rows += [
                FeatureDefinition(
                    f"{vital}_{statistic}_{window}",
                    "vitals",
                    f"{_STATISTIC_WORDS[statistic]} of {words} in the last {window}",
                    f"{unit}/day" if statistic == "trend" else unit,
                )
                for statistic in WINDOW_STATISTICS
            ]
        rows += [
            FeatureDefinition(f"{vital}_latest", "vitals", f"last {words} in the last {longest}", unit),
            FeatureDefinition(f"{vital}_count_{longest}", "vitals", f"readings of {words} in the last {longest}", "1"),
            FeatureDefinition(
                f"{vital}_deviation", "vitals", f"last {words} minus its mean in the last {longest}", unit
            ),
        ]
    return rows


def _derived(key: _ProfileKey) -> list[FeatureDefinition]:
    rows = []
    has_pressure = {"systolic_bp", "diastolic_bp"} <= set(key.vitals)
    has_shock = {"systolic_bp", "heart_rate"} <= set(key.vitals)
    for suffix in derived_suffixes(key.windows):
        source = "last values" if suffix == "latest" else f"means of the last {suffix.removeprefix('mean_')}"
        if has_pressure:
            rows += [
                FeatureDefinition(
                    f"pulse_pressure_{suffix}", "derived", f"systolic minus diastolic pressure, of the {source}", "mmHg"
                ),
                FeatureDefinition(
                    f"mean_arterial_pressure_{suffix}",
                    "derived",
                    f"diastolic plus a third of the pulse pressure, of the {source}",
                    "mmHg",
                ),
            ]
        if has_shock:
            rows.append(
                FeatureDefinition(
                    f"shock_index_{suffix}", "derived", f"heart rate by systolic pressure, of the {source}", "1"
                )
            )
    return rows


def _labs(key: _ProfileKey) -> list[FeatureDefinition]:
    window = f"{key.lab_window_days:g} days"
    words = {
        "latest": ("last result", "standard unit"),
        "mean": (f"mean of the last {window}", "standard unit"),
        "trend": (f"least-squares slope over the last {window}", "standard unit/day"),
        "change_from_baseline": ("last result minus the baseline", "standard unit"),
        "out_of_range_count": (f"results outside the reference range in the last {window}", "1"),
    }
    rows = [
        FeatureDefinition(
            lab_name(test, statistic),
            "labs",
            f"{test}: {words[statistic][0]}",
            words[statistic][1],
            key.lab_window_days if statistic == "out_of_range_count" else None,
        )
        for test in key.labs
        for statistic in LAB_STATISTICS
    ]
    rows += [
        FeatureDefinition(
            "lab_out_of_range_total",
            "labs",
            f"results of all tests out of range in the last {window}",
            "1",
            key.lab_window_days,
        ),
        FeatureDefinition("lab_days_since_latest", "labs", "days since the last result of any test", "day"),
    ]
    return rows


def _medications(key: _ProfileKey) -> list[FeatureDefinition]:
    lookback = f"{key.lookback_days:g} days"
    return [
        FeatureDefinition("med_polypharmacy", "medications", "distinct drugs active at t, study drug apart", "1"),
        FeatureDefinition("med_high_risk_count", "medications", "of those, drugs on the trial's high-risk list", "1"),
        FeatureDefinition(
            "med_started_count", "medications", f"drugs started in the last {lookback}", "1", key.lookback_days
        ),
        FeatureDefinition("med_stopped_count", "medications", "drugs known to have ended by t", "1"),
        FeatureDefinition("med_drugs_ever", "medications", "distinct drugs known by t, active or not", "1"),
        FeatureDefinition("med_classes_active", "medications", "distinct classes of the active drugs", "1"),
        FeatureDefinition("study_dose_current", "medications", "dose of the study drug in force", "as recorded"),
        FeatureDefinition("study_dose_max", "medications", "highest dose of the study drug so far", "as recorded"),
        FeatureDefinition("study_dose_change", "medications", "dose in force minus the first dose", "as recorded"),
        FeatureDefinition("study_dose_days", "medications", "days since the dose in force began", "day"),
        FeatureDefinition("study_dose_records", "medications", "dosing records of the study drug so far", "1"),
    ]


def _adverse_events(key: _ProfileKey) -> list[FeatureDefinition]:
    lookback = f"{key.lookback_days:g} days"
    rows = [
        FeatureDefinition("ae_count_ever", "adverse_events", "distinct adverse events known by t", "1"),
        FeatureDefinition("ae_count_on_treatment", "adverse_events", "of those, begun at or after the first dose", "1"),
        FeatureDefinition(
            "ae_count_lookback", "adverse_events", f"events begun in the last {lookback}", "1", key.lookback_days
        ),
        FeatureDefinition(
            "ae_reported_lookback", "adverse_events", f"events first reported in {lookback}", "1", key.lookback_days
        ),
        FeatureDefinition("ae_ongoing_count", "adverse_events", "events of which no end is known at t", "1"),
        FeatureDefinition("ae_distinct_types", "adverse_events", "distinct types of event", "1"),
        FeatureDefinition("ae_related_count", "adverse_events", "events stated to be possibly drug-related", "1"),
        FeatureDefinition("ae_onset_days", "adverse_events", "distinct days on which events began", "1"),
        FeatureDefinition("ae_max_grade_ever", "adverse_events", "highest CTCAE grade so far, 0 for none", "1"),
        FeatureDefinition(
            "ae_max_grade_lookback", "adverse_events", f"highest grade in the last {lookback}", "1", key.lookback_days
        ),
        FeatureDefinition("ae_days_since_last", "adverse_events", "days since the last known onset", "day"),
        FeatureDefinition("ae_rate_on_treatment", "adverse_events", "on-treatment events in 30 days of it", "1"),
    ]
    rows += [
        FeatureDefinition(f"ae_{name}_count", "adverse_events", f"events of the system organ class '{part}'", "1")
        for name, part in BODY_SYSTEMS.items()
    ]
    return rows


def _context(key: _ProfileKey) -> list[FeatureDefinition]:
    longest = key.windows[-1]
    return [
        FeatureDefinition("age_years", "context", "age as recorded for the trial", "year"),
        FeatureDefinition("sex_male", "context", "1 male, 0 female", "1"),
        FeatureDefinition("site_number", "context", "the digits of the site's identifier, as a number", "1"),
        FeatureDefinition("arm_placebo", "context", "1 where the planned arm is placebo or another control", "1"),
        FeatureDefinition("arm_dose_rank", "context", "planned arm: 0 control, 1 low, 2 medium, 3 high dose", "1"),
        FeatureDefinition("on_treatment", "context", "1 from the day of the first dose", "1"),
        FeatureDefinition("day_in_trial", "context", "days since the first dose; null before", "day"),
        FeatureDefinition("days_since_enrolment", "context", "days since consent or first demographics", "day"),
        FeatureDefinition(f"vital_days_{longest}", "context", f"days with a vital sign in the last {longest}", "1"),
        FeatureDefinition("days_since_previous_vitals", "context", "days since the day with vitals before", "day"),
    ]


def interaction_terms(profile_vitals: tuple[str, ...], labs: tuple[str, ...]) -> dict[str, tuple[str, str, str]]:
    """Return each interaction: name -> (operator ``*`` or ``/``, left feature, right feature)."""
    terms: dict[str, tuple[str, str, str]] = {}
    if {"heart_rate", "temperature"} <= set(profile_vitals):
        terms["heart_rate_x_temperature"] = ("*", "heart_rate_latest", "temperature_latest")
    terms["age_x_polypharmacy"] = ("*", "age_years", "med_polypharmacy")
    terms["age_x_study_dose"] = ("*", "age_years", "study_dose_current")
    terms["study_dose_x_day_in_trial"] = ("*", "study_dose_current", "day_in_trial")
    terms["study_dose_x_ae_lookback"] = ("*", "study_dose_current", "ae_count_lookback")
    terms["arm_dose_rank_x_day_in_trial"] = ("*", "arm_dose_rank", "day_in_trial")
    terms["ae_ongoing_x_day_in_trial"] = ("*", "ae_ongoing_count", "day_in_trial")
    if {"systolic_bp", "diastolic_bp"} <= set(profile_vitals):
        terms["age_x_pulse_pressure"] = ("*", "age_years", "pulse_pressure_latest")
    if "weight" in profile_vitals:
        terms["study_dose_per_weight"] = ("/", "study_dose_current", "weight_latest")
    for left, right in (("AST", "ALT"), ("BUN", "CREAT")):
        if {left, right} <= set(labs):
            name = f"lab_{left.lower()}_by_{right.lower()}"
            terms[name] = ("/", lab_name(left, "latest"), lab_name(right, "latest"))
    if "CREAT" in labs:
        terms["high_risk_x_creatinine"] = ("*", "med_high_risk_count", lab_name("CREAT", "latest"))
    return terms


def _interactions(key: _ProfileKey) -> list[FeatureDefinition]:
    return [
        FeatureDefinition(name, "interactions", f"{left} {'times' if operator == '*' else 'by'} {right}", "product")
        for name, (operator, left, right) in interaction_terms(key.vitals, key.labs).items()
    ]
