"""The monitoring report: a page of its own, and Evidently's view of the drift, both as self-contained HTML."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from clinical_orchestration.monitoring.drift import Sample

EVIDENTLY_COLUMNS = 20
EVIDENTLY_ROWS = 1000
"""Evidently draws every column and row it is given; so many take it a few seconds."""

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22262b; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; font-size: .9rem } th, td { padding: .25rem .7rem; border-bottom: 1px solid #e0e3e8 }
td { text-align: right } td:first-child, th:first-child { text-align: left }
img { max-width: 100% } .good { color: #1b7f4b } .bad { color: #b3261e } .none { color: #6a7079 }
"""
_CLASSES = {"ok": "good", "stable": "good", "none": "good", "degraded": "bad", "drift": "bad", "failed": "bad"}


def evidently_report(reference: Sample, current: Sample, columns: Sequence[str], *, bound: float, seed: int = 0) -> str:
    """Return Evidently's data drift report (HTML) of at most 20 columns and 1,000 rows a side.

    Args:
        reference: rows the model was trained on.
        current: rows to compare with them.
        columns: features to show, most interesting first; those without values on a side are left out.
        bound: population stability index that Evidently shall call drift.
        seed: which rows are shown.
    """
    import pandas as pd
    from evidently import DataDefinition, Dataset, Report  # type: ignore[import-untyped]
    from evidently.presets import DataDriftPreset  # type: ignore[import-untyped]

    def usable(name: str) -> bool:
        sides = (sample.values[:, sample.names.index(name)] for sample in (reference, current) if name in sample.names)
        return [bool(np.isfinite(side).any()) for side in sides] == [True, True]

    shown = [name for name in columns if usable(name)][:EVIDENTLY_COLUMNS]
    if not shown:
        raise ValueError("no feature has values in the reference and now")
    rng = np.random.default_rng(seed)

    def dataset(sample: Sample) -> Any:
        rows = np.arange(sample.rows)
        if len(rows) > EVIDENTLY_ROWS:
            rows = np.sort(rng.choice(rows, EVIDENTLY_ROWS, replace=False))
        frame = pd.DataFrame(sample.select(shown).values[rows], columns=shown)
        return Dataset.from_pandas(frame, data_definition=DataDefinition(numerical_columns=shown))

    report = Report([DataDriftPreset(columns=shown, num_method="psi", num_threshold=bound)], include_tests=False)
    snapshot = report.run(current_data=dataset(current), reference_data=dataset(reference))
    return str(snapshot.get_html_str(as_iframe=False))


def page(
    title: str,
    at: datetime,
    verdicts: Mapping[str, tuple[str, str]],
    plots: Mapping[str, bytes | None],
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[Any]]]],
    links: Mapping[str, str],
) -> bytes:
    """Return the report of one run as a page without outside resources.

    Args:
        title: headline.
        at: the trial's present (UTC).
        verdicts: what was checked -> (status, one sentence).
        plots: caption -> PNG; None where there is nothing to draw.
        tables: caption -> (columns, rows).
        links: what -> address.
    """
    parts = [f"<h1>{_text(title)}</h1><p>As of {at:%Y-%m-%d %H:%M} UTC.</p><table>"]
    for name, (status, sentence) in verdicts.items():
        kind = _CLASSES.get(status, "none")
        parts.append(
            f"<tr><th>{_text(name)}</th><td class='{kind}'>{_text(status.replace('_', ' '))}</td>"
            f"<td style='text-align:left'>{_text(sentence)}</td></tr>"
        )
    parts.append("</table>")
    for caption, png in plots.items():
        if png is not None:
            picture = base64.b64encode(png).decode()
            parts.append(f"<h2>{_text(caption)}</h2><img alt='{_text(caption)}' src='data:image/png;base64,{picture}'>")
    for caption, (columns, rows) in tables.items():
        if rows:
            head = "".join(f"<th>{_text(column)}</th>" for column in columns)
            body = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows)
            parts.append(f"<h2>{_text(caption)}</h2><table><tr>{head}</tr>{body}</table>")
    if links:
        items = "".join(f"<li>{_text(name)}: <code>{_text(address)}</code></li>" for name, address in links.items())
        parts.append(f"<h2>More</h2><ul>{items}</ul>")
    head = f"<meta charset='utf-8'><title>{_text(title)}</title><style>{_CSS}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>".encode()


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _text(f"{value:.3g}" if isinstance(value, float) else value)
