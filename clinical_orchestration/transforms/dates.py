"""ISO 8601 dates and times as clinical records write them: complete, cut short, or with unknown parts.

SDTM allows a date to stop where knowledge stops (``2012-02``) and a single hyphen for an unknown part
(``2003---15``: month unknown; ``2003-12-15T-:15``: hour unknown). A moment without a zone is taken as UTC: the message
contract says that times are UTC, and SDTM dates carry no zone.
"""

from __future__ import annotations

import re
from calendar import monthrange
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from functools import lru_cache

PRECISIONS = ("missing", "year", "month", "day", "hour", "minute", "second")
"""From nothing known to a full time of day; a later one is finer."""


@dataclass(frozen=True, slots=True)
class PartialDate:
    """What a possibly incomplete date says.

    Attributes:
        earliest: first moment that it allows, UTC; None where the year is unknown.
        latest: last whole second that it allows, UTC (the moment itself where it is complete); None with `earliest`.
        precision: the finest part known without a gap, one of :data:`PRECISIONS`.
    """

    earliest: datetime | None
    latest: datetime | None
    precision: str

    @property
    def column_precision(self) -> str:
        """The precision as silver tables hold it, where a time known to the hour counts as known to the day."""
        return "day" if self.precision == "hour" else self.precision


MISSING = PartialDate(None, None, "missing")

_DATE_TIME = re.compile(
    r"""
    (?P<year>[0-9]{4}|-)
    (?:-(?P<month>[0-9]{2}|-)
      (?:-(?P<day>[0-9]{2}|-))?
    )?
    (?:T(?P<hour>[0-9]{2}|-)
      (?::(?P<minute>[0-9]{2}|-)
        (?::(?P<second>[0-9]{2}|-)(?:[.,](?P<fraction>[0-9]{1,9}))?)?
      )?
      (?P<zone>Z|[+-][0-9]{2}(?::?[0-9]{2})?)?
    )?
    """,
    re.VERBOSE,
)


def parse_iso8601_partial(text: str) -> PartialDate:
    """Read an ISO 8601 date or time, complete or partial, or an interval ``<start>/<end>`` of two such.

    Blank text gives :data:`MISSING`. Surrounding blanks are ignored. ``24:00`` is midnight at the end of the day.

    Raises:
        ValueError: the text is no such date, or names a day or time that does not exist. The message does not repeat
            the text, so that it can be shown anywhere.
    """
    return _parse(text.strip())


@lru_cache(maxsize=65536)
def _parse(text: str) -> PartialDate:
    if not text:
        return MISSING
    if text.count("/") == 1:
        start, end = (_parse(part.strip()) for part in text.split("/"))
        if start.earliest is None or end.latest is None:
            return MISSING
        if end.latest < start.earliest:
            raise ValueError("the interval ends before it starts")
        return PartialDate(start.earliest, end.latest, min(start.precision, end.precision, key=PRECISIONS.index))
    match = _DATE_TIME.fullmatch(text)
    if match is None:
        raise ValueError("not an ISO 8601 date or time")
    try:
        return _bounds({name: None if part in (None, "-") else part for name, part in match.groupdict().items()})
    except OverflowError as error:
        raise ValueError("outside the years 1 to 9999") from error


def _bounds(parts: dict[str, str | None]) -> PartialDate:
    year, month, day = (_number(parts[name]) for name in ("year", "month", "day"))
    hour, minute, second = (_number(parts[name]) for name in ("hour", "minute", "second"))
    _check(month, 1, 12, "month")
    _check(day, 1, 31, "day")
    _check(hour, 0, 24, "hour")
    _check(minute, 0, 59, "minute")
    _check(second, 0, 59, "second")
    if hour == 24 and (minute or second or parts["fraction"]):
        raise ValueError("no such hour")
    if year is None:
        return MISSING
    if year == 0:
        raise ValueError("no such year")
    last_month = month or 12
    first_month = month or 1
    if month is None and day is not None:
        # an unknown month with a known day: the first and the last month that have such a day
        with_day = [m for m in range(1, 13) if day <= monthrange(year, m)[1]]
        first_month, last_month = with_day[0], with_day[-1]
    last_day = day or monthrange(year, last_month)[1]
    if day is not None and month is not None and day > monthrange(year, month)[1]:
        raise ValueError("no such day in that month")
    midnight_after = hour == 24
    if midnight_after:
        hour = 0
    microsecond = int((parts["fraction"] or "").ljust(6, "0")[:6] or 0)
    zone = _zone(parts["zone"])
    earliest = datetime(year, first_month, day or 1, hour or 0, minute or 0, second or 0, microsecond, zone)
    latest = datetime(
        year, last_month, last_day,
        23 if hour is None else hour,
        59 if minute is None and not midnight_after else minute or 0,
        59 if second is None and not midnight_after else second or 0,
        microsecond, zone,
    )  # fmt: skip
    if midnight_after:
        earliest, latest = earliest + timedelta(days=1), latest + timedelta(days=1)
    precision = "year"
    for name, part in (("month", month), ("day", day), ("hour", hour), ("minute", minute), ("second", second)):
        if part is None:
            break
        precision = name
    return PartialDate(earliest.astimezone(UTC), latest.astimezone(UTC), precision)


def _number(part: str | None) -> int | None:
    return None if part is None else int(part)


def _check(part: int | None, lowest: int, highest: int, name: str) -> None:
    if part is not None and not lowest <= part <= highest:
        raise ValueError(f"no such {name}")


def _zone(text: str | None) -> timezone:
    if text is None or text == "Z":
        return UTC
    hours, minutes = int(text[1:3]), int(text[3:].lstrip(":") or 0)
    if hours > 14 or minutes > 59:
        raise ValueError("no such time zone")
    offset = timedelta(hours=hours, minutes=minutes)
    return timezone(-offset if text[0] == "-" else offset)
