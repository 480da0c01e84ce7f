"""A tour of the platform's data, features, cohorts and models, cell by cell.

Run it in a shell that has ``eval "$(./pipeline-manager.sh --env)"``, whole (``python examples/notebook.py``) or cell by
cell in an editor that knows ``# %%``. It reads what the pipelines wrote; the only thing that it stores is one cohort.
"""

# %% The trial: that of CLINICAL_TRIAL
from __future__ import annotations

from datetime import timedelta

import polars as pl

from clinical_orchestration.clients import ClientError, ClinicalData, FeatureStore, Models
from clinical_orchestration.cohorts.criteria import available_definitions

data, store, models = ClinicalData(), FeatureStore(), Models()
print(f"trial {data.trial}: {data.profile.title}")
print(data.catalog().filter(pl.col("rows") > 0).select("table", "rows", "version"))

# %% Patients, and what is known about the first of them
patients = data.patients()
print(f"{patients.height} patients")
print(patients.group_by("arm").len().sort("arm"))
first = patients["patient_id"][0]
vitals = data.vitals(first)
print(vitals.group_by("test_code").agg(n=pl.len(), mean=pl.col("value").mean(), last=pl.col("value").last()))
last_day = vitals["event_time"].max()
print(data.labs(first, since=last_day - timedelta(days=7)).select("event_time", "test_code", "value", "unit"))

# %% How good the records are, and why some were rejected
print(data.quality().select("table", "rows", "score", "passed", "broken"))
print(data.rejected())

# %% A message against the contract, before it is sent
message = {"patient_id": "P1", "timestamp": "2025-01-01T00:00:00Z", "heart_rate": 400, "source": "example"}
print(data.validate([message], "vitals").faults)

# %% A cohort: criteria as data, matched without storing
criteria = {
    "name": "example-older",
    "title": "Patients of at least 60 years with a known heart rate",
    "index": {"at": "last_record"},
    "inclusion": [
        {"id": "age", "kind": "age", "min": 60},
        {
            "id": "heart-rate",
            "kind": "any",
            "of": [
                {"kind": "vital", "test": code, "max": 110, "window": {"before": "30d"}} for code in ("HR", "PULSE")
            ],
        },
    ],
    "exclusion": [{"id": "severe-event", "kind": "adverse_event", "min_grade": 4}],
}
cohort = data.match(criteria)
print(f"{len(cohort.members)} of {len(cohort.screened)} patients, {cohort.statuses()}")
print(cohort.screened[0].match.results[0].text())

# %% The same, stored, with the attrition of each criterion
report = data.build_cohort(criteria)
print(data.attrition(report.cohort).select("criterion", "entered", "removed", "removed_unknown", "remaining"))
print(f"criteria that ship for this trial: {', '.join(available_definitions(data.trial))}")

# %% Features: days, one patient online, and online against offline
print(store.days().tail(5))
newest = store.offline().unique("patient_id", keep="last", maintain_order=True)
try:
    online = store.online(newest["patient_id"][0])
    print(f"online features of {online.feature_time}: {sum(v is not None for v in online.features.values())} values")
except ClientError as error:
    print(error)
print(store.compare().group_by("status").len())

# %% Point in time: what was known a day before each adverse event
events = data.adverse_events(cohort.members).select(
    "patient_id", "event_type", time=pl.col("event_time") - pl.duration(days=1)
)
known = store.as_of(events, features=store.names[:3], max_age=timedelta(days=60))
print(known.head())
print(f"{known['feature_time'].is_not_null().sum()} of {known.height} events have features of the 60 days before")

# %% Models: what serves, and a prediction
try:
    champion = models.champion()
    print("no champion yet" if champion is None else f"champion: version {champion.version}, {champion.candidate}")
    print(models.predict(newest["patient_id"][0]))
except ClientError as error:
    print(f"models: {error}")
