"""Corrections: what is safe, what is for people, and that applying them is done once, survives kills and is undone."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinical_orchestration.ingestion.accounting import account_for
from clinical_orchestration.ingestion.cleaning import (
    UnknownBatchError,
    applied_batches,
    apply_safe,
    finish_unfinished,
    log_proposals,
    revert,
)
from clinical_orchestration.quality.anomalies import prepared
from clinical_orchestration.quality.cleaning import (
    DECIMAL_RULE,
    FAHRENHEIT_RANGE,
    FAHRENHEIT_RULE,
    SPELLING_RULE,
    SWAPPED_RULE,
    Proposal,
    batch_id,
    decimal_slips,
    fahrenheit_proposals,
    patched,
    rejected_temperature,
    spelling_proposals,
    swapped_pressures,
    to_celsius,
)
from clinical_orchestration.stores.tables import DeltaTableStore, TableStore
from clinical_orchestration.tables import CLEANING_LOG, DOMAINS, DUPLICATES, QUARANTINE, silver
from clinical_orchestration.trials import load_trial
from clinical_orchestration_tests.factories import bronze_messages, vitals_message
from clinical_orchestration_tests.fakes import InMemoryTableStore
from clinical_orchestration_tests.quality_frames import fill

NOW = datetime(2025, 3, 1, tzinfo=UTC)
PROFILE = load_trial("simulated")
TRIAL = PROFILE.name


# --- what is proposed -----------------------------------------------------------------------------------------------


def reason(value: float) -> list[str]:
    return [f"out_of_range: temperature is {value:g}, outside 35 to 42 Cel"]


def rejected(values: list[float], site: str = "S1") -> pl.DataFrame:
    return pl.DataFrame(
        {
            "source_position": [f"v-0-{number}" for number in range(len(values))],
            "reasons": [reason(value) for value in values],
            "patient_id": [f"P{number % 3}" for number in range(len(values))],
            "site": [site] * len(values),
        }
    )


TEMPERATURES = pl.DataFrame({"patient_id": ["P0", "P1", "P2"], "site": ["S1"] * 3, "value": [36.8, 36.9, 37.0]})


def test_a_sites_fahrenheit_temperatures_are_converted() -> None:
    found = fahrenheit_proposals(rejected([98.6, 98.2, 99.1, 97.9, 98.4, 100.0]), TEMPERATURES)
    assert all(item.safe for item in found)
    assert [(item.old, item.new) for item in found][:2] == [("98.6 C", "37 C"), ("98.2 C", "36.8 C")]
    assert {item.rule for item in found} == {FAHRENHEIT_RULE}


def test_a_single_fahrenheit_temperature_is_for_people() -> None:
    (item,) = fahrenheit_proposals(rejected([98.6]), TEMPERATURES)
    assert not item.safe


def test_a_site_with_other_impossible_temperatures_shows_no_thermometer() -> None:
    mixed = [98.6, 98.2, 99.1, 97.9, 98.4, 3.7, 370.0, 0.0]
    assert not any(item.safe for item in fahrenheit_proposals(rejected(mixed), TEMPERATURES))


def test_a_conversion_far_from_what_the_patient_has_is_for_people() -> None:
    found = fahrenheit_proposals(rejected([98.6, 98.2, 99.1, 97.9, 98.4, 107.0]), TEMPERATURES)
    assert [item.safe for item in found] == [True] * 5 + [False]


def test_a_record_with_another_fault_is_left_alone() -> None:
    assert rejected_temperature([*reason(98.6), "out_of_range: spo2 is 130, outside 70 to 100 %"]) is None
    assert rejected_temperature(["out_of_range: heart_rate is 98.6, outside 40 to 200 /min"]) is None
    assert rejected_temperature(None) is None
    assert rejected_temperature(["implausible: TEMP is 98.6 C, outside 32 to 43"]) == 98.6


@given(st.floats(30, 45))
def test_conversion_is_the_inverse_of_fahrenheit(celsius: float) -> None:
    assert to_celsius(celsius * 9 / 5 + 32) == pytest.approx(celsius, abs=0.051)


@given(st.floats(*FAHRENHEIT_RANGE))
def test_no_value_in_the_range_could_be_a_body_temperature_in_celsius(value: float) -> None:
    assert value > 60
    assert 33.9 <= to_celsius(value) <= 43.1


def test_an_sdtm_row_gets_its_unit_and_a_message_its_value() -> None:
    assert patched("message", {"temperature": 98.6})["temperature"] == 37.0
    assert patched("sdtm:VS", {"VSSTRESN": 98.6, "VSSTRESU": "C"})["VSSTRESU"] == "F"


def units(*values: str | None) -> pl.DataFrame:
    return pl.DataFrame(
        {"source_position": [f"l-0-{number}" for number in range(len(values))], "dose_unit": list(values)}
    )


def test_units_get_their_usual_spelling() -> None:
    found = spelling_proposals("medications", "dose_unit", units("mg", "mg", "mg", "m g", "IU", "IU", "iu", None))
    assert [(item.old, item.new, item.safe) for item in found] == [("iu", "IU", True), ("m g", "mg", True)]
    assert {item.rule for item in found} == {SPELLING_RULE}


def test_milli_and_mega_are_not_the_same() -> None:
    (item,) = spelling_proposals("medications", "dose_unit", units("mU/L", "mU/L", "MU/L"))
    assert not item.safe


def pressures(*pairs: tuple[float, float]) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {"source_position": f"v-0-{number}", "patient_id": "P", "event_time": number, "time_point": None,
             "test_code": code, "value": value, "site": "S1"}
            for number, pair in enumerate(pairs)
            for code, value in zip(("SYSBP", "DIABP"), pair, strict=True)
        ]
    )  # fmt: skip


def test_swapped_pressures_are_only_proposed() -> None:
    (item,) = swapped_pressures(pressures((120, 80), (78, 121), (110, 70)))
    assert (item.rule, item.safe, item.old, item.new) == (
        SWAPPED_RULE, False, "SYSBP 78, DIABP 121", "SYSBP 121, DIABP 78",
    )  # fmt: skip


def test_decimal_slips_are_only_proposed() -> None:
    values = [36.5, 36.9, 36.7, 37.0, 36.6, 36.8, 367.0, 36.4]
    frame = pl.DataFrame(
        {"source_position": [f"v-0-{n}" for n in range(8)], "patient_id": ["P"] * 8, "site": ["S1"] * 8,
         "event_time": list(range(8)), "test_code": ["TEMP"] * 8, "value": values}
    )  # fmt: skip
    (item,) = decimal_slips("patient_vitals", prepared(frame))
    assert (item.rule, item.safe, item.old, item.new) == (DECIMAL_RULE, False, "367", "36.7")


def test_the_same_proposals_are_the_same_batch() -> None:
    one, two = fahrenheit_proposals(rejected([98.6, 98.2]), TEMPERATURES)
    assert batch_id(TRIAL, [one, two]) == batch_id(TRIAL, [two, one])
    assert batch_id(TRIAL, [one]) != batch_id(TRIAL, [two])


# --- applying -------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class Mortal:
    """A table store that dies before its n-th write."""

    def __init__(self, store: TableStore, writes: int) -> None:
        self._store, self.writes = store, writes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def _live(self) -> None:
        if self.writes == 0:
            raise Killed
        self.writes -= 1

    def append(self, *args: Any, **more: Any) -> Any:
        self._live()
        return self._store.append(*args, **more)

    def replace(self, *args: Any, **more: Any) -> Any:
        self._live()
        return self._store.replace(*args, **more)


def filled(store: TableStore) -> TableStore:
    """Return a store with good vital signs, eight in Fahrenheit, one of them twice, and one repeating a good one."""
    good = [vitals_message(number) for number in range(30)]
    hot = [vitals_message(number, temperature=98.6) for number in range(30, 38)]
    twice = [vitals_message(31, temperature=98.6)]
    other = [vitals_message(32, temperature=98.4, heart_rate=99)]  # says something else about 32
    rows = bronze_messages([*good, *hot, *twice, *other], trial=TRIAL).to_pylist()
    drugs = [
        {
            "patient_id": f"P00{number}", "timestamp": "2025-01-01T00:00:00Z", "drug_name": "X", "dosage": 5,
            "unit": "iu" if number == 3 else "IU",
        }
        for number in range(5)
    ]  # fmt: skip
    more = bronze_messages(drugs, topic="medications", trial=TRIAL).to_pylist()
    fill(store, {"patient_vitals": rows, "medications": more}, PROFILE)
    return store


def proposals(store: TableStore) -> list[Proposal]:
    quarantine = pl.DataFrame(store.read(QUARANTINE)).with_columns(patient_id=pl.lit("P"), site=pl.lit("S1"))
    vitals = pl.DataFrame(store.read(silver("patient_vitals"))).filter(pl.col("test_code") == "TEMP")
    drugs = pl.DataFrame(store.read(silver("medications")))
    return [
        *fahrenheit_proposals(quarantine, vitals),
        *spelling_proposals("medications", "dose_unit", drugs),
    ]


def state(store: TableStore) -> dict[str, list[dict[str, Any]]]:
    names = [silver("patient_vitals"), silver("medications"), QUARANTINE, DUPLICATES]
    return {
        name: sorted(store.read(name).to_pylist(), key=lambda row: (row["source_position"], str(row.get("test_code"))))
        for name in names
    }


@pytest.fixture(params=["memory", "delta"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> TableStore:
    return filled(InMemoryTableStore() if request.param == "memory" else DeltaTableStore(str(tmp_path / "lake")))


def clean(store: TableStore) -> Any:
    _, still_open = log_proposals(store, TRIAL, proposals(store), now=NOW, run_id="r")
    return apply_safe(store, PROFILE, still_open, now=NOW, run_id="r")


def test_applying_moves_records_once_and_reverting_brings_them_back(store: TableStore) -> None:
    before = state(store)
    report = clean(store)
    assert report.applied == {FAHRENHEIT_RULE: 9, SPELLING_RULE: 1}
    assert report.kept == {"another record of the same observation says something else": 1}
    after = state(store)
    temperatures = [row for row in after[silver("patient_vitals")] if row["original_unit"] == "[degF]"]
    assert [row["value"] for row in temperatures] == [37.0] * 8
    assert {row["original_value"] for row in temperatures} == {"98.6"}
    assert len(after[DUPLICATES]) == 1
    assert len(after[QUARANTINE]) == 1
    assert {row["dose_unit"] for row in after[silver("medications")]} == {"IU"}
    assert all(account.balanced for account in account_for(store, DOMAINS).values())

    assert clean(store).applied == {}
    assert state(store) == after

    (batch,) = report.batches
    assert revert(store, TRIAL, batch, now=NOW, run_id="r") == 10
    assert state(store) == before
    assert all(account.balanced for account in account_for(store, DOMAINS).values())
    assert revert(store, TRIAL, batch, now=NOW, run_id="r") == 0
    assert state(store) == before
    assert clean(store).applied == {}
    assert [entry["reverted"] for entry in applied_batches(store, TRIAL)] == [True]


def test_the_log_says_of_each_record_what_why_and_by_which_rule(store: TableStore) -> None:
    clean(store)
    log = pl.DataFrame(store.read(CLEANING_LOG))
    begun = log.filter(pl.col("event") == "begun")
    assert begun.height == 10
    assert begun["source_position"].n_unique() == 10
    for column in ("rule", "old_value", "new_value", "reason", "before", "after", "run_id"):
        assert begun[column].null_count() == 0
    assert log.filter(pl.col("event") == "applied").height == 10


@pytest.mark.parametrize("writes", range(1, 10))
def test_a_run_that_is_killed_at_any_write_is_finished_by_the_next(writes: int) -> None:
    whole = filled(InMemoryTableStore())
    before = state(whole)
    report = clean(whole)
    store = filled(InMemoryTableStore())
    try:
        clean(Mortal(store, writes))
    except Killed:
        assert writes < 8
    clean(store)
    assert finish_unfinished(store, TRIAL, now=NOW, run_id="r") == []
    assert state(store) == state(whole)
    assert all(account.balanced for account in account_for(store, DOMAINS).values())
    (batch,) = report.batches
    try:
        revert(Mortal(store, writes), TRIAL, batch, now=NOW, run_id="r")
    except Killed:
        assert writes < 8
    revert(store, TRIAL, batch, now=NOW, run_id="r")
    assert state(store) == before


def test_an_unknown_batch_is_named_with_those_there_are() -> None:
    store = filled(InMemoryTableStore())
    with pytest.raises(UnknownBatchError, match="none was ever applied"):
        revert(store, TRIAL, "abc", now=NOW, run_id="r")
    (batch,) = clean(store).batches
    with pytest.raises(UnknownBatchError, match=batch):
        revert(store, TRIAL, "abc", now=NOW, run_id="r")
