"""Make the Python environment of a checkout: the first-use set-up behind ``pipeline-manager.sh``.

This file runs before anything is installed, with the standard library only, by any Python 3.11 to 3.13, and is no
importer of the package. It can be interrupted and repeated at any point: the stamp that marks the environment as
complete is written last, and everything before it is safe to do again.

Exit status: 0 ready, 1 failed (the message says why and what to do), 3 with ``--check`` where a set-up is needed,
130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

UV_VERSION = "0.13.9"
OLDEST_UV = (0, 8)  # reads this lock file's revision
STAMP = ".clinical-ready"
NEEDED_BYTES = 3 * 1024**3  # environment and build of pyspark, measured at 2.2 GB and 0.5 GB
_DOWNLOAD = re.compile(r"Downloading (\S+) \(([\d.]+)\s*(KiB|MiB|GiB)\)")
_UNITS = {"KiB": 1 / 1024, "MiB": 1.0, "GiB": 1024.0}
# pip's settings that would put uv elsewhere or refuse; those that say how to reach an index stay
_PIP_SPOILERS = ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_REQUIRE_VIRTUALENV", "PIP_REQUIREMENT",
                 "PIP_CONSTRAINT", "PIP_NO_DEPS", "PIP_DRY_RUN", "PIP_PYTHON", "PIP_NO_BINARY")  # fmt: skip
_UV_SPOILERS = ("UV_LOCKED", "UV_FROZEN", "UV_NO_DEV", "UV_NO_GROUP", "UV_NO_DEFAULT_GROUPS", "UV_PYTHON", "UV_PROJECT",
                "UV_WORKING_DIR", "UV_ISOLATED", "UV_NO_EDITABLE", "UV_NO_SYNC", "UV_NO_BINARY", "UV_SYSTEM_PYTHON",
                "UV_NO_INSTALL_PROJECT", "UV_EXCLUDE_NEWER")  # fmt: skip


class SetupError(Exception):
    """The set-up cannot go on.

    Args:
        what: what failed.
        why: the cause, as far as known.
        cure: what the user can do.
    """

    def __init__(self, what: str, why: str, cure: str) -> None:
        super().__init__(what)
        self.what, self.why, self.cure = what, why, cure


def fingerprint(root: Path) -> str:
    """Return the hash of what the environment is made from: lock file, project file, and where the checkout is."""
    digest = hashlib.sha256(str(root).encode())
    for name in ("uv.lock", "pyproject.toml"):
        try:
            digest.update((root / name).read_bytes())
        except OSError as error:
            raise SetupError(f"{root / name} cannot be read", str(error), "check that the clone is complete") from error
    return digest.hexdigest()


def is_ready(root: Path, venv: Path) -> bool:
    """Say whether `venv` was completed for the present lock file of `root`."""
    try:
        return (venv / STAMP).read_text(encoding="ascii").strip() == fingerprint(root)
    except (OSError, UnicodeDecodeError):
        return False


class Display:
    """Progress on one stream: a line that moves on a terminal, plain lines elsewhere.

    Args:
        stream: where to write; standard error, so that the output of a command stays clean.
        steps: how many steps there are.
    """

    def __init__(self, stream: TextIO, steps: int) -> None:
        self._stream, self._steps, self._step = stream, steps, 0
        self._live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._frame, self._said = 0, time.monotonic()

    def step(self, text: str) -> None:
        """Begin the next step."""
        self._step += 1
        self.clear()
        self._say(f"[{self._step}/{self._steps}] {text}")

    def note(self, text: str) -> None:
        """Write one line that stays."""
        self.clear()
        self._say(f"      {text}")

    def tick(self, text: str, *, every: float = 15.0) -> None:
        """Show that something goes on: at each call on a terminal, else a line every `every` seconds."""
        if self._live:
            self._frame += 1
            width = shutil.get_terminal_size().columns - 1
            line = f"      {'⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏'[self._frame % 10]} {text}"
            self._stream.write(f"\r\x1b[K{line[:width]}")
            self._stream.flush()
        elif time.monotonic() - self._said >= every:
            self._say(f"      ... {text}")

    def clear(self) -> None:
        """Remove the moving line."""
        if self._live:
            self._stream.write("\r\x1b[K")

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        self._stream.write(text + "\n")
        self._stream.flush()


class UvProgress:
    """What uv's own messages say about how far it is."""

    def __init__(self) -> None:
        self.phase = "downloading"
        self.megabytes = 0.0
        self._sizes: dict[str, float] = {}
        self._done = 0.0

    def feed(self, line: str) -> str | None:
        """Take one line; return it shortened where a reader without a terminal should see it."""
        line = line.strip()
        if match := _DOWNLOAD.search(line):
            size = float(match[2]) * _UNITS[match[3]]
            self._sizes[match[1]] = size
            self.megabytes += size
        elif line.startswith("Downloaded "):
            self._done += self._sizes.get(line.split()[1], 0.0)
        elif line.startswith("Building "):
            self.phase = f"building {line.split()[1]}"
        elif line.startswith("Prepared "):
            self.phase = "installing"
            return line
        elif line.startswith("Installed "):
            self.phase = "compiling bytecode"
            return line
        elif line.startswith("Bytecode compiled"):
            return line
        return None

    def text(self) -> str:
        """Return the phase, with the share of the announced downloads that is done."""
        if self.phase.startswith(("downloading", "building")) and self._done < self.megabytes:
            share = 100 * self._done / self.megabytes
            return f"downloading {self._done:.0f} of {self.megabytes:.0f} MB ({share:.0f} %)"
        return self.phase


def run(
    command: list[str], environment: dict[str, str], display: Display, describe: Callable[[], str],
    on_line: Callable[[str], None] | None = None,
) -> tuple[int, str]:  # fmt: skip
    """Run `command` with its output captured, showing progress; return its exit status and the end of its output.

    The child is ended with us when we are interrupted.
    """
    started = time.monotonic()
    kept: list[str] = []
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, errors="replace")  # fmt: skip

    def read() -> None:
        if process.stdout is None:
            return
        for line in process.stdout:
            kept.append(line)
            del kept[:-200]
            if on_line:
                on_line(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while process.poll() is None:
            display.tick(f"{describe()}, {time.monotonic() - started:.0f} s")
            time.sleep(0.15)
    except BaseException:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        raise
    reader.join(5)
    display.clear()
    return process.returncode, "".join(kept)


def diagnose(output: str, folder: Path) -> tuple[str, str]:
    """Return the cause and the cure that the output of a failed step and the state of the machine point to."""
    lowered = output.lower()
    lines = [line.strip().removeprefix("cause: ") for line in output.splitlines() if line.strip()]
    last = lines[-1] if lines else "no output"

    def telling(words: tuple[str, ...]) -> str | None:
        return next((line for line in lines if any(word in line.lower() for word in words)), None)

    free = shutil.disk_usage(folder).free if folder.exists() else NEEDED_BYTES
    if "no space left" in lowered or "os error 28" in lowered or "errno 28" in lowered or free < 100 * 1024**2:
        return (f"the disk that holds {folder} is full ({free / 1024**2:.0f} MB free)",
                f"free about {NEEDED_BYTES / 1024**3:.0f} GB there, or name another folder in CLINICAL_VENV"
                " (and UV_CACHE_DIR), then repeat")  # fmt: skip
    if line := telling(("certificate", "unknownissuer")):
        return (f"a server's certificate is not trusted: {line}",
                "set SSL_CERT_FILE to your organisation's certificate bundle, then repeat")  # fmt: skip
    if line := telling(("permission denied", "os error 13", "read-only file")):
        return (f"no permission to write: {line}",
                f"make {folder} writable, or name another folder in CLINICAL_VENV")  # fmt: skip
    if line := telling(("dns error", "resolv", "connect", "timed out", "timeout", "unreachable", "failed to fetch")):
        return (f"the package index cannot be reached: {line}",
                "check the network (HTTPS_PROXY behind a proxy), then repeat: what is there is kept")  # fmt: skip
    return last, "repeat; if it stays, the log named above has the whole story"


def writable_environment(venv: Path) -> dict[str, str]:
    """Return the environment for pip and uv: caller's network settings kept, what would spoil the result removed."""
    environment = {key: value for key, value in os.environ.items() if key not in (*_PIP_SPOILERS, *_UV_SPOILERS)}
    environment |= {
        "UV_PROJECT_ENVIRONMENT": str(venv), "UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1", "NO_COLOR": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_NO_COLOR": "1",
    }  # fmt: skip
    for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if environment.get(name) and "SSL_CERT_FILE" not in environment:
            environment["SSL_CERT_FILE"] = environment[name]
    if "UV_CACHE_DIR" not in environment:
        base = environment.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        if not _can_write(Path(base)):
            environment["UV_CACHE_DIR"] = str(venv / ".cache")
            environment["PIP_NO_CACHE_DIR"] = "1"
            environment["HOME"] = str(venv / ".home")  # tools that a build starts look for one too
            (venv / ".home").mkdir(parents=True, exist_ok=True)
    return environment


def _can_write(folder: Path) -> bool:
    """Say whether `folder`, or the nearest folder above it that exists, can be written."""
    while not folder.exists():
        if folder == folder.parent:
            return False
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


@contextlib.contextmanager
def exclusive(venv: Path, display: Display) -> Iterator[None]:
    """Hold the set-up lock of `venv`; waits for another set-up. The kernel frees it when its holder ends."""
    try:
        venv.mkdir(parents=True, exist_ok=True)
        handle = (venv / ".setup.lock").open("a+", encoding="ascii")
    except OSError as error:
        raise SetupError(
            f"the environment {venv} cannot be made", str(error),
            "make that folder writable, or name another one in CLINICAL_VENV",
        ) from error  # fmt: skip
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            display.note(f"another set-up is at work (process {handle.read().strip() or 'unknown'}); waiting for it")
            started = time.monotonic()
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    display.tick(f"waiting, {time.monotonic() - started:.0f} s")
                    time.sleep(0.3)
            display.clear()
        handle.seek(0)
        handle.truncate()
        handle.write(f"{os.getpid()}\n")
        handle.flush()
        yield


def find_uv(venv: Path, environment: dict[str, str], display: Display) -> str:
    """Return a uv that reads the lock file: the one on PATH, the one installed before, or a pinned one by pip."""
    tools = venv / ".tools"
    for candidate in (shutil.which("uv"), str(tools / "bin" / "uv")):
        if candidate and (version := _uv_version(candidate)) and version >= OLDEST_UV:
            return candidate
    wanted = ["install", "--quiet", "--retries", "2", "--timeout", "20", "--upgrade", "--target", str(tools)]
    output = ""
    for python in _pythons_with_pip(venv, environment):
        # first with the caller's pip settings (a mirror may be the only way out), then without them
        for extra in ([], ["--isolated"]):
            command = [python, "-m", "pip", *extra, *wanted, f"uv=={UV_VERSION}"]
            status, output = run(command, environment, display, lambda: "installing uv")
            if status == 0 and _uv_version(str(tools / "bin" / "uv")):
                return str(tools / "bin" / "uv")
        if "No matching distribution" in output or "connection" in output.lower():
            break  # another pip would reach no more than this one
    if not output:
        raise SetupError(
            "uv, which installs the packages, could not be installed",
            f"{sys.executable} has neither pip nor the module ensurepip",
            "install them (Debian, Ubuntu: apt install python3-venv), or put uv on PATH (https://docs.astral.sh/uv)",
        )
    raise SetupError("uv, which installs the packages, could not be installed", *diagnose(output, venv))


def _pythons_with_pip(venv: Path, environment: dict[str, str]) -> Iterator[str]:
    """Yield interpreters that have pip: ours, or a throw-away environment with the pip that Python carries."""
    quiet = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": False}
    if subprocess.run([sys.executable, "-m", "pip", "--version"], **quiet).returncode == 0:  # type: ignore[call-overload]
        yield sys.executable
    helper = venv / ".pip"
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(helper)], **quiet)  # type: ignore[call-overload]
    if made.returncode == 0:
        yield str(helper / "bin" / "python")
    shutil.rmtree(helper, ignore_errors=True)


def _uv_version(program: str) -> tuple[int, ...] | None:
    """Return the version of a uv, or None where it does not run."""
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.match(r"uv (\d+)\.(\d+)", said)
    return (int(match[1]), int(match[2])) if match else None


def prepare_folder(root: Path, venv: Path) -> None:
    """Make `venv` an empty environment where it is none, and start over where its Python is gone or unsuitable."""
    free = shutil.disk_usage(venv).free
    fresh = not (venv / "pyvenv.cfg").exists()
    if fresh and free < NEEDED_BYTES:
        raise SetupError(
            f"too little space for the environment {venv}",
            f"{free / 1024**3:.1f} GB are free, about {NEEDED_BYTES / 1024**3:.0f} GB are needed",
            "free some, or name a folder on another disk in CLINICAL_VENV",
        )
    if not fresh:
        probe = [str(venv / "bin" / "python"), "-I", "-S", "-c", "import sys; print(*sys.version_info[:2])"]
        try:
            said = subprocess.run(probe, capture_output=True, text=True, timeout=20, check=False).stdout.split()
        except OSError:
            said = []
        if said and (3, 11) <= (int(said[0]), int(said[1])) < (3, 14):
            return
        for entry in venv.iterdir():  # not the folder itself: it holds the lock
            if entry.name not in (".setup.lock", ".cache", ".tools"):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", "--prompt", root.name, str(venv)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode:
        why, cure = diagnose(made.stdout + made.stderr, venv)
        if "No module named venv" in made.stderr:
            why = f"{sys.executable} lacks the module venv"
            cure = "install it (Debian, Ubuntu: apt install python3-venv), or name another Python in CLINICAL_PYTHON"
        raise SetupError(f"the environment {venv} cannot be made", why, cure)


class JarFetch:
    """Fetches the jars of Kafka and the Spark connectors while the bytecode is compiled.

    Args:
        root: the checkout.
        venv: its environment; the fetcher needs a few of its packages.
    """

    def __init__(self, root: Path, venv: Path) -> None:
        self.log = venv / "jars.log"
        self._root, self._venv = root, venv
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin in the background; a second call does nothing."""
        if self._process is None:
            with self.log.open("wb") as output:
                self._process = subprocess.Popen(
                    [str(self._venv / "bin" / "python"), "-m", "clinical_orchestration.stack.cli", "--fetch-jars"],
                    cwd=self._root, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                )  # fmt: skip

    def stop(self) -> None:
        """End it; what was downloaded stays."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def finish(self, display: Display, limit: float = 90.0) -> None:
        """Wait at most `limit` seconds; what is missing is fetched at the first start, so this never fails."""
        self.start()
        process, started = self._process, time.monotonic()
        while process is not None and process.poll() is None and time.monotonic() - started < limit:
            display.tick(f"fetching, {time.monotonic() - started:.0f} s")
            time.sleep(0.2)
        display.clear()
        self.stop()
        if process is not None and process.returncode:
            display.note(f"not complete; the start of the stack tries again and says what is missing ({self.log})")


def set_up(root: Path, venv: Path, display: Display, *, again: bool = False) -> None:
    """Bring the environment to what the lock file says; with `again` also where it was complete before.

    Raises:
        SetupError: with cause and cure.
    """
    started = time.monotonic()
    with exclusive(venv, display):
        if not again and is_ready(root, venv):  # the one we waited for has done it
            return
        wanted = fingerprint(root)
        display.step(f"Python {sys.version.split()[0]} ({sys.executable})")
        prepare_folder(root, venv)
        (venv / STAMP).unlink(missing_ok=True)
        environment = writable_environment(venv)
        jars = JarFetch(root, venv)
        try:
            display.step("uv, which installs the packages")
            uv = find_uv(venv, environment, display)
            display.step("Packages of uv.lock, with compiled bytecode (a few minutes the first time)")
            _sync(root, venv, uv, environment, display, jars)
            display.step("Jars of Kafka and the Spark connectors")
            jars.finish(display)
        except BaseException:
            jars.stop()
            raise
        temporary = venv / f"{STAMP}.new"
        temporary.write_text(wanted + "\n", encoding="ascii")
        temporary.replace(venv / STAMP)
    display.note(f"environment ready in {time.monotonic() - started:.0f} s")


def _sync(root: Path, venv: Path, uv: str, environment: dict[str, str], display: Display, jars: JarFetch) -> None:
    progress = UvProgress()
    log = (venv / "setup.log").open("w", encoding="utf-8")

    def on_line(line: str) -> None:
        log.write(line)
        log.flush()
        if note := progress.feed(line):
            display.note(note)
            if progress.phase == "compiling bytecode":
                jars.start()

    command = [uv, "sync", "--project", str(root), "--python", str(venv / "bin" / "python"), "--frozen",
               "--compile-bytecode"]  # fmt: skip
    with log:
        status, output = run(command, environment, display, progress.text, on_line)
    if status:
        for line in output.splitlines()[-8:]:
            display.note(line)
        why, cure = diagnose(output, venv)
        raise SetupError(f"the packages could not be installed (log: {venv / 'setup.log'})", why, cure)
    # the checkout's own code is not part of what uv compiles
    subprocess.run(
        [str(venv / "bin" / "python"), "-m", "compileall", "-q", "-j", "0", str(root / "clinical_orchestration")],
        check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the set-up, or with ``--check`` only say by the exit status whether one is needed."""
    parser = argparse.ArgumentParser(description="Make the environment of this checkout.")
    parser.add_argument("--root", type=Path, required=True, help="the checkout")
    parser.add_argument("--venv", type=Path, required=True, help="the environment's folder")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 3 where a set-up is needed")
    parser.add_argument("--again", action="store_true", help="install again, even where it is complete")
    options = parser.parse_args(arguments)
    display = Display(sys.stderr, steps=4)
    try:
        if options.check:
            return 0 if is_ready(options.root, options.venv) else 3
        set_up(options.root, options.venv, display, again=options.again)
    except SetupError as error:
        display.clear()
        sys.stderr.write(f"error: {error.what}\n  why:  {error.why}\n  cure: {error.cure}\n")
        return 1
    except KeyboardInterrupt:
        display.clear()
        sys.stderr.write("interrupted; the same command continues where this one stopped\n")
        return 130
    except OSError as error:
        display.clear()
        why, cure = diagnose(str(error), options.venv)
        sys.stderr.write(f"error: the set-up of {options.venv} failed\n  why:  {why}\n  cure: {cure}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
