"""Steps in processes of their own, forked from the run worker: isolation for tens of milliseconds a step.

The worker has imported the code and built the plan, and it runs no code of a step; a step's process is a copy of it.
A step that crashes, runs out of memory or is killed fails alone and is tried again by its retry policy. No step
outlives its run: the kernel kills a step's process when the worker ends, and the worker ends the process group of a
step, so that whatever the step started and left behind ends with it.

A job takes it by ``executor_def=forked_executor`` (or all jobs, by ``Definitions(executor=forked_executor)``). Where
its steps run instead is the setting ``steps``, or a tag of the asset or op (:mod:`.isolation`).
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import dagster as dg
from dagster import DagsterEventType, Field, Float, Int, Noneable
from dagster._core.definitions.executor_definition import multiple_process_executor_requirements
from dagster._core.errors import DagsterExecutionInterruptedError
from dagster._core.events import DagsterEvent, EngineEventData
from dagster._core.execution.api import execute_plan_iterator
from dagster._core.execution.context_creation_job import create_context_free_log_manager
from dagster._core.execution.plan.active import ActiveExecution
from dagster._core.execution.plan.instance_concurrency_context import InstanceConcurrencyContext
from dagster._core.execution.plan.objects import StepFailureData
from dagster._core.execution.retries import RetryMode, get_retries_config
from dagster._core.execution.step_dependency_config import StepDependencyConfig, get_step_dependency_config_field
from dagster._core.execution.tags import get_tag_concurrency_limits_config
from dagster._core.executor.base import Executor
from dagster._core.executor.in_process import InProcessExecutor
from dagster._core.system_config.objects import ResolvedRunConfig
from dagster._utils.error import serializable_error_info_from_exc_info
from dagster._utils.interrupts import capture_interrupts, pop_captured_interrupt
from dagster_shared.error import SerializableErrorInfo

from clinical_orchestration.execution.compute_logs import DirectComputeLogManager
from clinical_orchestration.execution.isolation import (
    CHOICES,
    CONTAINERS,
    DOCKER,
    FORKED,
    HEALTH_SECONDS,
    IN_PROCESS,
    KUBERNETES,
    POLL_SECONDS,
    Containers,
    StoredEvents,
    checked,
    choice_of,
)
from clinical_orchestration.execution.relay import Frame, GroupedEvents, Inbox, RelayedEvents

if TYPE_CHECKING:
    from dagster._core.execution.context.system import PlanOrchestrationContext
    from dagster._core.execution.plan.plan import ExecutionPlan
    from dagster._core.execution.plan.state import KnownExecutionState
    from dagster._core.execution.plan.step import ExecutionStep
    from dagster._core.executor.init import InitExecutorContext

SECONDS_TO_STOP = 15.0
"""What a cancelled step has for its own cleaning up before it is killed."""

_OUTCOMES = {
    DagsterEventType.STEP_OUTPUT,
    DagsterEventType.STEP_SUCCESS,
    DagsterEventType.STEP_FAILURE,
    DagsterEventType.STEP_UP_FOR_RETRY,
}
_PR_SET_PDEATHSIG = 1
_CLAIM_SECONDS = 0.25
_OOM_SCORE = 100
_HARMLESS_THREADS = frozenset({"MainThread", "termination-handler"})
"""Threads of Python that a run worker may have at a fork: Dagster's own only waits for a signal to end."""


def why_not_fork() -> str | None:
    """Return why this process cannot be forked safely; None when it can.

    A thread does not exist in the copy, and the locks it held stay locked there. Threads that a library named itself,
    as polars and deltalake do, show that it was used; nameless ones are those of BLAS, which stop for a fork.
    """
    if sys.platform != "linux":
        return f"{sys.platform} cannot fork a process that uses system libraries"
    if threading.current_thread() is not threading.main_thread():
        return "the run is not in the main thread of its process"
    ours = sorted({thread.name for thread in threading.enumerate()} - _HARMLESS_THREADS)
    if ours:
        return f"the run worker has threads: {', '.join(ours)}"
    own = Path(f"/proc/self/task/{os.getpid()}/comm").read_text()
    named = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread may end meanwhile
            named.add((task / "comm").read_text())
    foreign = sorted(name.strip() for name in named - {own})
    return f"libraries have started threads in the run worker: {', '.join(foreign)}" if foreign else None


@dataclass
class _Process:
    """A step's process, seen from the run worker.

    Attributes:
        turns: where a process that steps share is told which one is next.
        idle: it waits for its next step.
        since: number of the newest event when it started; what is older is of another attempt.
        stops: it only stops a container that nobody looks after any more.
        error: what went wrong.
        done: it has nothing more to do for the step.
        killed: it did not stop by itself.
        retry: the step asked to be tried again.
        decided: the run knows how the step ended.
        output: name of the files with what the step prints.
    """

    step: ExecutionStep
    choice: str
    pid: int
    handle: int
    inbox: Inbox
    turns: socket.socket | None = None
    idle: bool = False
    since: int = 0
    stops: bool = False
    error: SerializableErrorInfo | None = None
    done: bool = False
    killed: bool = False
    retry: DagsterEvent | None = None
    decided: bool = False
    output: str | None = None

    def is_over(self) -> bool:
        """Return whether the step said how it ended."""
        return self.decided or self.retry is not None

    def close(self) -> None:
        """Close the sockets to it."""
        self.inbox.close()
        if self.turns is not None:
            self.turns.close()


@dataclass(frozen=True)
class _Limits:
    max_concurrent: int
    by_tag: list[dict[str, Any]]
    seconds_to_stop: float


@dataclass(frozen=True)
class _Isolation:
    """Where steps run that do not say it themselves, and what containers need."""

    default: str
    containers: Mapping[str, Mapping[str, Any]]
    poll_seconds: float
    health_seconds: float


class ForkedStepExecutor(Executor):
    """Runs each step in a process forked from the run worker, or where the step says.

    Args:
        retries: whether failed steps are tried again.
        limits: how many steps run at the same time, and how long a cancelled one may take.
        isolation: where steps run.
        step_dependency_config: when a step may start.
    """

    def __init__(
        self, retries: RetryMode, limits: _Limits, isolation: _Isolation, step_dependency_config: StepDependencyConfig
    ) -> None:
        self._retries = retries
        self._limits = limits
        self._isolation = isolation
        self._step_dependency_config = step_dependency_config

    @property
    def retries(self) -> RetryMode:
        """Whether failed steps are tried again."""
        return self._retries

    @property
    def step_dependency_config(self) -> StepDependencyConfig:
        """When a step may start."""
        return self._step_dependency_config

    def execute(self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan) -> Iterator[DagsterEvent]:
        """Run the plan; in stock processes, with a line that says why, where this process cannot be forked.

        Raises:
            DagsterInvalidDefinitionError: a step is to run where none can.
        """
        assets = plan_context.job.get_definition().asset_layer
        chosen = {choice_of(step, assets, self._isolation.default) for step in execution_plan.step_dict.values()}
        if chosen == {IN_PROCESS}:
            yield from InProcessExecutor(self._retries, self._step_dependency_config).execute(
                plan_context, execution_plan
            )
            return
        reason = why_not_fork()
        if reason is not None and chosen & set(CONTAINERS):
            raise dg.DagsterInvalidDefinitionError(
                f"No container can be started from this run worker: {reason}. "
                "Import what starts it inside functions, or give the job docker_executor or k8s_job_executor"
            )
        if reason is not None:
            from dagster._core.executor.multiprocess import MultiprocessExecutor

            plan_context.log.warning(f"Steps start cold, in new processes, which takes seconds for each: {reason}")
            yield from MultiprocessExecutor(
                retries=self._retries,
                max_concurrent=self._limits.max_concurrent,
                tag_concurrency_limits=self._limits.by_tag,
                step_dependency_config=self._step_dependency_config,
            ).execute(plan_context, execution_plan)
            return
        containers = Containers(plan_context, self._isolation.containers, self._retries, self._isolation.health_seconds)
        for choice in chosen & set(CONTAINERS):
            containers.prepare(choice)
        yield from _Run(self, self._limits, self._isolation, containers, plan_context, execution_plan).events()


class _Run:
    """The steps of one run."""

    def __init__(
        self,
        executor: ForkedStepExecutor,
        limits: _Limits,
        isolation: _Isolation,
        containers: Containers,
        context: PlanOrchestrationContext,
        plan: ExecutionPlan,
    ) -> None:
        self._executor = executor
        self._limits = limits
        self._isolation = isolation
        self._containers = containers
        self._context = context
        self._plan = plan
        self._run_config = ResolvedRunConfig.build(context.job.get_definition(), context.run_config)
        self._events = GroupedEvents(context.instance.event_log_storage)
        self._stored = StoredEvents(self._events.stored, context.run_id)
        self._processes: dict[int, _Process] = {}
        self._shared: _Process | None = None
        self._wait_for_shared: list[ExecutionStep] = []
        self._look_at = 0.0
        self._poll = select.poll()
        self._stop_by: float | None = None
        self._yielded: list[DagsterEvent] = []

    def events(self) -> Iterator[DagsterEvent]:
        """Run the steps."""
        instance, started = self._context.instance, time.monotonic()
        yield DagsterEvent.engine_event(
            self._context,
            f"Executing steps in processes forked from the run worker (pid: {os.getpid()})",
            event_specific_data=EngineEventData.multiprocess(
                os.getpid(), step_keys_to_execute=self._plan.step_keys_to_execute
            ),
        )
        stored = instance._event_storage
        with _waking(self._poll) as wake, contextlib.ExitStack() as stack:
            stack.callback(self._end_all)
            instance._event_storage = self._events  # type: ignore[assignment]
            stack.callback(setattr, instance, "_event_storage", stored)
            stack.callback(self._events.flush)
            claims = stack.enter_context(InstanceConcurrencyContext(instance, self._context.dagster_run))
            active = stack.enter_context(
                ActiveExecution(
                    self._plan,
                    retry_mode=self._executor.retries,
                    max_concurrent=self._limits.max_concurrent,
                    tag_concurrency_limits=self._limits.by_tag,
                    instance_concurrency_context=claims,
                    step_dependency_config=self._executor.step_dependency_config,
                )
            )
            if self._context.resume_from_failure:
                yield from self._resume(active)
            yield from self._until_complete(active, claims, wake)
            self._events.flush()
            if self._stop_by is not None:
                yield DagsterEvent.engine_event(
                    self._context, "All steps have stopped", event_specific_data=EngineEventData()
                )
                self._events.flush()
                raise DagsterExecutionInterruptedError
        yield DagsterEvent.engine_event(
            self._context,
            f"All steps have ended after {time.monotonic() - started:.2f} s (pid: {os.getpid()})",
            event_specific_data=EngineEventData.multiprocess(os.getpid()),
        )

    def _until_complete(
        self, active: ActiveExecution, claims: InstanceConcurrencyContext, wake: socket.socket
    ) -> Iterator[DagsterEvent]:
        while (self._stop_by is None and not active.is_complete) or self._busy:
            if self._stop_by is None and active.check_for_interrupts():
                yield self._stop(active)
            if self._stop_by is None:
                yield from self._start_ready(active)
            yield from active.plan_events_iterator(self._context)
            self._events.flush()
            self._kill_those_that_do_not_stop()
            ready = self._poll.poll(self._milliseconds(active, claims))
            with contextlib.suppress(BlockingIOError):
                wake.recv(64)
            waiting = []
            for descriptor in {fd for fd, _ in ready}:
                process = self._processes.get(descriptor)
                if process is None:
                    continue
                if self._take(process, active, process.inbox.frames()):
                    waiting.append(process)
                if process is self._shared and process.done and not process.idle:
                    self._step_ended(process, None, active)
                    process.idle = True
            if waiting:
                self._events.flush()
                for process in waiting:
                    process.inbox.answer()
            for process in [one for one in self._processes.values() if one.handle in {fd for fd, _ in ready}]:
                self._ended(process, active)
            if self._in_containers and time.monotonic() >= self._look_at:
                self._events.flush()
                self._follow_containers(active)
            yield from self._yielded
            self._yielded = []

    def _resume(self, active: ActiveExecution) -> Iterator[DagsterEvent]:
        """Take up a run whose worker is gone: steps that had ended stay so; those that ended with it begin anew.

        Containers go on without it, and are watched again.
        """
        self._stored.new()  # what a container stores from now on is followed
        entries = self._context.instance.all_logs(self._context.run_id, of_type=_OUTCOMES)
        events = [entry.get_dagster_event() for entry in entries]
        succeeded = {event.step_key for event in events if event.is_step_success}
        active.get_steps_to_execute()
        for event in events:
            if event.is_successful_output and event.step_key not in succeeded:
                continue  # it will be there again
            if event.is_step_up_for_retry:
                active.mark_up_for_retry(event.step_key or "")  # without its pause, which has begun long ago
            else:
                active.handle_event(event)
            active.get_steps_to_execute()
            yield event
        for key in sorted(active._in_flight):
            self._begin(active.get_step_by_key(key), active, again=True)

    def _milliseconds(self, active: ActiveExecution, claims: InstanceConcurrencyContext) -> float | None:
        now, waits = time.monotonic(), []
        if self._in_containers:
            waits.append(self._look_at - now)
        if self._stop_by is not None:
            waits.append(self._stop_by - now)
        elif claims.has_pending_claims():
            waits.append(_CLAIM_SECONDS)
        elif pause := active.sleep_interval():  # type: ignore[no-untyped-call]
            waits.append(pause)
        if waits:
            return max(0.0, min(waits)) * 1000 + 1
        return None if self._busy else 0

    @property
    def _busy(self) -> list[_Process]:
        return [process for process in self._processes.values() if not process.idle]

    @property
    def _in_containers(self) -> list[_Process]:
        return [process for process in self._processes.values() if process.choice in CONTAINERS]

    def _start_ready(self, active: ActiveExecution) -> Iterator[DagsterEvent]:
        while steps := active.get_steps_to_execute(limit=self._limits.max_concurrent - len(self._busy)):
            yield from active.concurrency_event_iterator(self._context)
            for step in steps:
                self._begin(step, active)
        self._start_shared(active)
        yield from active.concurrency_event_iterator(self._context)

    def _begin(self, step: ExecutionStep, active: ActiveExecution, *, again: bool = False) -> None:
        """Let a step begin; `again`, after the run's worker was replaced."""
        choice = choice_of(step, self._context.job.get_definition().asset_layer, self._isolation.default)
        if choice == IN_PROCESS:
            self._wait_for_shared.append(step)
            self._start_shared(active)
        elif choice in CONTAINERS:
            if not again:
                self._events.flush()
                self._follow_containers(active)
            self._start(step, choice, active, partial(self._containers.run, perhaps_there=again))
        else:
            if not again:
                message = f'Forking a process for "{step.key}".'
                self._yielded.append(
                    DagsterEvent.step_worker_starting(self._context.for_step(step), message, metadata={})
                )
            self._start(step, choice, active)

    def _start_shared(self, active: ActiveExecution) -> None:
        """Give the process that steps share its next one."""
        if not self._wait_for_shared or (self._shared is not None and not self._shared.idle):
            return
        step = self._wait_for_shared.pop(0)
        if self._shared is None:
            self._shared = self._start(step, IN_PROCESS, active)
            return
        shared = self._shared
        shared.step, shared.idle = step, False
        shared.error = shared.retry = shared.output = None
        shared.done = shared.decided = False
        if shared.turns is not None:
            with contextlib.suppress(OSError):  # it died meanwhile, which its handle says
                shared.turns.sendall(pickle.dumps((step.key, active.get_known_state())))

    def _start(
        self,
        step: ExecutionStep,
        choice: str,
        active: ActiveExecution,
        in_container: Callable[[str, ExecutionStep, KnownExecutionState], None] | None = None,
    ) -> _Process:
        known_state = active.get_known_state()
        ours, theirs = socket.socketpair()
        turns, coming = socket.socketpair() if choice == IN_PROCESS else (None, None)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # else both processes write what is in the buffer
        worker = os.getpid()
        pid = os.fork()
        if pid == 0:
            ours.close()
            work = partial(self._run_step, step.key, known_state)
            if in_container is not None:
                work = partial(in_container, choice, step, known_state)
            self._be_a_step(worker, theirs, work, turns, coming)
        for theirs_alone in (theirs, coming):
            if theirs_alone is not None:
                theirs_alone.close()
        with contextlib.suppress(OSError):  # it may have done so itself
            os.setpgid(pid, pid)
        process = _Process(step, choice, pid, os.pidfd_open(pid), Inbox(ours), turns, since=self._stored.newest)
        for descriptor in (process.handle, process.inbox.fileno()):
            self._poll.register(descriptor, select.POLLIN)
        self._processes[process.inbox.fileno()] = process
        return process

    def _take(self, process: _Process, active: ActiveExecution, frames: list[Frame]) -> bool:
        """Store what a step says and follow it; return whether the step waits."""
        waits = False
        for frame in frames:
            waits = waits or frame.waits
            process.error = process.error if process.stops else frame.error or process.error
            process.done = process.done or frame.done
            if frame.event is None:
                continue
            self._context.instance.handle_new_event(frame.event)
            known = frame.event.dagster_event
            if known is not None and process.choice not in CONTAINERS:  # theirs are followed when they are stored
                self._learn(process, known, active)
        return waits

    def _follow_containers(self, active: ActiveExecution) -> None:
        """Follow what containers have stored; who looked after one that is done is not needed any more."""
        self._look_at = time.monotonic() + self._isolation.poll_seconds
        by_step = {process.step.key: process for process in self._in_containers}
        for number, event in self._stored.new():
            process = by_step.get(event.step_key or "")
            if process is None or number <= process.since or process.is_over():
                continue
            self._learn(process, event, active)
            if process.is_over():
                process.done = True
                if self._stop_by is None and not process.stops:  # else it ends when its container has
                    _kill(process)

    def _learn(self, process: _Process, event: DagsterEvent, active: ActiveExecution) -> None:
        if event.event_type is DagsterEventType.LOGS_CAPTURED:
            process.output = event.logs_captured_data.file_key
        if event.step_key != process.step.key:
            self._yielded.append(event)
        elif event.is_step_up_for_retry:
            process.retry = event  # once this attempt has ended entirely
        else:
            self._follow(process, event, active)
            if event.is_resource_init_failure:
                error = event.engine_event_data.error
                self._fail(process, error or _error("its resources could not be made"), active)

    def _follow(self, process: _Process, event: DagsterEvent, active: ActiveExecution) -> None:
        active.handle_event(event)
        self._yielded.append(event)
        process.decided = (
            process.decided or event.is_step_success or event.is_step_failure or event.is_step_up_for_retry
        )

    def _fail(self, process: _Process, error: SerializableErrorInfo, active: ActiveExecution) -> None:
        """Let the step fail, or be tried again when its policy says so and nobody cancelled the run."""
        context = self._context.for_step(active.get_step_by_key(process.step.key))
        if self._stop_by is None:
            event = self._executor.log_failure_or_retry_event_after_error(context, error, active.get_known_state())
        else:
            failure = StepFailureData(error=error, user_failure_data=None)  # type: ignore[no-untyped-call]
            event = DagsterEvent.step_failure_event(context, failure)
        self._follow(process, event, active)

    def _ended(self, process: _Process, active: ActiveExecution) -> None:
        """Note that a step's process ended, with all that it started."""
        self._take(process, active, process.inbox.frames(all_of_them=True))
        in_container = process.choice in CONTAINERS
        if in_container:
            self._events.flush()
            self._follow_containers(active)
        status = self._forget(process)
        if process is self._shared:
            self._shared = None
        if in_container and not (process.done or process.stops or process.killed):
            stopper = self._start(process.step, process.choice, active, self._containers.stop)
            stopper.stops, stopper.since, stopper.output = True, process.since, process.output
            stopper.error = _error(_how_it_ended(process, status, self._limits.seconds_to_stop))
        elif not process.idle:
            self._step_ended(process, status, active)

    def _step_ended(self, process: _Process, status: int | None, active: ActiveExecution) -> None:
        if process.retry is not None and not process.decided:
            self._follow(process, process.retry, active)
        if not process.done:
            self._end_output(process)
        if process.error is not None or not process.done:
            error = process.error or _error(_how_it_ended(process, status, self._limits.seconds_to_stop))
            if not process.decided:
                self._fail(process, error, active)
            elif process.choice not in CONTAINERS:  # of which the step itself said that it was stopped
                self._context.log.warning(f"After step {process.step.key} had ended: {error.message}")
        if not process.decided:
            active.verify_complete(self._context, process.step.key)

    def _end_output(self, process: _Process) -> None:
        """Say that a step that was killed writes no more; whoever reads its output would wait for ever."""
        manager = self._context.instance.compute_log_manager
        if process.output is not None and isinstance(manager, DirectComputeLogManager):
            manager.complete(manager.build_log_key_for_run(self._context.run_id, process.output))

    def _forget(self, process: _Process) -> int | None:
        """End the process group, reap the process and return its exit status as :mod:`subprocess` gives it."""
        self._poll.unregister(process.handle)
        self._poll.unregister(process.inbox.fileno())
        del self._processes[process.inbox.fileno()]
        process.close()
        with contextlib.suppress(ProcessLookupError):  # not reaped yet, so that the number is its own
            os.killpg(process.pid, signal.SIGKILL)
        try:
            _, status = os.waitpid(process.pid, 0)
        except ChildProcessError:
            return None
        finally:
            os.close(process.handle)
        return os.waitstatus_to_exitcode(status)

    def _stop(self, active: ActiveExecution) -> DagsterEvent:
        self._stop_by = time.monotonic() + self._limits.seconds_to_stop
        active.mark_interrupted()
        keys = [process.step.key for process in self._busy]
        event = DagsterEvent.engine_event(
            self._context, "The run is to stop; its steps are told", EngineEventData.interrupted(keys)
        )
        for process in self._busy:
            signal.pidfd_send_signal(process.handle, signal.SIGINT)
        return event

    def _kill_those_that_do_not_stop(self) -> None:
        if self._stop_by is None or time.monotonic() < self._stop_by:
            return
        for process in self._busy:
            if not process.killed:
                process.killed = True
                _kill(process)

    def _end_all(self) -> None:
        """End what still runs: the process that steps share, and what an error of the run left behind."""
        leave = time.monotonic() + self._limits.seconds_to_stop
        in_peace = [process for process in self._processes.values() if process.idle or process.choice in CONTAINERS]
        for process in in_peace:
            if process.turns is not None:
                process.turns.close()
            else:
                signal.pidfd_send_signal(process.handle, signal.SIGINT)
        for process in in_peace:
            ended = select.poll()
            ended.register(process.handle, select.POLLIN)
            ended.poll(max(0.0, leave - time.monotonic()) * 1000)
        for process in list(self._processes.values()):
            _kill(process)
            self._forget(process)

    # ---- in the step's process ---------------------------------------------------------------------------------------

    def _be_a_step(
        self,
        worker: int,
        link: socket.socket,
        work: Callable[[], None],
        turns: socket.socket | None,
        coming: socket.socket | None,
    ) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            _bind_to(worker)
            if turns is not None:
                turns.close()
            for other in self._processes.values():
                other.close()
                os.close(other.handle)
            _start_anew()
            relay = RelayedEvents(self._events.stored, link, self._context.run_id)
            self._context.instance._event_storage = relay  # type: ignore[assignment]
            with capture_interrupts():
                pop_captured_interrupt()
                for one in chain((work,), self._coming_turns(coming)):
                    try:
                        one()
                        relay.send(Frame(done=True))
                        status = 0
                    except (Exception, KeyboardInterrupt, DagsterExecutionInterruptedError):
                        relay.send(Frame(error=serializable_error_info_from_exc_info(sys.exc_info()), done=True))
                        status = 1
            threading._shutdown()  # type: ignore[attr-defined]  # threads of the step may still work
        except BaseException:  # nothing may return into the worker's code from here
            with contextlib.suppress(BaseException):
                import traceback

                traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _coming_turns(self, coming: socket.socket | None) -> Iterator[Callable[[], None]]:
        if coming is None:
            return
        with coming.makefile("rb") as turns, contextlib.suppress(EOFError):
            while True:
                yield partial(self._run_step, *pickle.load(turns))  # noqa: S301  # from the worker

    def _run_step(self, step_key: str, known_state: KnownExecutionState) -> None:
        context = self._context
        DagsterEvent.step_worker_started(
            create_context_free_log_manager(context.instance, context.dagster_run),
            context.dagster_run.job_name,
            message=f'Executing step "{step_key}" in a forked process.',
            metadata={"pid": dg.MetadataValue.text(str(os.getpid()))},
            step_key=step_key,
        )
        plan = self._plan._replace(known_state=known_state).build_subset_plan(
            [step_key], context.job.get_definition(), self._run_config
        )
        for _ in execute_plan_iterator(
            plan,
            context.job,
            context.dagster_run,
            context.instance,
            retry_mode=self._executor.retries.for_inner_plan(),
            run_config=context.run_config,
            step_dependency_config=self._executor.step_dependency_config,
        ):
            pass


def _bind_to(worker: int) -> None:
    """Lead a process group of its own, and be killed when the worker ends, however it ends."""
    os.setpgid(0, 0)
    _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != worker:
        os._exit(1)  # it ended before the kernel knew


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _start_anew() -> None:
    """Undo what a copy should not share with its worker."""
    gc.freeze()  # else the first collection copies all memory of the worker
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()  # Python's own generator does so by itself
    faulthandler.enable(sys.__stderr__ or 2)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    with contextlib.suppress(OSError, ValueError):  # the kernel ends a step rather than the worker that tells of it
        score = Path("/proc/self/oom_score_adj")
        score.write_text(str(min(1000, int(score.read_text()) + _OOM_SCORE)))


@contextlib.contextmanager
def _waking(poll: select.poll) -> Iterator[socket.socket]:
    """Let a signal end the wait for the steps."""
    reading, writing = socket.socketpair()
    with reading, writing:
        reading.setblocking(False)
        writing.setblocking(False)
        before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        poll.register(reading, select.POLLIN)
        try:
            yield reading
        finally:
            signal.set_wakeup_fd(before)


def _kill(process: _Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process.handle, signal.SIGKILL)


def _error(message: str) -> SerializableErrorInfo:
    return SerializableErrorInfo(message, [], "StepProcessError")


def _how_it_ended(process: _Process, status: int | None, seconds_to_stop: float) -> str:
    if process.killed:
        return f"Step {process.step.key} did not stop within {seconds_to_stop:g} s and was killed"
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        hint = "; the kernel does that when memory runs out" if -status == signal.SIGKILL else ""
        return f"The process of step {process.step.key} was ended by signal {-status} ({name}){hint}"
    return f"The process of step {process.step.key} ended with status {status} and without a result"


def _executor(name: str, default: str, description: str) -> dg.ExecutorDefinition:
    return dg.executor(
        name=name,
        config_schema=Field(
            {
                "max_concurrent": Field(
                    Noneable(Int), default_value=None, description="Steps at the same time; empty: one a processor."
                ),
                "tag_concurrency_limits": get_tag_concurrency_limits_config(),  # type: ignore[no-untyped-call]
                "seconds_to_stop": Field(
                    Float, default_value=SECONDS_TO_STOP, description="What a cancelled step has before it is killed."
                ),
                "steps": Field(
                    str,
                    default_value=default,
                    description=f"Where steps run whose tags do not say it: {', '.join(CHOICES)}.",
                ),
                DOCKER: Field(dict, default_value={}, description="Containers: options of docker_executor."),
                KUBERNETES: Field(dict, default_value={}, description="Pods: options of k8s_job_executor."),
                "poll_seconds": Field(
                    Float, default_value=POLL_SECONDS, description="How often to ask what containers have stored."
                ),
                "health_seconds": Field(
                    Float, default_value=HEALTH_SECONDS, description="How often to ask whether a container still runs."
                ),
                "retries": get_retries_config(),  # type: ignore[no-untyped-call]
                "step_dependency_config": get_step_dependency_config_field(),  # type: ignore[no-untyped-call]
            },
            description=description,
            default_value={},
        ),
        requirements=multiple_process_executor_requirements(),
    )(_made)


def _made(init_context: InitExecutorContext) -> Executor:
    config: Mapping[str, Any] = init_context.executor_config
    return ForkedStepExecutor(
        RetryMode.from_config(config["retries"]) or RetryMode.ENABLED,
        _Limits(
            max_concurrent=config["max_concurrent"] or len(os.sched_getaffinity(0)),
            by_tag=config.get("tag_concurrency_limits") or [],
            seconds_to_stop=config["seconds_to_stop"],
        ),
        _Isolation(
            default=checked(config["steps"], "The executor's setting `steps`"),
            containers={choice: config[choice] for choice in CONTAINERS},
            poll_seconds=config["poll_seconds"],
            health_seconds=config["health_seconds"],
        ),
        StepDependencyConfig.from_config(config.get("step_dependency_config")),
    )


forked_executor = _executor("forked", FORKED, "Each step in a process forked from the run worker.")
"""Runs each step in a process forked from the run worker, in parallel where the graph allows."""

shared_executor = _executor("shared", IN_PROCESS, "Steps in the run worker; the setting `steps` isolates them.")
"""Runs the steps one after the other in the run worker, unless a run, an asset or an op asks for another place."""
