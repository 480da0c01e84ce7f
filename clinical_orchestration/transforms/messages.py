"""The messages of the Kafka topics and the gateway: what they may hold, as data, and their way to silver rows.

One rule table (:data:`RULES`) drives validation (gateway and decoder), the published JSON Schema and the mapping.

Decisions that the contract leaves open:

- A time without a zone is UTC (the contract's times are UTC). Other offsets are converted. A time needs a time of day;
  the onset of an adverse event, its end and enrolment dates may be dates alone.
- A time more than :data:`FUTURE_TOLERANCE` after the record was received is an error, not clock skew.
- A JSON boolean, a number in quotes, NaN and Infinity are no numbers. Null and blank text are missing values.
- Fields that the rules do not name are allowed, stay in the payload and count for nothing.
- A laboratory value is a number, a limit (``"<3.42"``) or one of :data:`QUALITATIVE_RESULTS`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import isfinite
from typing import Any, Literal

import orjson

from clinical_orchestration.transforms.dates import PartialDate, parse_iso8601_partial
from clinical_orchestration.transforms.units import LAB_UNITS, conversion, convert, lab_test_code

SCHEMA_VERSIONS = ("1.0", "1.1", "1.2")
"""Versions of the message contract that are understood; the fields are the same in all three."""

FUTURE_TOLERANCE = timedelta(days=1)
"""How far after its arrival a record's time may lie: zone mistakes and skewed clocks stay below this."""

EARLIEST_YEAR = 1900
"""Times before this year are recording errors: nobody in a trial was treated then."""

SEVERITIES = ("grade_1", "grade_2", "grade_3", "grade_4", "grade_5")
"""CTCAE grades of an adverse event."""

QUALITATIVE_RESULTS = (
    "NEGATIVE", "POSITIVE", "NORMAL", "ABNORMAL", "TRACE", "DETECTED", "NOT DETECTED", "REACTIVE", "NON-REACTIVE",
)  # fmt: skip
"""Text results of laboratory messages, without regard to case."""

Kind = Literal["identifier", "string", "number", "time", "date", "boolean", "lab_value", "version", "range"]


@dataclass(frozen=True, slots=True)
class FieldRule:
    """What one field of a message may hold.

    Attributes:
        name: the JSON field.
        kind: `time` needs a time of day, `date` does not.
        required: a message without it, or with a blank or null value, is rejected.
        minimum: lowest allowed number, in `unit`.
        maximum: highest allowed number, in `unit`.
        allowed: the only texts allowed, compared without case; maps each to what silver holds.
        unit: unit of the number (UCUM where the contract gives one).
        description: for the published schema.
        code: for a measurement of a vitals message: the SDTM test code and standard unit of its silver row.
    """

    name: str
    kind: Kind
    required: bool = False
    minimum: float | None = None
    maximum: float | None = None
    allowed: Mapping[str, str] | None = None
    unit: str = ""
    description: str = ""
    code: tuple[str, str] | None = None


def _same(*texts: str) -> dict[str, str]:
    return {text.casefold(): text for text in texts}


_PATIENT = FieldRule("patient_id", "identifier", required=True, description="Pseudonymous identifier of the patient")
_COMMON = (
    FieldRule("study_id", "string", description="Study the record belongs to"),
    FieldRule("schema_version", "version", description="Version of the message contract; absent: the newest"),
)
_SEX = {
    "m": "M",
    "male": "M",
    "f": "F",
    "female": "F",
    "u": "U",
    "unknown": "U",
    "undifferentiated": "UNDIFFERENTIATED",
}

RULES: dict[str, tuple[FieldRule, ...]] = {
    "patient_vitals": (
        _PATIENT,
        FieldRule("timestamp", "time", required=True, description="When it was measured"),
        FieldRule("heart_rate", "number", minimum=40, maximum=200, unit="/min", code=("HR", "beats/min")),
        FieldRule("blood_pressure_systolic", "number", minimum=60, maximum=250, unit="mmHg", code=("SYSBP", "mmHg")),
        FieldRule("blood_pressure_diastolic", "number", minimum=40, maximum=150, unit="mmHg", code=("DIABP", "mmHg")),
        FieldRule("temperature", "number", minimum=35, maximum=42, unit="Cel", code=("TEMP", "C")),
        FieldRule("spo2", "number", minimum=70, maximum=100, unit="%", code=("OXYSAT", "%")),
        FieldRule("source", "string", description="Device or system that measured; part of the record's identity"),
        FieldRule("trial_site", "string"),
        FieldRule("trial_arm", "string"),
        *_COMMON,
    ),
    "lab_results": (
        _PATIENT,
        FieldRule("timestamp", "time", required=True, description="When the specimen was taken"),
        FieldRule("test_name", "string", required=True, description="Name or SDTM code of the test"),
        FieldRule(
            "value", "lab_value", required=True, description="Number, limit such as <3.42, or qualitative result"
        ),
        FieldRule("unit", "string"),
        FieldRule("reference_range", "range", description='Such as "3.5-5.1", "<5", ">60"'),
        FieldRule("lab_id", "string", description="Identifier that the laboratory gives"),
        *_COMMON,
    ),
    "medications": (
        _PATIENT,
        FieldRule("timestamp", "time", required=True, description="When it was given or started"),
        FieldRule("drug_name", "string", required=True),
        FieldRule("dosage", "number", minimum=0, description="Amount in `unit`"),
        FieldRule("unit", "string"),
        FieldRule("route", "string"),
        FieldRule("frequency", "string"),
        *_COMMON,
    ),
    "adverse_events": (
        _PATIENT,
        FieldRule("event_timestamp", "date", required=True, description="Onset"),
        FieldRule("event_type", "string", required=True),
        FieldRule("severity", "string", required=True, allowed=_same(*SEVERITIES), description="CTCAE grade"),
        FieldRule("reported_by", "string"),
        FieldRule("report_timestamp", "time", description="When it was reported"),
        *_COMMON,
    ),
    "subjects": (
        _PATIENT,
        FieldRule("age", "number", minimum=0, maximum=120, unit="a", description="Age at enrolment"),
        FieldRule("sex", "string", allowed=_SEX),
        FieldRule("race", "string"),
        FieldRule("ethnicity", "string"),
        FieldRule("country", "string"),
        FieldRule("site", "string"),
        FieldRule("arm", "string", description="Planned arm"),
        FieldRule("actual_arm", "string"),
        FieldRule("enrolled_at", "date"),
        FieldRule("timestamp", "date", description="When the demographics were collected"),
        FieldRule("treatment_start", "date"),
        FieldRule("treatment_end", "date"),
        FieldRule("death_time", "date"),
        FieldRule("screen_failure", "boolean"),
        *_COMMON,
    ),
}

MEASUREMENTS = tuple(rule for rule in RULES["patient_vitals"] if rule.code is not None)
"""The fields of a vitals message that give a silver row each."""

_LIMIT = re.compile(r"(<=|>=|<|>|\u2264|\u2265)\s*[0-9]+(?:[.,][0-9]+)?")
_RANGE = re.compile(
    r"\s*(-?[0-9]+(?:\.[0-9]+)?)\s*(?:-|\u2013|to)\s*(-?[0-9]+(?:\.[0-9]+)?)(?:\s.*|[^0-9.].*)?", re.DOTALL
)
_BOUND = re.compile(r"\s*([<>]=?|\u2264|\u2265)\s*(-?[0-9]+(?:\.[0-9]+)?)(?:\s.*|[^0-9.].*)?", re.DOTALL)
_NEGATIVE_TESTS = frozenset({"BE", "BASE_EXCESS", "BASEXCESS", "ANION_GAP", "ANIONG"})


# --- reading ---------------------------------------------------------------------------------------------------------


def parse_object(payload: object) -> tuple[dict[str, Any] | None, list[str]]:
    """Read a payload as one JSON object.

    Args:
        payload: JSON as text or UTF-8 bytes, or an object that was read already.

    Returns:
        ``(object, reasons)``. The object is None where there is none. A text that is no JSON only because of ``NaN``
        or ``Infinity`` gives both, so that its other faults can be named too.
    """
    if isinstance(payload, Mapping):
        return dict(payload), []
    if isinstance(payload, (bytes, bytearray)):
        try:
            payload = bytes(payload).decode("utf-8")
        except UnicodeDecodeError:
            return None, ["not_utf8: the record is not UTF-8 text"]
    if not isinstance(payload, str) or not payload.strip():
        return None, ["empty: the record has no content"]
    try:
        parsed = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        parsed = _with_constants(payload)
        if parsed is None:
            # position only: the library's text is not ours to vouch for
            return None, [f"invalid_json: not JSON, at line {error.lineno} column {error.colno}"]
        reasons = ["invalid_json: NaN and Infinity are no JSON"]
    else:
        reasons = []
    if not isinstance(parsed, dict):
        return None, [*reasons, f"not_an_object: the record is a JSON {_json_type(parsed)}, not an object"]
    return parsed, reasons


def _with_constants(text: str) -> Any:
    """Read JSON that holds NaN or Infinity; None where that is not what is wrong with it."""
    if "NaN" not in text and "Infinity" not in text:
        return None
    import json

    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    return "text" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


# --- validation ------------------------------------------------------------------------------------------------------


def validate_message(
    domain: str, payload: bytes | str | Mapping[str, object], *, now: datetime | None = None
) -> list[str]:
    """Return everything that is wrong with a message; an empty list says that it is valid.

    Args:
        domain: bronze table that the message is for, one of :data:`RULES`.
        payload: the message, as received or already read.
        now: when it was received, aware; None is the present.

    Returns:
        Reasons ``"<rule>: <text>"``. Texts from the message are never repeated, so no reason holds an identifier.

    Raises:
        KeyError: there is no such domain.
    """
    rules = RULES[domain]
    parsed, reasons = parse_object(payload)
    if parsed is None:
        return reasons
    _, found = check_fields(domain, rules, parsed, now or datetime.now(UTC))
    return reasons + found


def check_fields(
    domain: str, rules: tuple[FieldRule, ...], message: Mapping[str, Any], now: datetime
) -> tuple[dict[str, Any], list[str]]:
    """Check a message against its rules.

    Returns:
        ``(values, reasons)``. `values` holds the fields that are present and valid: trimmed texts, floats, booleans,
        aware datetimes for `time`, :class:`PartialDate` for `date`.
    """
    values: dict[str, Any] = {}
    reasons: list[str] = []
    for rule in rules:
        name = rule.name
        raw = message.get(name)
        if raw is None or (type(raw) is str and not raw.strip()):
            if rule.required:
                reasons.append(f"missing_field: {name} is missing or blank")
            continue
        fault = _CHECKS[rule.kind](rule, raw, values, now)
        if fault is not None:
            reasons.append(fault)
    for check in _CROSS_CHECKS.get(domain, ()):
        fault = check(values, message)
        if fault is not None:
            reasons.append(fault)
    return values, reasons


def _check_string(rule: FieldRule, raw: object, values: dict[str, Any], now: datetime) -> str | None:
    if type(raw) is not str:
        return f"wrong_type: {rule.name} is a {_json_type(raw)}, not text"
    if rule.allowed is not None:
        known = rule.allowed.get(raw.strip().casefold())
        if known is None:
            return f"unknown_{rule.name}: {rule.name} is none of {', '.join(dict.fromkeys(rule.allowed.values()))}"
        values[rule.name] = known
    else:
        values[rule.name] = raw.strip()
    return None


def _check_identifier(rule: FieldRule, raw: object, values: dict[str, Any], now: datetime) -> str | None:
    if type(raw) is not str:
        return f"wrong_type: {rule.name} is a {_json_type(raw)}, not text"
    text = raw.strip()
    if len(text) > 200 or not text.isprintable():
        return f"invalid_identifier: {rule.name} is longer than 200 characters or has control characters"
    values[rule.name] = text
    return None


def _check_number(rule: FieldRule, raw: object, values: dict[str, Any], now: datetime) -> str | None:
    if type(raw) is not float and type(raw) is not int:
        return f"wrong_type: {rule.name} is a {_json_type(raw)}, not a number"
    number = _finite(raw)
    if number is None:
        return f"not_finite: {rule.name} is not a finite number"
    low, high = rule.minimum, rule.maximum
    if (low is not None and number < low) or (high is not None and number > high):
        return f"out_of_range: {rule.name} is {number:g}, {_range_text(low, high, rule.unit)}"
    values[rule.name] = number
    return None


def _finite(raw: float) -> float | None:
    try:
        number = float(raw) + 0.0  # adding zero turns -0.0 into 0.0
    except OverflowError:
        return None
    return number if isfinite(number) else None


def _range_text(low: float | None, high: float | None, unit: str) -> str:
    if low is None or high is None:
        return f"below {low:g}" if low is not None else f"above {high:g}"
    return f"outside {low:g} to {high:g} {unit}".rstrip()


def _check_boolean(rule: FieldRule, raw: object, values: dict[str, Any], now: datetime) -> str | None:
    if type(raw) is not bool:
        return f"wrong_type: {rule.name} is a {_json_type(raw)}, not true or false"
    values[rule.name] = raw
    return None


def _check_date(rule: FieldRule, raw: object, values: dict[str, Any], now: datetime) -> str | None:
    if type(raw) is not str:
        return f"wrong_type: {rule.name} is a {_json_type(raw)}, not a time in ISO 8601"
    try:
        parsed = parse_iso8601_partial(raw)
    except ValueError as error:
        return f"invalid_time: {rule.name} is not a time in ISO 8601 ({error})"
    if parsed.precision in _TOO_COARSE[rule.kind]:
        what = "its hours and minutes" if rule.kind == "time" else "its day"
        return f"incomplete_time: {rule.name} lacks {what}"
    fault = time_fault(rule.name, parsed, now)
    if fault is None:
        values[rule.name] = parsed if rule.kind == "date" else parsed.earliest
    return fault


_TOO_COARSE = {
    "time": frozenset({"missing", "year", "month", "day", "hour"}),
    "date": frozenset({"missing", "year", "month"}),
}


def time_fault(name: str, parsed: PartialDate, now: datetime) -> str | None:
    """Return why a time cannot be right: before :data:`EARLIEST_YEAR`, or well after it was received (`now`)."""
    if parsed.earliest is None:
        return None
    if parsed.earliest.year < EARLIEST_YEAR:
        return f"implausible_time: {name} lies before the year {EARLIEST_YEAR}"
    if parsed.earliest > now + FUTURE_TOLERANCE:
        return f"future_time: {name} lies more than {FUTURE_TOLERANCE.days} day after the record was received"
    return None


def _check_version(rule: FieldRule, raw: object, values: dict[str, Any], now: datetime) -> str | None:
    # 1.2 without quotes is a number to JSON, and means the same
    if (raw if type(raw) is str else repr(raw)).strip() not in SCHEMA_VERSIONS:
        return f"unknown_schema_version: {rule.name} is none of {', '.join(SCHEMA_VERSIONS)}"
    return None


def _check_lab_value(rule: FieldRule, raw: object, values: dict[str, Any], now: datetime) -> str | None:
    if type(raw) is str:
        text = raw.strip()
        if not _LIMIT.fullmatch(text) and text.upper() not in QUALITATIVE_RESULTS:
            return f"wrong_type: {rule.name} is text, not a number, a limit such as <3.42 or a qualitative result"
        values[rule.name] = text
        return None
    return _check_number(rule, raw, values, now)


def _check_range(rule: FieldRule, raw: object, values: dict[str, Any], now: datetime) -> str | None:
    """Accept any form: a range that cannot be read is no fault of the result."""
    values[rule.name] = read_reference_range(raw)
    return None


def read_reference_range(raw: object) -> tuple[float | None, float | None]:
    """Read a reference range as (low, high).

    Forms: ``"3.5-5.1 mmol/L"``, ``"<5"``, ``{"low": 3.5, "high": 5.1}``, ``[3.5, 5.1]``. What cannot be read is None.
    """
    if isinstance(raw, str):
        if match := _RANGE.fullmatch(raw):
            low, high = float(match[1]), float(match[2])
            return (low, high) if low <= high else (None, None)
        if match := _BOUND.fullmatch(raw):
            bound = float(match[2])
            return (None, bound) if match[1] in ("<", "<=", "\u2264") else (bound, None)
        return None, None
    if isinstance(raw, Mapping):
        pair = (raw.get("low", raw.get("min")), raw.get("high", raw.get("max")))
    elif isinstance(raw, (list, tuple)) and len(raw) == 2:
        pair = (raw[0], raw[1])
    else:
        return None, None
    low_, high_ = (_finite(item) if type(item) in (int, float) else None for item in pair)
    return low_, high_


_CHECKS: dict[str, Callable[[FieldRule, Any, dict[str, Any], datetime], str | None]] = {
    "identifier": _check_identifier,
    "string": _check_string,
    "number": _check_number,
    "boolean": _check_boolean,
    "time": _check_date,
    "date": _check_date,
    "version": _check_version,
    "lab_value": _check_lab_value,
    "range": _check_range,
}


def _some_measurement(values: Mapping[str, Any], message: Mapping[str, Any]) -> str | None:
    # a measurement that is there but wrong has its own reason
    for rule in MEASUREMENTS:
        if rule.name in values or message.get(rule.name) not in (None, ""):
            return None
    return "no_measurement: the message has none of " + ", ".join(rule.name for rule in MEASUREMENTS)


def _lab_not_negative(values: Mapping[str, Any], message: Mapping[str, Any]) -> str | None:
    value = values.get("value")
    if type(value) is float and value < 0 and lab_test_code(values.get("test_name", "")) not in _NEGATIVE_TESTS:
        return f"out_of_range: value is {value:g}, below 0"
    return None


def _reported_after_onset(values: Mapping[str, Any], message: Mapping[str, Any]) -> str | None:
    onset, report = values.get("event_timestamp"), values.get("report_timestamp")
    if onset is not None and report is not None and report + FUTURE_TOLERANCE < onset.earliest:
        return "inconsistent_times: report_timestamp lies more than 1 day before event_timestamp"
    return None


def _treatment_in_order(values: Mapping[str, Any], message: Mapping[str, Any]) -> str | None:
    start, end = values.get("treatment_start"), values.get("treatment_end")
    if start is not None and end is not None and end.latest < start.earliest:
        return "inconsistent_times: treatment_end lies before treatment_start"
    return None


_CROSS_CHECKS: dict[str, tuple[Callable[[Mapping[str, Any], Mapping[str, Any]], str | None], ...]] = {
    "patient_vitals": (_some_measurement,),
    "lab_results": (_lab_not_negative,),
    "adverse_events": (_reported_after_onset,),
    "subjects": (_treatment_in_order,),
}


# --- silver rows -----------------------------------------------------------------------------------------------------


def stable_hash(*parts: object) -> str:
    """Return 32 hexadecimal digits that depend on `parts` alone: the same in every process, version and machine."""
    return hashlib.blake2b(orjson.dumps(parts), digest_size=16).hexdigest()


def decode_message(
    domain: str, message: Mapping[str, Any], record: Mapping[str, Any]
) -> tuple[list[dict[str, object]], list[str]]:
    """Turn a message into silver rows, or reasons.

    `record` is its bronze row. Where a message came without a time of receipt, the platform could know it from its
    report time on, or else from the moment that it describes.
    """
    received = record.get("received_at")
    now = received or record.get("ingested_at") or datetime.now(UTC)
    values, reasons = check_fields(domain, RULES[domain], message, now)
    if reasons:
        return [], reasons
    return _DECODERS[domain](values, message, record, received), []


def _common(
    record: Mapping[str, Any], patient: str, event: datetime, received: datetime, key: str, content: str
) -> dict[str, object]:
    return {
        "trial": record.get("trial"),
        "patient_id": patient,
        "event_time": event,
        "received_at": received,
        "source": record.get("source"),
        "source_position": record.get("source_position"),
        "ingested_at": record.get("ingested_at"),
        "record_key": key,
        "content_hash": content,
    }


def _vitals(v: dict[str, Any], message: Mapping[str, Any], record: Mapping[str, Any], received: Any) -> list[Any]:
    patient, time, get = v["patient_id"], v["timestamp"], v.get
    site, arm = get("trial_site"), get("trial_arm")
    measured = [(rule, v[rule.name]) for rule in MEASUREMENTS if rule.name in v]
    key = stable_hash(record.get("trial"), "vitals", patient, time, get("source"))
    content = stable_hash(patient, time, get("source"), site, arm, [(rule.name, value) for rule, value in measured])
    common = _common(record, patient, time, received or time, key, content)
    return [
        {
            **common,
            "test_code": rule.code[0],
            "value": value,
            "unit": rule.code[1],
            "original_value": _text(message[rule.name]),
            "original_unit": rule.unit,
            "visit": None,
            "body_position": None,
            "time_point": None,
            "baseline_flag": None,
            "site": site,
            "arm": arm,
        }
        for rule, value in measured
        if rule.code is not None
    ]


def _text(number: float) -> str:
    return str(number)


def _labs(v: dict[str, Any], message: Mapping[str, Any], record: Mapping[str, Any], received: Any) -> list[Any]:
    patient, time, get = v["patient_id"], v["timestamp"], v.get
    raw, original_unit, name, lab_id = v["value"], get("unit"), v["test_name"], get("lab_id")
    low, high = get("reference_range") or (None, None)
    code = lab_test_code(name)
    value, unit, text = None, original_unit, None
    indicator = None
    if type(raw) is float:
        value = raw
        if low is not None or high is not None:
            indicator = (
                "LOW" if low is not None and raw < low else "HIGH" if high is not None and raw > high else "NORMAL"
            )
    else:
        text = raw
    rule = LAB_UNITS.get(code)
    if rule is not None and original_unit is not None and (factors := conversion(rule, original_unit)) is not None:
        unit = rule.standard
        value, low, high = (None if item is None else convert(item, factors) for item in (value, low, high))
    trial = record.get("trial")
    # some laboratories number results, some specimens, some themselves: the number alone does not tell results apart
    key = stable_hash(trial, "labs", patient, time, code, lab_id)
    content = stable_hash(patient, time, code, raw, original_unit, low, high, lab_id)
    return [
        {
            **_common(record, patient, time, received or time, key, content),
            "test_code": code,
            "value": value,
            "unit": unit,
            "original_value": str(message["value"]),
            "original_unit": original_unit,
            "text_value": text,
            "test_name": name,
            "category": None,
            "reference_low": low,
            "reference_high": high,
            "reference_indicator": indicator,
            "visit": None,
            "baseline_flag": None,
            "lab_id": lab_id,
        }
    ]


def _medications(v: dict[str, Any], message: Mapping[str, Any], record: Mapping[str, Any], received: Any) -> list[Any]:
    patient, time, drug, get = v["patient_id"], v["timestamp"], v["drug_name"], v.get
    details = (get("dosage"), get("unit"), get("route"), get("frequency"))
    key = stable_hash(record.get("trial"), "medications", patient, time, drug.casefold())
    return [
        {
            **_common(record, patient, time, received or time, key, stable_hash(patient, time, drug, details)),
            "drug_name": drug,
            "standardized_name": drug.upper(),
            "drug_class": None,
            "dose": details[0],
            "dose_unit": details[1],
            "route": details[2],
            "frequency": details[3],
            "indication": None,
            "start_time": time,
            "start_precision": "second",
            "end_time": None,
            "study_drug": False,
        }
    ]


def _adverse_events(
    v: dict[str, Any], message: Mapping[str, Any], record: Mapping[str, Any], received: Any
) -> list[Any]:
    patient, onset, event, get = v["patient_id"], v["event_timestamp"], v["event_type"], v.get
    time, reported = onset.earliest, get("report_timestamp")
    key = stable_hash(record.get("trial"), "adverse_events", patient, time, event.casefold(), reported)
    content = stable_hash(patient, time, onset.precision, event, v["severity"], get("reported_by"), reported)
    return [
        {
            **_common(record, patient, time, received or reported or onset.latest, key, content),
            "event_type": event,
            "body_system": None,
            "severity": v["severity"],
            "serious": None,
            "event_id": None,
            "causality": None,
            "outcome": None,
            "onset_precision": onset.column_precision,
            "end_time": None,
            "reported_by": get("reported_by"),
        }
    ]


def _subjects(v: dict[str, Any], message: Mapping[str, Any], record: Mapping[str, Any], received: Any) -> list[Any]:
    patient, get = v["patient_id"], v.get
    first = get("enrolled_at") or get("timestamp")
    known = get("timestamp") or first
    event: Any = first.earliest if first else received or record.get("ingested_at") or datetime.now(UTC)
    start, end, death = get("treatment_start"), get("treatment_end"), get("death_time")
    row = {
        "study_id": get("study_id"),
        "site": get("site"),
        "arm": get("arm"),
        "actual_arm": get("actual_arm"),
        "age_years": get("age"),
        "sex": get("sex"),
        "race": get("race"),
        "ethnicity": get("ethnicity"),
        "country": get("country"),
        "treatment_start": start.earliest if start else None,
        "treatment_end": end.latest if end else None,
        "death_time": death.earliest if death else None,
        "screen_failure": get("screen_failure", False),
    }
    key = stable_hash(record.get("trial"), "subjects", patient)
    content = stable_hash(patient, first.earliest if first else None, list(row.values()))
    return [{**_common(record, patient, event, received or (known.latest if known else event), key, content), **row}]


_DECODERS: dict[str, Callable[[dict[str, Any], Mapping[str, Any], Mapping[str, Any], Any], list[Any]]] = {
    "patient_vitals": _vitals,
    "lab_results": _labs,
    "medications": _medications,
    "adverse_events": _adverse_events,
    "subjects": _subjects,
}


# --- published schema ------------------------------------------------------------------------------------------------

_JSON_TYPES: dict[str, dict[str, object]] = {
    "identifier": {"type": "string", "minLength": 1, "maxLength": 200},
    "string": {"type": "string"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "time": {"type": "string", "format": "date-time"},
    "date": {"type": "string", "description": "ISO 8601 date, or date and time"},
    "version": {"type": "string", "enum": list(SCHEMA_VERSIONS)},
    "lab_value": {"type": ["number", "string"]},
    "range": {"type": ["string", "object", "array"]},
}


def message_schema(domain: str) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a topic's messages, made from :data:`RULES`.

    A schema cannot say everything: times in the future and reports before their event are found by
    :func:`validate_message` only. Units stand in ``x-unit``.

    Raises:
        KeyError: there is no such domain.
    """
    properties: dict[str, dict[str, Any]] = {}
    for rule in RULES[domain]:
        field: dict[str, Any] = dict(_JSON_TYPES[rule.kind])
        if rule.minimum is not None:
            field["minimum"] = rule.minimum
        if rule.maximum is not None:
            field["maximum"] = rule.maximum
        if rule.allowed is not None:
            field["enum"] = list(rule.allowed)
        if rule.unit:
            field["x-unit"] = rule.unit
        if rule.description:
            field["description"] = rule.description
        if not rule.required:
            kind = field["type"]
            field["type"] = [*(kind if isinstance(kind, list) else [kind]), "null"]
            if "enum" in field:
                field["enum"] = [*field["enum"], None]
        properties[rule.name] = field
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": domain,
        "type": "object",
        "properties": properties,
        "required": [rule.name for rule in RULES[domain] if rule.required],
        "additionalProperties": True,
    }
    if domain == "patient_vitals":
        schema["anyOf"] = [
            {"required": [rule.name], "properties": {rule.name: {"type": "number"}}} for rule in MEASUREMENTS
        ]
    return schema
