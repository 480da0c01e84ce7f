"""What is done once, before the first fork, so that no run has to do it again.

The code location is loaded as the code server does it. Then a run of one asset is executed here, by the same function
as all runs, in a transaction that is rolled back: afterwards the members of the instance are made, Dagster's late
imports are done and the statements of a run are compiled. Nothing that must not cross a fork is left.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dagster import (
    AssetCheckResult,
    AssetCheckSpec,
    DagsterInstance,
    Definitions,
    MaterializeResult,
    asset,
    define_asset_job,
    in_process_executor,
)
from dagster._cli.api import _execute_run_command_body, _resume_run_command_body
from dagster._core.code_pointer import ModuleCodePointer
from dagster._core.events import DagsterEventType, JobFailureData, RunFailureReason
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin, get_python_environment_entry_point
from dagster._core.storage.dagster_run import DagsterRunStatus
from dagster._core.storage.event_log.sql_event_log import SqlEventLogStorage
from dagster._core.storage.runs.sql_run_storage import SqlRunStorage
from dagster._core.storage.schedules.sql_schedule_storage import SqlScheduleStorage
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._grpc.server import LoadedRepositories
from dagster._time import datetime_from_timestamp
from dagster._utils.interrupts import capture_interrupts

from clinical_orchestration.execution.origins import code_mark, instance_mark
from clinical_orchestration.execution.steps import why_not_fork

logger = logging.getLogger("clinical_orchestration.execution")

REPORT_PAUSES = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Seconds between attempts to store how a run ended; the parent begins anew after the last."""

_JOB = "warm_up"
_ENDS = {DagsterEventType.RUN_SUCCESS, DagsterEventType.RUN_FAILURE, DagsterEventType.RUN_CANCELED}

made: list[Warm] = []
"""What :func:`warm_up` made in this process, for who wants to know what a child had to do anew."""


class UnsafeForkError(RuntimeError):
    """The loaded code left something that must not be copied into a child; the message names it."""


@asset(
    key=["clinical_orchestration", "warm_up"],
    check_specs=[AssetCheckSpec("warm", asset=["clinical_orchestration", "warm_up"])],
)
def warm_up_asset() -> MaterializeResult:  # type: ignore[type-arg]  # a parametrized one is not recognized
    """Do what the steps of runs have in common; nothing of it stays."""
    return MaterializeResult(metadata={"rows": 1}, check_results=[AssetCheckResult(passed=True)])


definitions = Definitions(assets=[warm_up_asset], jobs=[define_asset_job(_JOB, "*", executor_def=in_process_executor)])


@dataclass(frozen=True)
class Warm:
    """A loaded code location and its instance, ready to be forked.

    Attributes:
        instance: the Dagster instance; its connections are closed.
        codes: marks of what is loaded.
        modules: names of the modules that were imported before the first fork.
        compiled: how many statements were compiled by then.
    """

    instance: DagsterInstance
    codes: frozenset[str]
    modules: frozenset[str]
    compiled: int

    def foreign(self, instance: str, code: str) -> str:
        """Return why a run with these marks is not executed here, empty when it is."""
        if instance != instance_mark(self.instance):
            return "the run belongs to another Dagster instance"
        if code not in self.codes:
            return "the run's code location is not the one that is loaded"
        return ""

    def connect(self) -> None:
        """Open the connection that the next run needs first; without it, the run does."""
        storage = self.instance.run_storage
        if isinstance(storage, SqlRunStorage):
            with contextlib.suppress(Exception), storage.connect():
                pass

    def execute(self, run_id: str, *, resume: bool = False) -> bool:
        """Execute a run in this process; return whether it is in a final state now."""
        body = _resume_run_command_body if resume else _execute_run_command_body
        with capture_interrupts():
            body(run_id, self.instance, lambda _: None, set_exit_code_on_failure=False)
            run = self.instance.get_run_by_id(run_id)
        return run is None or run.is_finished

    def report_end(self, run_id: str, message: str) -> int:
        """Store how a run ended whose process is gone, unless its final state is stored; return an exit status."""
        for pause in (*REPORT_PAUSES, 0.0):
            try:
                store_end(self.instance, run_id, message)
            except Exception:  # the database is away, most likely
                traceback.print_exc()
                time.sleep(pause)
            else:
                return 0
        return 1


def store_end(instance: DagsterInstance, run_id: str, message: str) -> None:
    """Mark a run whose process is gone as cancelled or failed; one that was cancelled before is not a failure.

    A run whose own last event says how it ended has ended that way. A run that Dagster's monitoring is set to resume is
    left to it.
    """
    run = instance.get_run_by_id(run_id)
    if run is None or run.is_finished:
        return
    ends = instance.all_logs(run_id, of_type=_ENDS)
    if ends:  # the process was killed between the two, or its connection was
        last = ends[-1]
        instance.run_storage.handle_run_event(run_id, last.get_dagster_event(), datetime_from_timestamp(last.timestamp))
        instance.report_engine_event(f"{message} What the run had come to was stored; its state was not.", run)
    elif run.status is DagsterRunStatus.CANCELING:
        instance.report_run_canceled(run, f"{message} The run was being cancelled.")
    elif (
        run.status is DagsterRunStatus.STARTED
        and instance.run_monitoring_enabled
        and instance.count_resume_run_attempts(run_id) < instance.run_monitoring_max_resume_run_attempts
    ):
        instance.report_engine_event(f"{message} Run monitoring resumes it.", run)
        return
    else:
        failure = JobFailureData(error=None, failure_reason=RunFailureReason.UNEXPECTED_TERMINATION)
        instance.report_run_failed(run, message, failure)
    if instance.event_log_storage.supports_global_concurrency_limits:
        instance.event_log_storage.free_concurrency_slots_for_run(run_id)


def warm_up(
    *,
    module_name: str | None,
    python_file: str | None,
    attribute: str | None,
    working_directory: str | None,
    location_name: str | None,
    preload: Sequence[str] = (),
) -> Warm:
    """Load a code location into this process and make it ready to be forked.

    Args:
        module_name: of the definitions.
        python_file: instead of a module.
        attribute: name of the definitions in there, None to find them.
        working_directory: as the code server has it.
        location_name: name of the code location.
        preload: modules that the code imports only inside functions; with them here, no run has to.

    Raises:
        DagsterUserCodeLoadError: the code does not load.
        ImportError: a module of `preload` cannot be imported.
        UnsafeForkError: it left a thread or a connection that must not cross a fork.
    """
    sockets = _sockets()
    began = time.monotonic()
    target = LoadableTargetOrigin(
        executable_path=sys.executable,
        attribute=attribute,
        working_directory=working_directory or os.getcwd(),
        module_name=module_name,
        python_file=python_file,
    )
    loaded = LoadedRepositories(
        target,
        container_image=None,
        entry_point=get_python_environment_entry_point(sys.executable),
        container_context=None,
        code_location_name=location_name,
    )
    for name in preload:
        importlib.import_module(name)
    instance = DagsterInstance.get()
    loaded_after = time.monotonic() - began
    if _on_postgres(instance):
        _execute_and_roll_back(instance)
    else:
        logger.warning("the storage is not PostgreSQL: runs start without being warmed up")
    for reconstructable in loaded.reconstructables_by_name.values():
        reconstructable.get_definition()
    _dispose(instance)
    reason = why_not_fork()
    if reason:
        raise UnsafeForkError(f"{reason}. Import what starts it inside functions, or run with the default launcher.")
    left = _sockets() - sockets
    if left:
        raise UnsafeForkError(f"{len(left)} connections are open after loading: close them, or open them in functions.")
    codes = {
        code_mark(one.pointer, one.executable_path or sys.executable)
        for one in loaded.reconstructables_by_name.values()
    }
    logger.info("loaded in %.1f s, warm after %.1f s", loaded_after, time.monotonic() - began)
    engine = getattr(instance.event_log_storage, "_engine", None)
    compiled = len(engine._compiled_cache) if engine is not None else 0
    made.append(Warm(instance, frozenset(codes), frozenset(sys.modules), compiled))
    return made[-1]


def _on_postgres(instance: DagsterInstance) -> bool:
    engine = getattr(instance.run_storage, "_engine", None)
    return engine is not None and engine.dialect.name == "postgresql"


def _execute_and_roll_back(instance: DagsterInstance) -> None:
    with _one_transaction(instance):
        job = definitions.resolve_job_def(_JOB)
        run = instance.create_run_for_job(
            job,
            status=DagsterRunStatus.STARTING,
            job_code_origin=JobPythonOrigin(
                _JOB,
                RepositoryPythonOrigin(sys.executable, ModuleCodePointer(__name__, "definitions", os.getcwd())),
            ),
        )
        _execute_run_command_body(run.run_id, instance, lambda _: None, set_exit_code_on_failure=False)
        done = instance.get_run_by_id(run.run_id)
        if done is None or done.status is not DagsterRunStatus.SUCCESS:
            raise RuntimeError("the run that warms up did not succeed: its error is above")
    instance.compute_log_manager.delete_logs(prefix=[run.run_id])
    if instance.get_run_by_id(run.run_id) is not None:
        raise RuntimeError("the run that warms up was stored: its transaction was not rolled back")


@contextlib.contextmanager
def _one_transaction(instance: DagsterInstance) -> Iterator[None]:
    """Let the storages do all their work in one transaction, which is rolled back."""
    runs, events, schedules = instance.run_storage, instance.event_log_storage, instance.schedule_storage
    engine: Any = getattr(runs, "_engine", None)
    changed: list[tuple[Any, str]] = []
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(engine.connect().execution_options(isolation_level="READ COMMITTED"))
        transaction = connection.begin()
        stack.callback(transaction.rollback)

        def connect(*_: Any, **__: Any) -> contextlib.AbstractContextManager[Any]:
            return contextlib.nullcontext(connection)

        for storage, kind, names in (
            (runs, SqlRunStorage, ("connect",)),
            (events, SqlEventLogStorage, ("_connect", "run_connection", "index_connection")),
            (schedules, SqlScheduleStorage, ("connect",)),
        ):
            if isinstance(storage, kind):
                for name in names:
                    setattr(storage, name, connect)
                    changed.append((storage, name))
        try:
            yield
        finally:
            for storage, name in changed:
                delattr(storage, name)


def _dispose(instance: DagsterInstance) -> None:
    for storage in (instance.run_storage, instance.event_log_storage, instance.schedule_storage):
        engine = getattr(storage, "_engine", None)
        if engine is not None:
            engine.dispose()


def _sockets() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:"):
                found.add(target)
    return found
