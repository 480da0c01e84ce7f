"""The warm parent when the code that it holds changes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clinical_orchestration_tests.databases import new_database
from clinical_orchestration_tests.execution.warm_world import ROOT, World, wait_for, warm_world

GOOD = "import dagster as dg\n\n@dg.op\ndef one() -> None: ...\n\n@dg.job\ndef only() -> None:\n    one()\n"


@pytest.fixture
def world(postgres_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "changing_code.py").write_text(GOOD)
    database = new_database(postgres_env["POSTGRES_URL"], f"warm_parent_{time.time_ns()}")
    with warm_world(database, tmp_path / "home", module="changing_code", code_server=False) as made:
        monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path / 'code'}")
        made.options = ["--watch", str(tmp_path / "code")]
        yield made


def test_a_change_is_loaded_and_a_broken_one_is_not(world: World, tmp_path: Path) -> None:
    code = tmp_path / "code" / "changing_code.py"
    world.start_parent()
    first = (world.ping() or {})["pid"]

    code.write_text("import a_module_that_is_not_there\n")
    wait_for(lambda: bool((world.ping() or {}).get("stale")), 60, lambda: world.log)
    now = world.ping() or {}
    assert now["pid"] == first, "the code of before serves on"
    assert "a_module_that_is_not_there" in now["stale"]
    assert "ERROR the code does not load" in world.log

    code.write_text(GOOD + "# changed\n")
    wait_for(lambda: (world.ping() or {"pid": first})["pid"] != first, 60, lambda: world.log)
    assert (world.ping() or {})["stale"] == ""
    wait_for(lambda: not (Path("/proc") / str(first)).exists(), 10, lambda: world.log)


def test_code_that_does_not_load_at_all_ends_the_parent(world: World, tmp_path: Path) -> None:
    (tmp_path / "code" / "changing_code.py").write_text("1 / 0\n")
    world.start_parent(ready=False)
    parent = world.parent
    assert parent is not None
    assert parent.wait(60) == 1
    assert "ZeroDivisionError" in world.log
    assert world.ping() is None


def test_modules_are_imported_before_the_first_run(world: World, tmp_path: Path) -> None:
    (tmp_path / "code" / "a_slow_module.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'imported')!r}).touch()\n"
    )
    world.start_parent("--preload", "colorsys,a_slow_module")
    assert (tmp_path / "imported").exists()
    world.stop_parent()
    world.start_parent("--preload", "a_module_that_is_not_there", ready=False)
    assert world.parent is not None
    assert world.parent.wait(60) == 1
    assert "No module named 'a_module_that_is_not_there'" in world.log


@pytest.mark.parametrize("when", ["as it starts", "as it loads"])
def test_a_version_ends_with_its_parent(world: World, tmp_path: Path, when: str) -> None:
    """Else it could take over runs that the next parent looks for."""
    loading = tmp_path / "loading"
    code = f"import pathlib, time\npathlib.Path({str(loading)!r}).touch()\ntime.sleep(60)\n"
    (tmp_path / "code" / "changing_code.py").write_text(code + GOOD)
    world.start_parent(ready=False)
    wait_for(lambda: len(world.processes()) == 2, 20, lambda: world.log)
    if when == "as it loads":
        wait_for(loading.exists, 20, lambda: world.log)
    world.kill_parent()
    wait_for(lambda: world.processes() == [], 5)


def test_code_with_threads_is_not_forked(world: World, tmp_path: Path) -> None:
    threads = (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,), name='busy', daemon=True).start()\n"
    )
    (tmp_path / "code" / "changing_code.py").write_text(threads + GOOD)
    world.start_parent(ready=False)
    parent = world.parent
    assert parent is not None
    assert parent.wait(60) == 1
    assert "UnsafeForkError" in world.log
    assert "busy" in world.log
