"""SDTM rows (DM, VS, LB, AE, EX, CM) to silver rows.

Which variable feeds which column is data (:data:`TEXT_VARIABLES`); the rules of SDTM are code:

- The natural key is domain, USUBJID and --SEQ (DM: USUBJID).
- The result is --STRESN in --STRESU; where that is blank, a number in --STRESC or in --ORRES with its own unit. Results
  of the tests in :mod:`clinical_orchestration.transforms.units` are brought to the standard unit.
- --STAT "NOT DONE" and --OCCUR "N" are no observations: the row is rejected as ``not_done`` or ``did_not_occur``.
- A blank --BLFL is "not the baseline record".
- Dates may be partial. A start is the earliest moment that its date allows, an end the latest. A measurement (VS, LB)
  needs its day. A date without a zone is UTC.
- ``received_at`` is the last moment of the collection date (--DTC; EX: EXSTDTC): by the end of that day, and not
  before, the record was known for certain. Where a row has no collection date, its start date takes that place.
- AESEV MILD, MODERATE, SEVERE are grades 1 to 3, LIFE THREATENING or AESLIFE "Y" grade 4, AESDTH "Y" or a fatal outcome
  grade 5; AETOXGR goes before AESEV. An event without any severity is accepted without one: it did happen.
- A coded name of "UNCODED" is no name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from math import isfinite
from typing import TYPE_CHECKING, Any

from clinical_orchestration.transforms.dates import MISSING, PartialDate, parse_iso8601_partial
from clinical_orchestration.transforms.messages import stable_hash, time_fault
from clinical_orchestration.transforms.units import LAB_UNITS, VITAL_UNITS, UnitRule, conversion, convert

if TYPE_CHECKING:
    from clinical_orchestration.trials import TrialProfile

DOMAIN_TABLES: dict[str, str] = {
    "VS": "patient_vitals",
    "LB": "lab_results",
    "AE": "adverse_events",
    "DM": "subjects",
    "CM": "medications",
    "EX": "medications",
}
"""Which bronze and silver table each SDTM domain feeds."""

BROKEN_ROW = "_broken_row"
"""Variable of a record that stands for a row which could not be split into variables; holds counts, never text."""

TEXT_VARIABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "VS": {
        "original_value": ("VSORRES", "VSSTRESC"),
        "original_unit": ("VSORRESU",),
        "visit": ("VISIT",),
        "body_position": ("VSPOS",),
        "time_point": ("VSTPT",),
    },
    "LB": {
        "original_value": ("LBORRES", "LBSTRESC"),
        "original_unit": ("LBORRESU",),
        "test_name": ("LBTEST",),
        "category": ("LBCAT",),
        "reference_indicator": ("LBNRIND",),
        "visit": ("VISIT",),
        "lab_id": ("LBREFID",),
    },
    "AE": {
        "event_type": ("AEDECOD", "AETERM"),
        "body_system": ("AEBODSYS", "AESOC"),
        "event_id": ("AESPID",),
        "causality": ("AEREL",),
        "outcome": ("AEOUT",),
        "reported_by": ("AEEVAL",),
    },
    "CM": {
        "drug_name": ("CMTRT",),
        "standardized_name": ("CMDECOD",),
        "drug_class": ("CMCLAS",),
        "dose_unit": ("CMDOSU",),
        "route": ("CMROUTE",),
        "frequency": ("CMDOSFRQ",),
        "indication": ("CMINDC",),
    },
    "EX": {
        "drug_name": ("EXTRT",),
        "standardized_name": ("EXTRT",),
        "drug_class": ("EXCLAS",),
        "dose_unit": ("EXDOSU",),
        "route": ("EXROUTE",),
        "frequency": ("EXDOSFRQ",),
        "indication": ("EXINDC",),
    },
    "DM": {
        "study_id": ("STUDYID",),
        "site": ("SITEID",),
        "arm": ("ARM", "ARMNRS", "ARMCD"),
        "actual_arm": ("ACTARM", "ARMNRS", "ACTARMCD"),
        "sex": ("SEX",),
        "race": ("RACE",),
        "ethnicity": ("ETHNIC",),
        "country": ("COUNTRY",),
    },
}
"""Silver column -> the variables it comes from; the first that is not blank."""

AGE_UNITS = {"YEARS": 1.0, "MONTHS": 1 / 12, "WEEKS": 7 / 365.25, "DAYS": 1 / 365.25, "HOURS": 1 / 8766}
"""AGEU -> years."""

MAX_AGE_YEARS = 120.0

SEVERITY_GRADES = {
    "MILD": 1,
    "MODERATE": 2,
    "SEVERE": 3,
    "LIFE THREATENING": 4,
    "LIFE-THREATENING": 4,
    "FATAL": 5,
    "DEATH": 5,
}
"""AESEV -> CTCAE grade."""

_NUMERIC_TEXT = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_GRADE = re.compile(r"(?:GRADE\s*)?([1-5])(?:\.0+)?")


class _Row:
    """One SDTM row under examination: reads variables by their kind and collects what is wrong."""

    __slots__ = ("domain", "now", "reasons", "values")

    def __init__(self, domain: str, values: Mapping[str, Any], now: datetime) -> None:
        self.domain = domain
        self.values = values
        self.now = now
        self.reasons: list[str] = []

    def text(self, *names: str) -> str | None:
        for name in names:
            raw = self.values.get(name)
            if raw is None:
                continue
            if type(raw) is str:
                stripped = raw.strip()
                if stripped:
                    return stripped
            elif type(raw) is float and raw.is_integer():
                return str(int(raw))
            elif type(raw) in (int, float):
                return str(raw)
            else:
                self._once(f"wrong_type: {name} is neither text nor a number")
        return None

    def number(self, name: str) -> float | None:
        raw = self.values.get(name)
        if raw is None:
            return None
        if type(raw) is str:
            number = numeric_text(raw)
            if number is None and raw.strip():
                self._once(f"wrong_type: {name} is text, not a number")
            return number
        if type(raw) is float or type(raw) is int:
            number = _finite(raw)
            if number is None:
                self._once(f"not_finite: {name} is not a finite number")
            return number
        self._once(f"wrong_type: {name} is not a number")
        return None

    def date(self, name: str) -> PartialDate:
        raw = self.values.get(name)
        if raw is None:
            return MISSING
        if type(raw) is int and 1000 <= raw <= 9999:
            raw = str(raw)  # a year alone, which a spreadsheet turned into a number
        if type(raw) is not str:
            self._once(f"wrong_type: {name} is not a date in ISO 8601")
            return MISSING
        try:
            parsed = parse_iso8601_partial(raw)
        except ValueError as error:
            self._once(f"invalid_date: {name} is not a date in ISO 8601 ({error})")
            return MISSING
        fault = time_fault(name, parsed, self.now)
        if fault is not None:
            self._once(fault)
        return parsed

    def required(self, *names: str) -> str | None:
        found = self.text(*names)
        if found is None:
            self._once(f"missing_field: {' or '.join(names)} is missing or blank")
        return found

    def required_date(self, name: str, *, need_day: bool) -> PartialDate:
        before = len(self.reasons)
        parsed = self.date(name)
        if parsed.earliest is None:
            if len(self.reasons) == before:
                self.reasons.append(f"missing_time: {name} is missing or without its year")
        elif need_day and parsed.precision in ("year", "month"):
            self.reasons.append(f"incomplete_date: {name} lacks its day")
        return parsed

    def flag(self, *names: str) -> bool:
        return any(self.values.get(name) in ("Y", "y") for name in names)

    def _once(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)

    fault = _once


def _finite(raw: float) -> float | None:
    try:
        number = float(raw) + 0.0
    except OverflowError:
        return None
    return number if isfinite(number) else None


def numeric_text(text: str) -> float | None:
    """Return the number that a result's text is (``"093.7"`` -> 93.7), or None where it is no plain number."""
    stripped = text.strip()
    return _finite(float(stripped)) if _NUMERIC_TEXT.fullmatch(stripped) else None


def decode_row(
    table: str, domain: str, values: Mapping[str, Any], record: Mapping[str, Any], profile: TrialProfile
) -> tuple[list[dict[str, object]], list[str]]:
    """Turn one SDTM row into one silver row, or reasons.

    Args:
        table: bronze table that the record stands in.
        domain: SDTM domain that the record is said to be of, such as ``VS``.
        values: its variables; missing ones are absent, null or blank.
        record: its bronze row.
        profile: the trial; its `plausible` ranges apply to vital signs.
    """
    domain = domain.upper()
    if DOMAIN_TABLES.get(domain) != table:
        return [], [f"wrong_table: the record is of an SDTM domain that does not belong to {table}"]
    if BROKEN_ROW in values:
        return [], [_broken_row(values[BROKEN_ROW])]
    row = _Row(domain, values, record.get("ingested_at") or datetime.now(UTC))
    patient = row.required("USUBJID")
    stated = row.text("DOMAIN")
    if stated is None:
        row.fault("missing_field: DOMAIN is missing or blank")
    elif stated.upper() != domain:
        row.fault(f"wrong_domain: DOMAIN is not {domain}")
    sequence = None
    if domain != "DM":
        sequence = row.number(f"{domain}SEQ")
        if sequence is None:
            row.fault(f"missing_field: {domain}SEQ is missing or blank")
        status = row.text(f"{domain}STAT")
        if status is not None and status.upper() == "NOT DONE":
            row.fault(f"not_done: {domain}STAT is NOT DONE, there is no result")
        if row.text(f"{domain}OCCUR") in ("N", "n"):
            row.fault(f"did_not_occur: {domain}OCCUR is N, it did not happen")
    times, columns = _MAPPERS[domain](row, profile)
    if row.reasons:
        return [], row.reasons
    event, received = times
    common = {
        "trial": record.get("trial"),
        "patient_id": patient,
        "event_time": event,
        "received_at": received,
        "source": record.get("source"),
        "source_position": record.get("source_position"),
        "ingested_at": record.get("ingested_at"),
        "record_key": stable_hash(record.get("trial"), domain, patient, sequence),
        "content_hash": stable_hash(patient, event, received, list(columns.values())),
    }
    return [{**common, **columns}], []


def _broken_row(detail: object) -> str:
    if isinstance(detail, Mapping):
        fields, expected, fault = detail.get("fields"), detail.get("expected"), detail.get("fault")
        if fault == "encoding":
            return "broken_row: the row is not UTF-8 text"
        if fault == "quote":
            return "broken_row: a quotation mark in the row is not closed, or stands within a value"
        if type(fields) is int and type(expected) is int:
            return f"broken_row: the row has {fields} fields, the header {expected}"
    return "broken_row: the row could not be read"


_Mapped = tuple[tuple[datetime | None, datetime | None], dict[str, object]]


def _texts(row: _Row) -> dict[str, str | None]:
    return {column: row.text(*names) for column, names in TEXT_VARIABLES[row.domain].items()}


def _in_standard_unit(
    row: _Row, code: str, rule: UnitRule | None, candidates: tuple[tuple[float | None, str | None], ...]
) -> tuple[float | None, str | None, tuple[float, float] | None]:
    """Return (value, unit, factors) of the first candidate with a number; no factors where nothing was converted."""
    for value, unit in candidates:
        if value is None:
            continue
        if rule is None:
            return value, unit, None
        if unit is None:
            row.fault(f"missing_unit: {code} has a result without a unit")
            return None, None, None
        factors = conversion(rule, unit)
        if factors is None:
            row.fault(f"unknown_unit: the unit of {code} cannot be converted to {rule.standard}")
            return None, None, None
        return convert(value, factors), rule.standard, factors
    return None, None, None


def _vs(row: _Row, profile: TrialProfile) -> _Mapped:
    code = row.required("VSTESTCD")
    time = row.required_date("VSDTC", need_day=True)
    columns = _texts(row)
    not_done = bool(row.reasons) and any(reason.startswith("not_done") for reason in row.reasons)
    value = unit = None
    if code is not None and not not_done:
        code = code.upper()
        rule = VITAL_UNITS.get(code)
        standard, original = row.text("VSSTRESC"), row.text("VSORRES")
        standard_unit, original_unit = row.text("VSSTRESU"), columns["original_unit"]
        candidates = (
            (row.number("VSSTRESN"), standard_unit),
            (numeric_text(standard) if standard is not None and standard_unit is not None else None, standard_unit),
            (numeric_text(original) if original is not None else None, original_unit),
        )
        before = len(row.reasons)
        value, unit, _ = _in_standard_unit(row, code, rule, candidates)
        if value is None and len(row.reasons) == before:
            row.fault(
                "no_result: the row has no result"
                if standard is None and original is None
                else "not_numeric: the result is not a number"
            )
        bounds = profile.plausible.get(code)
        if value is not None and bounds is not None and not bounds[0] <= value <= bounds[1]:
            # the code is one of the profile's, so that nothing of the row but the value is repeated
            row.fault(f"implausible: {code} is {value:g} {unit}, outside {bounds[0]:g} to {bounds[1]:g}")
    return (time.earliest, time.latest), {
        "test_code": code,
        "value": value,
        "unit": unit,
        "original_value": columns["original_value"],
        "original_unit": columns["original_unit"],
        "visit": columns["visit"],
        "body_position": columns["body_position"],
        "time_point": columns["time_point"],
        "baseline_flag": row.flag("VSBLFL", "VSLOBXFL"),
        "site": None,
        "arm": None,
    }


def _lb(row: _Row, profile: TrialProfile) -> _Mapped:
    code = row.required("LBTESTCD")
    time = row.required_date("LBDTC", need_day=True)
    columns = _texts(row)
    standard, standard_unit = row.text("LBSTRESC"), row.text("LBSTRESU")
    original, original_unit = row.text("LBORRES"), columns["original_unit"]
    value, unit, text = row.number("LBSTRESN"), standard_unit, None
    low, high = row.number("LBSTNRLO"), row.number("LBSTNRHI")
    rule = LAB_UNITS.get(code.upper()) if code is not None else None
    if value is None and standard is not None:
        value = numeric_text(standard)
    if value is None and standard is None and original is not None:
        value, unit, low, high = _from_original(original, original_unit, rule)
    elif rule is not None and unit is not None and (factors := conversion(rule, unit)) is not None:
        unit = rule.standard
        value, low, high = (None if item is None else convert(item, factors) for item in (value, low, high))
    if value is None:
        text = standard or original
        if text is None and not any(
            reason.startswith(("not_done", "wrong_type", "not_finite")) for reason in row.reasons
        ):
            row.fault("no_result: the row has no result")
    return (time.earliest, time.latest), {
        "test_code": code.upper() if code is not None else None,
        "value": value,
        "unit": unit,
        "original_value": columns["original_value"],
        "original_unit": original_unit,
        "text_value": text,
        "test_name": columns["test_name"],
        "category": columns["category"],
        "reference_low": low,
        "reference_high": high,
        "reference_indicator": columns["reference_indicator"],
        "visit": columns["visit"],
        "baseline_flag": row.flag("LBBLFL", "LBLOBXFL"),
        "lab_id": columns["lab_id"],
    }


def _from_original(
    original: str, unit: str | None, rule: UnitRule | None
) -> tuple[float | None, str | None, float | None, float | None]:
    """Standardise a result that came as collected only; a number in a unit that does not convert is left as text."""
    number = numeric_text(original)
    if number is None or rule is None:
        return number, unit, None, None
    factors = conversion(rule, unit) if unit is not None else None
    return (None, unit, None, None) if factors is None else (convert(number, factors), rule.standard, None, None)


def _ae(row: _Row, profile: TrialProfile) -> _Mapped:
    row.required("AEDECOD", "AETERM")
    onset = row.required_date("AESTDTC", need_day=False)
    end, collected = row.date("AEENDTC"), row.date("AEDTC")
    _in_order(row, onset, end, "AEENDTC", "AESTDTC")
    columns = _texts(row)
    severity = _severity(row, columns["outcome"])
    serious = {"Y": True, "N": False}.get((row.text("AESER") or "").upper())
    return (onset.earliest, collected.latest or onset.latest), {
        "event_type": columns["event_type"],
        "body_system": columns["body_system"],
        "severity": severity,
        "serious": serious,
        "event_id": columns["event_id"],
        "causality": columns["causality"],
        "outcome": columns["outcome"],
        "onset_precision": onset.column_precision,
        "end_time": end.latest,
        "reported_by": columns["reported_by"],
    }


def _severity(row: _Row, outcome: str | None) -> str | None:
    grades: list[int] = []
    toxicity, severity = row.text("AETOXGR"), row.text("AESEV")
    if toxicity is not None:
        match = _GRADE.fullmatch(toxicity.upper())
        if match is None:
            row.fault("unknown_severity: AETOXGR is no grade from 1 to 5")
        else:
            grades.append(int(match[1]))
    elif severity is not None:
        grade = SEVERITY_GRADES.get(severity.upper())
        if grade is None:
            row.fault("unknown_severity: AESEV is none of MILD, MODERATE, SEVERE, LIFE THREATENING, FATAL")
        else:
            grades.append(grade)
    if row.flag("AESLIFE"):
        grades.append(4)
    if row.flag("AESDTH") or (outcome or "").upper() == "FATAL":
        grades.append(5)
    return f"grade_{max(grades)}" if grades else None


def _in_order(row: _Row, start: PartialDate, end: PartialDate, end_name: str, start_name: str) -> None:
    if start.earliest is not None and end.latest is not None and end.latest < start.earliest:
        row.fault(f"inconsistent_times: {end_name} lies before {start_name}")


def _medication(row: _Row, prefix: str, start: PartialDate, end: PartialDate, *, study_drug: bool) -> dict[str, object]:
    row.required(f"{prefix}TRT")
    _in_order(row, start, end, f"{prefix}ENDTC", f"{prefix}STDTC")
    dose = row.number(f"{prefix}DOSE")
    if dose is not None and dose < 0:
        row.fault(f"out_of_range: {prefix}DOSE is {dose:g}, below 0")
    columns = _texts(row)
    for name in ("standardized_name", "drug_class"):
        if (columns[name] or "").upper() == "UNCODED":
            columns[name] = None
    return {
        "drug_name": columns["drug_name"],
        "standardized_name": columns["standardized_name"],
        "drug_class": columns["drug_class"],
        "dose": dose,
        "dose_unit": columns["dose_unit"],
        "route": columns["route"],
        "frequency": columns["frequency"],
        "indication": columns["indication"],
        "start_time": start.earliest,
        "start_precision": start.column_precision,
        "end_time": end.latest,
        "study_drug": study_drug,
    }


def _cm(row: _Row, profile: TrialProfile) -> _Mapped:
    before = len(row.reasons)
    start, end, collected = row.date("CMSTDTC"), row.date("CMENDTC"), row.date("CMDTC")
    if start.earliest is None and collected.earliest is None and len(row.reasons) == before:
        row.fault("missing_time: neither CMSTDTC nor CMDTC says when")
    columns = _medication(row, "CM", start, end, study_drug=False)
    return (start.earliest or collected.earliest, collected.latest or start.latest), columns


def _ex(row: _Row, profile: TrialProfile) -> _Mapped:
    start, end = row.required_date("EXSTDTC", need_day=False), row.date("EXENDTC")
    return (start.earliest, start.latest), _medication(row, "EX", start, end, study_drug=True)


def _dm(row: _Row, profile: TrialProfile) -> _Mapped:
    consent, collected = row.date("RFICDTC"), row.date("DMDTC")
    start, end, death = row.date("RFSTDTC"), row.date("RFENDTC"), row.date("DTHDTC")
    first = next((date for date in (consent, collected, start) if date.earliest is not None), MISSING)
    known = next((date for date in (collected, consent, start) if date.latest is not None), MISSING)
    if first.earliest is None and not row.reasons:
        row.fault("missing_time: none of RFICDTC, DMDTC and RFSTDTC says when")
    _in_order(row, start, end, "RFENDTC", "RFSTDTC")
    age = row.number("AGE")
    if age is not None:
        factor = AGE_UNITS.get((row.text("AGEU") or "YEARS").upper())
        if factor is None:
            row.fault(f"unknown_unit: AGEU is none of {', '.join(AGE_UNITS)}")
        else:
            age *= factor
            if not 0 <= age <= MAX_AGE_YEARS:
                row.fault(f"out_of_range: AGE is {age:g} years, outside 0 to {MAX_AGE_YEARS:g}")
    columns = _texts(row)
    arms = (row.text(name) for name in ("ARMCD", "ACTARMCD", "ARM", "ACTARM", "ARMNRS"))
    return (first.earliest, known.latest), {
        "study_id": columns["study_id"],
        "site": columns["site"],
        "arm": columns["arm"],
        "actual_arm": columns["actual_arm"],
        "age_years": age,
        "sex": columns["sex"],
        "race": columns["race"],
        "ethnicity": columns["ethnicity"],
        "country": columns["country"],
        "treatment_start": start.earliest,
        "treatment_end": end.latest,
        "death_time": death.earliest,
        "screen_failure": any(arm.lower().startswith(("scrnfail", "screen fail")) for arm in arms if arm is not None),
    }


_MAPPERS: dict[str, Callable[[_Row, TrialProfile], _Mapped]] = {
    "VS": _vs,
    "LB": _lb,
    "AE": _ae,
    "CM": _cm,
    "EX": _ex,
    "DM": _dm,
}
