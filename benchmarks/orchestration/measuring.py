"""What is measured on the sides, round by round and by the clock."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.orchestration import MANY_STEPS, SCHEDULE, report, say
from benchmarks.orchestration.airflow import Airflow
from benchmarks.orchestration.deployments import Deployment, Times, parts_of
from benchmarks.orchestration.report import Figures

BURST, STOCK_BURST = 50, 8
SUBMITTERS = 8
REPEATS = 3
"""How often a round has a run that takes less than seconds."""

PAUSE_SECONDS = 1.0
"""Between two measurements, for what the one before left to do."""

SETTLE_SECONDS = 15
AFTER_TICK_SECONDS = 10
CLEAR_OF_THE_HOUR = 120
"""Seconds before an even hour in which the measurement by the clock does not begin: pipelines are due then."""

_EVEN_HOUR = 7200


@dataclass
class Sides:
    """The deployments that are compared."""

    ours: Deployment
    queued: Deployment
    stock: Deployment
    airflow: Airflow | None


def rounds(figures: Figures, sides: Sides, number: int, parts: set[str]) -> None:
    """Measure what is measured in turns."""
    for job in ("pipeline_in_process", "pipeline_forked"):  # everything has been used once, on all sides
        for side in (sides.ours, sides.queued):
            side.run(job)
    sides.stock.run("pipeline_in_process")
    if sides.airflow is not None and "starts" in parts:
        sides.airflow.run()
    for this in range(number):
        say(f"round {this + 1} of {number}")
        if "starts" in parts:
            starts(figures, sides)
        if "burst" in parts:
            bursts(figures, sides)
        if "steps" in parts and this == 0:
            steps(figures, sides)


def starts(figures: Figures, sides: Sides) -> None:
    """Measure a run of twelve empty tasks on each side."""
    turns: list[tuple[str, Callable[[], Times], int]] = [
        (report.IN_PROCESS, lambda: sides.ours.run("pipeline_in_process"), REPEATS),
        (report.FORKED, lambda: sides.ours.run("pipeline_forked"), REPEATS),
        (report.QUEUED_IN_PROCESS, lambda: sides.queued.run("pipeline_in_process"), REPEATS),
        (report.QUEUED, lambda: sides.queued.run("pipeline_forked"), REPEATS),
        (report.STOCK, lambda: sides.stock.run("pipeline_in_process"), 1),
        (report.STOCK_MULTI, lambda: sides.stock.run("pipeline_multiprocess"), 1),
    ]
    if sides.airflow is not None:
        turns.append((report.AIRFLOW, sides.airflow.run, 1))
    ends = {}
    for side, run, repeats in turns:
        taken = []
        for _ in range(repeats):
            time.sleep(PAUSE_SECONDS)
            taken.append(run())
        figures.add(report.FIRST, side, *(times.first for times in taken))
        figures.add(report.END, side, *(times.end for times in taken))
        ends[side] = statistics.median(times.end for times in taken)
        say(f"  {side}: {ends[side]:.2f} s")
    for side in (report.STOCK_MULTI, report.AIRFLOW):
        if side in ends:
            figures.add_ratio(side, ends[report.FORKED], ends[side])


def bursts(figures: Figures, sides: Sides) -> None:
    """Measure many small runs, submitted at once over several connections."""
    for side, deployment, runs in (
        (report.IN_PROCESS, sides.ours, BURST),
        (report.QUEUED_IN_PROCESS, sides.queued, BURST),
        (report.STOCK, sides.stock, STOCK_BURST),
    ):
        time.sleep(PAUSE_SECONDS)
        with ThreadPoolExecutor(SUBMITTERS) as submitters:
            launched = list(submitters.map(deployment.launch, ["three_in_process"] * runs))
        deployment.wait([run_id for run_id, _ in launched])
        took = max(deployment.times(run_id)[1] for run_id, _ in launched) - min(began for _, began in launched)
        figures.add(report.BURST, side, runs / took)
        say(f"  {side}: {runs / took:.1f} runs/s")


def steps(figures: Figures, sides: Sides) -> None:
    """Measure one run of many steps, which takes a minute where it is slow."""
    for side, deployment, job in (
        (report.IN_PROCESS, sides.ours, "many_in_process"),
        (report.FORKED, sides.ours, "many_forked"),
        (report.STOCK, sides.stock, "many_in_process"),
    ):
        time.sleep(PAUSE_SECONDS)
        took = deployment.run(job).end
        figures.add(report.MANY, side, MANY_STEPS / took)
        say(f"  {side}: {MANY_STEPS} steps in {took:.1f} s")


def by_the_clock(figures: Figures, sides: Sides, folder: Path, ticks: int, parts: set[str]) -> None:
    """Measure the delay of schedules, and meanwhile what idle daemons and the warm parent take."""
    left = _EVEN_HOUR - time.time() % _EVEN_HOUR
    if left < CLEAR_OF_THE_HOUR + 60 * ticks:
        say(f"waiting {left:.0f} s for the hour to pass: pipelines of the platform are due then")
        time.sleep(left + SETTLE_SECONDS)
    with contextlib.ExitStack() as stack:
        daemons = {}
        if "idle" in parts:
            from clinical_orchestration.stack.testing import embedded

            say("starting the idle stacks")
            for side, own in ((report.OURS_DAEMON, True), (report.STOCK_DAEMON, False)):
                home = folder / f"idle-{'ours' if own else 'stock'}"
                launcher = ("run_launcher",) if own else ()
                with parts_of(own):
                    stack.enter_context(embedded(home, "s3", "redis", "daemon", *launcher))
                daemons[side] = _only(
                    processes(home, "dagster._daemon", "clinical_orchestration.execution.coordinator")
                )
            time.sleep(SETTLE_SECONDS)
        began, before = time.monotonic(), {side: _cpu_seconds(daemon) for side, daemon in daemons.items()}
        if "schedule" in parts:
            _ticks(figures, sides, ticks)
        if daemons:
            time.sleep(max(0.0, began + 60 - time.monotonic()))
            lasted = time.monotonic() - began
            for side, daemon in daemons.items():
                figures.add(report.IDLE, side, (_cpu_seconds(daemon) - before[side]) / lasted * 100)
            names = ("clinical_orchestration.execution.parent", "clinical_orchestration.execution.version")
            own_memory = sum(one.memory_full_info().pss for one in processes(folder / "idle-ours", *names))
            figures.add(report.MEMORY, report.OURS_DAEMON, own_memory / 1e6)


def _ticks(figures: Figures, sides: Sides, ticks: int) -> None:
    """Let a schedule tick on both sides, in the same minutes."""
    now = time.time()
    last = (now + 5) // 60 * 60 + 60 * ticks
    deployments = {report.QUEUED_IN_PROCESS: sides.queued, report.STOCK: sides.stock}
    running = [(deployment, deployment.start_schedule(SCHEDULE)) for deployment in deployments.values()]
    say(f"ticks of schedules: {ticks} minutes")
    time.sleep(last + AFTER_TICK_SECONDS - now)
    for deployment, identity in running:
        deployment.stop_schedule(identity)
    for side, deployment in deployments.items():
        for created, started in deployment.ticks():
            figures.add(report.CREATED, side, created)
            figures.add(report.TICKED, side, started)


def processes(home: Path, *modules: str) -> list[psutil.Process]:
    """Return the processes below this one that execute modules for a stack."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.environ().get("CLINICAL_HOME") == str(home) and set(modules) & set(process.cmdline()):
                found.append(process)
    return found


def _only(found: list[psutil.Process]) -> psutil.Process:
    [process] = found
    return process


def _cpu_seconds(process: psutil.Process) -> float:
    taken = process.cpu_times()
    return float(taken.user + taken.system)
