"""The watch of the champion: what rolls it back, what does not, and what survives a crash or an absent service."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest

from clinical_orchestration.defs.retraining import champion_watch_sensor, sensor
from clinical_orchestration.features.definitions import feature_names
from clinical_orchestration.modeling.train import HYPER_PARAMETERS
from clinical_orchestration.stores.registry import ModelRegistry, RegistryError, RegistryUnavailableError
from clinical_orchestration.stores.training import stored_evaluation
from clinical_orchestration_tests.retraining_world import World, result_of


class Trained:
    """Two training runs in MLflow: the first learned the truth, the second the opposite."""

    def __init__(self, folder: Path, registry: ModelRegistry) -> None:
        self.registry = registry
        self.runs: list[str] = []
        for number, signal in enumerate((2.5, -2.5)):
            world = World(folder, registry, f"source-{number}")
            world.fill(50, seed=number, signal=signal, visits=5)
            self.runs.append(result_of(world.run(), "retraining/challenger")["run_id"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # MLflow puts artifacts of a database file below the present folder
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.setenv("CLINICAL_VAR_ROLLBACK_WATCH_SECONDS", "0")
        patch.setitem(HYPER_PARAMETERS["random_forest"], "n_estimators", 20)
        patch.setitem(HYPER_PARAMETERS["xgboost"], "n_estimators", 30)
        yield Trained(folder, ModelRegistry(uri))


@pytest.fixture
def world(tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> World:
    """Version 1 was champion; version 2, which learned the opposite of the truth, is."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)[-60:]
    world = World(tmp_path, trained.registry, f"watched-{name}")
    for run_id in trained.runs:
        evaluation = stored_evaluation(world.registry, run_id)
        assert evaluation is not None
        info = world.registry.register(world.profile.model_name, run_id, evaluation)
        world.registry.promote(info.name, info.version)
    monkeypatch.setattr(sensor, "profiles", lambda: {"small": world.profile})
    return world


def look(world: World, cursor: str | None = None) -> dg.SensorResult:
    context = dg.build_sensor_context(instance=world.instance, cursor=cursor)
    result = champion_watch_sensor(
        context, tables=world.tables, registry=world.registry, serving=world.server, alerts=world.alerts
    )
    assert isinstance(result, dg.SensorResult)
    return result


def champion(world: World) -> str | None:
    found = world.registry.champion(world.profile.model_name)
    return None if found is None else found.version


def said(result: dg.SensorResult) -> str:
    assert result.skip_reason is not None
    return str(result.skip_reason.skip_message)


def performance(**changes: Any) -> dict[str, Any]:
    return {
        "status": "degraded", "rows": 400, "events": 100, "model_version": "2",
        "auroc": {"value": 0.4, "lower": 0.35, "upper": 0.45}, "brier": {"value": 0.3, "lower": 0.28, "upper": 0.32},
        "baseline": {"auroc": 0.8, "auprc": 0.5, "brier": 0.15, "ece": 0.05}, **changes,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- registry


def test_promotion_and_rollback_in_the_registry(world: World) -> None:
    registry, name = world.registry, world.profile.model_name
    assert registry.promote(name, "2") == "1"  # again, as after a crash
    previous = registry.by_alias(name, "previous_champion")
    assert previous is not None
    assert previous.version == "1"
    with pytest.raises(RegistryError, match="not the champion"):
        registry.roll_back(name, "1", "a reason")
    registry.set_challenger(name, "2")
    restored = registry.roll_back(name, "2", "a reason", at=datetime(2026, 1, 2, tzinfo=UTC))
    assert restored is not None
    assert champion(world) == restored.version == "1"
    bad = registry.versions(name)[0]
    assert (bad.rolled_back, bad.aliases) == (True, ())
    assert bad.tags["rolled_back_at"] == "2026-01-02T00:00:00+00:00"
    assert bad.tags["rollback_reason"] == "a reason"
    with pytest.raises(RegistryError, match="rolled back"):
        registry.promote(name, "2")
    assert registry.roll_back(name, "1", "another") is None  # nothing to go back to: nothing changes
    assert champion(world) == "1"


def test_a_rollback_that_stopped_half_way_is_finished(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, name = world.registry, world.profile.model_name
    client = registry._client()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(client, "set_registered_model_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            registry.roll_back(name, "2", "it fails")
    assert champion(world) == "2"
    world.monitored(performance(status="ok", auroc={"value": 0.8, "lower": 0.7, "upper": 0.9}, brier=None))
    assert "rolled back" in said(look(world))
    assert champion(world) == "1"


# -------------------------------------------------------------------------------------------------- errors and latency


def test_failing_answers_roll_back_once_there_are_enough_of_them(world: World) -> None:
    world.server.answers = 10_000  # a long good time before
    first = look(world)
    assert said(first) == "small: within bounds"
    cursor = first.cursor
    for _ in range(4):  # ten bad answers between two looks: too few by themselves
        world.server.answers += 10
        world.server.failures += 10
        result = look(world, cursor)
        cursor = result.cursor
        assert champion(world) == "2"
    world.server.answers += 10
    world.server.failures += 10
    result = look(world, cursor)
    assert said(result) == "small: rolled back"
    assert champion(world) == "1"
    (event,) = result.asset_events
    assert event.asset_key.path == ["retraining", "outcome"]
    assert event.metadata["outcome"].value == "rolled back"
    (alert,) = world.alerts.sent
    assert (alert.key, alert.severity) == ("champion_rolled_back:small", "error")
    assert "error_rate: 1.0000" in alert.what
    # the restored version is judged by its own answers
    world.server.answers, world.server.failures = 100, 0
    assert said(look(world, result.cursor)) == "small: within bounds"
    assert champion(world) == "1"


def test_two_that_roll_back_at_once_do_it_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.server.answers = world.server.failures = 500
    roll_back = world.registry.roll_back

    def late(name: str, version: str, reason: str) -> None:
        roll_back(name, version, "the other was faster")
        roll_back(name, version, reason)

    with monkeypatch.context() as patch:
        patch.setattr(world.registry, "roll_back", late)
        result = look(world)
    assert said(result) == "small: within bounds"
    assert champion(world) == "1"
    bad = world.registry.versions(world.profile.model_name)[0]
    assert bad.tags["rollback_reason"] == "the other was faster"
    assert not world.alerts.sent


def test_a_slow_champion_is_rolled_back(world: World) -> None:
    world.server.answers, world.server.latency = 100, ((0.5, 50.0), (2.5, 100.0), (float("inf"), 100.0))
    assert said(look(world)) == "small: rolled back"
    assert "p95_seconds" in world.registry.versions(world.profile.model_name)[0].tags["rollback_reason"]


def test_a_champion_that_cannot_be_loaded_is_rolled_back_at_the_second_look(world: World) -> None:
    world.server.failing, world.server.served = True, "1"
    first = look(world)
    assert champion(world) == "2"
    assert said(look(world, first.cursor)) == "small: rolled back"
    assert champion(world) == "1"


def test_a_model_server_that_is_down_says_nothing_about_the_model(world: World) -> None:
    world.server.up = False
    result = look(world)
    assert said(result) == "small: unknown"
    assert champion(world) == "2"
    assert not world.alerts.sent


# -------------------------------------------------------------------------------------------------- error on outcomes


def rows_of_the_truth(world: World, count: int = 240) -> tuple[list[int], list[float], list[dict[str, float]]]:
    """Return labels by the truth, what version 2 says of them, and the features."""
    rng = np.random.default_rng(5)
    names = feature_names(world.profile)
    matrix = rng.normal(size=(count, len(names)))
    labels = (rng.random(count) < 1 / (1 + np.exp(1.0 - 2.5 * matrix[:, 0]))).astype(int)
    model = world.registry.load_model(world.profile.model_name, "2")
    order = [names.index(name) for name in model.feature_names]
    probabilities = model.probabilities(matrix[:, order])
    return labels.tolist(), probabilities.tolist(), [dict(zip(names, row, strict=True)) for row in matrix.tolist()]


def test_a_champion_that_does_worse_on_outcomes_than_the_one_before_is_rolled_back(world: World) -> None:
    world.predicted("2", *rows_of_the_truth(world))
    cursor = look(world).cursor
    world.monitored(performance())
    result = look(world, cursor)
    assert said(result) == "small: rolled back"
    assert champion(world) == "1"
    reason = world.registry.versions(world.profile.model_name)[0].tags["rollback_reason"]
    assert "live_auroc: 0.4500" in reason
    assert "live_brier" in reason
    assert "SECRET" not in reason + str(world.alerts.sent)
    # the same result is not judged again, and says nothing about the version that serves now
    assert said(look(world, result.cursor)) != "small: rolled back"
    assert said(look(world)) != "small: rolled back"
    assert champion(world) == "1"


def test_where_the_one_before_does_no_better_the_data_are_to_blame(world: World) -> None:
    labels, probabilities, rows = rows_of_the_truth(world)
    world.predicted("2", [1 - label for label in labels], probabilities, rows)  # version 2 is right, version 1 wrong
    world.monitored(performance())
    result = look(world)
    assert said(result) == "small: kept"
    assert champion(world) == "2"
    (alert,) = world.alerts.sent
    assert alert.key == "champion_out_of_bounds:small"
    assert "does no better" in alert.what
    assert len(list(result.asset_events)) == 1


def test_without_a_version_before_the_champion_stays_and_people_are_told(world: World) -> None:
    registry, name = world.registry, world.profile.model_name
    registry.roll_back(name, "2", "earlier")
    world.monitored(performance(model_version="1"))
    kept = look(world)
    assert said(kept) == "small: kept"
    assert champion(world) == "1"
    assert "no version to go back to" in world.alerts.sent[-1].what
    world.server.answers = 500
    look(world, kept.cursor)
    assert "champion_out_of_bounds:small" in world.alerts.resolved


def test_a_result_from_before_the_promotion_is_not_held_against_the_champion(world: World) -> None:
    world.monitored(performance())
    world.registry.promote(world.profile.model_name, "2", at=datetime.now(UTC) + timedelta(seconds=2))
    assert "rolled back" not in said(look(world))
    assert champion(world) == "2"


def test_a_registry_that_is_away_loses_no_finding(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    cursor = look(world).cursor
    world.monitored(performance())

    def away(*_: object) -> None:
        raise RegistryUnavailableError("the MLflow server does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(world.registry, "champion", away)
        patch.setattr(world.server, "served", "2")
        result = look(world, cursor)
    assert said(result) == "small: registry not available"
    assert json.loads(result.cursor or "{}") == json.loads(cursor or "{}")
    assert said(look(world, result.cursor)) == "small: rolled back"


def test_an_unreadable_cursor_starts_anew(world: World) -> None:
    for cursor in ("", "no json", "[1]", '{"small": {"sample": {"version": 3}}}'):
        assert look(world, cursor).cursor


def test_a_look_is_quick(world: World) -> None:
    look(world)
    began = time.monotonic()
    cursor = look(world).cursor
    look(world, cursor)
    assert time.monotonic() - began < 5
