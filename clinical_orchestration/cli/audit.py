"""``clinical audit``: verify, list and export the audit trail."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clinical_orchestration.cli import deployment
from clinical_orchestration.cli.groups.dag_words import moment
from clinical_orchestration.cli.output import write_private
from clinical_orchestration.platform.database import StoreUnavailableError
from clinical_orchestration.stack.console import Display, UserError

if TYPE_CHECKING:
    from clinical_orchestration.audit.chain import Row
    from clinical_orchestration.audit.trail import Filter

LISTED = 50
_COLUMNS = ("seq", "at", "event", "who", "origin", "address", "dag_id", "task_id", "run_id")


def add_commands(add: Any) -> None:
    """Add the commands; `add` takes a name, a handler and a help text, and returns the parser."""
    verify = add("verify", _verify, "check every row; fails and names the first that was changed, removed or reordered")
    verify.add_argument(
        "--unsigned-up-to", type=int, default=0, metavar="ROW",
        help="rows up to this one were recorded before CLINICAL_FERNET_KEY was set",
    )  # fmt: skip
    listed = add("list", _list, "newest rows")
    listed.add_argument("-n", "--limit", type=int, default=LISTED, metavar="N", help="rows (default %(default)s)")
    export = add("export", _export, "all rows with all columns, oldest first")
    export.add_argument("--format", choices=("csv", "json"), default="csv")
    export.add_argument("--output", type=Path, metavar="FILE", help="for its owner only (default: standard output)")
    for parser in (listed, export):
        parser.add_argument("--event", help="rows of this event only")
        parser.add_argument("--user", help="rows of this user only")
        parser.add_argument("--dag-id", help="rows of this DAG only")
        parser.add_argument("--after", type=moment, metavar="TIME", help="rows after this moment only, UTC")
        parser.add_argument("--before", type=moment, metavar="TIME", help="rows before this moment only, UTC")


def _filter(values: argparse.Namespace) -> Filter:
    from clinical_orchestration.audit.trail import Filter

    return Filter(
        event=values.event, who=values.user, dag_id=values.dag_id, after=values.after, before=values.before
    )  # fmt: skip


def _verify(values: argparse.Namespace, display: Display) -> tuple[dict[str, Any], int]:
    report = deployment.trail().verify(unsigned_up_to=values.unsigned_up_to)
    verdict = report.verdict
    if not values.json:
        if verdict.finding is None:
            display.write(f"{verdict.rows} rows, {verdict.signed} with a checked signature: nothing was changed")
        else:
            display.write(f"row {verdict.finding.seq}: {verdict.finding.what}", "bold red")
            display.write(f"{verdict.rows} rows before it are as they were recorded")
        for note in report.notes:
            display.write(f"note: {note}")
    finding = None if verdict.finding is None else {"row": verdict.finding.seq, "what": verdict.finding.what}
    counts = {"rows": verdict.rows, "signed": verdict.signed, "anchored": verdict.anchored}
    return {**counts, "finding": finding, "notes": list(report.notes)}, 0 if report.ok else 1


def _list(values: argparse.Namespace, display: Display) -> tuple[dict[str, Any], int]:
    rows, total = deployment.trail().page(_filter(values), "-event_log_id", max(1, values.limit))
    if not values.json:
        shown = [[_cell(getattr(row, name)) for name in _COLUMNS] for row in rows]
        display.table(list(_COLUMNS), shown)
        display.write(f"{len(rows)} of {total} rows")
    return {"rows": [_plain(row) for row in rows], "total": total}, 0


def _export(values: argparse.Namespace, display: Display) -> tuple[dict[str, Any], int]:
    if values.json and values.output is None:
        raise UserError(
            "nothing was exported", "--json and the export would both go to standard output", "give --output FILE", 2
        )
    count = 0

    def counted() -> Iterator[Row]:
        nonlocal count
        for row in deployment.trail().rows(_filter(values)):
            count += 1
            yield row

    parts = _as_csv(counted()) if values.format == "csv" else _as_json(counted())
    if values.output is None:
        sys.stdout.writelines(parts)
        sys.stdout.flush()
        return {}, 0
    try:
        write_private(values.output, parts)
    except StoreUnavailableError:
        raise
    except OSError as error:
        raise UserError("nothing was exported", f"{values.output} cannot be written: {error.strerror}") from None
    if not values.json:
        display.write(f"{count} rows in {values.output}")
    return {"rows": count, "file": str(values.output)}, 0


def _plain(row: Row) -> dict[str, Any]:
    return vars(row) | {"at": row.at.astimezone(UTC).isoformat(timespec="microseconds")}


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:%Y-%m-%d %H:%M:%S}" if hasattr(value, "strftime") else str(value)


def _as_csv(rows: Iterable[Row]) -> Iterator[str]:
    from clinical_orchestration.audit.chain import STORED

    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, STORED, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(_plain(row))
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()
    yield buffer.getvalue()


def _as_json(rows: Iterable[Row]) -> Iterator[str]:
    before = "["
    for row in rows:
        yield f"{before}\n{json.dumps(_plain(row))}"
        before = ","
    yield "[]\n" if before == "[" else "\n]\n"
