"""The table of operations in the docs: written from what the official client saw, read by a test."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from clinical_orchestration_tests.airflow.live import ROOT

TABLE = ROOT / "docs" / "airflow-operations.md"

NOTES = {
    "test_connection": "Switched off, as in the Airflow deployment: 403.",
    "get_mapped_task_instances": "No task is mapped: Airflow's 404 for a task that is not.",
    "get_upstream_dataset_events": "No run is started by a dataset: the list is empty.",
    "delete_dag": "Deletes the runs; the DAG is there again while its code is, as in Airflow.",
    "get_plugins": "There are none.",
    "post_role": "A name that is taken is 400, as in Airflow's document; its server answers 409.",
}
_QUEUED = "No DAG waits for a dataset, so nothing is queued: Airflow's 404."
_MAPPED = "`-1` is the only index."

_HEAD = """# Operations of the stable API

Written by the test run in which `apache-airflow-client` 2.10.0 drove each of them against the page, over real runs
(`CLINICAL_WRITE_OPERATIONS=1 pytest clinical_orchestration_tests/airflow/test_clients.py -k official`); a test compares
the table with the API. The last column says how the operation was seen to answer.

| Operation | Method | Path | Status | Notes | Seen |
|---|---|---|---|---|---|
"""


class Row(NamedTuple):
    """One line of the table."""

    name: str
    method: str
    path: str
    status: str
    notes: str
    seen: str


def written(operations: Iterable[Mapping[str, Any]]) -> str:
    """Return the document, from the report of the official client."""
    rows = []
    for one in sorted(operations, key=lambda one: (one["path"], one["method"])):
        name = one["name"]
        note = NOTES.get(name, _QUEUED if "queued_event" in name else _MAPPED if "_mapped_" in name else "")
        status = "done" if one["answers"] and all(int(code) < 500 for code in one["answers"]) else "missing"
        seen = " ".join(sorted(one["answers"]))
        rows.append(f"| {name} | {one['method']} | `{one['path']}` | {status} | {note} | {seen} |")
    return _HEAD + "\n".join(rows) + "\n"


def parsed(text: str) -> list[Row]:
    """Return the lines of the table."""
    lines = [line for line in text.splitlines() if re.match(r"\| [a-z_]+ \|", line)]
    return [Row(*(cell.strip().strip("`") for cell in line.strip("|").split("|"))) for line in lines]
