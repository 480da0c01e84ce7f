"""The steps of scheduled_retraining on in-memory tables and a real registry in a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from clinical_orchestration.modeling.holdout import held_out_subjects
from clinical_orchestration.modeling.train import HYPER_PARAMETERS
from clinical_orchestration.resources import PipelineResource
from clinical_orchestration.stores.registry import ModelRegistry
from clinical_orchestration.stores.tables import TableStore
from clinical_orchestration_tests.retraining_world import World, result_of, skipped_steps

BRANCH = {
    "prepare_training_data", "retrain_model", "evaluate_retrained_model", "compare_models", "deploy_new_model",
    "rollback_if_needed",
}  # fmt: skip


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelRegistry]:
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # MLflow puts artifacts of a database file below the present folder
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        registry = ModelRegistry(uri)
        registry.ensure_experiment()
        yield registry


@pytest.fixture
def world(
    tmp_path: Path, registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> World:
    monkeypatch.setenv("CLINICAL_VAR_ROLLBACK_WATCH_SECONDS", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.tracking_uri)
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return World(tmp_path, registry, f"model-{name[-60:]}")


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer trees: a test needs no better model than that."""
    monkeypatch.setitem(HYPER_PARAMETERS["random_forest"], "n_estimators", 20)
    monkeypatch.setitem(HYPER_PARAMETERS["xgboost"], "n_estimators", 40)


@pytest.mark.usefixtures("small_models")
def test_a_whole_story(world: World) -> None:
    """No rows, first champion, nothing to do, asked with nothing new, better data, failure and rollback."""
    name = world.profile.model_name
    empty = world.run(force=True)
    assert empty.success
    assert skipped_steps(empty) == BRANCH
    assert "no labelled rows" in result_of(empty, "retraining/skipped")["reasons"][0]

    world.fill(60)
    first = world.run()
    assert first.success
    assert skipped_steps(first) == {"skip_retraining"}
    assert result_of(first, "retraining/decision")["reasons"] == ["there is no champion"]
    assert result_of(first, "retraining/outcome")["outcome"] == "promoted"
    one = world.registry.champion(name)
    assert one is not None
    assert one.promoted_at is not None
    assert one.tags["promotion"] == "champion"
    assert one.tags["stage"] == "production"
    assert one.tags["training_rows"] == "480"
    assert world.registry.by_alias(name, "previous_champion") is None

    second = world.run()
    assert second.success
    assert skipped_steps(second) == BRANCH
    decision = result_of(second, "retraining/decision")
    assert (decision["retrain"], decision["champion"]) == (False, one.version)
    assert {c["name"] for c in decision["conditions"]} >= {"new_data", "age", "data_drift", "performance"}
    assert result_of(second, "retraining/skipped")["skipped"] is True

    asked = world.run(reason="a person asks")
    assert skipped_steps(asked) == {"skip_retraining"}
    assert result_of(asked, "retraining/challenger")["trained"] is False  # the same rows give the same model
    assert result_of(asked, "retraining/outcome")["outcome"] == "unchanged"
    assert [info.version for info in world.registry.versions(name)] == [one.version]

    # new subjects, whose events depend on the features the other way round
    world.fill(150, seed=2, signal=-4.0, base=-0.5, first_subject=60, days_later=150)
    better = world.run()
    assert result_of(better, "retraining/decision")["reasons"][0].startswith("new_data: 2")
    compared = result_of(better, "retraining/comparison")["comparison"]
    assert compared["champion_saw_subjects"] is False
    assert "without the held-out subjects" in compared["basis"]
    assert compared["gains"]["auroc"]["gain"]["lower"] > 0
    assert result_of(better, "retraining/deployment")["outcome"] == "promoted", result_of(better, "retraining/outcome")
    two = world.registry.champion(name)
    previous = world.registry.by_alias(name, "previous_champion")
    assert two is not None
    assert previous is not None
    assert (two.version, previous.version) == ("2", one.version)
    assert previous.tags["promotion"] == "replaced"
    assert previous.tags["stage"] == "archived"
    assert not any("SECRET" in str(alert) for alert in world.alerts.sent)
    assert [alert.details["outcome"] for alert in world.alerts.sent] == ["promoted", "promoted"]

    # a minute later every answer of the new champion fails
    world.server.answers, world.server.failures = 200, 190
    watched = world.run(force=True)
    outcome = result_of(watched, "retraining/outcome")
    assert outcome["outcome"] == "rolled back"
    assert outcome["champion"] == one.version
    restored = world.registry.champion(name)
    bad = next(info for info in world.registry.versions(name) if info.version == "2")
    assert restored is not None
    assert restored.version == one.version
    assert bad.rolled_back
    assert bad.tags["promotion"] == "rolled back"
    assert bad.tags["stage"] == "archived"
    assert "error_rate: 0.9500" in bad.tags["rollback_reason"]
    assert world.registry.by_alias(name, "previous_champion") is None
    assert world.alerts.sent[-1].key == "champion_rolled_back:small"

    # the same rows give the version that was rolled back: it stays where it is
    world.server.answers = world.server.failures = 0
    again = world.run(force=True)
    assert result_of(again, "retraining/deployment")["outcome"] == "refused"
    assert "rolled back" in result_of(again, "retraining/outcome")["reasons"][0]
    still = world.registry.champion(name)
    assert still is not None
    assert still.version == one.version


@pytest.mark.usefixtures("small_models")
def test_what_has_changed_since_the_champion_was_trained_decides_and_not_what_was_before(world: World) -> None:
    """Events become four times as likely at the same state of health: only rows since then show who is right."""
    world.fill(150, visits=6)
    champion = world.train_champion()
    world.fill(150, seed=2, base=1.5, first_subject=150, days_later=100, visits=4)
    result = world.run(reason="drift")
    compared = result_of(result, "retraining/comparison")["comparison"]
    assert compared["since"] == "2025-03-12T23:00:00+00:00"  # the champion's newest row
    prepared = result_of(result, "retraining/training_set")
    since_then = held_out_subjects(
        world.profile.name, [f"SECRET-{number:04d}" for number in range(150, 300)],
        share=prepared["holdout_share"], seed=prepared["holdout_seed"],
    )  # fmt: skip
    assert compared["rows"] == 4 * len(since_then) < prepared["rows_held_out"]
    assert compared["gains"]["brier"]["gain"]["lower"] > 0
    deployed = result_of(result, "retraining/deployment")
    assert (deployed["outcome"], deployed["replaced"]) == ("promoted", champion)


@pytest.mark.usefixtures("small_models")
@pytest.mark.parametrize("seed", [3, 4])
def test_shuffled_labels_never_replace_the_champion(world: World, seed: int) -> None:
    world.fill(70)
    champion = world.train_champion()
    world.empty()
    world.fill(110, seed=seed, shuffled=True)
    result = world.run(force=True)
    assert result.success
    assert result_of(result, "retraining/deployment")["outcome"] == "refused"
    assert result_of(result, "retraining/comparison")["comparison"]["champion_saw_subjects"] is False
    now = world.registry.champion(world.profile.model_name)
    assert now is not None
    assert now.version == champion
    refused = world.registry.versions(world.profile.model_name)[0]
    assert refused.tags["promotion"] == "refused"
    assert refused.promoted is False
    assert world.alerts.sent[-1].severity == "warning"


@pytest.mark.usefixtures("small_models")
def test_where_the_champions_training_set_is_gone_it_answers_itself_and_the_leak_is_told(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clinical_orchestration.defs.retraining import assets

    world.fill(60, visits=6)
    assert world.train_champion() == "1"
    before = world.registry.versions(world.profile.model_name)[0].training_set_version
    read = assets.read_training_set

    def vacuumed(tables: TableStore, trial: str, version: int) -> Any:
        if version == before:
            raise LookupError(f"gold/training_set has no version {version} any more")
        return read(tables, trial, version)

    monkeypatch.setattr(assets, "read_training_set", vacuumed)
    world.fill(30, seed=2, first_subject=60, days_later=90, visits=6)
    compared = result_of(world.run(), "retraining/comparison")["comparison"]
    assert compared["champion_saw_subjects"] is True
    assert "which favours it" in compared["basis"]


def test_a_search_is_logged_and_its_parameters_are_used(world: World) -> None:
    import json

    world.fill(60)
    result = world.run(hpo_trials=2)
    assert result.success
    challenger = result_of(result, "retraining/challenger")
    trials = json.loads(world.registry.read_file(challenger["run_id"], "hpo/trials.json"))
    assert len(trials["trials"]) == 6  # two a member
    assert world.registry.read_file(challenger["run_id"], "hpo/search.png").startswith(b"\x89PNG")
    params = world.registry.run_params(challenger["run_id"])
    for member, values in trials["parameters"].items():
        assert all(params[f"{member}.{name}"] == str(value) for name, value in values.items())


@pytest.mark.parametrize("trials", [-1, "many", 10_000, True])
def test_an_impossible_number_of_trials_is_refused_with_its_bounds(world: World, trials: object) -> None:
    from clinical_orchestration.defs.retraining.assets import _trials

    with pytest.raises(dg.Failure, match="from 0 to 500"):
        _trials(PipelineResource(conf={"hpo_trials": trials}))
