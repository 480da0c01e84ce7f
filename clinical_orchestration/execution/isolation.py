"""Where a step runs: in a process of its own, in one that steps share, in a container of Docker or a pod of Kubernetes.

A job chooses by the setting ``steps`` of :data:`~clinical_orchestration.execution.steps.forked_executor`, an asset or
an op by a tag, which stands above it::

    @dg.asset(tags=runs_in(DOCKER))
    @dg.op(tags=runs_in(IN_PROCESS))

Containers and pods are started, watched and stopped by the step handlers of ``dagster-docker`` and ``dagster-k8s``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from dagster import DagsterInvalidConfigError, DagsterInvalidDefinitionError
from dagster._config import process_config
from dagster._core.errors import DagsterExecutionInterruptedError, raise_execution_interrupts
from dagster._core.event_api import EventLogCursor
from dagster._core.executor.init import InitExecutorContext
from dagster._core.executor.step_delegating import StepDelegatingExecutor, StepHandler, StepHandlerContext
from dagster._grpc.types import ExecuteStepArgs

if TYPE_CHECKING:
    from dagster import ExecutorDefinition
    from dagster._core.definitions.assets.job.asset_layer import AssetLayer
    from dagster._core.events import DagsterEvent
    from dagster._core.execution.context.system import PlanOrchestrationContext
    from dagster._core.execution.plan.state import KnownExecutionState
    from dagster._core.execution.plan.step import ExecutionStep, IExecutionStep
    from dagster._core.execution.retries import RetryMode
    from dagster._core.storage.event_log import EventLogStorage

EXECUTOR_TAG = "clinical/executor"
"""Tag of an asset or an op that says where its step runs."""

FORKED, IN_PROCESS, DOCKER, KUBERNETES = "forked", "in_process", "docker", "kubernetes"
CHOICES = (FORKED, IN_PROCESS, DOCKER, KUBERNETES)
CONTAINERS = (DOCKER, KUBERNETES)

POLL_SECONDS = 0.5
"""How often the event log is asked for what containers have stored."""

HEALTH_SECONDS = 10.0
"""How often Docker or Kubernetes is asked whether a step still runs."""

_LAG_SECONDS = 10.0
_PAGE = 1000


class StepContainerError(RuntimeError):
    """A step's container or pod ended without a result, or never ran."""


def runs_in(choice: str) -> dict[str, str]:
    """Return the tag by which an asset or an op says where its step runs.

    Args:
        choice: one of :data:`CHOICES`.

    Raises:
        DagsterInvalidDefinitionError: it is none of them.
    """
    return {EXECUTOR_TAG: checked(choice, "runs_in")}


def checked(choice: str, whose: str) -> str:
    """Return a choice.

    Raises:
        DagsterInvalidDefinitionError: there is no such choice; the message names those that there are.
    """
    if choice not in CHOICES:
        raise DagsterInvalidDefinitionError(
            f"{whose}: steps do not run in {choice!r}; {EXECUTOR_TAG} is one of {', '.join(CHOICES)}"
        )
    return choice


def choice_of(step: IExecutionStep, assets: AssetLayer, default: str) -> str:
    """Return where a step runs: by the tag of its op, else by that of its assets, else as its job says.

    Raises:
        DagsterInvalidDefinitionError: there is no such choice, or assets that one step makes say different things.
    """
    tags = step.tags or {}
    chosen = {tags[EXECUTOR_TAG]} if EXECUTOR_TAG in tags else set()
    if not chosen:
        keys = assets.get_selected_entity_keys_for_node(step.node_handle)
        found = (getattr(assets.asset_graph.get(key), "tags", {}).get(EXECUTOR_TAG) for key in keys)
        chosen = {one for one in found if one is not None}
    if len(chosen) > 1:
        raise DagsterInvalidDefinitionError(
            f"Step {step.key} makes assets whose tags {EXECUTOR_TAG} differ ({', '.join(sorted(chosen))}): set one"
        )
    return checked(chosen.pop(), f"Step {step.key}") if chosen else default


class Containers:
    """Starts, watches and stops steps in containers and pods; made by the run worker, used in forks of it.

    Args:
        context: of the run.
        configuration: of ``docker_executor`` and ``k8s_job_executor``, by choice.
        retries: whether failed steps are tried again.
        health_seconds: how often a running step is looked after.
    """

    def __init__(
        self,
        context: PlanOrchestrationContext,
        configuration: Mapping[str, Mapping[str, Any]],
        retries: RetryMode,
        health_seconds: float,
    ) -> None:
        self._context = context
        self._configuration = configuration
        self._retries = retries
        self._health_seconds = health_seconds
        self._handlers: dict[str, StepHandler] = {}

    def prepare(self, choice: str) -> None:
        """Load what a choice needs, once, before it is forked.

        Raises:
            DagsterInvalidDefinitionError: its package is not installed.
            DagsterInvalidConfigError: its configuration is wrong.
        """
        official = _official(choice)
        wanted = dict(self._configuration[choice])
        if choice == KUBERNETES and not self._runs_are_pods():
            wanted.setdefault("job_namespace", "default")
        settings = process_config(official.config_schema.config_type, wanted)
        if not settings.success:
            message = f"The configuration of steps in {choice} is wrong"
            raise DagsterInvalidConfigError(message, settings.errors, wanted)  # type: ignore[no-untyped-call]
        create: Any = official.executor_creation_fn
        executor = create(
            InitExecutorContext(self._context.job, official, settings.value or {}, self._context.instance)
        )
        if not isinstance(executor, StepDelegatingExecutor):
            raise DagsterInvalidDefinitionError(f"{official.name} does not delegate steps in this version of Dagster")
        self._handlers[choice] = executor._step_handler

    def run(
        self, choice: str, step: ExecutionStep, known_state: KnownExecutionState, *, perhaps_there: bool = False
    ) -> None:
        """Start a step and look after it until this process is ended from outside; what it does is in the event log.

        Args:
            choice: where.
            step: the step.
            known_state: what the run knows, such as the number of the attempt.
            perhaps_there: whether a run worker that is gone may have started it.

        Raises:
            StepContainerError: it does not run any more.
            DagsterExecutionInterruptedError: this process was interrupted; the step was stopped.
        """
        handler, context = self._handlers[choice], self._handler_context(choice, step, known_state)
        try:
            with raise_execution_interrupts():
                if not perhaps_there or self._what_ails(handler, context):
                    _exhaust(handler.launch_step(context))
                while True:
                    time.sleep(self._health_seconds)
                    if reason := self._what_ails(handler, context):
                        raise StepContainerError(f"Step {step.key} does not run any more: {reason}")
        except DagsterExecutionInterruptedError:
            _exhaust(handler.terminate_step(context))
            while choice == KUBERNETES and not self._what_ails(handler, context):  # Docker has waited
                time.sleep(POLL_SECONDS)
            raise

    def stop(self, choice: str, step: ExecutionStep, known_state: KnownExecutionState) -> None:
        """Stop a step that nobody looks after any more."""
        _exhaust(self._handlers[choice].terminate_step(self._handler_context(choice, step, known_state)))

    def _what_ails(self, handler: StepHandler, context: StepHandlerContext) -> str | None:
        try:
            health = handler.check_step_health(context)
        except Exception as error:  # Docker or the API of Kubernetes is away for a while
            self._context.log.warning(f"It cannot be seen whether a step runs ({handler.name}): {error}")
            return None
        return None if health.is_healthy else health.unhealthy_reason or "no reason was given"

    def _runs_are_pods(self) -> bool:
        from dagster_k8s import K8sRunLauncher

        return isinstance(self._context.instance.run_launcher, K8sRunLauncher)

    def _handler_context(
        self, choice: str, step: ExecutionStep, known_state: KnownExecutionState
    ) -> StepHandlerContext:
        instance, run = self._context.instance, self._context.dagster_run
        kind = _PodContext if choice == KUBERNETES and not self._runs_are_pods() else StepHandlerContext
        return kind(
            instance,
            self._context,
            [step],
            ExecuteStepArgs(
                job_origin=self._context.reconstructable_job.get_python_origin(),
                run_id=run.run_id,
                step_keys_to_execute=[step.key],
                instance_ref=instance.get_ref(),
                retry_mode=self._retries.for_inner_plan(),
                known_state=known_state,
                should_verify_step=choice == KUBERNETES,  # which may start a pod twice
                print_serialized_events=False,
            ),
            run,
        )


class _NoSettings:
    """Stands where the handler of Kubernetes looks for settings of a launcher that starts runs in pods."""

    job_image = dagster_home = instance_config_map = postgres_password_secret = None

    def __bool__(self) -> bool:
        return False


class _PodContext(StepHandlerContext):
    """For the handler of Kubernetes, which asks the instance only for its launcher, where runs are no pods."""

    @property
    def instance(self) -> Any:
        """Return what has a launcher without settings."""
        return SimpleNamespace(run_launcher=_NoSettings())


class StoredEvents:
    """The events of a run that other processes store.

    Numbers are given before events are committed, so that a smaller one may appear after a larger one: each event is
    looked for some seconds longer.

    Args:
        storage: the event log.
        run_id: the run.
    """

    def __init__(self, storage: EventLogStorage, run_id: str) -> None:
        self._storage = storage
        self._run_id = run_id
        self._cursor = 0
        self._seen: dict[int, float] = {}
        self.newest = 0

    def new(self) -> list[tuple[int, DagsterEvent]]:
        """Return the events that were not returned before, with their numbers."""
        now, found, cursor, more = time.monotonic(), [], self._cursor, True
        while more:
            after = EventLogCursor.from_storage_id(cursor).to_string() if cursor else None
            page = self._storage.get_records_for_run(self._run_id, after, limit=_PAGE)
            for record in page.records:
                cursor = record.storage_id
                if cursor in self._seen:
                    continue
                self._seen[cursor] = now
                event = record.event_log_entry.dagster_event
                if event is not None:
                    found.append((cursor, event))
            more = page.has_more
        self.newest = max(self.newest, cursor)
        for number in sorted(self._seen):
            if self._seen[number] > now - _LAG_SECONDS:
                break
            self._cursor = number
            del self._seen[number]
        return found


def _official(choice: str) -> ExecutorDefinition:
    try:
        if choice == DOCKER:
            from dagster_docker import docker_executor

            return docker_executor
        from dagster_k8s import k8s_job_executor
    except ImportError as error:
        raise DagsterInvalidDefinitionError(
            f"Steps in {choice} need a package that is not installed here ({error.name}): "
            f"install the extra `{choice}` (uv sync --inexact --extra {choice})"
        ) from error
    return k8s_job_executor


def _exhaust(events: Iterator[DagsterEvent]) -> None:
    for _ in events:  # each is stored when it is made
        pass
