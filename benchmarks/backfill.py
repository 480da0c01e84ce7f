"""Measure feature backfills of the whole CDISC pilot and print a Markdown table.

    python benchmarks/backfill.py [--rounds N] [--output FILE]

Figures: `feature_backfill` over every day of the trial by `pipeline-manager.sh --run` (everything is computed and
compared; nothing differs from what the pipeline has stored), and over one year and one day; the range once more as a
Dagster backfill of the asset over its partitions, with the time that Dagster takes to make the run; and what the steps
take. Everything runs in a folder of its own on ports of its own, so a running stack is left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
PORTS = ("POSTGRES", "KAFKA", "KAFKA_CONTROLLER", "REDIS", "S3", "MLFLOW", "SPARK", "SERVING", "PAGE", "GATEWAY",
         "CODE_SERVER")  # fmt: skip
ASSET = ["backfill", "patient_features"]
LAUNCH = """mutation($p: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $p) {
  ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }"""
STATUS = """query($b: String!, $f: RunsFilter) {
  partitionBackfillOrError(backfillId: $b) { ... on PartitionBackfill { status } }
  runsOrError(filter: $f) { ... on Runs { results { runId creationTime startTime endTime status } } } }"""


def manager(env: dict[str, str], *arguments: str) -> tuple[float, dict[str, Any]]:
    begin = time.perf_counter()
    result = subprocess.run(
        ["./pipeline-manager.sh", *arguments, "--json"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - begin
    if result.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{result.stdout[-3000:]}\n{result.stderr[-2000:]}")
    return seconds, json.loads(result.stdout)


def ask(page: str, query: str, variables: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(
        f"{page}/dagster/graphql",
        json={"query": query, "variables": variables},
        timeout=600,
        trust_env=False,
        auth=("admin", "admin"),
    )
    data: dict[str, Any] = answer.json()["data"]
    return data


def asset_backfill(page: str, first: date, last: date) -> tuple[float, float, int]:
    """Return seconds from the request to the end, seconds of the runs, and how many runs there were."""
    days = [(first + timedelta(days=number)).isoformat() for number in range((last - first).days + 1)]
    begin = time.perf_counter()
    params = {"assetSelection": [{"path": ASSET}], "partitionNames": days}
    backfill = ask(page, LAUNCH, {"p": params})["launchPartitionBackfill"]["backfillId"]
    wanted = {"b": backfill, "f": {"tags": [{"key": "dagster/backfill", "value": backfill}]}}
    while True:
        answer = ask(page, STATUS, wanted)
        status = answer["partitionBackfillOrError"]["status"]
        if status.startswith("COMPLETED") or status in ("FAILED", "CANCELED"):
            runs = answer["runsOrError"]["results"]
            if status != "COMPLETED_SUCCESS":
                sys.exit(f"the backfill ended as {status}")
            return time.perf_counter() - begin, sum(run["endTime"] - run["startTime"] for run in runs), len(runs)
        time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="rounds on a fresh stack each (default 1)")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args()

    rows: dict[str, list[float]] = {}
    steps: dict[str, list[float]] = {}
    facts: dict[str, Any] = {}

    def note(name: str, seconds: float) -> None:
        rows.setdefault(name, []).append(seconds)

    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="clinical-backfill-") as folder:
            env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
            env |= {f"CLINICAL_PORT_{name}": "0" for name in PORTS} | {"CLINICAL_HOME": f"{folder}/home"}
            manager(env, "--start")
            try:
                manager(env, "--run", "clinical_data_pipeline")
                _, monitored = manager(env, "--monitor-feature-pipeline")
                facts["rows"] = monitored["monitor"]["rows"]

                def run(conf: dict[str, str], env: dict[str, str] = env) -> dict[str, Any]:
                    return manager(env, "--run", "feature_backfill", "--conf", json.dumps(conf))[1]["run"]

                whole = run({})
                note("whole trial by --run, nothing changed", whole["seconds"])
                for step in whole["steps"]:
                    steps.setdefault(step["step"], []).append(step["seconds"])
                shown = next(
                    step["assets"]["backfill/history"]
                    for step in whole["steps"]
                    if "backfill/history" in step["assets"]
                )
                facts["days"], (first, last) = int(shown["days"]), shown["range"].split(" to ")
                note("one year by --run", run({"start_date": "2013-01-01", "end_date": "2013-12-31"})["seconds"])
                note("one day by --run", run({"start_date": "2013-05-08", "end_date": "2013-05-08"})["seconds"])
                _, places = manager(env, "-o")
                total, running, runs = asset_backfill(
                    places["open"]["page"].rstrip("/"), date.fromisoformat(first), date.fromisoformat(last)
                )
                facts["runs"] = runs
                note("whole trial as a Dagster backfill of the asset, request to end", total)
                note("of it the run itself", running)
            finally:
                manager(env, "--stop")
                shutil.rmtree(f"{folder}/home", ignore_errors=True)

    def figure(values: list[float]) -> str:
        return f"{statistics.median(values):.1f} s" + (f" ({min(values):.1f} to {max(values):.1f})" * (len(values) > 1))

    lines = [
        "# Feature backfill",
        "",
        f"The whole CDISC pilot: {facts['days']} days, {facts['rows']:,} feature rows; embedded stack, "
        f"{os.cpu_count()} cores, warm Spark; medians of {options.rounds} round(s), load average "
        f"{os.getloadavg()[1]:.1f} at the end. Target: the whole pilot in less than 120 s.",
        "",
        "| | seconds |",
        "|---|---|",
        *(f"| {name} | {figure(values)} |" for name, values in rows.items()),
        "",
        f"Dagster made {facts['runs']} run of the {facts['days']} partitions. Steps of the first row:",
        "",
        "| step | seconds |",
        "|---|---|",
        *(f"| `{name}` | {figure(values)} |" for name, values in steps.items()),
        "",
        "Run by `python benchmarks/backfill.py`.",
    ]
    table = "\n".join(lines) + "\n"
    sys.stdout.write(table)
    if options.output:
        options.output.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
