"""A run launcher that asks the warm parent to fork a child, which has everything loaded already.

In `dagster.yaml`::

    run_launcher:
      module: clinical_orchestration.execution.launcher
      class: WarmRunLauncher
      config:
        folder: /where/the/parent/is

A run that the parent cannot take (it is not there, or holds other code) starts as Dagster's default launcher starts it,
by the code server; the run's events say so.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dagster import Field, IntSource, StringSource
from dagster._core.errors import DagsterLaunchFailedError
from dagster._core.events import EngineEventData
from dagster._core.launcher.base import CheckRunHealthResult, LaunchRunContext, ResumeRunContext, WorkerStatus
from dagster._core.launcher.default_run_launcher import DefaultRunLauncher
from dagster._core.storage.dagster_run import DagsterRunStatus
from dagster._core.storage.tags import GRPC_INFO_TAG
from dagster._serdes import ConfigurableClassData

from clinical_orchestration.execution.origins import code_mark, instance_mark
from clinical_orchestration.execution.protocol import Meeting, ParentGoneError

if TYPE_CHECKING:
    from dagster._config.config_schema import UserConfigSchema
    from dagster._core.storage.dagster_run import DagsterRun

logger = logging.getLogger("dagster.clinical_orchestration.launcher")

WAIT_SECONDS = 60
"""How long a launch waits for its turn when as many runs execute as the parent allows."""

ASK_AGAIN = 3


class WarmRunLauncher(DefaultRunLauncher):
    """Starts runs in children of the warm parent.

    Args:
        folder: where the parent is met.
        wait_seconds: how long a launch waits for its turn.
        inst_data: what Dagster read it from.
    """

    def __init__(
        self, folder: str, wait_seconds: int = WAIT_SECONDS, inst_data: ConfigurableClassData | None = None
    ) -> None:
        super().__init__(inst_data)
        self._meeting = Meeting(Path(folder))
        self._wait_seconds = wait_seconds
        self._mark = ""

    @classmethod
    def config_type(cls) -> UserConfigSchema:
        """Return the options."""
        return {
            "folder": Field(StringSource, description="Folder where the warm parent listens."),
            "wait_seconds": Field(
                IntSource,
                is_required=False,
                default_value=WAIT_SECONDS,
                description="How long a launch waits for its turn when the parent's limit of runs is reached.",
            ),
        }

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]) -> Self:
        """Make it from `dagster.yaml`."""
        return cls(inst_data=inst_data, **config_value)

    # -- start

    def launch_run(self, context: LaunchRunContext) -> None:
        """Start a run.

        Raises:
            DagsterLaunchFailedError: the parent's limit was reached for too long.
        """
        reason = self._start("launch", context)
        if reason:
            self._say(context.dagster_run, f"Not started warm: {reason}. The code server starts the run.")
            super().launch_run(context)

    @property
    def supports_resume_run(self) -> bool:
        """A run whose process is gone can go on in another."""
        return True

    def resume_run(self, context: ResumeRunContext) -> None:
        """Let a run go on whose process is gone.

        Raises:
            DagsterLaunchFailedError: the parent is not there, or has other code.
        """
        reason = self._start("resume", context)
        if reason:
            raise DagsterLaunchFailedError(  # type: ignore[no-untyped-call]
                f"The run cannot be resumed: {reason}. Start the warm parent."
            )

    def _start(self, what: str, context: LaunchRunContext | ResumeRunContext) -> str:
        """Ask the parent; return why it does not take the run, empty when it does."""
        run = context.dagster_run
        origin = context.job_code_origin
        if origin is None:
            return "the run does not say where its code is"
        repository = origin.repository_origin
        self._mark = self._mark or instance_mark(self._instance)
        question = {
            "ask": what,
            "run_id": run.run_id,
            "instance": self._mark,
            "code": code_mark(repository.code_pointer, repository.executable_path),
        }
        answer = self._ask(question)
        if isinstance(answer, ParentGoneError):
            worker = self._meeting.workers.of(run.run_id)
            if worker is not None and (what == "launch" or worker.process.alive):
                return ""  # it took the run before it went away; its successor says what became of it
            return str(answer)
        if "error" in answer:
            raise DagsterLaunchFailedError(  # type: ignore[no-untyped-call]
                f"The warm parent did not start the run: {answer['error']}"
            )
        if answer.get("stale"):
            self._say(run, f"The code has changed since it was loaded, but does not load: {answer['stale']}")
        return str(answer.get("foreign", ""))

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any] | ParentGoneError:
        """Ask again while somebody hangs up: a version is being replaced then. Asking twice starts no run twice."""
        for _ in range(ASK_AGAIN):
            try:
                return self._meeting.ask(question, self._wait_seconds)
            except ParentGoneError as error:
                gone = error
                if not error.asked:
                    break
            except TimeoutError:
                raise DagsterLaunchFailedError(  # type: ignore[no-untyped-call]
                    f"The warm parent did not start the run within {self._wait_seconds} s: as many runs execute as it"
                    " allows (its option --runs), or it hangs. Set max_concurrent_runs below that limit."
                ) from None
        return gone

    def _say(self, run: DagsterRun, message: str) -> None:
        logger.warning("run %s: %s", run.run_id, message)
        try:
            self._instance.report_engine_event(message, run, EngineEventData(), cls=type(self))
        except Exception:  # who launches would take the run, which may execute by now, for one that could not start
            logger.exception("run %s: the event was not stored", run.run_id)

    # -- end

    def terminate(self, run_id: str) -> bool:
        """Interrupt a run, and kill it some time later if need be; return whether there was something to end.

        It is cancelled once its process has ended: the process itself says so, or the parent when it was killed.
        """
        run = self._instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return False
        if GRPC_INFO_TAG in run.tags and self._meeting.workers.of(run_id) is None:
            return bool(super().terminate(run_id))  # type: ignore[no-untyped-call]
        if run.status is not DagsterRunStatus.CANCELING:
            self._instance.report_run_canceling(run)
        worker = self._meeting.workers.of(run_id)
        try:
            answer = self._meeting.ask({"ask": "cancel", "run_id": run_id}, 10)
        except (ParentGoneError, TimeoutError) as error:
            if worker is None or not worker.process.signal(signal.SIGINT):
                self._say(run, f"The run has no process that could be interrupted: {error}")
                return False
            self._say(run, f"The run was interrupted, and nobody sees to it that it ends: {error}")
            return True
        if "ok" in answer:
            return True
        run = self._instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return False
        self._instance.report_run_canceled(run, "The run had no process yet.")
        return True

    # -- health

    @property
    def supports_check_run_worker_health(self) -> bool:
        """The process of a run is known."""
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """Return whether the process of a run is there.

        A run that the code server started counts as running: what became of it cannot be asked.
        """
        worker = self._meeting.workers.of(run.run_id)
        if worker is None:
            if GRPC_INFO_TAG in run.tags:
                return CheckRunHealthResult(WorkerStatus.RUNNING, "started by the code server")
            return CheckRunHealthResult(WorkerStatus.NOT_FOUND, "the run has no process")
        name = f"{worker.process.pid}-{worker.process.started}"
        if worker.process.alive:
            return CheckRunHealthResult(WorkerStatus.RUNNING, run_worker_id=name)
        if worker.owner.alive:
            return CheckRunHealthResult(WorkerStatus.RUNNING, "how it ended is being stored", run_worker_id=name)
        return CheckRunHealthResult(
            WorkerStatus.FAILED,
            f"process {worker.process.pid} of the run is gone, and so is its parent",
            run_worker_id=name,
        )
