import threading
from typing import Any

import numpy as np
import pytest

from clinical_orchestration.serving import champions
from clinical_orchestration.serving.champions import ChampionManager, prepare
from clinical_orchestration.serving.ports import Champion, LoadedModel, ModelLoadError
from clinical_orchestration_tests.serving.fakes import PILOT, SIMULATED, FakeRegistry, constant, model


def manager(registry: FakeRegistry, failures: list[str] | None = None) -> ChampionManager:
    return ChampionManager(lambda: registry, (PILOT, SIMULATED), on_load_failure=(failures or []).append)


def version(asked: ChampionManager, trial: str = PILOT.name) -> str | None:
    served = asked.current(trial)
    return served.version if served else None


def test_the_version_behind_the_alias_is_loaded_once() -> None:
    registry = FakeRegistry()
    asked = manager(registry)
    asked.poll()
    assert version(asked) is None
    registry.promote("4", model())
    for _ in range(3):
        asked.poll()
    assert version(asked) == "4"
    assert registry.loads == ["4"]
    assert version(asked, SIMULATED.name) is None


def test_moving_the_alias_back_serves_the_older_version_again() -> None:
    registry = FakeRegistry()
    asked = manager(registry)
    for number in ("1", "2"):
        registry.promote(number, model())
        asked.poll()
    registry.aliases[PILOT.model_name] = "1"
    asked.poll()
    assert version(asked) == "1"


def test_a_broken_version_is_tried_again_later_and_the_old_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(champions.time, "monotonic", lambda: now[0])
    registry, failures = FakeRegistry(), []
    asked = ChampionManager(lambda: registry, (PILOT,), on_load_failure=failures.append)
    registry.promote("1", model())
    asked.poll()
    registry.promote("2", OSError("artifact is missing"))
    for _ in range(3):
        asked.poll()
    assert version(asked) == "1"
    assert failures == [PILOT.name]
    state = asked.states()[PILOT.name]
    assert (state.failed_version, state.error) == ("2", "OSError: artifact is missing")
    now[0] = 2.5
    asked.poll()
    now[0] = 5.0  # the pause has doubled
    asked.poll()
    assert len(failures) == 2
    registry.versions[PILOT.model_name, "2"] = model()
    now[0] = 10.0
    asked.poll()
    assert version(asked) == "2"
    assert asked.states()[PILOT.name].error is None


def test_the_alias_moved_back_from_a_broken_version_clears_the_error() -> None:
    registry = FakeRegistry()
    asked = manager(registry)
    registry.promote("1", model())
    asked.poll()
    registry.promote("2", ModelLoadError("broken"))
    asked.poll()
    registry.aliases[PILOT.model_name] = "1"
    asked.poll()
    assert asked.states()[PILOT.name].failed_version is None
    assert registry.loads == ["1", "2"]


def test_removing_the_alias_withdraws_the_model_on_the_second_look() -> None:
    registry = FakeRegistry()
    asked = manager(registry)
    registry.promote("1", model())
    asked.poll()
    registry.aliases.clear()
    asked.poll()
    assert version(asked) == "1"
    asked.poll()
    assert version(asked) is None
    assert asked.states()[PILOT.name].error == "the alias champion was removed"


def test_a_registry_that_is_out_keeps_what_is_loaded() -> None:
    registry = FakeRegistry()
    asked = manager(registry)
    registry.promote("1", model())
    asked.poll()
    registry.out = True
    for _ in range(3):
        asked.poll()
    assert version(asked) == "1"
    assert asked.registry_error == "http://registry does not answer"
    registry.out = False
    asked.poll()
    assert asked.registry_error is None


def test_the_old_version_answers_while_the_new_one_loads() -> None:
    loading, go_on = threading.Event(), threading.Event()

    class Slow(FakeRegistry):
        def load(self, champion: Champion) -> LoadedModel:
            if champion.version == "2":
                loading.set()
                assert go_on.wait(5)
            return super().load(champion)

    registry = Slow()
    asked = manager(registry)
    registry.promote("1", model())
    asked.poll()
    registry.promote("2", model())
    thread = threading.Thread(target=asked.poll)
    thread.start()
    assert loading.wait(5)
    assert version(asked) == "1"
    go_on.set()
    thread.join(5)
    assert version(asked) == "2"


@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.5])
def test_answers_that_are_no_probabilities_are_refused(value: float) -> None:
    with pytest.raises(ModelLoadError, match="no probabilities"):
        prepare("t", Champion("m", "1"), model(value))


def test_a_model_is_warmed_with_its_own_example() -> None:
    seen: list[Any] = []

    def predict(rows: Any) -> Any:
        seen.append(rows.copy())
        return np.full(len(rows), 0.5)

    example = np.array([[1.0, 2.0]])
    prepare("t", Champion("m", "1"), LoadedModel(("a", "b"), predict, example))
    assert all((rows == example).all() for rows in seen)
    with pytest.raises(ModelLoadError, match="no features"):
        prepare("t", Champion("m", "1"), LoadedModel((), constant(0.5)))


def test_a_model_of_another_trial_is_refused() -> None:
    other = LoadedModel(("a",), constant(0.5), trial="simulated")
    assert prepare("simulated", Champion("m", "1"), other).version == "1"
    with pytest.raises(ModelLoadError, match="trained for trial simulated"):
        prepare("cdisc-pilot", Champion("m", "1"), other)
