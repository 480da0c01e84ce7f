"""Runs one job of :class:`clinical_orchestration.stores.spark_jobs.ProcessJobs`, as a process of its own.

``python -m clinical_orchestration.stores.spark_job_runner FOLDER``: reads what was asked from the folder, runs it, and
leaves how it ended there. A SIGTERM ends the job: what Spark still computes for it is interrupted.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from clinical_orchestration.stores.spark_jobs import JOB_FILE, STATE_FILE, JobState, _read, _write


class JobKilledError(BaseException):
    """The job was asked to end. No Exception: a script's ``except Exception`` must not swallow it."""


def main(folder: str) -> int:
    """Run the job of a folder; return the exit status of this process."""
    place = Path(folder)
    job = _read(place / JOB_FILE)
    state: dict[str, Any] = {"state": JobState.RUNNING, "started_at": datetime.now(UTC).isoformat()}

    def end(reached: JobState, message: str = "") -> int:
        ended = datetime.now(UTC).isoformat()
        _write(place / STATE_FILE, {**state, "state": reached, "message": message[:500], "ended_at": ended})
        return 0 if reached is JobState.FINISHED else 1

    def terminate(number: int, frame: FrameType | None) -> None:
        raise JobKilledError

    signal.signal(signal.SIGTERM, terminate)
    _write(place / STATE_FILE, state)
    try:
        if job["command"] is not None:
            status = _run_command(job["command"])
            if status:
                return end(JobState.FAILED, f"SparkSubmit ended with status {status}; see the log")
        else:
            _run_script(job["application"], job["arguments"], job["properties"])
    except JobKilledError:
        return end(JobState.KILLED)
    except SystemExit as leaving:
        if leaving.code not in (None, 0):
            return end(JobState.FAILED, f"the script ended with status {leaving.code}")
    except BaseException as error:
        traceback.print_exc()
        first = str(error).strip().splitlines()[:1]
        return end(JobState.FAILED, f"{type(error).__name__}: {first[0] if first else ''}")
    return end(JobState.FINISHED)


def _run_command(command: Sequence[str]) -> int:
    process = subprocess.Popen(list(command), stdin=subprocess.DEVNULL)
    try:
        return process.wait()
    except JobKilledError:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(8)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise


def _run_script(application: str, arguments: Sequence[str], properties: Mapping[str, str]) -> None:
    from clinical_orchestration.stores.spark import SparkSessions

    entry = getattr(_load(application), "main", None)
    if not callable(entry):
        raise AttributeError(f"{application} has no function main(spark); Spark Connect runs that one")
    takes = [
        parameter
        for parameter in inspect.signature(entry).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    with_arguments = len(takes) > 1 or any(parameter.kind is parameter.VAR_POSITIONAL for parameter in takes)
    sessions = SparkSessions()
    spark = sessions.get()
    try:
        for name, value in properties.items():
            spark.conf.set(name, value)
        entry(spark, list(arguments)) if with_arguments else entry(spark)
    except BaseException:
        with contextlib.suppress(Exception):
            spark.interruptAll()
        raise
    finally:
        with contextlib.suppress(Exception):
            sessions.close()


def _load(application: str) -> ModuleType:
    path = Path(application)
    if not path.is_file():
        return importlib.import_module(application)
    sys.path.insert(0, str(path.parent))  # as `python script.py` does
    spec = importlib.util.spec_from_file_location("submitted_application", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{application} is no Python script")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    ended = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended)  # gRPC's threads of a server that is gone would hold the process for minutes
