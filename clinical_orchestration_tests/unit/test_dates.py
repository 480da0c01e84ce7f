from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinical_orchestration.transforms.dates import MISSING, PRECISIONS, PartialDate, parse_iso8601_partial


def at(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "earliest", "latest", "precision"),
    [
        ("2003", at(2003, 1, 1), at(2003, 12, 31, 23, 59, 59), "year"),
        ("2012-02", at(2012, 2, 1), at(2012, 2, 29, 23, 59, 59), "month"),
        ("2012-02-29", at(2012, 2, 29), at(2012, 2, 29, 23, 59, 59), "day"),
        ("2012-02-29T13", at(2012, 2, 29, 13), at(2012, 2, 29, 13, 59, 59), "hour"),
        ("2012-02-29T13:05", at(2012, 2, 29, 13, 5), at(2012, 2, 29, 13, 5, 59), "minute"),
        ("2012-02-29T13:05:07", at(2012, 2, 29, 13, 5, 7), at(2012, 2, 29, 13, 5, 7), "second"),
        ("2012-02-29T13:05:07.5", at(2012, 2, 29, 13, 5, 7, 500000), at(2012, 2, 29, 13, 5, 7, 500000), "second"),
        (
            "2012-02-29T13:05:07,123456789Z",
            at(2012, 2, 29, 13, 5, 7, 123456),
            at(2012, 2, 29, 13, 5, 7, 123456),
            "second",
        ),
        ("2012-03-01T01:30+02:00", at(2012, 2, 29, 23, 30), at(2012, 2, 29, 23, 30, 59), "minute"),
        ("2012-03-01T01:30-0530", at(2012, 3, 1, 7, 0), at(2012, 3, 1, 7, 0, 59), "minute"),
        ("2012-12-31T24:00", at(2013, 1, 1), at(2013, 1, 1), "minute"),
        # unknown parts, as the SDTM implementation guide writes them
        ("2003---15", at(2003, 1, 15), at(2003, 12, 15, 23, 59, 59), "year"),
        ("2003---31", at(2003, 1, 31), at(2003, 12, 31, 23, 59, 59), "year"),
        ("2003-12-15T-:15", at(2003, 12, 15, 0, 15), at(2003, 12, 15, 23, 15, 59), "day"),
        ("2003-12-15T13:-:17", at(2003, 12, 15, 13, 0, 17), at(2003, 12, 15, 13, 59, 17), "hour"),
        ("2003-02--", at(2003, 2, 1), at(2003, 2, 28, 23, 59, 59), "month"),
        ("  2003-12  ", at(2003, 12, 1), at(2003, 12, 31, 23, 59, 59), "month"),
        # an interval of uncertainty
        ("2003-12-01/2003-12-10", at(2003, 12, 1), at(2003, 12, 10, 23, 59, 59), "day"),
        ("2003-12/2004-01-05T10:00", at(2003, 12, 1), at(2004, 1, 5, 10, 0, 59), "month"),
    ],
)
def test_a_date_gives_its_bounds_and_precision(text: str, earliest: datetime, latest: datetime, precision: str) -> None:
    assert parse_iso8601_partial(text) == PartialDate(earliest, latest, precision)


@pytest.mark.parametrize("text", ["", "   ", "--12-15", "-----T07:15", "-"])
def test_a_date_without_a_year_is_missing(text: str) -> None:
    assert parse_iso8601_partial(text) == MISSING


@pytest.mark.parametrize(
    "text",
    [
        "12/31/2012", "31-12-2012", "2012-13", "2012-00", "2012-02-30", "2011-02-29", "2012-1-5", "12", "20120229",
        "2012-02-29 13:05", "2012-02-29T", "2012-02-29T25:00", "2012-02-29T24:01", "2012-02-29T13:60", "2012-02-29Z",
        "2012-02-29T13:05:60", "2012-02-29T13:05+15:00", "UNK", "0000", "0001-01-01T00:00+05:00", "--13-01", "--12-32",
        "9999-12-31T24:00", "2004/2003", "2012-02-29T13:05:07.", "2012/", "\u0662\u0660\u0661\u0662", "2012-W01-1",
        "1/2/3",
    ],
)  # fmt: skip
def test_what_is_no_date_is_refused_without_repeating_it(text: str) -> None:
    if text == "2012/":
        assert parse_iso8601_partial(text) == MISSING
        return
    with pytest.raises(ValueError) as caught:
        parse_iso8601_partial(text)
    assert text not in str(caught.value)


@given(st.datetimes(min_value=datetime(1000, 1, 1), max_value=datetime(9000, 1, 1)), st.integers(-14 * 60, 14 * 60))  # noqa: DTZ001
def test_a_complete_time_in_any_zone_is_read_exactly(moment: datetime, minutes: int) -> None:
    aware = moment.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    parsed = parse_iso8601_partial(aware.isoformat())
    assert parsed.earliest == parsed.latest == aware
    assert parsed.precision == "second"
    assert parsed.earliest is not None
    assert parsed.earliest.utcoffset() == timedelta(0)


@given(st.datetimes(min_value=datetime(1000, 1, 1), max_value=datetime(9000, 1, 1)), st.integers(1, 6))  # noqa: DTZ001
def test_cutting_a_time_short_widens_its_bounds_and_never_loses_it(moment: datetime, parts: int) -> None:
    moment = moment.replace(microsecond=0, tzinfo=UTC)
    full = moment.strftime("%Y-%m-%dT%H:%M:%S").rjust(19, "0")
    cut = full[: (4, 7, 10, 13, 16, 19)[parts - 1]]
    parsed = parse_iso8601_partial(cut)
    assert parsed.precision == PRECISIONS[parts]
    assert parsed.earliest is not None
    assert parsed.latest is not None
    assert parsed.earliest <= moment <= parsed.latest
    # the bounds are tight: they read back as the same text
    for bound in (parsed.earliest, parsed.latest):
        assert bound.strftime("%Y-%m-%dT%H:%M:%S").rjust(19, "0").startswith(cut)


@given(st.text(alphabet="0123456789-:TZ+./ ", max_size=30))
def test_any_text_gives_ordered_bounds_or_a_value_error(text: str) -> None:
    try:
        parsed = parse_iso8601_partial(text)
    except ValueError:
        return
    assert parsed.precision in PRECISIONS
    assert (parsed.earliest is None) == (parsed.latest is None) == (parsed.precision == "missing")
    if parsed.earliest is not None and parsed.latest is not None:
        assert parsed.earliest <= parsed.latest
