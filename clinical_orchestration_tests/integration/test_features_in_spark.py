"""Features in real Spark: against a plain Python oracle, and the point-in-time property.

Histories are drawn from coarse grids, so that ties, equal times, late receipts and missing values are common. Each
patient is an example of its own: one pair of Spark runs tests dozens of them.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from clinical_orchestration.features.compute import compute_features, feature_times
from clinical_orchestration.features.definitions import feature_names
from clinical_orchestration.settings import ClientSettings
from clinical_orchestration.stores.spark import SparkSessions
from clinical_orchestration.tables import DOMAINS, SILVER_COLUMNS, arrow_schema
from clinical_orchestration.trials import load_trial
from clinical_orchestration.trials.profile import FeatureTimes, Vital

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.integration

START = datetime(2024, 2, 27, tzinfo=UTC)  # a leap day lies ahead
PATIENTS = 40
Rows = dict[str, list[dict[str, Any]]]
Row = Mapping[str, Any]

_PILOT = load_trial("cdisc-pilot")
VISITS = _PILOT.model_copy(
    update={
        "features": _PILOT.features.model_copy(
            update={
                "windows": {"2d": timedelta(days=2), "5d": timedelta(days=5)},
                "vitals": {"heart_rate": Vital(codes=("PULSE", "HR")), "systolic_bp": Vital(codes=("SYSBP",))},
                "labs": ("ALT",),
                "lab_trend_window": timedelta(days=4),
                "adverse_event_lookback": timedelta(days=3),
            }
        )
    }
)
GRID = VISITS.model_copy(
    update={
        "features": VISITS.features.model_copy(
            update={"times": FeatureTimes(kind="interval", every=timedelta(hours=12))}
        )
    }
)


@pytest.fixture(scope="module")
def spark(spark_env: dict[str, str]) -> Iterator[SparkSession]:
    sessions = SparkSessions(ClientSettings(SPARK_REMOTE=spark_env["SPARK_REMOTE"]))
    yield sessions.get()
    sessions.close()


def history(seed: int, patients: int = PATIENTS) -> Rows:
    """Return silver rows of some patients over ten days."""
    draw = random.Random(seed)
    rows: Rows = {domain: [] for domain in DOMAINS}

    def moment(first: int = 0, last: int = 40) -> datetime:
        return START + timedelta(hours=6 * draw.randint(first, last))

    def add(domain: str, patient: str, event: datetime, **values: Any) -> None:
        lag = draw.choice([0, 0, 0, 0, 1, 6, 30, 100])
        rows[domain].append(
            {
                "trial": draw.choices([VISITS.name, "another-trial"], [20, 1])[0],
                "patient_id": patient,
                "event_time": event,
                "received_at": event + timedelta(hours=lag),
                "source_position": f"{domain}#{len(rows[domain]):05d}",
                **values,
            }
        )

    for number in range(patients):
        patient = f"P{number:03d}"
        if draw.random() < 0.9:
            add("subjects", patient, START, age_years=float(draw.randint(40, 90)), sex=draw.choice(["M", "F", None]),
                site=draw.choice(["701", "site_12", None]), arm=draw.choice(["Placebo", "Drug Low Dose", "High", None]),
                treatment_start=draw.choice([None, moment(0, 20)]), treatment_end=moment(30, 40))  # fmt: skip
        for _ in range(draw.randint(0, 25)):
            code = draw.choice(["PULSE", "HR", "SYSBP", "SYSBP", "TEMP"])
            value = draw.choice([None, 60.0, 70.0, 70.1, 90.5, 120.0])
            add("patient_vitals", patient, moment(), test_code=code, value=value)
        for _ in range(draw.randint(0, 12)):
            add("lab_results", patient, moment(), test_code=draw.choice(["ALT", "ALT", "AST"]),
                value=draw.choice([None, 10.0, 20.0, 55.5]), reference_low=draw.choice([None, 15.0]),
                reference_high=40.0, reference_indicator=draw.choice([None, "NORMAL", "HIGH"]),
                baseline_flag=draw.random() < 0.2)  # fmt: skip
        for _ in range(draw.randint(0, 8)):
            start = moment()
            add("medications", patient, start, drug_name=draw.choice(["Aspirin", "aspirin ", "Warfarin", "X"]),
                drug_class=draw.choice([None, "A", "B"]), dose=draw.choice([0.0, 54.0, 81.0]), start_time=start,
                start_precision="day", end_time=draw.choice([None, start + timedelta(hours=draw.randint(0, 90))]),
                study_drug=draw.random() < 0.3)  # fmt: skip
        for _ in range(draw.randint(0, 8)):
            onset = moment()
            add("adverse_events", patient, onset, event_type=draw.choice(["RASH", "HEADACHE"]),
                severity=draw.choice([None, "grade_1", "grade_3"]), causality=draw.choice([None, "PROBABLE", "NONE"]),
                body_system=draw.choice([None, "Skin disorders"]), onset_precision=draw.choice(["day", "month"]),
                end_time=draw.choice([None, onset + timedelta(hours=draw.randint(0, 90))]))  # fmt: skip
    return rows


def run(spark: SparkSession, rows: Rows, profile: Any) -> dict[tuple[str, datetime], dict[str, float | None]]:
    """Return the feature rows by patient and time."""
    import pyarrow as pa
    from pyspark.sql.pandas.types import from_arrow_schema

    silver = {}
    for domain in DOMAINS:
        columns = SILVER_COLUMNS[domain]
        table = pa.Table.from_pylist([{c: r.get(c) for c in columns} for r in rows[domain]], arrow_schema(columns))
        empty = table.num_rows == 0
        silver[domain] = spark.createDataFrame([] if empty else table, from_arrow_schema(table.schema))
    found = compute_features(silver, feature_times(silver["patient_vitals"], profile), profile).toArrow().to_pylist()
    names = feature_names(profile)
    keyed = {(r["patient_id"], r["feature_time"].astimezone(UTC)): {n: r[n] for n in names} for r in found}
    assert len(keyed) == len(found), "one row a patient and time"
    assert all(r["trial"] == profile.name and r["feature_date"] == r["feature_time"].date() for r in found)
    return keyed


def equal(left: float | None, right: float | None) -> bool:
    if left is None or right is None:
        return left is right
    return math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-9)


def cut(rows: Rows, at: Mapping[str, datetime]) -> Rows:
    """Return what was known of each patient at its time."""
    return {
        domain: [r for r in records if max(r["event_time"], r["received_at"]) <= at[r["patient_id"]]]
        for domain, records in rows.items()
    }


@pytest.mark.parametrize("profile", [VISITS, GRID], ids=["visit", "interval"])
@settings(
    max_examples=1, derandomize=True, deadline=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(seed=st.integers(0, 2**32 - 1))
def test_features_of_the_data_cut_at_a_time_equal_those_of_all_data_up_to_it(
    spark: SparkSession, profile: Any, seed: int
) -> None:
    rows = history(seed)
    draw = random.Random(seed + 1)
    at = {
        f"P{number:03d}": START + timedelta(days=draw.randint(1, 10), seconds=draw.choice([0, -1]))
        for number in range(PATIENTS)
    }
    complete, early = run(spark, rows, profile), run(spark, cut(rows, at), profile)
    due = {key for key in complete if key[1] <= at[key[0]]}
    seen = {key for key in early if key[1] <= at[key[0]]}
    assert len(due) > PATIENTS
    assert seen <= due
    # a grid point is due once a later vital sign shows that the patient is still watched; visits are due at once
    assert profile is GRID or seen == due
    assert len(seen) > len(due) / 2
    wrong = {name for key in seen for name, value in early[key].items() if not equal(value, complete[key][name])}
    assert not wrong


def known(rows: Rows, domain: str, patient: str, t: datetime) -> list[Row]:
    return sorted(
        (
            r
            for r in rows[domain]
            if r["patient_id"] == patient and r["trial"] == VISITS.name and max(r["event_time"], r["received_at"]) <= t
        ),
        key=lambda r: (r["event_time"], r["received_at"], r["source_position"]),
    )


def slope(points: list[tuple[datetime, float]], t: datetime) -> float | None:
    x = [(at - t) / timedelta(days=1) for at, _ in points]
    if len(set(x)) < 2:
        return None
    return statistics.linear_regression(x, [y for _, y in points]).slope


def oracle(rows: Rows, patient: str, t: datetime) -> dict[str, float | None]:
    """Return some of the features, written down as plainly as possible."""
    expected: dict[str, float | None] = {}
    vitals = [r for r in known(rows, "patient_vitals", patient, t) if r["value"] is not None]
    longest = [r for r in vitals if r["event_time"] > t - timedelta(days=5)]
    for name, codes in {"heart_rate": ("PULSE", "HR"), "systolic_bp": ("SYSBP",)}.items():
        code = next((c for c in codes if any(r["test_code"] == c for r in longest)), codes[0])
        mine = [(r["event_time"], r["value"]) for r in longest if r["test_code"] == code]
        for window, days in {"2d": 2, "5d": 5}.items():
            inside = [(at, value) for at, value in mine if at > t - timedelta(days=days)]
            values = [value for _, value in inside]
            expected[f"{name}_mean_{window}"] = statistics.fmean(values) if values else None
            expected[f"{name}_std_{window}"] = statistics.stdev(values) if len(values) > 1 else None
            expected[f"{name}_min_{window}"] = min(values, default=None)
            expected[f"{name}_max_{window}"] = max(values, default=None)
            expected[f"{name}_trend_{window}"] = slope(inside, t)
        expected[f"{name}_latest"] = mine[-1][1] if mine else None
        expected[f"{name}_count_5d"] = float(len(mine))

    subject = known(rows, "subjects", patient, t)
    start = subject[0]["treatment_start"] if subject else None
    treated_from = start if start is not None and start <= t else None
    expected["on_treatment"] = float(treated_from is not None)
    expected["day_in_trial"] = None if treated_from is None else (t - treated_from) / timedelta(days=1)
    expected["age_years"] = subject[0]["age_years"] if subject else None

    labs = [r for r in known(rows, "lab_results", patient, t) if r["value"] is not None and r["test_code"] == "ALT"]
    recent = [r for r in labs if r["event_time"] > t - timedelta(days=4)]
    expected["lab_alt_latest"] = labs[-1]["value"] if labs else None
    expected["lab_alt_mean"] = statistics.fmean(r["value"] for r in recent) if recent else None
    expected["lab_alt_trend"] = slope([(r["event_time"], r["value"]) for r in recent], t)
    expected["lab_alt_out_of_range_count"] = float(
        sum(
            r["reference_indicator"] == "HIGH"
            or r["value"] > r["reference_high"]
            or (r["reference_low"] is not None and r["value"] < r["reference_low"])
            for r in recent
        )
    )
    baseline = labs[0]["value"] if labs else None
    if treated_from is not None and labs:
        before = [r["value"] for r in labs if r["event_time"] <= treated_from]
        flagged = [r["value"] for r in labs if r["baseline_flag"]]
        baseline = (flagged or before or [baseline])[-1]
    expected["lab_alt_change_from_baseline"] = labs[-1]["value"] - baseline if labs else None

    def ended(record: Row) -> bool:
        end = record["end_time"]
        return end is not None and end <= t and end.date() <= record["received_at"].date()

    drugs = [r for r in known(rows, "medications", patient, t) if not r["study_drug"]]
    courses: dict[tuple[str, datetime], bool] = {}
    for r in drugs:
        course = (r["drug_name"].strip().upper(), r["start_time"])
        courses[course] = courses.get(course, False) or ended(r)
    active = {drug for (drug, _), over in courses.items() if not over}
    expected["med_polypharmacy"] = float(len(active))
    expected["med_stopped_count"] = float(sum(courses.values()))
    study = [r for r in known(rows, "medications", patient, t) if r["study_drug"]]
    expected["study_dose_current"] = None if not study else 0.0 if ended(study[-1]) else study[-1]["dose"]

    events = known(rows, "adverse_events", patient, t)
    distinct = {(r["event_type"], r["event_time"]) for r in events}
    over = {(r["event_type"], r["event_time"]) for r in events if ended(r)}
    expected["ae_count_ever"] = float(len(distinct))
    expected["ae_ongoing_count"] = float(len(distinct - over))
    expected["ae_max_grade_ever"] = float(max((int(r["severity"][-1]) for r in events if r["severity"]), default=0))
    return expected


@pytest.mark.parametrize("profile", [VISITS, GRID], ids=["visit", "interval"])
def test_features_equal_the_plain_oracle(spark: SparkSession, profile: Any) -> None:
    rows = history(7)
    found = run(spark, rows, profile)
    assert len(found) > PATIENTS
    wrong = [
        (name, found[key][name], value, key)
        for key in found
        for name, value in oracle(rows, *key).items()
        if not equal(found[key][name], value)
    ]
    assert not wrong, wrong[:5]


def test_feature_times_are_the_ends_of_days_with_a_vital_sign_or_grid_points(spark: SparkSession) -> None:
    def vital(at: datetime, late: float = 0) -> dict[str, Any]:
        return {"trial": VISITS.name, "patient_id": "P1", "event_time": at,
                "received_at": at + timedelta(days=late), "test_code": "HR", "value": 70.0,
                "source_position": "x"}  # fmt: skip

    midnight = START + timedelta(days=1)
    rows: Rows = {domain: [] for domain in DOMAINS}
    rows["patient_vitals"] = [
        vital(START),
        vital(midnight),
        vital(midnight + timedelta(hours=1)),
        vital(START + timedelta(days=3, hours=13)),
        vital(START + timedelta(days=5), late=1),  # heard of after its day: no visit was known then
    ]
    second = timedelta(seconds=1)
    assert sorted(t for _, t in run(spark, rows, VISITS)) == [
        START + timedelta(days=1) - second,
        START + timedelta(days=2) - second,
        START + timedelta(days=4) - second,
    ]
    half = timedelta(hours=12)
    # a vital sign at a grid point belongs to the interval that ends there; 24:00 of the day of the 13 o'clock vital
    # sign is due because the patient was still watched later
    assert sorted(t for _, t in run(spark, rows, GRID)) == [
        START, midnight, midnight + half, START + timedelta(days=4)
    ]  # fmt: skip


def test_all_text_and_missing_values_give_rows_without_features_not_errors(spark: SparkSession) -> None:
    rows: Rows = {domain: [] for domain in DOMAINS}
    rows["patient_vitals"] = [
        {"trial": VISITS.name, "patient_id": "P1", "event_time": START, "received_at": None, "test_code": "HR",
         "value": None, "source_position": "x"}
    ]  # fmt: skip
    assert set(run(spark, rows, VISITS)) <= {("P1", START + timedelta(days=1, seconds=-1))}
