"""The ingestion steps on an in-memory lakehouse and an in-memory broker."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from clinical_orchestration.defs.common import asset_key
from clinical_orchestration.defs.ingestion.assets import TOPICS, monitor_kafka_topics, validate_clinical_data
from clinical_orchestration.defs.results import RESULT
from clinical_orchestration.resources import KafkaResource, PipelineResource
from clinical_orchestration.tables import DOMAINS, bronze
from clinical_orchestration_tests.fakes import InMemoryTableStore


def run(source: Path | None = None, trial: str = "cdisc-pilot", **stores: Any) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        [monitor_kafka_topics, validate_clinical_data],
        resources={
            "pipeline": PipelineResource(trial=trial, source=None if source is None else str(source)),
            "tables": stores.get("tables") or InMemoryTableStore(),
            "kafka": stores.get("kafka") or KafkaResource(enabled=False),
        },
        raise_on_error=False,
    )


def result_of(result: dg.ExecuteInProcessResult, key: str) -> dict[str, Any]:
    (materialization,) = [
        event.materialization
        for event in result.get_asset_materialization_events()
        if event.asset_key == asset_key(key)
    ]
    return dict(materialization.metadata[RESULT].value)


def write_vitals(folder: Path, values: list[str]) -> None:
    head = "STUDYID,DOMAIN,USUBJID,VSSEQ,VSTESTCD,VSORRES,VSORRESU,VSSTRESC,VSSTRESN,VSSTRESU,VSDTC"
    rows = [
        f"CDISCPILOT01,VS,01-701-1015,{number},SYSBP,{value},mmHg,{value},{value},mmHg,2014-01-02"
        for number, value in enumerate(values, start=1)
    ]
    (folder / "vs.csv").write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")


def test_files_of_a_source_folder_land_in_bronze_once(tmp_path: Path) -> None:
    write_vitals(tmp_path, ["120", "130"])
    tables = InMemoryTableStore()
    first = run(tmp_path, tables=tables)
    assert first.success
    assert result_of(first, bronze("patient_vitals"))["appended"] == 2
    again = run(tmp_path, tables=tables)
    assert result_of(again, bronze("patient_vitals"))["appended"] == 0
    assert tables.row_count(bronze("patient_vitals")) == 2


def test_every_bronze_table_is_reported_even_without_records(tmp_path: Path) -> None:
    write_vitals(tmp_path, ["120"])
    keys = {event.asset_key for event in run(tmp_path).get_asset_materialization_events()}
    assert {asset_key(bronze(domain)) for domain in DOMAINS} <= keys


def test_a_missing_broker_is_said_and_does_not_fail_the_run(tmp_path: Path) -> None:
    write_vitals(tmp_path, ["120"])
    result = run(tmp_path)
    assert result.success
    assert result_of(result, TOPICS) == {"installed": False}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"trial": "no-such-trial"}, "there is no trial profile 'no-such-trial'; available: cdisc-pilot, simulated"),
        ({"source": Path("/no/such/folder")}, "the source folder /no/such/folder does not exist"),
    ],
)
def test_wrong_parameters_fail_at_once_and_say_why(arguments: dict[str, Any], said: str) -> None:
    result = run(**arguments)
    assert not result.success
    failures = [event for event in result.all_events if event.is_step_failure]
    assert failures
    assert not [event for event in result.all_events if event.is_step_up_for_retry]
    assert said in str(failures[0].step_failure_data.user_failure_data or failures[0].step_failure_data.error)
