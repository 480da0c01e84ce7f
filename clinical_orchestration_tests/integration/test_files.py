"""SDTM files to bronze: each row once, whatever is run again or killed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from clinical_orchestration.ingestion.files import ingest_files
from clinical_orchestration.stores.sdtm_files import SdtmFileError
from clinical_orchestration.stores.tables import DeltaTableStore
from clinical_orchestration.tables import bronze
from clinical_orchestration.trials import load_trial
from clinical_orchestration_tests.factories import NOW, sdtm_rows, write_sdtm
from clinical_orchestration_tests.fakes import InMemoryTableStore

PILOT = load_trial("cdisc-pilot")


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class KilledAfter(InMemoryTableStore):
    """Dies right after the given commit."""

    def __init__(self, commits: int) -> None:
        super().__init__()
        self.left = commits

    def append(self, name: str, *args: Any, **more: Any) -> int | None:
        version = super().append(name, *args, **more)
        self.left -= 1
        if self.left == 0:
            raise Killed
        return version


def positions(tables: Any, domain: str) -> list[str]:
    return [text.partition("#")[2] for text in tables.read(bronze(domain)).column("source_position").to_pylist()]


def test_a_file_becomes_raw_records_with_its_name_content_and_row(tmp_path: Path) -> None:
    tables = DeltaTableStore(str(tmp_path / "lake"))
    write_sdtm(tmp_path / "in", "VS", sdtm_rows("VS", 3))
    report = ingest_files(tables, PILOT, tmp_path / "in", now=NOW)
    row = tables.read(bronze("patient_vitals")).to_pylist()[0]
    assert row["source"] == "file:vs.csv"
    assert row["source_position"] == f"vs.csv@{report.files[0].sha256[:12]}#0"
    assert (row["trial"], row["record_format"], row["received_at"]) == ("cdisc-pilot", "sdtm:VS", None)
    assert row["ingested_at"] == NOW
    assert '"VSTESTCD":"PULSE"' in row["payload"]
    assert (report.appended, report.already_ingested) == (3, 0)
    assert report.missing == ["DM", "LB", "AE", "EX", "CM"]


def test_the_same_files_again_append_nothing(tmp_path: Path) -> None:
    tables = DeltaTableStore(str(tmp_path / "lake"))
    write_sdtm(tmp_path / "in", "VS", sdtm_rows("VS", 5))
    write_sdtm(tmp_path / "in", "DM", sdtm_rows("DM", 2), "parquet")
    ingest_files(tables, PILOT, tmp_path / "in", now=NOW, chunk_rows=2)
    version = tables.version(bronze("patient_vitals"))
    report = ingest_files(tables, PILOT, tmp_path / "in", now=NOW, chunk_rows=2)
    assert (report.appended, report.already_ingested) == (0, 7)
    assert tables.version(bronze("patient_vitals")) == version


def test_medications_come_from_two_domains(tmp_path: Path) -> None:
    tables = InMemoryTableStore()
    write_sdtm(tmp_path, "CM", sdtm_rows("CM", 3))
    write_sdtm(tmp_path, "EX", sdtm_rows("EX", 2))
    report = ingest_files(tables, PILOT, tmp_path, now=NOW)
    assert report.by_table() == {"medications": 5}
    assert sorted(tables.read(bronze("medications")).column("record_format").to_pylist()) == [
        "sdtm:CM", "sdtm:CM", "sdtm:CM", "sdtm:EX", "sdtm:EX",
    ]  # fmt: skip


@pytest.mark.parametrize("commits", [1, 2, 3, 4])
def test_a_killed_ingest_goes_on_where_it_stopped(tmp_path: Path, commits: int) -> None:
    tables = KilledAfter(commits)
    write_sdtm(tmp_path, "VS", sdtm_rows("VS", 7))
    with contextlib.suppress(Killed):
        ingest_files(tables, PILOT, tmp_path, now=NOW, chunk_rows=2)
    # with another chunk size, so that chunks begin in the middle of what is there
    report = ingest_files(tables, PILOT, tmp_path, now=NOW, chunk_rows=3)
    assert positions(tables, "patient_vitals") == [str(number) for number in range(7)]
    assert report.appended + report.already_ingested == 7


def test_a_corrected_file_is_new(tmp_path: Path) -> None:
    tables = InMemoryTableStore()
    rows = sdtm_rows("VS", 3)
    write_sdtm(tmp_path, "VS", rows)
    ingest_files(tables, PILOT, tmp_path, now=NOW)
    write_sdtm(tmp_path, "VS", [*rows[:2], rows[2] | {"VSSTRESN": 99}])
    assert ingest_files(tables, PILOT, tmp_path, now=NOW).appended == 3


def test_two_trials_may_take_the_same_file(tmp_path: Path) -> None:
    tables = InMemoryTableStore()
    write_sdtm(tmp_path, "VS", sdtm_rows("VS", 3))
    ingest_files(tables, PILOT, tmp_path, now=NOW)
    assert ingest_files(tables, load_trial("simulated"), tmp_path, now=NOW).appended == 3


def test_a_trial_without_files_gives_an_empty_report() -> None:
    assert ingest_files(InMemoryTableStore(), load_trial("simulated"), now=NOW).files == []


def test_an_unusable_folder_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(SdtmFileError, match="--source"):
        ingest_files(InMemoryTableStore(), PILOT, tmp_path / "absent", now=NOW)
