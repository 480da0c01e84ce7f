"""Which parts of Dagster are replaced, by setting."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import yaml

from clinical_orchestration.stack import services, starting
from clinical_orchestration.stack.model import StackError
from clinical_orchestration.stack.settings import StackSettings, checkout

SECTIONS = {
    starting.LAUNCHER: "run_launcher",
    starting.COORDINATOR: "run_coordinator",
    starting.STORAGE: "storage",
    starting.COMPUTE_LOGS: "compute_logs",
}


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in starting.OWN:
        monkeypatch.delenv(variable, raising=False)


def test_with_all_off_it_is_stock_dagster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (checkout() / "dagster.yaml").read_text()
    assert starting.dagster_yaml(text) == text, "unset, the settings are those of the file"
    for variable in starting.OWN:
        monkeypatch.setenv(variable, "default")
    stock = starting.dagster_yaml(text)
    assert "clinical_orchestration.execution" not in stock
    assert list(yaml.safe_load(stock)["storage"]) == ["postgres"]
    context = services.Context(StackSettings.load(tmp_path))
    assert services._daemon_command(context)[2] == "dagster._daemon"
    assert services.spec("run_launcher").off is not None
    assert services._launcher_off(context.settings) is not None


@pytest.mark.parametrize("variable", starting.OWN)
def test_each_part_is_replaced_alone(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    text = (checkout() / "dagster.yaml").read_text()
    for other in starting.OWN:
        monkeypatch.setenv(other, "default")
    before = yaml.safe_load(starting.dagster_yaml(text))
    monkeypatch.setenv(variable, starting.OWN[variable])
    after = yaml.safe_load(starting.dagster_yaml(text))
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert changed == {SECTIONS[variable]}
    section = after[SECTIONS[variable]]
    section = section.get("custom", section)
    assert hasattr(importlib.import_module(section["module"]), section["class"])


def test_a_value_that_means_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(starting.LAUNCHER, "hot")
    with pytest.raises(StackError, match=r"CLINICAL_RUN_LAUNCHER=hot[^\n]*\n.*warm or default"):
        starting.own(starting.LAUNCHER)


def test_what_the_stack_starts_is_what_the_file_names(tmp_path: Path) -> None:
    settings = StackSettings.load(tmp_path)
    services.prepare_dagster_home(settings)
    written = yaml.safe_load((settings.dagster_home / "dagster.yaml").read_text())
    assert set(SECTIONS.values()) <= set(written)
    context = services.Context(settings)
    assert services._launcher_off(settings) is None
    command = services._launcher_command(context)
    folder = settings.environment()[written["run_launcher"]["config"]["folder"]["env"]]
    assert folder == command[command.index("--folder") + 1]
    assert services._daemon_command(context)[2] == "clinical_orchestration.execution.coordinator"
