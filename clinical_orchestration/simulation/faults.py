"""Ways in which a message can be broken; the contract rejects every one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import orjson

_ANY = (
    "invalid_json", "not_utf8", "no_value", "not_an_object", "unknown_schema_version", "missing_field", "wrong_type",
    "out_of_range", "invalid_time", "several",
)  # fmt: skip

_DOMAINS = ("patient_vitals", "lab_results", "medications", "adverse_events", "subjects")
FAULTS: dict[str, tuple[str, ...]] = dict.fromkeys(_DOMAINS, _ANY)
"""Faults that a message of each domain can have."""

_TIME_FIELDS = ("timestamp", "event_timestamp", "enrolled_at")


def broken(fault: str, record: dict[str, Any], rng: np.random.Generator) -> bytes | None:
    """Return the bytes of a message with a fault; None for a message without a value.

    Raises:
        KeyError: there is no such fault.
    """
    return _MAKERS[fault](dict(record), rng)


def _invalid_json(record: dict[str, Any], rng: np.random.Generator) -> bytes:
    text = orjson.dumps(record)
    return text[: int(rng.integers(1, len(text) - 1))]  # without its closing brace an object is never complete


def _not_utf8(record: dict[str, Any], rng: np.random.Generator) -> bytes:
    text = orjson.dumps(record)
    place = int(rng.integers(1, len(text) - 1))
    return text[:place] + b"\xff\xfe" + text[place:]


def _no_value(record: dict[str, Any], rng: np.random.Generator) -> None:
    return None


def _not_an_object(record: dict[str, Any], rng: np.random.Generator) -> bytes:
    return orjson.dumps([record])


def _unknown_schema_version(record: dict[str, Any], rng: np.random.Generator) -> bytes:
    record["schema_version"] = "9.9"
    return orjson.dumps(record)


def _missing_field(record: dict[str, Any], rng: np.random.Generator) -> bytes:
    present = ["patient_id", *(name for name in _TIME_FIELDS[:2] if name in record)]
    del record[present[int(rng.integers(len(present)))]]
    return orjson.dumps(record)


def _wrong_type(record: dict[str, Any], rng: np.random.Generator) -> bytes:
    wrong: dict[str, Any] = {"source": 7, "test_name": 7, "dosage": "much", "event_type": [], "age": "old"}
    field = next(name for name in wrong if name in record)
    record[field] = wrong[field]
    return orjson.dumps(record)


_EXCESS = {
    "heart_rate": 412,
    "blood_pressure_systolic": 20,
    "blood_pressure_diastolic": 900,
    "temperature": 98.6,  # Fahrenheit sent as Celsius
    "spo2": 130,
    "value": -40.0,
    "dosage": -5.0,
    "severity": "grade_9",
    "age": 240,
}


def _out_of_range(record: dict[str, Any], rng: np.random.Generator) -> bytes:
    present = [field for field in _EXCESS if field in record]
    field = present[int(rng.integers(len(present)))]
    record[field] = _EXCESS[field]
    return orjson.dumps(record)


def _invalid_time(record: dict[str, Any], rng: np.random.Generator) -> bytes:
    field = next(name for name in _TIME_FIELDS if name in record)
    record[field] = "yesterday"
    return orjson.dumps(record)


def _several(record: dict[str, Any], rng: np.random.Generator) -> bytes:
    record["schema_version"] = "0.1-draft"
    del record["patient_id"]
    return _out_of_range(record, rng)


_MAKERS: dict[str, Callable[[dict[str, Any], np.random.Generator], bytes | None]] = {
    "invalid_json": _invalid_json,
    "not_utf8": _not_utf8,
    "no_value": _no_value,
    "not_an_object": _not_an_object,
    "unknown_schema_version": _unknown_schema_version,
    "missing_field": _missing_field,
    "wrong_type": _wrong_type,
    "out_of_range": _out_of_range,
    "invalid_time": _invalid_time,
    "several": _several,
}
