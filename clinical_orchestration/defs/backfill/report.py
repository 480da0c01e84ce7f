"""The report of a backfill: JSON for programs, HTML for people, and a table for the run's metadata."""

import html
from collections.abc import Iterable, Mapping
from typing import Any

import dagster as dg

from clinical_orchestration.defs.common import markdown_table
from clinical_orchestration.features.changes import FeatureChange

SHOWN = 20
"""So many features are in the table of a run's metadata; the report has all."""

_STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2rem;max-width:70rem}table{border-collapse:collapse;margin:1rem 0}"
    "td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:right}td:first-child,th:first-child{text-align:left}"
)


def difference_table(changes: Iterable[FeatureChange]) -> dg.MetadataValue:
    """Return the most changed features as a table."""
    return markdown_table(
        ["feature", "changed", "emptied", "filled", "largest difference"],
        [
            (change.feature, change.changed, change.emptied, change.filled, change.max_difference)
            for change in list(changes)[:SHOWN]
        ],
    )


def report_json(content: Mapping[str, Any]) -> bytes:
    """Return the report for programs."""
    import orjson

    return orjson.dumps(dict(content), option=orjson.OPT_INDENT_2)


def report_html(content: Mapping[str, Any]) -> bytes:
    """Return the report for people: one page without outside parts."""
    loaded, history = content["patient_features"], content["history"]
    verified = content["verification"]
    changes = loaded.get("differences", {})
    title = f"Backfill of {content['trial']}, {content['start']} to {content['end']}"
    sections = [
        f"<h1>{_text(title)}</h1><p>{content['days']} days, run {_text(content['run_id'])}, {_text(content['at'])}</p>",
        "<h2>Rows</h2>",
        _table(
            ["", "rows"],
            [
                ("due, from the vital signs", history.get("expected_rows", 0)),
                ("stored", loaded.get("rows", 0)),
                ("before", changes.get("rows_before", 0)),
                ("added", changes.get("added_rows", 0)),
                ("changed", changes.get("changed_rows", 0)),
                ("removed", changes.get("removed_rows", 0)),
                ("days with a difference", changes.get("changed_days", 0)),
            ],
        ),
        "<h2>Records</h2>",
        _table(
            ["table", "in range", "before"],
            [
                (domain, count, history.get("records_before", {}).get(domain, 0))
                for domain, count in history.get("records_in_range", {}).items()
            ],
        ),
        "<h2>Before and after</h2>",
        "<p>Nothing changed.</p>"
        if not changes.get("changed_days")
        else _table(
            ["feature", "changed", "emptied", "filled", "largest difference"],
            [
                (change["feature"], change["changed"], change["emptied"], change["filled"], change["max_difference"])
                for change in changes.get("features", [])
            ],
        ),
        "<h2>Verified</h2>",
        _table(["", ""], [(name.replace("_", " "), value) for name, value in verified.items()]),
        "<h2>Seconds</h2>",
        _table(["step", "seconds"], content["seconds"].items()),
    ]
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{_text(title)}</title><style>{_STYLE}</style>"
        f"<body>{''.join(sections)}</body></html>"
    )
    return page.encode()


def _table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{_text(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return html.escape(str(value))
