"""Memory, descriptors, connections and latency over many runs in a row, as a Markdown table and a plot.

    python -m benchmarks.endurance [--runs 2000] [--write docs/benchmarks/endurance.md]

One run of three empty in-process steps after the other is started by the warm run launcher, on an embedded PostgreSQL
of its own, with pooled storage and direct compute logs. After each run it is noted what the processes that stay have:
the parent, its version (which forks the runs), and this process, which launches them as the web server or the daemon
does. The exit status is 1 when the last hundred runs differ from the first by more than the table allows; what else the
machine has to do shows in the latency.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg2

from clinical_orchestration.execution.compute_logs import DirectComputeLogManager
from clinical_orchestration.stack.testing import embedded
from clinical_orchestration_tests.databases import new_database
from clinical_orchestration_tests.execution.warm_world import World, wait_for, warm_world

JOB = "three_steps"
COMPARED = 100
WARMING = 10
SPARES = 2
TIMES = """
SELECT extract(epoch FROM min(timestamp) FILTER (WHERE dagster_event_type = 'STEP_START') AT TIME ZONE 'UTC'),
       extract(epoch FROM min(timestamp) FILTER (WHERE dagster_event_type = 'PIPELINE_SUCCESS') AT TIME ZONE 'UTC')
FROM event_logs WHERE run_id = %s"""
CONNECTIONS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"""


@dataclass(frozen=True)
class Figure:
    """One thing that is noted after each run; `most` is what the last hundred may be beyond the first."""

    title: str
    unit: str
    most: float
    relative: bool = False


MEMORY = {who: Figure(f"resident memory of {title}", "MB", 0.05, relative=True) for who, title in (
    ("parent", "the parent"), ("version", "its version"), ("own", "the process that launches"),
)}  # fmt: skip
FILES = {who: Figure(f"descriptors of {title}", "", 1) for who, title in (
    ("parent", "the parent"), ("version", "its version"), ("own", "the process that launches"),
)}  # fmt: skip
PROCESSES = Figure("processes", "", 0)
OPEN = Figure("connections to the database", "", 1)  # a child that waits may have yet to connect
FIRST = Figure("launch to first step", "ms", 0.3, relative=True)
DONE = Figure("launch to success", "ms", 0.3, relative=True)
FIGURES = (*MEMORY.values(), *FILES.values(), PROCESSES, OPEN, FIRST, DONE)
Noted = dict[Figure, list[float]]


@contextmanager
def cursor_of(database: str) -> Iterator[Any]:
    connection = psycopg2.connect(database)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()


def one_run(world: World, cursor: Any) -> tuple[float, float]:
    """Execute a run; return the milliseconds to its first step and to its success."""
    run = world.create(JOB)
    assert world.context is not None
    workspace = world.context.create_request_context()
    began = time.time()
    world.instance.launch_run(run.run_id, workspace)
    wait_for(lambda: world.meeting.workers.of(run.run_id) is None, 60, lambda: world.log)
    cursor.execute(TIMES, (run.run_id,))
    times = cursor.fetchone()
    if None in times:
        raise SystemExit(f"a run did not succeed: {world.messages(run.run_id)}")
    first, done = times
    return (float(first) - began) * 1000, (float(done) - began) * 1000


def endure(world: World, database: str, runs: int) -> Noted:
    """Execute runs one after the other and note what there is after each."""
    noted: Noted = {figure: [] for figure in FIGURES}
    world.start_parent()
    assert world.parent is not None
    processes = {
        "parent": psutil.Process(world.parent.pid),
        "version": psutil.Process((world.ping() or {})["pid"]),
        "own": psutil.Process(),
    }
    with cursor_of(database) as cursor:
        for number in range(WARMING + runs):
            first, done = one_run(world, cursor)
            wait_for(lambda: _spares(world) == SPARES, 10, lambda: world.log)
            if number < WARMING:
                continue
            for who, process in processes.items():
                noted[MEMORY[who]].append(process.memory_info().rss / 1e6)
                noted[FILES[who]].append(process.num_fds())
            cursor.execute(CONNECTIONS)
            noted[OPEN].append(cursor.fetchone()[0])
            noted[PROCESSES].append(len(processes["parent"].children(recursive=True)))
            noted[FIRST].append(first)
            noted[DONE].append(done)
            if (number + 1 - WARMING) % 100 == 0:
                print(f"{number + 1 - WARMING} runs", file=sys.stderr, flush=True)
    return noted


def _spares(world: World) -> int:
    return int((world.ping() or {"spares": -1})["spares"])


def compare(noted: Noted) -> tuple[list[str], list[str]]:
    """Return the rows of the table, and what grew by more than it may."""
    rows, grown = [], []
    for figure, values in noted.items():
        first, last = (statistics.median(part) for part in (values[:COMPARED], values[-COMPARED:]))
        allowed = figure.most * first if figure.relative else figure.most
        if last > first + allowed:
            grown.append(f"{figure.title}: {first:.1f} {figure.unit}, at the end {last:.1f}")
        unit = f", {figure.unit}" if figure.unit else ""
        most = f"+{figure.most:.0%}" if figure.relative else f"+{figure.most:g}"
        digits = 1 if figure.relative else 0
        cells = (first, last, min(values), max(values))
        rows.append(f"| {figure.title}{unit} | {' | '.join(f'{cell:.{digits}f}' for cell in cells)} | {most} |")
    return rows, grown


def picture(noted: Noted) -> bytes:
    """Return the plot: memory, descriptors and connections, latency, each over the runs."""
    from clinical_orchestration.transforms.plotting import BLUE, GREY, ORANGE, RED, png

    panels: Sequence[tuple[str, Sequence[Figure]]] = (
        ("Memory, MB", tuple(MEMORY.values())),
        ("Descriptors, processes, connections", (*FILES.values(), PROCESSES, OPEN)),
        ("Latency, ms", (FIRST, DONE)),
    )

    def draw(axes: Any) -> None:
        for place, (title, figures) in zip(axes, panels, strict=True):
            for figure, colour in zip(figures, (BLUE, ORANGE, RED, GREY, "#4c9a5f"), strict=False):
                place.plot(noted[figure], ".", markersize=1.5, color=colour, label=figure.title)
            place.set_title(title)
            place.set_ylim(bottom=0)
            place.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, markerscale=6)
        # a machine that others use too has outliers, which would make a line of all the rest
        axes[-1].set_ylim(0, 2 * statistics.quantiles(noted[DONE], n=100)[98])
        axes[-1].set_xlabel("run")

    return png(draw, (10, 8), rows=len(panels))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000, help="runs after the first ten (default 2000)")
    parser.add_argument("--write", type=Path, help="the page; the plot goes beside it")
    options = parser.parse_args()
    if options.runs < 2 * COMPARED:
        parser.error(f"--runs: the first {COMPARED} are compared with the last {COMPARED}")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="clinical-endurance-") as folder:
        home = Path(folder)
        if os.geteuid() == 0:
            home.chmod(0o711)  # PostgreSQL runs as another user then
        logs = {
            "module": DirectComputeLogManager.__module__,
            "class": DirectComputeLogManager.__name__,
            "config": {"base_dir": str(home / "logs")},
        }
        with embedded(home / "postgres", "postgres") as environment:
            database = new_database(environment["POSTGRES_URL"], "endurance")
            with warm_world(database, home / "dagster", settings={"compute_logs": logs}) as world:
                began = time.monotonic()
                noted = endure(world, database, options.runs)
                seconds = time.monotonic() - began
    rows, grown = compare(noted)
    lines = [
        "# Endurance",
        "",
        f"{options.runs:,} runs in a row by the warm run launcher, each of three empty in-process steps, in "
        f"{seconds:.0f} s on {os.cpu_count()} cores; medians of the first and of the last {COMPARED} runs. Load of the "
        f"machine before: {load:.1f}, at the end: {os.getloadavg()[0]:.1f}.",
        "",
        f"| | first {COMPARED} | last {COMPARED} | least | most | allowed |",
        "|---|--:|--:|--:|--:|--:|",
        *rows,
        "",
        *[f"Grown: {one}." for one in grown],
        *(["![Memory, descriptors and latency over the runs](endurance.png)", ""] if options.write else []),
        "Run by `python -m benchmarks.endurance`.",
    ]
    page = "\n".join(lines) + "\n"
    sys.stdout.write(page)
    if options.write:
        options.write.write_text(page.replace("endurance.png", f"{options.write.stem}.png"), encoding="utf-8")
        options.write.with_suffix(".png").write_bytes(picture(noted))
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
