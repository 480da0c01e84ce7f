"""The set-up on first use: the Python that is found, stamp, lock, diagnosis; without installing anything."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from clinical_orchestration.stack import bootstrap

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "pipeline-manager.sh"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the script needs of a checkout, under a path with a space."""
    root = tmp_path / "my checkout"
    (root / "clinical_orchestration" / "stack").mkdir(parents=True)
    shutil.copy(SCRIPT, root / "pipeline-manager.sh")
    shutil.copy(ROOT / "clinical_orchestration" / "stack" / "bootstrap.py", root / "clinical_orchestration" / "stack")
    (root / "uv.lock").write_text("version = 1\n")
    (root / "pyproject.toml").write_text("[project]\n")
    return root


def _run(
    checkout: Path, *arguments: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    values = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment}
    return subprocess.run(
        [str(checkout / "pipeline-manager.sh"), *arguments],
        env=values, cwd=cwd, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def _pretend_ready(checkout: Path, venv: Path) -> None:
    """Make an environment whose Python only prints what it is started with."""
    (venv / "bin").mkdir(parents=True)
    fake = venv / "bin" / "python"
    fake.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = -I ]; then exec "{sys.executable}" "$@"; fi\n'
        'echo "$@"; echo "checkout=$CLINICAL_CHECKOUT bytecode=${PYTHONDONTWRITEBYTECODE-unset}"\n'
    )
    fake.chmod(0o755)
    (venv / bootstrap.STAMP).write_text(bootstrap.fingerprint(checkout))


def test_no_python_gives_the_cause_and_the_cure(checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "readlink", "env"):
        (tools / name).symlink_to(str(shutil.which(name)))
    # the folders looked at besides PATH cannot be taken away, so that a copy of the script without them is tried
    script = checkout / "pipeline-manager.sh"
    text = script.read_text()
    start = text.index("      /usr/local/bin/python3")
    script.write_text(text[:start] + text[text.index("; do", start) :])
    (tools / "python3").write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.1"; exit 1\n')
    (tools / "python3").chmod(0o755)
    result = _run(checkout, "--help", PATH=str(tools))
    assert result.returncode == 1
    assert "no Python 3.11, 3.12 or 3.13 was found" in result.stderr
    assert "Python 3.8.1" in result.stderr
    assert "CLINICAL_PYTHON" in result.stderr


def test_a_wrong_clinical_python_is_named(checkout: Path) -> None:
    result = _run(checkout, "--help", CLINICAL_PYTHON="/nowhere/python9")
    assert result.returncode == 1
    assert "CLINICAL_PYTHON=/nowhere/python9" in result.stderr


def test_a_ready_environment_starts_at_once_from_anywhere(checkout: Path, tmp_path: Path) -> None:
    _pretend_ready(checkout, checkout / ".venv")
    link = tmp_path / "link.sh"
    link.symlink_to(checkout / "pipeline-manager.sh")
    values = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": "/nowhere"}
    values.pop("CLINICAL_VENV", None)
    result = subprocess.run(
        [str(link), "--run", "a job", "--conf", '{"a": 1}'],
        cwd="/",
        env=values,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = result.stdout.splitlines()
    assert first == '-m clinical_orchestration.cli.main --run a job --conf {"a": 1}'
    assert second == f"checkout={checkout} bytecode=unset"


def test_another_folder_for_the_environment(checkout: Path, tmp_path: Path) -> None:
    _pretend_ready(checkout, tmp_path / "elsewhere")
    result = _run(checkout, "--help", CLINICAL_VENV=str(tmp_path / "elsewhere"))
    assert result.returncode == 0
    assert "cli.main --help" in result.stdout


@pytest.mark.parametrize("change", ["uv.lock", "pyproject.toml", "moved", "interrupted"])
def test_the_stamp_holds_for_one_lock_one_project_and_one_place(checkout: Path, tmp_path: Path, change: str) -> None:
    venv = tmp_path / "venv"
    _pretend_ready(checkout, venv)
    assert bootstrap.is_ready(checkout, venv)
    if change == "moved":
        checkout = checkout.rename(tmp_path / "moved")
    elif change == "interrupted":
        (venv / bootstrap.STAMP).unlink()
    else:
        (checkout / change).write_text("changed")
    assert not bootstrap.is_ready(checkout, venv)
    assert bootstrap.main(["--root", str(checkout), "--venv", str(venv), "--check"]) == 3


def test_a_second_set_up_waits_for_the_first(tmp_path: Path) -> None:
    stream = io.StringIO()
    display = bootstrap.Display(stream, 4)
    entered = threading.Event()

    def second() -> None:
        with bootstrap.exclusive(tmp_path, display):
            entered.set()

    with (tmp_path / ".setup.lock").open("a+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.write("4711\n")
        handle.flush()
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.5)
        assert not entered.is_set()
        fcntl.flock(handle, fcntl.LOCK_UN)
        thread.join(10)
    assert entered.is_set()
    assert "another set-up is at work (process 4711)" in stream.getvalue()


def test_a_set_up_that_was_overtaken_does_nothing(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv = tmp_path / "venv"
    _pretend_ready(checkout, venv)
    monkeypatch.setattr(bootstrap, "prepare_folder", lambda *_: pytest.fail("it started to install"))
    bootstrap.set_up(checkout, venv, bootstrap.Display(io.StringIO(), 4))


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("error: No space left on device (os error 28)", "is full"),
        ("error: client error (Connect): dns error: failed to lookup address", "cannot be reached"),
        ("invalid peer certificate: UnknownIssuer", "not trusted"),
        ("error: failed to create directory: Permission denied (os error 13)", "no permission"),
        ("error: something else\n", "error: something else"),
        ("", "no output"),
    ],
)
def test_diagnosis_names_cause_and_cure(tmp_path: Path, output: str, why: str) -> None:
    cause, cure = bootstrap.diagnose(output, tmp_path)
    assert why in cause
    assert cure


def test_a_folder_that_cannot_be_made_is_an_error_with_a_cure(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert bootstrap.main(["--root", str(checkout), "--venv", str(tmp_path / "file" / "venv")]) == 1
    assert "CLINICAL_VENV" in capsys.readouterr().err


def test_too_little_space_is_said_before_anything_is_done(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**9))
    assert bootstrap.main(["--root", str(checkout), "--venv", str(tmp_path / "venv")]) == 1
    assert "too little space" in capsys.readouterr().err


def test_without_a_writable_home_everything_stays_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/proc/nowhere")
    for name in ("XDG_CACHE_HOME", "UV_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_USER", "1")
    monkeypatch.setenv("UV_LOCKED", "1")
    monkeypatch.setattr(bootstrap, "_can_write", lambda folder: not str(folder).startswith("/proc"))
    environment = bootstrap.writable_environment(tmp_path)
    assert environment["UV_CACHE_DIR"] == str(tmp_path / ".cache")
    assert environment["HOME"] == str(tmp_path / ".home")
    assert "PIP_USER" not in environment
    assert "UV_LOCKED" not in environment


def test_progress_of_uv_is_read_from_its_words() -> None:
    progress = bootstrap.UvProgress()
    for line in ("Downloading pyspark (400.0MiB)", "Downloading polars (100.0MiB)", " Downloaded polars"):
        assert progress.feed(line) is None
    assert progress.text() == "downloading 100 of 500 MB (20 %)"
    assert progress.feed("Installed 182 packages in 2s") == "Installed 182 packages in 2s"
    assert progress.text() == "compiling bytecode"


def test_a_step_that_fails_keeps_its_last_words(tmp_path: Path) -> None:
    display = bootstrap.Display(io.StringIO(), 4)
    status, output = bootstrap.run(
        [sys.executable, "-S", "-c", "print('no route'); raise SystemExit(3)"], dict(os.environ), display, lambda: "x"
    )
    assert (status, output) == (3, "no route\n")
