"""A process that has the code loaded and forks a child for each run: what :mod:`.parent` starts, one a version.

It stays single-threaded and holds no connection, so that a fork is safe. Children wait, a few of them, with a
connection of their own already open; the next run goes to one of them. A child leads a session of its own and executes
the run as `dagster api execute_run` does. When it ends, what is left of its process group is killed, and unless it
proved that its run is in a final state, another child stores how it ended.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import heapq
import itertools
import logging
import os
import random
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from clinical_orchestration.execution.protocol import Meeting, receive, send
from clinical_orchestration.execution.sessions import end_with_parent, kill_session
from clinical_orchestration.execution.workers import Process, Worker

if TYPE_CHECKING:
    from clinical_orchestration.execution.warm_up import Warm

logger = logging.getLogger("clinical_orchestration.execution")

UNPROVEN = 70
"""Exit status of a child that could not see its run in a final state."""

LISTEN_SECONDS = 0.5
"""A client that says nothing for so long after it connected is sent away."""

REFILL_SECONDS = 0.1
"""How long after a start the next child is forked: not while the run that has just begun needs the processor."""

REPORT_AGAIN_SECONDS = 5.0
"""When what became of a run could not be stored, it is tried again after so long."""

OOM_SCORE = 300
"""Runs go before services when memory runs out."""


@dataclass(frozen=True)
class Limits:
    """How many, and how long.

    Attributes:
        runs: that execute at the same time; more wait for their turn.
        spares: children that wait for a run.
        cancel_seconds: from the interrupt of a cancelled run to its kill.
        stop_seconds: the same for all runs, when the parent is stopped.
    """

    runs: int = 32
    spares: int = 2
    cancel_seconds: float = 20.0
    stop_seconds: float = 8.0


@dataclass
class _Spare:
    pid: int
    line: socket.socket


@dataclass
class _Question:
    asked: Mapping[str, Any]
    client: socket.socket


class Version:
    """The event loop. Nothing in it waits for anything but its selector."""

    def __init__(self, meeting: Meeting, control: socket.socket, warm: Warm, limits: Limits) -> None:
        self._meeting = meeting
        self._control = control
        self._warm = warm
        self._limits = limits
        self._own = Process.own()
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._handles: dict[int, int] = {}
        self._spares: list[_Spare] = []
        self._runs: dict[int, str] = {}
        self._adopted: dict[int, str] = {}
        self._reports: dict[int, tuple[str, str]] = {}
        self._unreported: dict[str, str] = {}
        self._waiting: deque[_Question] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._stale = ""
        self._leaving = False

    def run(self) -> None:
        """Serve until the parent says that another version does, or is gone."""
        name = f"{self._own.pid}.sock"
        self._listener = self._meeting.listen(name)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._control, selectors.EVENT_READ, self._obey)
        send(self._control, {"ready": name})  # fails when the parent is gone: the runs are its successor's then
        self._adopt()
        self._fill()
        while not (self._leaving and self._idle):
            for key, _ in self._selector.select(self._next_timer()):
                self._safely(key.data)
            while self._timers and self._timers[0][0] <= time.monotonic():
                self._safely(heapq.heappop(self._timers)[2])
        self._dismiss_spares()

    @property
    def _idle(self) -> bool:
        return not (self._runs or self._adopted or self._reports or self._unreported)

    def _safely(self, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception:  # one client or one run; the others go on
            logger.exception("the run launcher could not do one thing, and goes on")

    def _later(self, seconds: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), do))

    def _next_timer(self) -> float | None:
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    # -- the parent

    def _obey(self) -> None:
        message = receive(self._control)
        if message is None:  # the parent is gone; its successor adopts the runs
            os._exit(0)
        what = message["do"]
        if what == "adopt":
            self._adopt()
        elif what == "stale":
            self._stale = str(message["reason"])
        elif what in ("drain", "stop"):
            self._stop_listening()
            self._dismiss_spares()
            if what == "stop":
                for run_id in [*self._runs.values(), *self._adopted.values()]:
                    self._interrupt(run_id, self._limits.stop_seconds)

    def _stop_listening(self) -> None:
        self._leaving = True
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
        while self._waiting:  # they ask again, and another version answers
            self._waiting.popleft().client.close()

    # -- clients

    def _accept(self) -> None:
        if self._listener is None:
            return
        try:
            client, _ = self._listener.accept()
        except BlockingIOError:
            return
        client.settimeout(LISTEN_SECONDS)
        try:
            asked = receive(client)
            if asked is None:
                client.close()
                return
            answer = self._answer(asked)
        except (OSError, ValueError, KeyError) as error:
            answer = {"error": f"not understood: {type(error).__name__}: {error}"}
        if answer is None:
            self._waiting.append(_Question(asked or {}, client))
            self._later(1.0, self._serve_waiting)
        else:
            self._reply(client, answer)

    @staticmethod
    def _reply(client: socket.socket, answer: Mapping[str, Any]) -> None:
        with client, contextlib.suppress(OSError):  # who has gone does not want to know
            send(client, answer)

    def _answer(self, asked: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the answer, None when the question has to wait."""
        what = asked["ask"]
        if what == "ping":
            return {
                "pid": self._own.pid,
                "runs": len(self._runs) + len(self._adopted),
                "spares": len(self._spares),
                "stale": self._stale,
            }
        if what == "cancel":
            return self._cancel(str(asked["run_id"]))
        if what in ("launch", "resume"):
            reason = self._warm.foreign(str(asked["instance"]), str(asked["code"]))
            if reason:
                return {"foreign": reason}
            if len(self._meeting.workers) >= self._limits.runs:
                return None
            return self._start(what, str(asked["run_id"]))
        return {"error": f"{what!r} is nothing that can be asked"}

    def _serve_waiting(self) -> None:
        while self._waiting and len(self._meeting.workers) < self._limits.runs:
            question = self._waiting.popleft()
            with contextlib.suppress(OSError):
                question.client.setblocking(False)
                gone = False
                with contextlib.suppress(BlockingIOError):
                    gone = question.client.recv(1, socket.MSG_PEEK) == b""
                if gone:
                    question.client.close()
                    continue
                question.client.settimeout(LISTEN_SECONDS)
            self._reply(question.client, self._start(question.asked["ask"], str(question.asked["run_id"])))
        if self._waiting:
            self._later(1.0, self._serve_waiting)

    # -- children

    def _start(self, what: str, run_id: str) -> dict[str, Any]:
        """Give a run to a child that waits. A run that has a process already keeps it."""
        before = self._meeting.workers.of(run_id)
        if before is not None:
            return {"pid": before.process.pid, "already": True}
        while True:
            spare = self._spares.pop(0) if self._spares else self._fork_spare()
            process = Process.of(spare.pid)
            if process is None:
                spare.line.close()
                continue
            if not self._meeting.workers.add(Worker(run_id, process, self._own)):
                self._spares.append(spare)
                return self._start(what, run_id)
            self._runs[spare.pid] = run_id
            with spare.line:
                try:
                    send(spare.line, {"do": what, "run_id": run_id})
                except OSError:  # it has just died; nothing of the run has begun
                    del self._runs[spare.pid]
                    self._meeting.workers.remove(run_id)
                    continue
            self._later(REFILL_SECONDS, self._fill)
            return {"pid": spare.pid, "stale": self._stale}

    def _fill(self) -> None:
        while len(self._spares) < self._limits.spares and not self._leaving:
            self._spares.append(self._fork_spare())

    def _fork_spare(self) -> _Spare:
        ours, theirs = socket.socketpair()
        pid = self._fork(lambda: _wait_for_a_run(theirs, self._warm), keep=theirs, drop=ours)
        theirs.close()
        return _Spare(pid, ours)

    def _dismiss_spares(self) -> None:
        while self._spares:
            self._spares.pop().line.close()

    def _fork(
        self, work: Callable[[], int], keep: socket.socket | None = None, drop: socket.socket | None = None
    ) -> int:
        pid = os.fork()
        if pid:
            self._watch(pid)
            return pid
        status = UNPROVEN
        try:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)
            self._close_inherited(drop)
            _become_a_process_of_its_own()
            status = work()
        except BaseException:  # there is nobody above to tell; the exit status says that something went wrong
            traceback.print_exc()
        finally:
            _leave(status)

    def _close_inherited(self, drop: socket.socket | None) -> None:
        self._selector.close()
        for one in (self._listener, self._control, drop, *(spare.line for spare in self._spares)):
            if one is not None:
                one.close()
        for question in self._waiting:
            question.client.close()
        for handle in self._handles.values():
            os.close(handle)

    def _watch(self, pid: int) -> None:
        handle = os.pidfd_open(pid)
        self._handles[pid] = handle
        self._selector.register(handle, selectors.EVENT_READ, lambda: self._ended(pid))

    def _ended(self, pid: int) -> None:
        handle = self._handles.pop(pid)
        self._selector.unregister(handle)
        os.close(handle)
        adopted = pid in self._adopted
        if not adopted:  # not yet waited for, so that nobody else can have its pid
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        if pid in self._runs or adopted:
            kill_session(pid)  # steps are groups of their own
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        status = None if adopted else os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        run_id = self._runs.pop(pid, None) or self._adopted.pop(pid, None)
        if run_id is not None:
            if status == 0:
                self._done(run_id)
            else:
                self._report(run_id, _how_it_ended(pid, status))
        elif pid in self._reports:
            run_id, message = self._reports.pop(pid)
            if status == 0:
                self._done(run_id)
            else:
                self._unreported[run_id] = message
                self._later(REPORT_AGAIN_SECONDS, lambda: self._report(run_id, message))
        else:
            spares = [spare for spare in self._spares if spare.pid == pid]
            for spare in spares:
                logger.warning("a waiting child ended (%s); another takes its place", status)
                spare.line.close()
                self._spares.remove(spare)
                self._later(1.0, self._fill)

    def _done(self, run_id: str) -> None:
        self._meeting.workers.remove(run_id)
        self._serve_waiting()

    def _report(self, run_id: str, message: str) -> None:
        self._unreported.pop(run_id, None)
        logger.warning("run %s: %s", run_id, message)
        pid = self._fork(lambda: self._warm.report_end(run_id, message))
        self._reports[pid] = (run_id, message)

    def _adopt(self) -> None:
        """Take over the runs whose parent is gone."""
        self._meeting.workers.remove_drafts()
        for worker in self._meeting.workers:
            if worker.owner.alive:
                continue
            pid = worker.process.pid
            self._meeting.workers.give(worker, self._own)
            with contextlib.suppress(ProcessLookupError):
                self._watch(pid)
            if pid in self._handles and worker.process.alive:
                logger.info("run %s goes on in process %d", worker.run_id, pid)
                self._adopted[pid] = worker.run_id
                continue
            if pid in self._handles:  # another process has the pid by now
                self._selector.unregister(self._handles[pid])
                os.close(self._handles.pop(pid))
            self._report(worker.run_id, _how_it_ended(pid, None))

    # -- cancellation

    def _cancel(self, run_id: str) -> dict[str, Any]:
        for question in [one for one in self._waiting if one.asked.get("run_id") == run_id]:
            self._waiting.remove(question)
            self._reply(question.client, {"cancelled": True})
        if not self._interrupt(run_id, self._limits.cancel_seconds):
            return {"unknown": True}
        return {"ok": True}

    def _interrupt(self, run_id: str, patience: float) -> bool:
        worker = self._meeting.workers.of(run_id)
        if worker is None:
            return False
        worker.process.signal(signal.SIGINT)

        def kill() -> None:
            if worker.process.signal(signal.SIGKILL, group=True):
                logger.warning("run %s did not end %g s after its interrupt: killed", run_id, patience)

        self._later(patience, kill)
        return True


def _how_it_ended(pid: int, status: int | None) -> str:
    who = f"The process of the run (pid {pid})"
    if status is None:
        return f"{who} ended while the run launcher was being restarted, so that how it ended is not known."
    if status >= 0:
        return f"{who} ended with exit status {status} before the run was finished."
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = {
        signal.SIGKILL: " Somebody killed it, or the machine ran out of memory (the kernel's log says so).",
        signal.SIGSEGV: " Native code that it called is at fault; the launcher's log may hold a traceback.",
    }.get(-status, "")  # type: ignore[call-overload]
    return f"{who} was ended by {name} before the run was finished.{hint}"


def _wait_for_a_run(line: socket.socket, warm: Warm) -> int:
    warm.connect()
    message = receive(line)
    line.close()
    if message is None:  # nobody needs it any more
        os._exit(0)
    return 0 if warm.execute(message["run_id"], resume=message["do"] == "resume") else UNPROVEN


def _become_a_process_of_its_own() -> None:
    """Undo what a forked process should not share with its siblings."""
    atexit._clear()  # those of the parent are its own
    random.seed()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    gc.enable()


def _leave(status: int) -> NoReturn:
    """End as a Python program does, but for what belongs to the process that was forked."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # the run is over, one way or the other
        traceback.print_exc()
    finally:
        os._exit(status)


def add_code_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which code is loaded; as those of `dagster api grpc`."""
    parser.add_argument("--module-name", default=None, help="module of the definitions")
    parser.add_argument("--python-file", default=None, help="file of the definitions, instead of a module")
    parser.add_argument("--attribute", default=None, help="name of the definitions in there")
    parser.add_argument("--working-directory", default=None, help="as the code server has it")
    parser.add_argument("--location-name", default=None, help="name of the code location")
    parser.add_argument("--preload", default=None, help="modules to import before the first run, separated by commas")


def add_limit_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each of the limits."""
    standard = Limits()
    parser.add_argument("--runs", type=int, default=standard.runs, help="most runs at the same time")
    parser.add_argument("--spares", type=int, default=standard.spares, help="children that wait for a run")
    parser.add_argument(
        "--cancel-seconds",
        type=float,
        default=standard.cancel_seconds,
        help="from a cancelled run's interrupt to its kill",
    )
    parser.add_argument(
        "--stop-seconds", type=float, default=standard.stop_seconds, help="the same, when the parent is stopped"
    )


def log_to_stderr() -> None:
    """Let the launcher's own lines be seen; other libraries only warn."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logger.setLevel(logging.INFO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Load, say so, and serve. Started by :mod:`.parent` only."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--control", type=int, required=True)
    add_code_options(parser)
    add_limit_options(parser)
    options = parser.parse_args(arguments)
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the parent gets them, and says what to do
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=options.control)
    control.set_inheritable(False)
    with contextlib.suppress(BlockingIOError):
        if not control.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
            return 1  # the parent ended before the kernel knew that this process wants to end with it
    try:
        from clinical_orchestration.execution.warm_up import warm_up

        warm = warm_up(
            module_name=options.module_name,
            python_file=options.python_file,
            attribute=options.attribute,
            working_directory=options.working_directory,
            location_name=options.location_name,
            preload=options.preload.split(",") if options.preload else (),
        )
        limits = Limits(options.runs, options.spares, options.cancel_seconds, options.stop_seconds)
        version = Version(Meeting(options.folder), control, warm, limits)
    except Exception as error:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            send(control, {"failed": f"{type(error).__name__}: {error}"[:2000]})
        return 1
    gc.collect()
    gc.freeze()  # else the first collection in a child copies all of it
    gc.disable()
    version.run()
    return 0


if __name__ == "__main__":
    log_to_stderr()
    sys.exit(main())
