"""Steps in processes of their own, forked from the run worker: isolation for tens of milliseconds a step.

The worker has imported the code and built the plan, and it runs no code of a step; a step's process is a copy of it.
A step that crashes, runs out of memory or is killed fails alone and is tried again by its retry policy. No step
outlives its run: the kernel kills a step's process when the worker ends, and the worker ends the process group of a
step, so that whatever the step started and left behind ends with it.

A job takes it by ``executor_def=forked_executor`` (or all jobs, by ``Definitions(executor=forked_executor)``); with
``in_process_executor``, ``docker_executor`` or ``k8s_job_executor`` it takes another way.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
from dagster._core.system_config.objects import ResolvedRunConfig
from dagster._utils.error import serializable_error_info_from_exc_info
from dagster._utils.interrupts import capture_interrupts, pop_captured_interrupt
from dagster_shared.error import SerializableErrorInfo

from clinical_orchestration.execution.compute_logs import DirectComputeLogManager
from clinical_orchestration.execution.relay import Frame, GroupedEvents, Inbox, RelayedEvents

if TYPE_CHECKING:
    from dagster._core.execution.context.system import PlanOrchestrationContext
    from dagster._core.execution.plan.plan import ExecutionPlan
    from dagster._core.execution.plan.state import KnownExecutionState
    from dagster._core.execution.plan.step import ExecutionStep
    from dagster._core.executor.init import InitExecutorContext

SECONDS_TO_STOP = 15.0
"""What a cancelled step has for its own cleaning up before it is killed."""

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
    """A step's process, seen from the run worker."""

    step_key: str
    pid: int
    handle: int
    inbox: Inbox
    error: SerializableErrorInfo | None = None
    done: bool = False
    killed: bool = False
    retry: DagsterEvent | None = None
    decided: bool = False
    output: str | None = None


@dataclass(frozen=True)
class _Limits:
    max_concurrent: int
    by_tag: list[dict[str, Any]]
    seconds_to_stop: float


class ForkedStepExecutor(Executor):
    """Runs each step in a process forked from the run worker.

    Args:
        retries: whether failed steps are tried again.
        limits: how many steps run at the same time, and how long a cancelled one may take.
        step_dependency_config: when a step may start.
    """

    def __init__(self, retries: RetryMode, limits: _Limits, step_dependency_config: StepDependencyConfig) -> None:
        self._retries = retries
        self._limits = limits
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
        """Run the plan; in stock processes, with a line that says why, where this process cannot be forked."""
        reason = why_not_fork()
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
        yield from _Run(self, self._limits, plan_context, execution_plan).events()


class _Run:
    """The steps of one run."""

    def __init__(
        self, executor: ForkedStepExecutor, limits: _Limits, context: PlanOrchestrationContext, plan: ExecutionPlan
    ) -> None:
        self._executor = executor
        self._limits = limits
        self._context = context
        self._plan = plan
        self._run_config = ResolvedRunConfig.build(context.job.get_definition(), context.run_config)
        self._events = GroupedEvents(context.instance.event_log_storage)
        self._processes: dict[int, _Process] = {}
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
        while (self._stop_by is None and not active.is_complete) or self._processes:
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
                if process is not None and self._take(process, active, process.inbox.frames()):
                    waiting.append(process)
            if waiting:
                self._events.flush()
                for process in waiting:
                    process.inbox.answer()
            for process in [one for one in self._processes.values() if one.handle in {fd for fd, _ in ready}]:
                self._ended(process, active)
            yield from self._yielded
            self._yielded = []

    def _milliseconds(self, active: ActiveExecution, claims: InstanceConcurrencyContext) -> float | None:
        if self._stop_by is not None:
            return max(0.0, self._stop_by - time.monotonic()) * 1000 + 1
        if claims.has_pending_claims():
            return _CLAIM_SECONDS * 1000
        pause = active.sleep_interval()  # type: ignore[no-untyped-call]
        if pause:
            return float(max(0.0, pause) * 1000 + 1)
        return None if self._processes else 0

    def _start_ready(self, active: ActiveExecution) -> Iterator[DagsterEvent]:
        while steps := active.get_steps_to_execute(limit=self._limits.max_concurrent - len(self._processes)):
            yield from active.concurrency_event_iterator(self._context)
            for step in steps:
                yield DagsterEvent.step_worker_starting(
                    self._context.for_step(step), f'Forking a process for "{step.key}".', metadata={}
                )
                self._start(step, active.get_known_state())
        yield from active.concurrency_event_iterator(self._context)

    def _start(self, step: ExecutionStep, known_state: KnownExecutionState) -> None:
        ours, theirs = socket.socketpair()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # else both processes write what is in the buffer
        worker = os.getpid()
        pid = os.fork()
        if pid == 0:
            ours.close()
            self._be_a_step(worker, theirs, step, known_state)
        theirs.close()
        with contextlib.suppress(OSError):  # it may have done so itself
            os.setpgid(pid, pid)
        process = _Process(step.key, pid, os.pidfd_open(pid), Inbox(ours))
        for descriptor in (process.handle, process.inbox.fileno()):
            self._poll.register(descriptor, select.POLLIN)
        self._processes[process.inbox.fileno()] = process

    def _take(self, process: _Process, active: ActiveExecution, frames: list[Frame]) -> bool:
        """Store what a step says and follow it; return whether the step waits."""
        waits = False
        for frame in frames:
            waits = waits or frame.waits
            process.error = frame.error or process.error
            process.done = process.done or frame.done
            if frame.event is None:
                continue
            self._context.instance.handle_new_event(frame.event)
            known = frame.event.dagster_event
            if known is None:
                continue
            if known.event_type is DagsterEventType.LOGS_CAPTURED:
                process.output = known.logs_captured_data.file_key
            if known.step_key != process.step_key:
                self._yielded.append(known)
            elif known.is_step_up_for_retry:
                process.retry = known  # once this attempt has ended entirely
            else:
                self._follow(process, known, active)
                if known.is_resource_init_failure:
                    error = known.engine_event_data.error
                    self._fail(process, error or _error("its resources could not be made"), active)
        return waits

    def _follow(self, process: _Process, event: DagsterEvent, active: ActiveExecution) -> None:
        active.handle_event(event)
        self._yielded.append(event)
        process.decided = (
            process.decided or event.is_step_success or event.is_step_failure or event.is_step_up_for_retry
        )

    def _fail(self, process: _Process, error: SerializableErrorInfo, active: ActiveExecution) -> None:
        """Let the step fail, or be tried again when its policy says so and nobody cancelled the run."""
        context = self._context.for_step(active.get_step_by_key(process.step_key))
        if self._stop_by is None:
            event = self._executor.log_failure_or_retry_event_after_error(context, error, active.get_known_state())
        else:
            failure = StepFailureData(error=error, user_failure_data=None)  # type: ignore[no-untyped-call]
            event = DagsterEvent.step_failure_event(context, failure)
        self._follow(process, event, active)

    def _ended(self, process: _Process, active: ActiveExecution) -> None:
        """Note that a step's process ended, with all that it started."""
        self._take(process, active, process.inbox.frames(all_of_them=True))
        status = self._forget(process)
        if process.retry is not None and not process.decided:
            self._follow(process, process.retry, active)
        if not process.done:
            self._end_output(process)
        if process.error is not None or not process.done:
            error = process.error or _error(_how_it_ended(process, status, self._limits.seconds_to_stop))
            if process.decided:
                self._context.log.warning(f"After step {process.step_key} had ended: {error.message}")
            else:
                self._fail(process, error, active)
        if not process.decided:
            active.verify_complete(self._context, process.step_key)

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
        process.inbox.close()
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
        keys = [process.step_key for process in self._processes.values()]
        event = DagsterEvent.engine_event(
            self._context, "The run is to stop; its steps are told", EngineEventData.interrupted(keys)
        )
        for process in self._processes.values():
            signal.pidfd_send_signal(process.handle, signal.SIGINT)
        return event

    def _kill_those_that_do_not_stop(self) -> None:
        if self._stop_by is None or time.monotonic() < self._stop_by:
            return
        for process in self._processes.values():
            if not process.killed:
                process.killed = True
                signal.pidfd_send_signal(process.handle, signal.SIGKILL)

    def _end_all(self) -> None:
        for process in list(self._processes.values()):
            signal.pidfd_send_signal(process.handle, signal.SIGKILL)
            self._forget(process)

    # ---- in the step's process ---------------------------------------------------------------------------------------

    def _be_a_step(
        self, worker: int, link: socket.socket, step: ExecutionStep, known_state: KnownExecutionState
    ) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            _bind_to(worker)
            for other in self._processes.values():
                other.inbox.close()
                os.close(other.handle)
            _start_anew()
            relay = RelayedEvents(self._events.stored, link, self._context.run_id)
            self._context.instance._event_storage = relay  # type: ignore[assignment]
            with capture_interrupts():
                pop_captured_interrupt()
                try:
                    self._run_step(step, known_state)
                    relay.send(Frame(done=True))
                    status = 0
                except (Exception, KeyboardInterrupt, DagsterExecutionInterruptedError):
                    relay.send(Frame(error=serializable_error_info_from_exc_info(sys.exc_info()), done=True))
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

    def _run_step(self, step: ExecutionStep, known_state: KnownExecutionState) -> None:
        context = self._context
        DagsterEvent.step_worker_started(
            create_context_free_log_manager(context.instance, context.dagster_run),
            context.dagster_run.job_name,
            message=f'Executing step "{step.key}" in a forked process.',
            metadata={"pid": dg.MetadataValue.text(str(os.getpid()))},
            step_key=step.key,
        )
        plan = self._plan._replace(known_state=known_state).build_subset_plan(
            [step.key], context.job.get_definition(), self._run_config
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


def _error(message: str) -> SerializableErrorInfo:
    return SerializableErrorInfo(message, [], "StepProcessError")


def _how_it_ended(process: _Process, status: int | None, seconds_to_stop: float) -> str:
    if process.killed:
        return f"Step {process.step_key} did not stop within {seconds_to_stop:g} s and was killed"
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        hint = "; the kernel does that when memory runs out" if -status == signal.SIGKILL else ""
        return f"The process of step {process.step_key} was ended by signal {-status} ({name}){hint}"
    return f"The process of step {process.step_key} ended with status {status} and without a result"


@dg.executor(
    name="forked",
    config_schema=Field(
        {
            "max_concurrent": Field(
                Noneable(Int), default_value=None, description="Steps at the same time; empty: one a processor."
            ),
            "tag_concurrency_limits": get_tag_concurrency_limits_config(),  # type: ignore[no-untyped-call]
            "seconds_to_stop": Field(
                Float, default_value=SECONDS_TO_STOP, description="What a cancelled step has before it is killed."
            ),
            "retries": get_retries_config(),  # type: ignore[no-untyped-call]
            "step_dependency_config": get_step_dependency_config_field(),  # type: ignore[no-untyped-call]
        },
        description="Each step in a process forked from the run worker.",
        default_value={},
    ),
    requirements=multiple_process_executor_requirements(),
)
def forked_executor(init_context: InitExecutorContext) -> Executor:
    """Run each step in a process forked from the run worker, in parallel where the graph allows."""
    config: Mapping[str, Any] = init_context.executor_config
    return ForkedStepExecutor(
        RetryMode.from_config(config["retries"]) or RetryMode.ENABLED,
        _Limits(
            max_concurrent=config["max_concurrent"] or len(os.sched_getaffinity(0)),
            by_tag=config.get("tag_concurrency_limits") or [],
            seconds_to_stop=config["seconds_to_stop"],
        ),
        StepDependencyConfig.from_config(config.get("step_dependency_config")),
    )
