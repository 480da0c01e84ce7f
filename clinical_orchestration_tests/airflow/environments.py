"""Python environments of the tools that speak to Airflow: made once, kept in the user's cache, never ours.

A tool is pinned; another pin makes another folder. uv makes them where there is one, else `venv` and pip.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

AIRFLOW = "apache-airflow==2.11.0"
OFFICIAL = ("apache-airflow-client==2.10.0",)
AIRLIFT = ("dagster-airlift==0.29.27", "dagster==1.13.27", "dagster-webserver==1.13.27")
SCHEMATHESIS = ("schemathesis==4.32.5", "pip")
DOCUMENT = "airflow/api_connexion/openapi/v1.yaml"
LIMIT_SECONDS = 280

_ROOT = Path(__file__).resolve().parents[2]


def cache_folder() -> Path:
    """Return where the environments are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "clinical-orchestration" / "test-tools"


def find_uv() -> str | None:
    """Return the uv on PATH, or the one that the set-up installed."""
    return shutil.which("uv") or shutil.which("uv", path=str(_ROOT / ".venv" / ".tools" / "bin"))


def environment(*requirements: str) -> Path:
    """Return the Python of an environment that has these packages; skip the test where they cannot be had.

    Options of `uv pip install` and of `pip install` may follow the packages.
    """
    name = requirements[0].partition("=")[0] + "-" + hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:12]
    folder = cache_folder() / name
    python = folder / "bin" / "python"
    with _locked(name):
        if not (folder / "complete").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            if uv := find_uv():
                _run(uv, "venv", "--quiet", "--python", sys.executable, str(folder))
                _run(uv, "pip", "install", "--quiet", "--python", str(python), *requirements)
            else:
                _run(sys.executable, "-m", "venv", str(folder))
                _run(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements)
            (folder / "complete").touch()
    return python


def airflow_document() -> Path:
    """Return Airflow's own OpenAPI document, out of its wheel, which is not installed."""
    file = cache_folder() / f"{AIRFLOW.replace('==', '-')}.yaml"
    if not file.is_file():
        python = environment(*SCHEMATHESIS)
        with _locked(file.name):
            folder = cache_folder() / f"{file.stem}-wheel"
            _run(str(python), "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), AIRFLOW)
            with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
                text = wheel.read(DOCUMENT)
            shutil.rmtree(folder)
            part = file.with_suffix(".part")
            part.write_bytes(text)
            part.replace(file)
    return file


class _locked:  # noqa: N801 - used as a function
    """One process at a time makes an environment."""

    def __init__(self, name: str) -> None:
        cache_folder().mkdir(parents=True, exist_ok=True)
        self._file = (cache_folder() / f"{name}.lock").open("w")

    def __enter__(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _run(*command: str) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, env=kept, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"no answer from the package index within {LIMIT_SECONDS} s: {Path(command[0]).name} {command[1]}")
    if done.returncode:
        pytest.skip(f"the tool cannot be installed from the package index: {done.stderr.strip()[-300:]}")
