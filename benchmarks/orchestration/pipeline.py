"""`clinical_data_pipeline` itself, before and after: whole stacks with Dagster's parts and with the platform's."""

from __future__ import annotations

import os
import shlex
import statistics
import subprocess
from contextlib import closing
from pathlib import Path

from benchmarks.orchestration import ROOT, say
from benchmarks.orchestration.deployments import TIMES, parts_of
from benchmarks.orchestration.report import digits
from clinical_orchestration.stack.ports import Reservations
from clinical_orchestration.stack.settings import PUBLIC_PORTS

MANAGER = str(ROOT / "pipeline-manager.sh")
JOB = "clinical_data_pipeline"
NEWEST = """
SELECT run_id, extract(epoch FROM create_timestamp AT TIME ZONE current_setting('TimeZone')) FROM runs
WHERE pipeline_name = %s ORDER BY id DESC LIMIT 1"""
SIDES = (("before: Dagster's launcher, queue, storage and logs", False), ("after: the platform's", True))
PARTS = ("launch to first step", "first step to end", "launch to end")


def measure(folder: Path, rounds: int) -> str:
    """Start one stack after the other, execute the pipeline on it, and return the page.

    Both have all data after their first runs, which are not measured; what is measured then finds nothing new.
    """
    taken: dict[str, dict[str, list[float]]] = {title: {part: [] for part in PARTS} for title, _ in SIDES}
    stacks = []
    try:
        for title, own in SIDES:
            stack = _Stack(folder / ("after" if own else "before"), own)
            stacks.append(stack)
            say(f"{title}: starting the stack, and the first run")
            stack.manage("--start")
            stack.execute()
        for this in range(rounds):
            for (title, _), stack in zip(SIDES, stacks, strict=True):
                waited, worked = stack.execute()
                for part, seconds in zip(PARTS, (waited, worked, waited + worked), strict=True):
                    taken[title][part].append(seconds)
                say(f"round {this + 1} of {rounds}, {title}: {waited:.2f} s, then {worked:.1f} s")
    finally:
        for stack in stacks:
            stack.manage("--stop")
    return document(taken, rounds)


def document(taken: dict[str, dict[str, list[float]]], rounds: int) -> str:
    """Return the page of seconds by side and part."""
    lines = ["| seconds | | minimum | median | maximum |", "|---|---|--:|--:|--:|"]
    for part in PARTS:
        for title, parts in taken.items():
            values = parts[part]
            numbers = [digits(value) for value in (min(values), statistics.median(values), max(values))]
            lines.append(f"| {part} | {title} | {' | '.join(numbers)} |")
    how = (
        f"`python -m benchmarks.orchestration --pipeline --rounds {rounds}`, {os.cpu_count()} cores: two whole stacks, "
        "both running, `clinical_data_pipeline` in turns on the CDISC pilot with no new data; from the creation of the "
        f"run to the start of its first step and to its end. {rounds} rounds after a first run that had everything to "
        "do. The bodies of the steps (Spark, MLflow) are the same on both sides."
    )
    return "\n\n".join(["# How fast clinical_data_pipeline starts", how, "\n".join(lines)]) + "\n"


class _Stack:
    """A whole stack with a folder and ports of its own."""

    def __init__(self, home: Path, own: bool) -> None:
        self._own = own
        self._ports = Reservations()
        ports = {f"CLINICAL_PORT_{name.upper()}": str(self._ports.pick()) for name in PUBLIC_PORTS}
        with parts_of(own):
            self._environment = {**os.environ, **ports, "CLINICAL_HOME": str(home)}

    def manage(self, *arguments: str) -> str:
        """Call the manager; return what it prints."""
        done = subprocess.run([MANAGER, *arguments], env=self._environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        return done.stdout

    def execute(self) -> tuple[float, float]:
        """Execute the pipeline; return the seconds from launch to first step and from there to the end."""
        import psycopg2

        self.manage("--run", JOB)
        lines = [shlex.split(line)[-1].partition("=") for line in self.manage("--env").splitlines() if line]
        [url] = [value for name, _, value in lines if name == "POSTGRES_URL"]
        with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
            cursor.execute(NEWEST, (JOB,))
            run_id, created = cursor.fetchone()
            cursor.execute(TIMES, (run_id,))
            first, end = cursor.fetchone()
        return float(first) - float(created), float(end) - float(first)
