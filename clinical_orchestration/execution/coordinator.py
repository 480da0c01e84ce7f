"""The run queue, without the wait for the daemon where there is nothing to wait for.

A submitted run goes into the queue, as ever. If the rules by which the daemon empties the queue (limits, pools,
priorities, first come first served) would launch it now, the submitter launches it, and what comes before it. Whoever
empties the queue holds a lock in PostgreSQL from the count to the launch: no limit is overshot and no run launched
twice, however many submit at once. The rules are the daemon's own code.

In `dagster.yaml` (the name of the class is one that Dagster looks for when it checks the settings)::

    run_coordinator:
      module: clinical_orchestration.execution.coordinator
      class: QueuedRunCoordinator

The daemon has to hold the lock as well: start it by ``python -m clinical_orchestration.execution.coordinator``, which
takes the place of ``dagster-daemon run``.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from dagster._core.run_coordinator import queued_run_coordinator
from dagster._core.storage.dagster_run import DagsterRunStatus, RunsFilter
from dagster._core.storage.runs.sql_run_storage import SqlRunStorage
from dagster._daemon.run_coordinator.queued_run_coordinator_daemon import QueuedRunCoordinatorDaemon
from sqlalchemy.exc import DBAPIError, OperationalError

if TYPE_CHECKING:
    from dagster import DagsterInstance
    from dagster._core.run_coordinator.base import SubmitRunContext
    from dagster._core.storage.dagster_run import DagsterRun
    from dagster._core.workspace.context import BaseWorkspaceRequestContext, IWorkspaceProcessContext
    from dagster._daemon.daemon import DaemonIterator, DagsterDaemon

logger = logging.getLogger("dagster.clinical_orchestration.coordinator")

LOCK = 0x636C696E71  # "clinq"
"""Number of the advisory lock of the queue."""

LOCK_SECONDS = 2.0
"""Who does not get the lock within this time leaves the queue to others."""

MOST = 16
"""A submitter launches no more than this many; a longer queue is the daemon's work."""

_LOCK_NOT_AVAILABLE = "55P03"


class Turn:
    """Whether the lock of the queue is held: asked of the database each time, which may have ended the connection."""

    def __init__(self, connection: sa.Connection | None) -> None:
        self._connection = connection
        self._asking = threading.Lock()

    def __bool__(self) -> bool:
        if self._connection is None:
            return False
        with self._asking:
            try:
                self._connection.execute(sa.text("SELECT 1"))
            except DBAPIError:
                logger.warning("the connection that held the lock of the run queue was ended")
                self._connection = None
        return self._connection is not None


@contextlib.contextmanager
def queue_lock(instance: DagsterInstance, seconds: float = LOCK_SECONDS) -> Iterator[Turn]:
    """Hold the lock of the queue.

    Args:
        instance: the Dagster instance.
        seconds: how long to wait for it.

    Yields:
        Whether it is held. Without PostgreSQL there is none.
    """
    storage = instance.run_storage
    engine: Any = getattr(storage, "_engine", None)
    if not isinstance(storage, SqlRunStorage) or engine is None or engine.dialect.name != "postgresql":
        yield Turn(None)
        return
    with storage.connect() as plain:
        # of a transaction: it ends with the connection's use, whatever happens
        connection = plain.execution_options(isolation_level="READ COMMITTED")
        transaction = connection.begin()
        try:
            held = True
            try:
                connection.execute(sa.text(f"SET LOCAL lock_timeout = {int(seconds * 1000)}"))
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
            except OperationalError as error:
                if getattr(error.orig, "pgcode", None) != _LOCK_NOT_AVAILABLE:
                    raise
                held = False
            yield Turn(connection if held else None)
        finally:
            with contextlib.suppress(DBAPIError):  # the lock goes with the connection, too
                transaction.rollback()


class QueuedRunCoordinator(queued_run_coordinator.QueuedRunCoordinator["DagsterInstance"]):
    """Launches a submitted run at once if it would not have to wait. The options are those of Dagster's."""

    def submit_run(self, context: SubmitRunContext) -> DagsterRun:
        """Put a run into the queue, and launch it if it is its turn; return it as it is then."""
        run = super().submit_run(context)
        if run.status is not DagsterRunStatus.QUEUED or context.workspace is None:
            return run
        try:
            self._launch_up_to(run.run_id, context.workspace)
        except Exception:  # the run is in the queue: the daemon launches it
            logger.exception("run %s stays in the queue for the daemon", run.run_id)
        return self._instance.get_run_by_id(run.run_id) or run

    def cancel_run(self, run_id: str) -> bool:
        """Cancel a run; not while somebody takes it from the queue."""
        with queue_lock(self._instance):
            return bool(super().cancel_run(run_id))

    def _launch_up_to(self, run_id: str, workspace: BaseWorkspaceRequestContext) -> None:
        instance: DagsterInstance = self._instance
        queue = LockedQueueDaemon(interval_seconds=self.dequeue_interval_seconds)
        queue._logger = logger  # the daemon's would say so for every run
        with queue_lock(instance) as queue.turn:
            if not queue.turn:
                return
            concurrency = instance.get_concurrency_config()
            turns = queue._get_runs_to_dequeue(instance, concurrency, fixed_iteration_time=None)
            until = next((place for place, run in enumerate(turns, 1) if run.run_id == run_id), MOST + 1)
            for run in turns[:until] if until <= MOST else []:
                queue._dequeue_run(instance, workspace, run, concurrency, fixed_iteration_time=None)


class LockedQueueDaemon(QueuedRunCoordinatorDaemon):
    """Dagster's part of the daemon that empties the queue, with the lock held."""

    turn = Turn(None)

    def run_iteration(
        self, workspace_process_context: IWorkspaceProcessContext[Any], fixed_iteration_time: float | None = None
    ) -> DaemonIterator:
        """Launch the runs whose turn it is."""
        instance = workspace_process_context.instance
        if not instance.get_run_ids(filters=RunsFilter(statuses=[DagsterRunStatus.QUEUED]), limit=1):
            return
        with queue_lock(instance) as self.turn:
            if self.turn:
                yield from super().run_iteration(workspace_process_context, fixed_iteration_time)

    def _dequeue_run(self, *arguments: Any, **named: Any) -> bool:
        """Launch a run, unless the lock was lost: somebody else has counted anew then."""
        return bool(self.turn) and super()._dequeue_run(*arguments, **named)


def create_daemons(instance: DagsterInstance) -> Sequence[DagsterDaemon[Any]]:
    """Return the parts of the daemon that an instance needs."""
    from dagster._daemon.controller import create_daemon_of_type

    ours = isinstance(instance.run_coordinator, QueuedRunCoordinator)
    return [
        LockedQueueDaemon(interval_seconds=instance.run_coordinator.dequeue_interval_seconds)  # type: ignore[attr-defined]
        if ours and kind == LockedQueueDaemon.daemon_type()
        else create_daemon_of_type(kind, instance)
        for kind in instance.get_required_daemon_types()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the daemon until it is interrupted, as ``dagster-daemon run`` does."""
    from dagster import DagsterInstance
    from dagster._core.workspace.load_target import WorkspaceFileTarget
    from dagster._daemon.controller import daemon_controller_from_instance
    from dagster._utils.interrupts import capture_interrupts, setup_interrupt_handlers

    parser = argparse.ArgumentParser(prog="clinical_orchestration.execution.coordinator", description=main.__doc__)
    parser.add_argument("-w", "--workspace", required=True, help="workspace file")
    parser.add_argument("--log-level", default="info", choices=("critical", "error", "warning", "info", "debug"))
    options = parser.parse_args(arguments)
    setup_interrupt_handlers()
    with (
        contextlib.suppress(KeyboardInterrupt),
        capture_interrupts(),
        DagsterInstance.get() as instance,
        daemon_controller_from_instance(
            instance,
            workspace_load_target=WorkspaceFileTarget([options.workspace]),
            gen_daemons=create_daemons,
            log_level=options.log_level,
            code_server_log_level="warning",
        ) as controller,
    ):
        controller.check_daemon_loop()


if __name__ == "__main__":
    main()
