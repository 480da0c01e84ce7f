"""HL7 v2 result messages (ORU^R01) as laboratory messages of the contract.

One OBX segment gives one message: PID-3 is the patient, OBX-14 (else OBR-7) the time, OBX-3 the test, OBX-5 the
value, OBX-6 the unit, OBX-7 the reference range, OBX-15 (else MSH-4) the laboratory.

Decisions that the standard leaves to the receiver:

- A time needs hours and minutes. Without an offset of its own it has that of MSH-7 (HL7 2.5, 2.A.22), and where that
  has none either, the zone that the caller names.
- Results that are not final (P, R, S, I) or are no result (X, N, O) give no message and are counted: a final one takes
  the place of a preliminary one, and the first record with a key is the one that silver accepts. A message that
  withdraws a result (D, W) is a fault, because a person has to act on it.
- A message is taken as a whole or not at all: one fault anywhere refuses it, and all faults are named.

Segment positions, types and codes stand in the reasons; texts of the message never do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import Any

import hl7  # type: ignore[import-untyped]

from clinical_orchestration.transforms.units import LAB_UNITS, lab_test_code

FINAL = frozenset({"F", "C", "U", "V"})
"""OBX-11 of results that are passed on: final, corrected, changed to final, verified."""

WITHHELD = frozenset({"P", "R", "S", "I", "X", "N", "O"})
"""OBX-11 of results that are not there yet, or never will be (HL7 table 0085)."""

WITHDRAWN = frozenset({"D", "W"})
"""OBX-11 that asks to delete an earlier result, or says that it belongs to another patient."""

NUMERIC = frozenset({"NM", "ST", "TX", "FT"})
CODED = frozenset({"CE", "CWE", "CNE", "CF"})

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_LIMIT = re.compile(r"(<=|>=|<|>)\s*((?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))")
_TIME = re.compile(
    r"([0-9]{4})(?:([0-9]{2})(?:([0-9]{2})(?:([0-9]{2})(?:([0-9]{2})(?:([0-9]{2})(?:\.([0-9]{1,4}))?)?)?)?)?)?"
    r"([+-][0-9]{4})?"
)
_CODE = re.compile(r"[A-Z]{1,3}")
_CHARSETS = {"": "utf-8", "ASCII": "utf-8", "UNICODE": "utf-8", "UNICODE UTF-8": "utf-8", "UTF-8": "utf-8"}


@dataclass(slots=True)
class LabReport:
    """What one HL7 message says.

    Attributes:
        messages: laboratory messages of the contract, in the order of the OBX segments; none where there are reasons.
        reasons: everything that is wrong, ``"<rule>: <text>"``, without text of the message.
        withheld: OBX-11 status -> number of results that give no message.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    withheld: Counter[str] = field(default_factory=Counter)


def looks_like_hl7(payload: bytes | str) -> bool:
    """Return whether a payload begins as an HL7 v2 message or batch does, with or without MLLP framing."""
    start = payload[:64] if isinstance(payload, str) else payload[:64].decode("latin-1")
    return start.lstrip("\ufeff\x0b\r\n\t ").removeprefix("\u00ef\u00bb\u00bf")[:3] in ("MSH", "FHS", "BHS")


def read_oru(
    payload: bytes | str, *, zone: tzinfo = UTC, identifier_types: Collection[str] = (), extra: bool = True
) -> LabReport:
    """Read one ORU^R01 message.

    Args:
        payload: the message; bytes are decoded as MSH-18 says. Segments may end in CR, LF or both.
        zone: of times without an offset, where MSH-7 has none.
        identifier_types: CX.5 codes (``MR``, ``PI`` ...) of the PID-3 repetition that is the patient; empty takes the
            first repetition that has an identifier.
        extra: whether the messages also carry ``result_status``, ``test_code`` and ``coding_system``, which the
            contract allows and does not use.

    Returns:
        Messages, or reasons; never an error, whatever the payload.
    """
    report = LabReport()
    text, fault = _text(payload)
    if fault is not None:
        report.reasons.append(fault)
        return report
    lines = [line for line in re.split(r"[\r\n]+", text.strip("\ufeff\x0b\x1c\r\n\t ")) if line.strip()]
    if not lines or not lines[0].startswith("MSH") or len(lines[0]) < 9:
        report.reasons.append("invalid_hl7: the message does not begin with an MSH segment")
        return report
    try:
        parsed = hl7.parse("\r".join(lines))
    except Exception as error:  # a library of many shapes: whatever it raises, the message cannot be read
        report.reasons.append(f"invalid_hl7: the segments cannot be read ({type(error).__name__})")
        return report
    _Reader(report, zone, frozenset(identifier_types), extra).read(parsed)
    if report.reasons:
        report.messages = []
    return report


def read_time(text: str, default: tzinfo) -> tuple[datetime | None, str]:
    """Read an HL7 time stamp.

    Returns:
        ``(UTC time, "")``, or ``(None, why not)``. Hours and minutes are needed.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        return None, "is not a time stamp of HL7 (YYYYMMDDHHMM[SS][+/-ZZZZ])"
    year, month, day, hour, minute, second, fraction, offset = match.groups()
    if minute is None:
        return None, "lacks its hours and minutes"
    zone = _zone(offset) if offset else default
    if zone is None:
        return None, "has an offset that no place has"
    try:
        moment = datetime(
            int(year), int(month), int(day), int(hour), int(minute), int(second or 0),
            int((fraction or "").ljust(6, "0") or 0), tzinfo=zone,
        ).astimezone(UTC)  # fmt: skip
    except (ValueError, OverflowError):
        return None, "is no time of the calendar"
    return moment, ""


def _zone(offset: str) -> timezone | None:
    hours, minutes = int(offset[1:3]), int(offset[3:5])
    if hours > 14 or minutes > 59:
        return None
    delta = timedelta(hours=hours, minutes=minutes)
    return timezone(-delta if offset[0] == "-" else delta)


def _text(payload: bytes | str) -> tuple[str, str | None]:
    if isinstance(payload, str):
        return payload, None
    first = re.split(rb"[\r\n]", payload.lstrip(b"\xef\xbb\xbf\x0b\r\n\t "), maxsplit=1)[0].decode("latin-1")
    fields = first.split(first[3:4]) if len(first) > 3 else []
    # MSH-1 is the separator itself, so that MSH-18 is the part of index 17; of several, the first is the message's
    name = fields[17].split(first[5:6] or "~")[0].strip().upper() if len(fields) > 17 else ""
    charset = _CHARSETS.get(name)
    if charset is None and (match := re.fullmatch(r"8859/([0-9]{1,2})", name)):
        charset = f"iso-8859-{match[1]}"
    if charset is None:
        return "", "unsupported_charset: MSH-18 names a character set that is not supported"
    try:
        return payload.decode(charset), None
    except UnicodeDecodeError:
        return "", "not_decodable: the bytes are not in the character set of MSH-18"
    except LookupError:
        return "", "unsupported_charset: MSH-18 names a character set that is not supported"


Parts = list[list[list[str]]]
"""A field: repetitions of components of subcomponents, unescaped."""


class _Reader:
    """Reads the segments of one message in their order."""

    def __init__(self, report: LabReport, zone: tzinfo, identifier_types: frozenset[str], extra: bool) -> None:
        self.report = report
        self.zone = zone
        self.types = identifier_types
        self.extra = extra
        self.separators = "|~^&"
        self.escape = "\\"
        self.patient: str | None = None
        self.patients = 0
        self.order: Any = None
        self.facility: str | None = None

    def fault(self, text: str) -> None:
        if text not in self.report.reasons:
            self.report.reasons.append(text)

    def read(self, message: Any) -> None:
        head = message[0]
        declared = str(head[2]) if len(head) > 2 else ""
        if len(declared) < 3:
            self.fault("invalid_hl7: MSH-2 does not name the separators")
            return
        self.separators = f"{head[1]}{declared[1]}{declared[0]}{declared[3] if len(declared) > 3 else '&'}"
        self.escape = declared[2]
        kind = self._first(head, 9)
        if kind[:1] != ["ORU"] or (len(kind) > 1 and kind[1] != "R01"):
            self.fault("unsupported_message: MSH-9 is not ORU^R01")
            return
        stamp = self._one(head, 7)
        if stamp and (match := _TIME.fullmatch(stamp)) and match[8]:
            self.zone = _zone(match[8]) or self.zone
        self.facility = self._one(head, 4)
        results = 0
        for segment in message[1:]:
            name = str(segment[0])
            if name == "MSH":
                self.fault("several_messages: there is more than one MSH segment")
            elif name == "PID":
                self._patient(segment)
            elif name == "OBR":
                self.order = segment
            elif name == "OBX":
                results += 1
                self._result(segment, f"OBX {results}")
        if not self.patients:
            self.fault("missing_field: there is no PID segment")
        if not results:
            self.fault("no_result: there is no OBX segment")

    def _patient(self, segment: Any) -> None:
        self.patients += 1
        self.patient, self.order = None, None
        for repetition in self._parts(segment, 3):
            identifier = repetition[0][0].strip()
            kind = repetition[4][0].strip() if len(repetition) > 4 else ""
            if identifier and (not self.types or kind in self.types):
                self.patient = identifier
                return
        wanted = f" of type {' or '.join(sorted(self.types))}" if self.types else ""
        self.fault(f"missing_field: PID-3 of PID {self.patients} has no identifier{wanted}")

    def _result(self, segment: Any, where: str) -> None:
        status = (self._one(segment, 11) or (self._one(self.order, 25) if self.order else None) or "F").upper()
        if status in WITHHELD:
            self.report.withheld[status] += 1
            return
        if status in WITHDRAWN:
            self.fault(f"withdrawal: {where} asks to withdraw an earlier result (status {status})")
            return
        if status not in FINAL:
            self.fault(f"unknown_status: OBX-11 of {where} is no known result status")
            return
        if self.patient is None and not self.patients:
            self.fault("missing_field: there is no PID segment before the results")
        name, code, system = self._test(segment)
        if name is None:
            self.fault(f"missing_field: OBX-3 of {where} names no test")
        value, fault = self._value(segment)
        if fault:
            self.fault(fault.format(where))
        moment = self._time(segment, where)
        if self.patient is None or name is None or fault or moment is None:
            return
        record: dict[str, Any] = {
            "patient_id": self.patient,
            "timestamp": moment.isoformat().replace("+00:00", "Z"),
            "test_name": name,
            "value": value,
            "unit": self._coded(segment, 6),
            "reference_range": self._one(segment, 7),
            "lab_id": self._coded(segment, 15, code=True) or self.facility,
        }
        if self.extra:
            record |= {"result_status": status, "test_code": code, "coding_system": system}
        self.report.messages.append({key: item for key, item in record.items() if item is not None})

    def _time(self, segment: Any, where: str) -> datetime | None:
        own = self._one(segment, 14)
        text = own or (self._one(self.order, 7) if self.order else None)
        if not text:
            self.fault(f"missing_field: neither OBX-14 of {where} nor its OBR-7 has a time")
            return None
        moment, why = read_time(text, self.zone)
        if moment is None:
            self.fault(f"invalid_time: {'OBX-14' if own else 'OBR-7'} of {where} {why}")
        return moment

    def _test(self, segment: Any) -> tuple[str | None, str | None, str | None]:
        """Return the test's name as the platform knows it best, its code and coding system."""
        code, text, system, other_code, other_text = (self._first(segment, 3) + [""] * 5)[:5]
        names = [item for item in (text, other_text, code, other_code) if item and item != '""']
        if not names:
            return None, None, None
        known = next((item for item in names if lab_test_code(item) in LAB_UNITS), names[0])
        return known, code or None, system or None

    def _value(self, segment: Any) -> tuple[float | int | str | None, str | None]:
        repetitions = self._parts(segment, 5)
        filled = [item for item in repetitions if any(part.strip() for comp in item for part in comp)]
        kind = (self._one(segment, 2) or "").upper()
        if not filled or filled[0][0][0] == '""':
            return None, "missing_field: OBX-5 of {} has no value"
        if len(filled) > 1:
            return None, "repeated_value: OBX-5 of {} has more than one value"
        components = ["".join(comp[:1]).strip() for comp in filled[0]] + [""] * 4
        if kind in NUMERIC:
            return _plain(components[0], numeric=kind == "NM")
        if kind == "SN":
            return _structured(components)
        if kind in CODED:
            return _plain(components[1] or components[0], numeric=False)
        shown = kind if _CODE.fullmatch(kind) else "a type that is not known"
        return None, f"unsupported_type: OBX-2 of {{}} is {shown or 'missing'}, not NM, SN, ST or CE"

    def _coded(self, segment: Any, number: int, *, code: bool = False) -> str | None:
        """Return the code of a coded field (UCUM units are codes), else its text."""
        parts = self._first(segment, number)
        found = next((part for part in parts[:2] if part and part != '""'), None)
        return found if found is None or not code else found.strip()

    def _one(self, segment: Any, number: int) -> str | None:
        """Return the first component of the first repetition, or None where it is absent, blank or the HL7 null."""
        parts = self._first(segment, number)
        return parts[0] if parts and parts[0] and parts[0] != '""' else None

    def _first(self, segment: Any, number: int) -> list[str]:
        repetitions = self._parts(segment, number)
        return [component[0].strip() for component in repetitions[0]] if repetitions else []

    def _parts(self, segment: Any, number: int) -> Parts:
        if segment is None or number >= len(segment):
            return []
        return [
            [[self._unescaped(repetition)]]
            if isinstance(repetition, str)
            else [
                [self._unescaped(component)]
                if isinstance(component, str)
                else [self._unescaped(str(part)) for part in component] or [""]
                for component in repetition
            ]
            or [[""]]
            for repetition in segment[number]
        ]

    def _unescaped(self, text: str) -> str:
        """Resolve escape sequences; formatting and unknown ones vanish, an escape character on its own stays."""
        if self.escape not in text:
            return text
        mark = re.escape(self.escape)
        field_, repetition, component, part = tuple(self.separators)
        plain = {"F": field_, "S": component, "T": part, "R": repetition, "E": self.escape, ".br": " ", ".sp": " "}

        def resolved(match: re.Match[str]) -> str:
            code = match[1]
            if code in plain:
                return plain[code]
            if code[:1] == "X" and len(code) % 2 and re.fullmatch(r"[0-9A-Fa-f]*", code[1:]):
                return bytes.fromhex(code[1:]).decode("utf-8", "replace")
            return ""

        return re.sub(rf"{mark}([^{mark}\s]*){mark}", resolved, text)


def _plain(text: str, *, numeric: bool) -> tuple[float | int | str | None, str | None]:
    if _NUMBER.fullmatch(text):
        return (int(text) if text.lstrip("+-").isdigit() and len(text) < 16 else float(text)), None
    if match := _LIMIT.fullmatch(text):
        return f"{match[1]}{match[2]}", None
    if numeric:
        return None, "invalid_number: OBX-5 of {} is NM and no number"
    return text, None


def _structured(components: Sequence[str]) -> tuple[float | int | str | None, str | None]:
    """Read an SN value: comparator, number, separator or suffix, second number."""
    comparator, first, separator, second = components[:4]
    if second or separator:  # a range, a ratio, or a grade such as 2+
        return None, "unsupported_value: OBX-5 of {} is a range, a ratio or a grade, not one number"
    if not _NUMBER.fullmatch(first):
        return None, "invalid_number: OBX-5 of {} is SN and has no number"
    if comparator in ("<", "<=", ">", ">="):
        return f"{comparator}{first}", None
    if comparator not in ("", "="):
        return None, "unsupported_value: OBX-5 of {} has a comparator that says no limit"
    return _plain(first, numeric=True)
