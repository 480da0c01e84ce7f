"""Corrections of records: proposed with their reason, and safe only where nothing else can be meant.

A proposal names the record, what is wrong, the old and the new value and the rule. :attr:`Proposal.safe` ones may be
applied without a person; the others are for people to decide. Nothing here reads or writes a table; applying, its log
and its reversal are in :mod:`clinical_orchestration.ingestion.cleaning`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from clinical_orchestration.quality.anomalies import MAD_TO_SD
from clinical_orchestration.transforms.units import normalise_unit

if TYPE_CHECKING:
    import polars as pl

Action = Literal["accept", "change"]

FAHRENHEIT_RULE = "DQ-CL-01"
SPELLING_RULE = "DQ-CL-02"
SWAPPED_RULE = "DQ-CL-03"
DECIMAL_RULE = "DQ-CL-04"

RULES: dict[str, tuple[str, bool]] = {
    FAHRENHEIT_RULE: ("A temperature in Fahrenheit, rejected as Celsius, is converted", True),
    SPELLING_RULE: ("A unit that differs from the usual one in blanks and case only gets the usual spelling", True),
    SWAPPED_RULE: ("A systolic pressure below the diastolic one: the two may be swapped", False),
    DECIMAL_RULE: ("A reading ten times, or a tenth of, what its patient has otherwise: a decimal slip", False),
}
"""Rule -> (what it does, whether it can be safe)."""

FAHRENHEIT_RANGE = (93.2, 109.4)
"""34 to 43 C in Fahrenheit. As Celsius every value in it is far above what anybody survives."""

SITE_EVIDENCE = 5
"""Records of a site with such temperatures that show a thermometer, and no single slip."""

SITE_SHARE = 0.9
"""Of a site's rejected temperatures, the share that must be in the range."""

NEAR = 2.0
"""A converted temperature must lie so near (C) to what the patient, else the site, has otherwise."""

FAR = 10.0
"""A reading is far from its patient's median from so many robust standard deviations on."""

DECIMAL_NEAR = 4.0
"""A shifted reading must lie within so many robust standard deviations of the patient's median."""


@dataclass(frozen=True)
class Proposal:
    """One proposed correction of one record.

    Attributes:
        rule: id of the cleaning rule.
        table: silver table that the record belongs to, or would.
        source_position: names the record.
        action: ``accept`` takes a record out of quarantine, ``change`` changes a column of a silver row.
        column: what is corrected.
        old: the value as received.
        new: the value proposed.
        reason: why, without anything that identifies a patient.
        safe: whether it may be applied without a person.
        site: the site, where it is known.
    """

    rule: str
    table: str
    source_position: str
    action: Action
    column: str
    old: str
    new: str
    reason: str
    safe: bool
    site: str | None = None


def batch_id(trial: str, proposals: Sequence[Proposal], generation: int = 0) -> str:
    """Return the id of a batch, 12 hex digits: the same proposals give the same id."""
    parts = sorted(f"{item.rule}|{item.table}|{item.source_position}|{item.column}|{item.new}" for item in proposals)
    return hashlib.sha256("\n".join([trial, str(generation), *parts]).encode()).hexdigest()[:12]


# --- Fahrenheit -----------------------------------------------------------------------------------------------------

_TEMPERATURE_REASON = re.compile(r"(?:out_of_range: temperature|implausible: TEMP) is (-?[0-9.]+(?:e[+-]?[0-9]+)?)")


def rejected_temperature(reasons: Sequence[str] | None) -> float | None:
    """Return the temperature for which alone a record was rejected, None where that is not why."""
    if not reasons or len(reasons) != 1:
        return None
    match = _TEMPERATURE_REASON.match(reasons[0])
    return float(match[1]) if match else None


def to_celsius(fahrenheit: float) -> float:
    """Convert, rounded to a tenth like readings are: 98.6 -> 37.0."""
    return round((fahrenheit - 32) * 5 / 9, 1)


def fahrenheit_proposals(rejected: pl.DataFrame, temperatures: pl.DataFrame) -> list[Proposal]:
    """Propose to convert temperatures in Fahrenheit that were rejected as Celsius.

    Safe where a site shows the pattern (:data:`SITE_EVIDENCE`, :data:`SITE_SHARE`) and the converted value is near
    what the patient has otherwise, else the site, else the trial.

    Args:
        rejected: ``source_position, reasons, patient_id, site`` of quarantined vital signs.
        temperatures: ``patient_id, site, value`` of accepted temperatures (C).
    """
    import polars as pl

    found = []
    for position, reasons, patient, site in rejected.select(
        "source_position", "reasons", "patient_id", "site"
    ).iter_rows():
        value = rejected_temperature(reasons)
        if value is not None:
            found.append((position, patient, site, value))
    by_site: dict[str | None, list[float]] = {}
    for _, _, site, value in found:
        by_site.setdefault(site, []).append(value)
    low, high = FAHRENHEIT_RANGE
    shown = {
        site
        for site, values in by_site.items()
        if site is not None
        and (inside := sum(low <= value <= high for value in values)) >= SITE_EVIDENCE
        and inside >= SITE_SHARE * len(values)
    }
    of_patient = dict(temperatures.group_by("patient_id").agg(pl.col("value").median()).iter_rows())
    of_site = dict(temperatures.group_by("site").agg(pl.col("value").median()).iter_rows())
    overall = temperatures.get_column("value").median()
    proposals = []
    for position, patient, site, value in found:
        if not low <= value <= high:
            continue
        celsius = to_celsius(value)
        usual = of_patient.get(patient, of_site.get(site, overall))
        near = usual is not None and abs(celsius - usual) <= NEAR
        pattern = f"{len(by_site[site])} records of the site show it" if site in shown else "the site shows no pattern"
        close = "near" if near else "not near"
        proposals.append(
            Proposal(
                FAHRENHEIT_RULE, "patient_vitals", position, "accept", "temperature", f"{value:g} C", f"{celsius:g} C",
                f"{value:g} is a body temperature in Fahrenheit and none in Celsius; {pattern}; converted it is "
                f"{close} what the patient or site has otherwise",
                safe=site in shown and near, site=site,
            )
        )  # fmt: skip
    return proposals


def patched(record_format: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return a payload with its Fahrenheit temperature as what it is, for the decoder.

    A message has no unit, so its value is converted; an SDTM row gets the unit ``F`` and is converted by the decoder.
    """
    out = dict(payload)
    if record_format == "message":
        out["temperature"] = to_celsius(float(out["temperature"]))
    else:
        for unit in ("VSSTRESU", "VSORRESU"):
            out[unit] = "F"
    return out


def with_original(rows: Sequence[dict[str, Any]], payload: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return decoded rows whose temperature says as original what was received, in Fahrenheit."""
    out = []
    for row in rows:
        if row["test_code"] == "TEMP":
            original = payload.get("temperature", payload.get("VSORRES", payload.get("VSSTRESN")))
            row = {**row, "original_value": str(original), "original_unit": "[degF]"}
        out.append(row)
    return out


# --- units ----------------------------------------------------------------------------------------------------------


def spelling_proposals(table: str, column: str, rows: pl.DataFrame, by: str | None = None) -> list[Proposal]:
    """Propose the usual spelling of units that differ from it in blanks and case only.

    Safe unless a prefix changes between ``m`` and ``M``: milli is not mega.

    Args:
        table: silver table.
        column: its column of units.
        rows: ``source_position``, `column`, and `by` where given.
        by: the usual spelling is that of the rows with the same value here, such as ``test_code``.
    """
    import polars as pl

    key = [by] if by else []
    counts = (
        rows.filter(pl.col(column).is_not_null())
        .group_by(*key, column)
        .agg(pl.len().alias("n"), pl.col("source_position"))
        .sort("n", column, descending=[True, False])
    )
    usual: dict[tuple[Any, str], str] = {}
    proposals = []
    for row in counts.iter_rows(named=True):
        unit: str = row[column]
        same = (row[by] if by else None, normalise_unit(unit))
        spelling = usual.setdefault(same, unit)
        if spelling == unit:
            continue
        safe = _tokens(spelling) == _tokens(unit)
        why = "differs from the usual spelling in blanks and case only"
        proposals += [
            Proposal(SPELLING_RULE, table, position, "change", column, unit, spelling,
                     f"the unit {why}" if safe else f"the unit {why}, but m and M may mean milli and mega", safe)
            for position in row["source_position"]
        ]  # fmt: skip
    return proposals


def _tokens(unit: str) -> list[str]:
    """Return the parts of a unit with their first letter as it is where it is an m, and all else without case."""
    parts = re.split(r"[^A-Za-z]+", unit.replace(" ", ""))
    return [part[0] + part[1:].casefold() if part[:1] in ("m", "M") else part.casefold() for part in parts]


# --- proposals for people -------------------------------------------------------------------------------------------


def swapped_pressures(vitals: pl.DataFrame) -> list[Proposal]:
    """Propose to swap systolic and diastolic pressures of one reading where the first is below the second.

    Args:
        vitals: ``source_position, patient_id, event_time, time_point, test_code, value, site``.
    """
    import polars as pl

    key = ["patient_id", "event_time", "time_point"]
    pressures = {
        code: vitals.filter(pl.col("test_code") == code).select(*key, "value", "source_position", "site")
        for code in ("SYSBP", "DIABP")
    }
    pairs = pressures["SYSBP"].join(pressures["DIABP"], on=key, suffix="_low", nulls_equal=True)
    wrong = pairs.filter(pl.col("value") < pl.col("value_low"))
    return [
        Proposal(
            SWAPPED_RULE, "patient_vitals", row["source_position"], "change", "value",
            f"SYSBP {row['value']:g}, DIABP {row['value_low']:g}",
            f"SYSBP {row['value_low']:g}, DIABP {row['value']:g}",
            "the systolic pressure is below the diastolic one of the same reading", safe=False, site=row["site"],
        )
        for row in wrong.sort("source_position").iter_rows(named=True)
    ]  # fmt: skip


def decimal_slips(table: str, rows: pl.DataFrame) -> list[Proposal]:
    """Propose to move the decimal point of readings that then fit their patient, and else are far from it.

    Args:
        table: silver table.
        rows: see :func:`clinical_orchestration.quality.anomalies.prepared`, with ``source_position``; patients with
            fewer than five readings of a test are left out.
    """
    import polars as pl

    enough = pl.len().over("patient_id", "test_code") >= 5
    far = (pl.col("residual") / pl.col("scale")).abs() > FAR
    # of tests that rise tenfold in disease (such as CRP) a tenfold value is no slip: far by their logarithm, too
    ratio = (pl.col("value") / pl.col("centre")).log()
    rows = rows.filter((pl.col("value") > 0) & (pl.col("centre") > 0)).with_columns(ratio=ratio)
    rows = rows.with_columns(ratio_scale=pl.col("ratio").abs().median().over("test_code") * MAD_TO_SD)
    far = far & (pl.col("ratio").abs() > FAR * pl.max_horizontal("ratio_scale", pl.lit(0.01)))
    proposals = []
    for row in rows.filter(enough & far).sort("source_position").iter_rows(named=True):
        for factor in (0.1, 10.0):
            shifted = row["value"] * factor
            if abs(shifted - row["centre"]) <= DECIMAL_NEAR * row["scale"]:
                proposals.append(
                    Proposal(
                        DECIMAL_RULE, table, row["source_position"], "change", "value", f"{row['value']:g}",
                        f"{shifted:g}", f"{row['test_code']} is far from what the patient has otherwise, and fits "
                        f"with its decimal point moved", safe=False, site=row.get("site"),
                    )
                )  # fmt: skip
                break
    return proposals
