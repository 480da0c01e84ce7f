"""The quality step on in-memory tables and an in-memory bucket."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import orjson
import pyarrow as pa
import pytest

from clinical_orchestration.defs.quality.assets import RULES, SCORE, validate_data_quality
from clinical_orchestration.resources import PipelineResource
from clinical_orchestration.stores.objects import ObjectNotFoundError, StoredObject
from clinical_orchestration.tables import SILVER_COLUMNS, arrow_schema, silver
from clinical_orchestration_tests.fakes import InMemoryTableStore

TRIAL = "cdisc-pilot"
THEN = datetime(2014, 1, 2, tzinfo=UTC)


class InMemoryObjects:
    """Bytes by key in a dictionary."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def uri(self, key: str) -> str:
        return f"s3://memory/{key}"

    def ensure_bucket(self) -> bool:
        return False

    def put(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> str:
        self.objects[key] = data
        return self.uri(key)

    def get(self, key: str) -> bytes:
        try:
            return self.objects[key]
        except KeyError:
            raise ObjectNotFoundError(key) from None

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        for key in sorted(self.objects):
            if key.startswith(prefix):
                yield StoredObject(key, len(self.objects[key]), None)


def vitals(count: int, **changes: Any) -> pa.Table:
    columns = SILVER_COLUMNS["patient_vitals"]
    row = dict.fromkeys(columns) | {
        "trial": TRIAL, "patient_id": "P1", "event_time": THEN, "received_at": THEN, "source": "file:vs.csv",
        "ingested_at": THEN, "test_code": "SYSBP", "value": 120.0, "unit": "mmHg", "original_value": "120",
        "original_unit": "mmHg", "record_key": "k", "content_hash": "c",
    }  # fmt: skip
    rows = [
        {**row, "record_key": f"k{number}", "source_position": f"vs.csv@0#{number}", **changes}
        for number in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=arrow_schema(columns))


def run(table: pa.Table) -> tuple[dict[str, bool], InMemoryObjects]:
    tables, objects = InMemoryTableStore(), InMemoryObjects()
    tables.append(silver("patient_vitals"), table)
    result = dg.materialize(
        [validate_data_quality],
        resources={"pipeline": PipelineResource(trial=TRIAL), "tables": tables, "objects": objects},
    )
    return {check.check_name: check.passed for check in result.get_asset_check_evaluations()}, objects


def test_good_rows_pass_and_leave_a_report() -> None:
    checks, objects = run(vitals(20, visit="BASELINE"))
    assert checks == {SCORE.name: True, RULES.name: True}
    (stored,) = objects.list(f"reports/quality/{TRIAL}/")
    report = orjson.loads(objects.get(stored.key))
    assert report["trial"] == TRIAL
    assert report["tables"]["patient_vitals"]["rows"] == 20
    assert b"P1" not in objects.get(stored.key)  # no patient identifier


@pytest.mark.parametrize(
    "changes",
    [{"event_time": datetime.now(UTC) + timedelta(days=30)}, {"unit": "furlong"}],
    ids=["times in the future", "an unknown unit"],
)
def test_rows_that_break_a_rule_fail_the_check(changes: dict[str, Any]) -> None:
    checks, _ = run(vitals(20, **changes))
    assert not checks[RULES.name]
