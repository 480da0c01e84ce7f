"""Whether a patient meets criteria, and for each criterion why: by which value of which time, or what is missing.

Everything here looks at one patient's silver rows (mappings with the columns of ``tables.SILVER_COLUMNS``). Reasons
name values, times and terms of the record, never the patient.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from clinical_orchestration.cohorts.criteria import (
    AdverseEvent,
    Age,
    All,
    AnyOf,
    Arm,
    Bounds,
    CohortDefinition,
    Criterion,
    Demographic,
    Diagnosis,
    Index,
    Lab,
    Medication,
    Not,
    Sex,
    Site,
    Treated,
    Vital,
    Window,
)
from clinical_orchestration.cohorts.logic import Truth, at_least, every, some
from clinical_orchestration.transforms.units import LAB_UNITS, VITAL_UNITS, conversion, convert, normalise_unit

Row = Mapping[str, Any]
Status = Literal["eligible", "ineligible", "undetermined", "no index"]

_CENSORED = re.compile(r"^\s*(<=|>=|<|>|\u2264|\u2265)\s*([0-9]+(?:\.[0-9]+)?)\s*$")
_SHOWN = 3  # records that a reason lists


@dataclass(frozen=True)
class PatientRecords:
    """One patient's silver rows, in any order."""

    patient_id: str
    subjects: Sequence[Row] = ()
    vitals: Sequence[Row] = ()
    labs: Sequence[Row] = ()
    medications: Sequence[Row] = ()
    adverse_events: Sequence[Row] = ()

    @property
    def subject(self) -> Row:
        """The newest demographics; empty where there are none."""
        rows = sorted(self.subjects, key=lambda row: (_or_min(row.get("received_at")), str(row.get("source_position"))))
        return rows[-1] if rows else {}


@dataclass(frozen=True)
class Finding:
    """Whether one criterion is met, and why."""

    truth: Truth
    reason: str


@dataclass(frozen=True)
class CriterionResult:
    """One criterion of a definition for one patient."""

    part: Literal["inclusion", "exclusion"]
    criterion: str
    truth: Truth
    reason: str

    @property
    def passed(self) -> Truth:
        """Whether the patient may go on: an exclusion criterion must not be met."""
        return self.truth if self.part == "inclusion" else ~self.truth

    def text(self) -> str:
        """Return ``<criterion>: <truth>, <reason>``."""
        return f"{self.criterion}: {self.truth.value}, {self.reason}"


@dataclass(frozen=True)
class PatientMatch:
    """One patient against a definition.

    Attributes:
        patient_id: the patient.
        index_time: what windows are counted from (UTC); None where the patient has no such time.
        results: one a criterion, in order; none without an index time.
    """

    patient_id: str
    index_time: datetime | None
    results: tuple[CriterionResult, ...] = field(default=())

    @property
    def status(self) -> Status:
        """All criteria in one word."""
        if self.index_time is None:
            return "no index"
        found = every(result.passed for result in self.results)
        return {Truth.MET: "eligible", Truth.NOT_MET: "ineligible", Truth.UNKNOWN: "undetermined"}[found]  # type: ignore[return-value]


def match_patient(definition: CohortDefinition, records: PatientRecords) -> PatientMatch:
    """Evaluate every criterion of a definition for one patient."""
    index = index_time(definition.index, records)
    if index is None:
        return PatientMatch(records.patient_id, None)
    results = []
    for part, name, criterion in definition.criteria():
        finding = evaluate(criterion, records, index)
        results.append(CriterionResult(part, name, finding.truth, finding.reason))
    return PatientMatch(records.patient_id, index, tuple(results))


def index_time(index: Index, records: PatientRecords) -> datetime | None:
    """Return the time that a patient's windows are counted from; None where the records have none."""
    found: datetime | None
    if index.at == "time":
        found = index.time
    elif index.at == "treatment_start":
        found = records.subject.get("treatment_start")
    elif index.at == "consent":
        found = records.subject.get("event_time")
    else:
        domains = (records.subjects, records.vitals, records.labs, records.medications, records.adverse_events)
        times = [row["event_time"] for rows in domains for row in rows if row.get("event_time") is not None]
        found = None if not times else min(times) if index.at == "first_record" else max(times)
    return None if found is None else found + index.shift


def evaluate(criterion: Criterion, records: PatientRecords, index: datetime) -> Finding:
    """Return whether a criterion is met at the index time, and why."""
    return _EVALUATORS[type(criterion)](criterion, records, index)


# --- subject ---------------------------------------------------------------------------------------------------------


def _age(criterion: Age, records: PatientRecords, index: datetime) -> Finding:
    age = records.subject.get("age_years")
    if age is None:
        return Finding(Truth.UNKNOWN, "no age is recorded")
    return Finding(_within(criterion, _Number.exactly(age)), f"age {age:g} years")


def _recorded(name: str, values: Sequence[str], records: PatientRecords, label: str) -> Finding:
    found = records.subject.get(name)
    if not found:
        return Finding(Truth.UNKNOWN, f"no {label} is recorded")
    wanted = {value.casefold() for value in values}
    return Finding(Truth.of(str(found).casefold() in wanted), f"{label} is {found}")


def _sex(criterion: Sex, records: PatientRecords, index: datetime) -> Finding:
    return _recorded("sex", criterion.values, records, "sex")


def _arm(criterion: Arm, records: PatientRecords, index: datetime) -> Finding:
    name, label = ("actual_arm", "actual arm") if criterion.actual else ("arm", "arm")
    return _recorded(name, criterion.values, records, label)


def _site(criterion: Site, records: PatientRecords, index: datetime) -> Finding:
    return _recorded("site", criterion.values, records, "site")


def _demographic(criterion: Demographic, records: PatientRecords, index: datetime) -> Finding:
    return _recorded(criterion.field, criterion.values, records, criterion.field)


def _treated(criterion: Treated, records: PatientRecords, index: datetime) -> Finding:
    subject = records.subject
    start = subject.get("treatment_start")
    if start is not None:
        return Finding(Truth.MET, f"treatment started on {start:%Y-%m-%d}")
    if subject.get("screen_failure"):
        return Finding(Truth.NOT_MET, "failed screening")
    return Finding(Truth.UNKNOWN, "no start of treatment is recorded")


# --- measurements ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Number:
    """A value that is known exactly, or only to be beyond a limit of the assay ("<3.42")."""

    low: float
    high: float
    low_open: bool = False
    high_open: bool = False

    @classmethod
    def exactly(cls, value: float) -> _Number:
        return cls(value, value)

    def scaled(self, factors: tuple[float, float]) -> _Number:
        return _Number(
            convert(self.low, factors) if math.isfinite(self.low) else self.low,
            convert(self.high, factors) if math.isfinite(self.high) else self.high,
            self.low_open,
            self.high_open,
        )


def _within(bounds: Bounds, number: _Number) -> Truth:
    found = []
    if bounds.lower is not None:
        limit, strict = bounds.lower, bounds.min is None
        if number.low > limit or (number.low == limit and (number.low_open or not strict)):
            found.append(Truth.MET)
        elif number.high < limit or (number.high == limit and (number.high_open or strict)):
            found.append(Truth.NOT_MET)
        else:
            found.append(Truth.UNKNOWN)
    if bounds.upper is not None:
        limit, strict = bounds.upper, bounds.max is None
        if number.high < limit or (number.high == limit and (number.high_open or not strict)):
            found.append(Truth.MET)
        elif number.low > limit or (number.low == limit and (number.low_open or strict)):
            found.append(Truth.NOT_MET)
        else:
            found.append(Truth.UNKNOWN)
    return every(found)


def _number(row: Row) -> _Number | None:
    value = row.get("value")
    if value is not None:
        return None if math.isnan(value) else _Number.exactly(float(value))
    found = _CENSORED.match(str(row.get("text_value") or ""))
    if found is None:
        return None
    limit, sign = float(found[2]), found[1]
    if sign in ("<", "<=", "\u2264"):
        return _Number(-math.inf, limit, high_open=sign == "<")
    return _Number(limit, math.inf, low_open=sign == ">")


def _measured(criterion: Lab | Vital, records: PatientRecords, index: datetime) -> Finding:
    rows = records.labs if isinstance(criterion, Lab) else records.vitals
    wanted = [
        row
        for row in rows
        if str(row.get("test_code")).upper() == criterion.test
        and row.get("event_time") is not None
        and _in_window(criterion.window, row["event_time"], index)
    ]
    if isinstance(criterion, Vital) and criterion.position:
        wanted = [row for row in wanted if str(row.get("body_position") or "").upper() == criterion.position.upper()]
    if not wanted:
        return Finding(Truth.UNKNOWN, f"no {criterion.test} value {criterion.window.describe()}")
    if criterion.select in ("latest", "first"):
        moment = (max if criterion.select == "latest" else min)(row["event_time"] for row in wanted)
        wanted = [row for row in wanted if row["event_time"] == moment]
    findings = [_one_value(criterion, row) for row in sorted(wanted, key=lambda row: row["event_time"])]
    truths = {finding.truth for finding in findings}
    if criterion.select == "any":
        truth = some(truths)
    elif criterion.select == "all":
        truth = every(truths)
    else:  # several values of one time may contradict each other
        truth = truths.pop() if len(truths) == 1 else Truth.UNKNOWN
        if len(findings) > 1 and truth is Truth.UNKNOWN and Truth.MET in {item.truth for item in findings}:
            return Finding(truth, "values of the same time disagree: " + _listed([item.reason for item in findings]))
    deciding = [finding.reason for finding in findings if finding.truth is truth] or [item.reason for item in findings]
    return Finding(truth, _listed(deciding))


def _one_value(criterion: Lab | Vital, row: Row) -> Finding:
    shown = row.get("value")
    shown = f"{shown:g}" if shown is not None else str(row.get("text_value") or "no number")
    unit = str(row.get("unit") or "")
    what = f"{criterion.test} {shown}{' ' + unit if unit else ''} on {row['event_time']:%Y-%m-%d %H:%M}"
    number = _number(row)
    if number is None:
        return Finding(Truth.UNKNOWN, f"{what} is no number")
    if isinstance(criterion, Lab) and criterion.relative_to:
        reference = row.get(criterion.relative_to)
        if reference is None or not reference > 0:
            return Finding(Truth.UNKNOWN, f"{what} has no such reference limit")
        relative = _Number(number.low / reference, number.high / reference, number.low_open, number.high_open)
        return Finding(_within(criterion, relative), f"{what} (reference limit {reference:g})")
    if criterion.unit is None or normalise_unit(criterion.unit) == normalise_unit(unit):
        return Finding(_within(criterion, number), what)
    rule = (LAB_UNITS if isinstance(criterion, Lab) else VITAL_UNITS).get(criterion.test)
    theirs, ours = conversion(rule, unit), conversion(rule, criterion.unit)
    if theirs is None or ours is None:
        return Finding(Truth.UNKNOWN, f"{what} cannot be compared with {criterion.unit}")
    limits = {
        name: None if limit is None else convert(limit, ours)
        for name, limit in (
            ("min", criterion.min), ("max", criterion.max), ("above", criterion.above), ("below", criterion.below),
        )
    }  # fmt: skip
    return Finding(_within(Bounds(**limits), number.scaled(theirs)), what)


# --- events ----------------------------------------------------------------------------------------------------------


def _adverse_event(criterion: AdverseEvent, records: PatientRecords, index: datetime) -> Finding:
    found: list[tuple[Truth, str]] = []
    for row in records.adverse_events:
        if criterion.terms and not _mentions(criterion.terms, row.get("event_type"), row.get("body_system")):
            continue
        truth = _started_in(criterion.window, row.get("event_time"), row.get("onset_precision"), index)
        if criterion.min_grade is not None:
            grade = _grade(row.get("severity"))
            truth &= Truth.of(None if grade is None else grade >= criterion.min_grade)
        if criterion.serious is not None:
            serious = row.get("serious")
            truth &= Truth.of(None if serious is None else bool(serious) == criterion.serious)
        found.append((truth, _event(row)))
    truth = at_least((item for item, _ in found), criterion.at_least)
    return _counted(truth, found, "adverse event", criterion.window, criterion.absence)


def _diagnosis(criterion: Diagnosis, records: PatientRecords, index: datetime) -> Finding:
    found = [
        (_started_in(criterion.window, row.get("event_time"), row.get("onset_precision"), index), _event(row))
        for row in records.adverse_events
        if _mentions(criterion.terms, row.get("event_type"))
    ]
    found += [
        (_taken_in(criterion.window, row, index), f"{row.get('drug_name')} for {row.get('indication')}")
        for row in records.medications
        if _mentions(criterion.terms, row.get("indication"))
    ]
    truth = some(item for item, _ in found)
    return _counted(truth, found, "mention of the condition", criterion.window, criterion.absence)


def _medication(criterion: Medication, records: PatientRecords, index: datetime) -> Finding:
    found: list[tuple[Truth, str]] = []
    for row in records.medications:
        if bool(row.get("study_drug")) != criterion.study_drug:
            continue
        if not criterion.names and not criterion.classes:
            kind = Truth.MET
        else:
            named = _mentions(criterion.names, row.get("drug_name"), row.get("standardized_name"))
            kind = Truth.of(named)
            if criterion.classes:
                known = row.get("drug_class")
                kind |= Truth.of(_mentions(criterion.classes, known) if known else None)
        truth = kind & _taken_in(criterion.window, row, index)
        if truth is not Truth.NOT_MET:
            start = row.get("start_time")
            since = f"since {start:%Y-%m-%d} ({row.get('start_precision')})" if start else "of unknown start"
            unclassed = "" if kind is Truth.MET else ", class not recorded"
            found.append((truth, f"{row.get('drug_name')} {since}{unclassed}"))
    return _counted(some(item for item, _ in found), found, "such medication", criterion.window, "not met")


def _counted(truth: Truth, found: list[tuple[Truth, str]], what: str, window: Window, absence: str) -> Finding:
    if truth is Truth.NOT_MET:
        met = sum(item is Truth.MET for item, _ in found)
        if absence == "unknown" and not met:
            return Finding(Truth.UNKNOWN, f"no {what} is recorded, which does not show that there was none")
        return Finding(truth, f"no {what} {window.describe()}" if not met else f"only {met}: {_listed(_of(found))}")
    if truth is Truth.MET:
        return Finding(truth, _listed(_of(found)))
    return Finding(truth, "cannot be told: " + _listed([text for item, text in found if item is Truth.UNKNOWN]))


def _of(found: list[tuple[Truth, str]]) -> list[str]:
    return [text for item, text in found if item is Truth.MET]


def _started_in(window: Window, start: datetime | None, precision: object, index: datetime) -> Truth:
    """Return whether something of a possibly partial date started in the window."""
    if start is None:
        return Truth.UNKNOWN
    latest = start + _SPANS.get(str(precision), timedelta(0))
    low = None if window.before is None else index - window.before
    high = index + window.after
    if (low is not None and latest < low) or start > high:
        return Truth.NOT_MET
    return Truth.MET if (low is None or start >= low) and latest <= high else Truth.UNKNOWN


def _taken_in(window: Window, row: Row, index: datetime) -> Truth:
    """Return whether a medication was taken at some time in the window."""
    low = None if window.before is None else index - window.before
    high = index + window.after
    end, start, noted = row.get("end_time"), row.get("start_time"), row.get("event_time")
    if low is not None and end is not None and end < low:
        return Truth.NOT_MET
    if start is None:  # it had begun when it was noted; how long before is unknown
        return Truth.MET if noted is not None and noted <= high else Truth.UNKNOWN
    if start > high:
        return Truth.NOT_MET
    return Truth.MET if start + _SPANS.get(str(row.get("start_precision")), timedelta(0)) <= high else Truth.UNKNOWN


_SPANS = {
    # how much later than its earliest possible time something of a partial date may have been, at most
    "year": timedelta(days=366) - timedelta(seconds=1),
    "month": timedelta(days=31) - timedelta(seconds=1),
    "day": timedelta(days=1) - timedelta(seconds=1),
    "hour": timedelta(hours=1) - timedelta(seconds=1),
    "minute": timedelta(seconds=59),
}


def _in_window(window: Window, moment: datetime, index: datetime) -> bool:
    return (window.before is None or moment >= index - window.before) and moment <= index + window.after


def _mentions(parts: Sequence[str], *texts: object) -> bool:
    known = [str(text).casefold() for text in texts if text]
    return any(part.casefold() in text for part in parts for text in known)


def _grade(severity: object) -> int | None:
    found = re.fullmatch(r"grade_([1-5])", str(severity or ""))
    return int(found[1]) if found else None


def _event(row: Row) -> str:
    start = row.get("event_time")
    when = f" on {start:%Y-%m-%d} ({row.get('onset_precision')})" if start else " of unknown onset"
    grade = f", {row['severity']}" if row.get("severity") else ", no grade"
    return f"{row.get('event_type')}{when}{grade}"


def _listed(texts: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(texts))
    more = len(distinct) - _SHOWN
    return "; ".join(distinct[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _or_min(moment: object) -> str:
    return moment.isoformat() if isinstance(moment, datetime) else ""


# --- groups ----------------------------------------------------------------------------------------------------------


def _all(criterion: All, records: PatientRecords, index: datetime) -> Finding:
    found = [evaluate(part, records, index) for part in criterion.of]
    return _group(every(item.truth for item in found), found)


def _any(criterion: AnyOf, records: PatientRecords, index: datetime) -> Finding:
    found = [evaluate(part, records, index) for part in criterion.of]
    return _group(some(item.truth for item in found), found)


def _not(criterion: Not, records: PatientRecords, index: datetime) -> Finding:
    found = evaluate(criterion.of, records, index)
    return Finding(~found.truth, found.reason)


def _group(truth: Truth, found: list[Finding]) -> Finding:
    """Return a group's finding with the reasons of the parts that decide it."""
    return Finding(truth, "; ".join(dict.fromkeys(item.reason for item in found if item.truth is truth)))


_EVALUATORS: dict[type, Callable[[Any, PatientRecords, datetime], Finding]] = {
    Age: _age,
    Sex: _sex,
    Arm: _arm,
    Site: _site,
    Demographic: _demographic,
    Treated: _treated,
    Lab: _measured,
    Vital: _measured,
    AdverseEvent: _adverse_event,
    Diagnosis: _diagnosis,
    Medication: _medication,
    All: _all,
    AnyOf: _any,
    Not: _not,
}
