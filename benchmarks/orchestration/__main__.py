"""Speed of starting and executing runs: this platform, stock Dagster and Airflow side by side, as a Markdown table.

    python -m benchmarks.orchestration [--with-airflow] [--rounds 3] [--write docs/benchmarks/orchestration.md]
    python -m benchmarks.orchestration --pipeline [--rounds 3] [--write docs/benchmarks/pipeline.md]

Each side is a deployment of its own: processes, folder, `dagster.yaml` and database, all in one embedded PostgreSQL.
Runs are triggered over HTTP; times are those of the runs' own events. In every round the sides take turns, so that a
busy machine slows all of them alike. With `--write`, a plot is drawn beside the page.

`--with-airflow` installs Airflow into an environment of its own in the user's cache, once.
`--pipeline` measures `clinical_data_pipeline` itself instead, on whole stacks with Dagster's parts and with ours.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from benchmarks.orchestration import ROOT, measuring, pipeline, report, say
from benchmarks.orchestration.airflow import VERSION, Airflow, install
from benchmarks.orchestration.deployments import Deployment
from benchmarks.orchestration.report import Figures

PARTS = ("starts", "burst", "steps", "schedule", "idle")


def compile_bytecode(python: Path | None) -> None:
    """Compile what the sides import; set-up has done so where nothing prevented it."""
    say("compiling bytecode")
    for folder in (ROOT / "clinical_orchestration", ROOT / "benchmarks", Path(sysconfig.get_paths()["purelib"])):
        compileall.compile_dir(str(folder), quiet=2, workers=0)
    if python is not None:
        where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        folder = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
        command = [str(python), "-m", "compileall", "-qq", "-j", "0", folder]
        subprocess.run(command, check=False)  # some packages carry files that are none of this Python


def about(options: argparse.Namespace, load: float, airflow: str) -> list[str]:
    """Return the paragraphs that say how it was measured."""
    others = f" and Airflow {VERSION} (packages by {airflow})" if airflow else ""
    return [
        f"`python -m benchmarks.orchestration{' --with-airflow' if airflow else ''} --rounds {options.rounds}` on "
        f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, everything on one machine and one PostgreSQL, "
        f"bytecode compiled on all sides. Load of the machine over the minute before: {load:.1f}.",
        "Ours is this platform's launcher, storage and compute logs, without the run queue; *through the queue* is the "
        "whole of it as it comes, with the prompt run coordinator and its daemon. Beside it: stock Dagster of the same "
        f"version on the same graph, without the run queue, which would add its interval{others}. Dagster is triggered "
        "by GraphQL, Airflow by REST with a password; times are those of the run's own events or rows. The sides took "
        "turns in every round, but for one run of 1,000 steps a side, and the ticks of schedules, which were the same "
        f"minutes. Stock Dagster has {measuring.STOCK_BURST} runs at once instead of {measuring.BURST}: each is a "
        "process that imports everything, and memory bounds them.",
        "The idle daemons are those of whole stacks' levels with the platform's own schedules and sensors, on S3, "
        "Redis and PostgreSQL; the warm parent has the platform's code loaded, and its memory is the proportional set "
        "size of its processes, those that wait for a run included.",
    ]


def measure(options: argparse.Namespace, folder: Path) -> str:
    """Measure what the options say; return the page, and draw the plot."""
    from clinical_orchestration.stack.testing import embedded
    from clinical_orchestration_tests.databases import new_database

    python, versions = install(options.airflow_constraints) if options.with_airflow else (None, "")
    compile_bytecode(python)
    load = os.getloadavg()[0]
    figures = Figures()
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(embedded(folder / "postgres", "postgres"))["POSTGRES_URL"]

        def deployment(name: str, *, own: bool, queued: bool, daemon: bool) -> Deployment:
            made = Deployment(name, folder / name, new_database(url, name), own=own, queued=queued, daemon=daemon)
            stack.callback(made.stop)
            made.start()
            return made

        say("starting the deployments")
        sides = measuring.Sides(
            ours=deployment("ours", own=True, queued=False, daemon=False),
            queued=deployment("queued", own=True, queued=True, daemon=True),
            stock=deployment("stock", own=False, queued=False, daemon=True),
            airflow=None,
        )
        dagsters = (sides.ours, sides.queued, sides.stock)
        for one in dagsters:
            one.serve()
        for one in dagsters:
            one.wait_ready()
        if python is not None:
            say("starting Airflow")
            sides.airflow = Airflow(python, folder / "airflow", new_database(url, "airflow"))
            stack.callback(sides.airflow.stop)
            sides.airflow.start()
            sides.airflow.wait_ready()
        parts = set(options.parts)
        if parts & {"starts", "burst", "steps"}:
            measuring.rounds(figures, sides, options.rounds, parts)
        if sides.airflow is not None:
            sides.airflow.stop()  # what follows is measured without it
        if parts & {"schedule", "idle"}:
            measuring.by_the_clock(figures, sides, folder, options.ticks, parts)
    picture = ""
    if options.write:
        picture = f"{options.write.stem}.svg"
        if "starts" in parts:
            report.plot(figures, options.write.with_suffix(".svg"))
    return report.document(figures, about(options, load, versions), picture if "starts" in parts else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.orchestration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds in which the sides take turns (default 3)")
    parser.add_argument("--ticks", type=int, default=3, help="ticks of the schedule that are measured (default 3)")
    parser.add_argument("--with-airflow", action="store_true", help="measure Airflow too")
    parser.add_argument("--airflow-constraints", default="", metavar="FILE_OR_URL", help="instead of the published")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured (default: all)")
    parser.add_argument("--pipeline", action="store_true", help="measure clinical_data_pipeline before and after")
    parser.add_argument("--write", type=Path, help="the page; the plot goes beside it")
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # whatever was started is ended on the way out
    with tempfile.TemporaryDirectory(prefix="clinical-orchestration-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL runs as another user when root measures
        text = pipeline.measure(folder, options.rounds) if options.pipeline else measure(options, folder)
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
