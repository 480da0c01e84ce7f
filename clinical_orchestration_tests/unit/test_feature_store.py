"""What a refresh computes and writes, with the computation itself replaced: no Spark here."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

import pytest

from clinical_orchestration.features.definitions import feature_names
from clinical_orchestration.stores import feature_store
from clinical_orchestration.stores.feature_store import OfflineStore, load_newest, read_features, verify
from clinical_orchestration.stores.online import InMemoryOnlineStore, OnlineLoad
from clinical_orchestration.tables import FEATURE_KEY_COLUMNS, FEATURES, SILVER_COLUMNS, arrow_schema, silver
from clinical_orchestration.trials import load_trial
from clinical_orchestration_tests.fakes import InMemoryTableStore

if TYPE_CHECKING:
    import pyarrow as pa

    from clinical_orchestration.trials import TrialProfile

PILOT, STREAM = load_trial("cdisc-pilot"), load_trial("simulated")
NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


class CountingStore(OfflineStore):
    """One feature row a vital sign of a patient: `age_years` is the patient's number of vital signs so far."""

    def __init__(self, tables: InMemoryTableStore) -> None:
        super().__init__(cast(Any, None), tables)
        self.computed: list[list[str] | None] = []

    def _compute(
        self, profile: TrialProfile, versions: Mapping[str, int], affected: list[str] | None, clock: Any
    ) -> pa.Table:
        import polars as pl

        self.computed.append(affected)
        vitals = pl.DataFrame(self._tables.read(silver("patient_vitals"), version=versions["patient_vitals"]))
        vitals = vitals.filter(pl.col("trial") == profile.name).sort("patient_id", "event_time")
        if affected is not None:
            vitals = vitals.filter(pl.col("patient_id").is_in(affected))
        count = pl.col("event_time").cum_count().over("patient_id").cast(pl.Float64)
        rows = vitals.select(
            "trial",
            "patient_id",
            pl.col("event_time").alias("feature_time"),
            pl.col("event_time").dt.date().alias("feature_date"),
            *(
                (count if name == "age_years" else pl.lit(None, dtype=pl.Float64)).alias(name)
                for name in feature_names(profile)
            ),
        )
        return rows.to_arrow()


def add_vitals(tables: InMemoryTableStore, patient: str, *days: int, trial: str = PILOT.name) -> None:
    import pyarrow as pa

    columns = SILVER_COLUMNS["patient_vitals"]
    rows = [
        {**dict.fromkeys(columns), "trial": trial, "patient_id": patient, "event_time": NOON + timedelta(days=day)}
        for day in days
    ]
    tables.append(silver("patient_vitals"), pa.Table.from_pylist(rows, arrow_schema(columns)))


@pytest.fixture
def tables() -> InMemoryTableStore:
    tables = InMemoryTableStore()
    add_vitals(tables, "P1", 0, 1, 2)
    add_vitals(tables, "P2", 0, 5)
    return tables


def ages(tables: InMemoryTableStore, profile: TrialProfile = PILOT) -> dict[tuple[str, int], float]:
    rows = read_features(tables, profile)
    return {
        (patient, (time - NOON).days): age
        for patient, time, age in rows.select("patient_id", "feature_time", "age_years").iter_rows()
    }


def test_the_first_refresh_computes_everything_and_the_second_nothing(tables: InMemoryTableStore) -> None:
    store = CountingStore(tables)
    first = store.refresh(PILOT)
    assert (first.status, first.rows, first.patients, first.changed_rows, first.changed_dates) == ("full", 5, 2, 5, 4)
    assert first.null_share == pytest.approx(1 - 1 / first.features)
    version = tables.version(FEATURES)
    second = CountingStore(tables).refresh(PILOT)
    assert (second.status, second.rows, second.computed_rows) == ("up_to_date", 5, 0)
    assert tables.version(FEATURES) == version
    assert store.computed == [None]


def test_new_records_of_one_patient_compute_that_patient_and_write_only_changed_days(
    tables: InMemoryTableStore,
) -> None:
    CountingStore(tables).refresh(PILOT)
    add_vitals(tables, "P2", 4)  # late: the row of day 5 changes too
    store = CountingStore(tables)
    report = store.refresh(PILOT)
    assert store.computed == [["P2"]]
    assert (report.status, report.computed_rows, report.changed_rows, report.changed_dates) == ("incremental", 3, 2, 2)
    assert ages(tables) == {("P1", 0): 1, ("P1", 1): 2, ("P1", 2): 3, ("P2", 0): 1, ("P2", 4): 2, ("P2", 5): 3}


def test_a_changed_day_keeps_the_rows_of_patients_that_were_not_computed(tables: InMemoryTableStore) -> None:
    CountingStore(tables).refresh(PILOT)
    add_vitals(tables, "P2", -1)  # P2's row of day 0, which P1 has too, changes
    CountingStore(tables).refresh(PILOT)
    assert ages(tables) == {("P1", 0): 1, ("P1", 1): 2, ("P1", 2): 3, ("P2", -1): 1, ("P2", 0): 2, ("P2", 5): 3}


def test_trials_do_not_touch_each_other(tables: InMemoryTableStore) -> None:
    CountingStore(tables).refresh(PILOT)
    add_vitals(tables, "P1", 0, 1, trial=STREAM.name)  # the same patient id and days in another trial
    assert CountingStore(tables).refresh(PILOT).status == "up_to_date"
    report = CountingStore(tables).refresh(STREAM)
    assert (report.status, report.rows) == ("full", 2)
    assert len(ages(tables)) == 5
    add_vitals(tables, "P1", -3, trial=STREAM.name)
    CountingStore(tables).refresh(STREAM)
    assert ages(tables, STREAM) == {("P1", -3): 1, ("P1", 0): 2, ("P1", 1): 3}
    assert ages(tables)["P1", 0] == 1
    CountingStore(tables).refresh(PILOT, full=True)
    assert len(ages(tables, STREAM)) == 3


def test_a_full_refresh_without_changes_writes_no_row(tables: InMemoryTableStore) -> None:
    CountingStore(tables).refresh(PILOT)
    report = CountingStore(tables).refresh(PILOT, full=True)
    assert (report.status, report.computed_rows, report.changed_rows, report.changed_dates) == ("full", 5, 0, 0)


def test_a_run_killed_before_it_recorded_its_progress_repeats_and_doubles_nothing(
    tables: InMemoryTableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(feature_store.FeatureState, "record", killed)
        with pytest.raises(KeyboardInterrupt):
            CountingStore(tables).refresh(PILOT)
    report = CountingStore(tables).refresh(PILOT)
    assert (report.status, report.rows, report.changed_rows) == ("full", 5, 0)


def test_another_set_of_features_computes_everything_and_so_does_the_way_back(tables: InMemoryTableStore) -> None:
    other = PILOT.model_copy(update={"features": PILOT.features.model_copy(update={"high_risk_drugs": ()})})
    CountingStore(tables).refresh(PILOT)
    assert CountingStore(tables).refresh(other).status == "full"
    assert CountingStore(tables).refresh(other).status == "up_to_date"
    assert CountingStore(tables).refresh(PILOT).status == "full"


def test_silver_made_anew_computes_everything(tables: InMemoryTableStore) -> None:
    CountingStore(tables).refresh(PILOT)
    del tables._tables[silver("patient_vitals")]
    add_vitals(tables, "P9", 1)
    report = CountingStore(tables).refresh(PILOT)
    assert (report.status, report.rows) == ("full", 1)
    assert ages(tables) == {("P9", 1): 1}
    assert CountingStore(tables).refresh(PILOT).status == "up_to_date"


def test_the_newest_row_of_each_patient_goes_online_and_equals_offline(tables: InMemoryTableStore) -> None:
    store, online = CountingStore(tables), InMemoryOnlineStore()
    store.refresh(PILOT)
    assert load_newest(store, online, PILOT) == OnlineLoad(written=2)
    assert load_newest(store, online, PILOT) == OnlineLoad(unchanged=2)
    row = online.get("P2")
    assert row is not None
    assert (row.feature_time, row.features, row.trial) == (NOON + timedelta(days=5), {"age_years": 2.0}, PILOT.name)
    assert verify(store, online, PILOT).consistent

    add_vitals(tables, "P2", 6)
    store.refresh(PILOT)
    stale = verify(store, online, PILOT)
    assert (stale.checked, stale.equal, stale.differing, stale.consistent) == (2, 1, 1, False)
    assert load_newest(store, online, PILOT) == OnlineLoad(written=1, unchanged=1)
    assert verify(store, online, PILOT, sample=1).checked == 1
    assert verify(store, InMemoryOnlineStore(), PILOT).missing == 2


def test_an_absent_table_reads_as_no_rows_with_every_column() -> None:
    rows = read_features(InMemoryTableStore(), PILOT)
    assert rows.height == 0
    assert rows.columns == [*FEATURE_KEY_COLUMNS, *feature_names(PILOT)]
