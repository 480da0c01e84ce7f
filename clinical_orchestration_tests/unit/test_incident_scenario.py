"""The scripted scenario's own judgement: what it calls a promotion, and which stories it accepts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).resolve().parents[2] / "examples" / "incident_scenario.py"
GOOD = [
    (16.0, "model", "first champion"),
    (19.0, "quality", "2 anomalies found"),
    (19.0, "alert", "quality_anomaly:simulated-live [error] a site differs"),
    (20.0, "freshness", "stale: lab_results/LAB-005"),
    (22.0, "drift", "data: 9 of 215 features"),
    (22.0, "alert", "data_drift:simulated-live [warning] features have drifted"),
    (22.0, "retraining", "asked for by a sensor: data drift"),
    (22.0, "challenger", "no benefit is shown"),
    (26.0, "retraining", "asked for by a sensor: concept drift"),
    (26.0, "promotion", "Brier score is shown to be better"),
]


@pytest.fixture(scope="module")
def scenario() -> ModuleType:
    found = importlib.util.spec_from_file_location("incident_scenario", FILE)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    return module


def judged(scenario: ModuleType, entries: list[tuple[float, str, str]]) -> list[str]:
    wrong: list[str] = scenario.in_order(scenario.Timeline(entries=entries))
    return wrong


def test_the_whole_story_in_its_order_is_accepted(scenario: ModuleType) -> None:
    assert judged(scenario, GOOD) == []


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([entry for entry in GOOD if entry[1] != "promotion"], "no entry of the kind promotion"),
        ([entry for entry in GOOD if entry[1] != "quality"], "no entry of the kind quality"),
        ([entry for entry in GOOD if not entry[2].startswith("data_drift")], "no alert about the model"),
        ([GOOD[0], GOOD[3], *GOOD[1:3], *GOOD[4:]], "freshness came before quality"),
        ([*GOOD[:4], GOOD[6], *GOOD[4:6], *GOOD[7:]], "retraining came before drift"),
        ([GOOD[0], (17.0, "drift", "data: 1 of 215 features"), *GOOD[1:]], "false alarm on day 17.0"),
    ],
)
def test_a_story_with_a_gap_or_another_order_is_not(
    scenario: ModuleType, entries: list[tuple[float, str, str]], said: str
) -> None:
    assert any(text.startswith(said) for text in judged(scenario, entries))


class Platform:
    """Answers as a platform on which a sensor asks for retraining on days 18 and 19.

    Args:
        decisions: outcome of each retraining, and the champion after it.
    """

    def __init__(self, *decisions: tuple[str, str]) -> None:
        self.decisions = decisions
        self.days = 0
        self.asked: list[str] = []

    def run(self, pipeline: str, **conf: Any) -> dict[str, Any]:
        self.days += pipeline == "clinical_data_pipeline"
        return {"state": "success", "dag_run_id": pipeline}

    def wait(self, pipeline: str, run_id: str) -> dict[str, Any]:
        self.asked.append(run_id)
        return {"state": "success"}

    def result(self, pipeline: str, run_id: str, task: str, asset: str = "") -> dict[str, Any]:
        if task == "deploy_new_model":
            number = int(run_id)
            return {"version": str(number + 2), "outcome": self.decisions[number][0], "reasons": ["because"]}
        return {}

    def runs(self, pipeline: str) -> list[dict[str, Any]]:
        there = min(max(0, self.days - 2), len(self.decisions))
        return [{"dag_run_id": str(number), "conf": {"reason": "drift"}} for number in range(there)]

    def alerts(self) -> list[dict[str, Any]]:
        return []

    def champion(self, model: str) -> str:
        return self.decisions[len(self.asked) - 1][1] if self.asked else "1"

    def predict(self, patients: list[str]) -> int:
        return len(patients)


class Hospital:
    """Sends nothing."""

    patients: frozenset[str] = frozenset({"P1"})

    def send_until(self, day: float) -> int:
        return 0


def kinds(scenario: ModuleType, *decisions: tuple[str, str]) -> list[str]:
    timeline = scenario.Timeline()
    scenario.play(Platform(*decisions), Hospital(), 20, timeline, patience=0)
    return [kind for _, kind, _ in timeline.entries if kind not in ("data", "model")]


def test_the_play_goes_on_after_a_challenger_and_ends_with_the_promotion(scenario: ModuleType) -> None:
    assert kinds(scenario, ("challenger", "1"), ("promoted", "3"), ("challenger", "3")) == [
        "retraining", "challenger", "retraining", "promotion",
    ]  # fmt: skip


def test_it_is_a_promotion_only_where_the_champion_is_another_one(scenario: ModuleType) -> None:
    assert kinds(scenario, ("promoted", "1")) == ["retraining", "decision"]
    assert kinds(scenario, ("promoted", "9")) == ["retraining", "decision"]
    assert kinds(scenario, ("refused", "1")) == ["retraining", "decision"]
