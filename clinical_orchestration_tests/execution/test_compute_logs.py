"""Output of steps in files: what is in them, and where the descriptors lead afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from dagster import DagsterInstance
from dagster._core.instance_for_test import instance_for_test
from dagster._core.storage.compute_log_manager import CapturedLogData, ComputeIOType

from clinical_orchestration.execution.compute_logs import DirectComputeLogManager

KEY = ["run", "compute_logs", "file"]
PLAYER = """
import json, os, subprocess, sys, threading, traceback
from clinical_orchestration.execution.compute_logs import DirectComputeLogManager
for line in sys.stdin:
    folder, script = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT), number)
        os.closerange(3, 64)
        manager = DirectComputeLogManager(folder)
        key = lambda name: ["run", "compute_logs", name]
        def read(name):
            found = manager.get_log_data(key(name))
            return ((found.stdout or b"").decode(), (found.stderr or b"").decode())
        try:
            exec(script)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        if sys.stdout:
            sys.stdout.flush()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Player:
    """Runs scripts, each in a fork of one process that has imported what they need."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def play(self, folder: Path, script: str) -> tuple[str, str]:
        """Run a script with a manager on the folder, and return what reached its own output."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(folder), script]) + "\n")
        self._process.stdin.flush()
        status = self._process.stdout.readline().strip()
        out, err = (folder / "out").read_text(), (folder / "err").read_text()
        assert status == "0", err
        return out, err


@pytest.fixture(scope="module")
def player() -> Iterator[Player]:
    """One process for all scripts."""
    with subprocess.Popen(
        [sys.executable, "-c", PLAYER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Player(process)
        assert process.stdin is not None
        process.stdin.close()


def _captured(folder: Path, name: str) -> tuple[str, str]:
    found = DirectComputeLogManager(str(folder)).get_log_data(["run", "compute_logs", name])
    return (found.stdout or b"").decode(), (found.stderr or b"").decode()


def test_output_of_python_and_of_other_processes_is_captured_and_the_rest_is_not(
    tmp_path: Path, player: Player
) -> None:
    out, err = player.play(
        tmp_path,
        """
print("before", end="")  # in the buffer when the capture begins
with manager.capture_logs(key("a")):
    print("inside")
    print("a warning", file=sys.stderr)
    os.write(1, b"raw\\n")
    subprocess.run(["sh", "-c", "echo from a child; echo its error >&2"], check=True)
    print("last", end="")  # in the buffer when the capture ends
print("after")
""",
    )

    assert _captured(tmp_path, "a") == ("inside\nraw\nfrom a child\nlast", "a warning\nits error\n")
    assert (out, err) == ("beforeafter\n", "")


def test_output_is_readable_while_it_is_written_and_nothing_is_started_for_it(tmp_path: Path, player: Player) -> None:
    player.play(
        tmp_path,
        """
started = []
sys.addaudithook(lambda event, _: started.append(event) if event in ("subprocess.Popen", "os.fork") else None)
with manager.capture_logs(key("a")):
    print("so far")
    assert read("a") == ("so far\\n", ""), read("a")
    assert not manager.is_capture_complete(key("a"))
assert manager.is_capture_complete(key("a"))
assert started == [], started
assert threading.active_count() == 1
assert len(os.listdir("/proc/self/fd")) == 4, os.listdir("/proc/self/fd")  # one of them is of the listing
""",
    )


def test_captures_in_captures_and_after_an_error(tmp_path: Path, player: Player) -> None:
    out, _ = player.play(
        tmp_path,
        """
with manager.capture_logs(key("outer")):
    print("one")
    try:
        with manager.capture_logs(key("inner")):
            print("two")
            raise ValueError
    except ValueError:
        print("three")
print("four")
assert manager.is_capture_complete(key("inner"))
""",
    )

    assert _captured(tmp_path, "outer")[0] == "one\nthree\n"
    assert _captured(tmp_path, "inner")[0] == "two\n"
    assert out == "four\n"


def test_captures_that_overlap_in_threads_leave_the_descriptors_as_they_were(tmp_path: Path, player: Player) -> None:
    out, _ = player.play(
        tmp_path,
        """
first, second = manager.capture_logs(key("first")), manager.capture_logs(key("second"))
first.__enter__()
second.__enter__()
first.__exit__(None, None, None)
print("in the second")
second.__exit__(None, None, None)
print("in none")
""",
    )

    assert _captured(tmp_path, "second")[0] == "in the second\n"
    assert out == "in none\n"


def test_a_forked_process_captures_for_itself(tmp_path: Path, player: Player) -> None:
    out, _ = player.play(
        tmp_path,
        """
with manager.capture_logs(key("worker")):
    print("worker")
    pid = os.fork()
    if pid == 0:
        with manager.capture_logs(key("step")):
            print("step")
        print("step, in what it inherited", flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
    print("worker again")
print("end")
""",
    )

    assert _captured(tmp_path, "step")[0] == "step\n"
    assert _captured(tmp_path, "worker")[0] == "worker\nstep, in what it inherited\nworker again\n"
    assert out == "end\n"


def test_a_service_without_standard_output_captures_too(tmp_path: Path, player: Player) -> None:
    player.play(
        tmp_path,
        """
sys.stdout = None
with manager.capture_logs(key("a")):
    os.write(1, b"raw\\n")
assert read("a") == ("raw\\n", "")
""",
    )


def test_the_instance_makes_it_and_readers_follow_it(tmp_path: Path) -> None:
    chosen = {
        "module": DirectComputeLogManager.__module__,
        "class": "DirectComputeLogManager",
        "config": {"base_dir": str(tmp_path / "logs"), "polling_timeout": 0.05},
    }
    seen: list[CapturedLogData] = []
    arrived = threading.Event()
    with instance_for_test(overrides={"compute_logs": chosen}) as instance:
        manager = instance.compute_log_manager
        assert type(manager) is DirectComputeLogManager
        with manager.open_log_stream(KEY, ComputeIOType.STDOUT) as stream:
            assert stream is not None
            stream.write("first\n")
        subscription = manager.subscribe(KEY)
        subscription(lambda data: (seen.append(data), arrived.set()))
        arrived.wait(5)
        assert [data.stdout for data in seen] == [b"first\n"]
        manager.complete(KEY)
        assert manager.is_capture_complete(KEY)
        subscription.dispose()
        _has_stock_options(instance)


def _has_stock_options(instance: DagsterInstance) -> None:
    manager = instance.compute_log_manager
    assert isinstance(manager, DirectComputeLogManager)
    assert manager.polling_timeout == pytest.approx(0.05)
