"""What the quarantine says by site, test and time: a fault that ingestion rejects shows nowhere else."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from clinical_orchestration.transforms.dates import parse_iso8601_partial
from clinical_orchestration.transforms.messages import MEASUREMENTS, RULES
from clinical_orchestration.transforms.units import lab_test_code

if TYPE_CHECKING:
    import polars as pl

_TEST_OF_FIELD = {rule.name: rule.code[0] for rule in MEASUREMENTS if rule.code is not None}
_KNOWN_FIELDS = frozenset(rule.name for rules in RULES.values() for rule in rules)
_SUBJECT = re.compile(r"([a-z0-9_]+): ([A-Za-z0-9_]+)")
_TIMES = ("timestamp", "event_timestamp", "enrolled_at", "VSDTC", "LBDTC", "AESTDTC", "EXSTDTC", "CMSTDTC", "DMDTC")
SCHEMA = {
    "table": "String", "source_position": "String", "patient_id": "String", "site": "String", "test_code": "String",
    "tests": "List", "lab_id": "String", "event_time": "Datetime", "rule": "String", "field": "String",
}  # fmt: skip
"""Columns of :func:`rejections`."""


def rejections(quarantine: pl.DataFrame, sites: pl.DataFrame) -> pl.DataFrame:
    """Return one row a rejected record and reason, with what its payload says about where it came from.

    Args:
        quarantine: ``table, source_position, reasons, payload`` of one trial.
        sites: ``patient_id, site`` of its subjects, for records that do not name their site.

    Returns:
        Columns of :data:`SCHEMA`: ``rule`` and ``field`` (a field of the contract, an SDTM variable or a test code;
        null where the reason names none), ``test_code`` of the vital sign or laboratory test that the reason is about,
        ``tests`` that the record holds, the site, and the time that the record gives, null where it cannot be read.
    """
    import orjson
    import polars as pl

    site_of = dict(sites.select("patient_id", "site").iter_rows())
    rows: list[tuple[Any, ...]] = []
    for table, position, reasons, payload in quarantine.select(
        "table", "source_position", "reasons", "payload"
    ).iter_rows():
        try:
            record = orjson.loads(payload) if payload else {}
        except orjson.JSONDecodeError:
            record = {}
        if not isinstance(record, dict):
            record = {}
        patient = _text(record, "patient_id", "USUBJID")
        site = _text(record, "trial_site", "site", "SITEID") or site_of.get(patient)
        test = _text(record, "VSTESTCD", "LBTESTCD")
        if test is None and (name := _text(record, "test_name")) is not None:
            test = lab_test_code(name)
        time, lab = _time(record), _text(record, "lab_id", "LBREFID")
        tests = [code for name, code in _TEST_OF_FIELD.items() if record.get(name) is not None]
        tests = [test] if test is not None else tests
        for reason in reasons or ["unknown: no reason is recorded"]:
            rule, field = rule_and_field(reason)
            code = test or _TEST_OF_FIELD.get(field or "")
            rows.append((table, position, patient, site, code, tests, lab, time, rule, field))
    types: dict[str, Any] = {"String": pl.String, "Datetime": pl.Datetime("us", "UTC"), "List": pl.List(pl.String)}
    schema = {name: types[kind] for name, kind in SCHEMA.items()}
    return pl.DataFrame(rows, schema=schema, orient="row")


def rule_and_field(reason: str) -> tuple[str, str | None]:
    """Return the rule of a quarantine reason and the field it is about, where it names one."""
    match = _SUBJECT.match(reason)
    if match is None:
        return reason.partition(":")[0], None
    field = match[2]
    named = field in _KNOWN_FIELDS or (field.isupper() and len(field) > 1)
    return match[1], field if named else None


def _text(record: dict[str, Any], *names: str) -> str | None:
    for name in names:
        value = record.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip()
    return None


def _time(record: dict[str, Any]) -> Any:
    for name in _TIMES:
        text = record.get(name)
        if isinstance(text, str):
            try:
                found = parse_iso8601_partial(text).earliest
            except ValueError:
                continue
            if found is not None and 1900 <= found.year < 2200:
                return found
    return None
