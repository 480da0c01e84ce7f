"""The feature store on the command line: answers, exit status, JSON, and what is refused."""

from __future__ import annotations

import json
from datetime import date, timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from clinical_orchestration.stack import cli, feature_queries
from clinical_orchestration.stack import client as real_client
from clinical_orchestration.stack.console import UserError
from clinical_orchestration.stack.feature_queries import (
    Stores,
    compare_stores,
    lines,
    monitor,
    query_offline,
    query_online,
)
from clinical_orchestration.stores.online import InMemoryOnlineStore
from clinical_orchestration_tests.fakes import InMemoryTableStore
from clinical_orchestration_tests.stack.test_cli import FakeClient
from clinical_orchestration_tests.unit.test_feature_store import NOON, PILOT, CountingStore, add_vitals


@pytest.fixture
def stores() -> Stores:
    """P1 has rows of days 0 to 2, P2 of days 0 and 5; all newest ones are online."""
    tables, online = InMemoryTableStore(), InMemoryOnlineStore()
    add_vitals(tables, "P1", 0, 1, 2)
    add_vitals(tables, "P2", 0, 5)
    offline = CountingStore(tables)
    offline.refresh(PILOT)
    online.put(offline.newest(PILOT))
    return Stores(PILOT, cast(Any, tables), cast(Any, online))


def test_equal_stores_are_consistent(stores: Stores) -> None:
    found = compare_stores(stores)
    assert (found["checked"], found["equal"], found["consistent"], found["features"]) == (2, 2, True, {})


def test_a_day_narrows_the_comparison_to_patients_last_seen_on_it(stores: Stores) -> None:
    assert compare_stores(stores, (NOON + timedelta(days=5)).date())["checked"] == 1
    assert compare_stores(stores, date(1999, 1, 1))["checked"] == 0


def test_differing_features_are_named(stores: Stores) -> None:
    row = stores.online.get("P1")
    assert row is not None
    cast(Any, stores.online)._rows.clear()
    stores.online.put([type(row)(row.patient_id, row.trial, row.feature_time, {"age_years": 99.0}, row.feature_set)])
    found = compare_stores(stores)
    assert (found["missing"], found["differing"], found["features"]) == (1, 1, {"age_years": 1})
    assert not found["consistent"]


def test_offline_rows_of_a_day_and_of_the_newest_one(stores: Stores) -> None:
    newest = query_offline(stores)
    assert (newest["date"], newest["rows"]) == ((NOON + timedelta(days=5)).date().isoformat(), 1)
    first = query_offline(stores, NOON.date())
    assert (first["rows"], first["patients"]) == (2, 2)
    assert first["features"]["age_years"] == {"values": 2, "mean": 1.0, "min": 1.0, "max": 1.0}
    assert [record["patient_id"] for record in first["records"]] == ["P1", "P2"]
    assert query_offline(stores, date(1999, 1, 1))["rows"] == 0
    json.dumps(first, default=str)
    assert lines("query_offline", first)[1].split()[0] == "P1"


def test_a_patients_online_features_and_all_patients(stores: Stores) -> None:
    found = query_online(stores, "P2", now=NOON + timedelta(days=6))
    assert (found["found"], found["age_seconds"], found["features"]) == (True, 86_400, {"age_years": 2.0})
    assert query_online(stores, "nobody") == {"patient": "nobody", "found": False}
    everybody = query_online(stores)
    assert (everybody["patients"], everybody["not_online"], everybody["examples"]) == (2, 0, ["P1", "P2"])
    assert "age_years = 2" in "\n".join(lines("query_online", found))
    assert "never loaded" in lines("query_online", query_online(stores, "nobody"))[0]


def test_a_healthy_pipeline_has_no_problems(stores: Stores) -> None:
    found = monitor(stores)
    assert found["problems"] == []
    assert found["up_to_date"]
    assert (found["rows"], found["patients"], sum(found["days"].values())) == (5, 2, 5)
    assert monitor(stores, NOON.date())["rows"] == 2


def test_new_records_and_missing_patients_are_problems(stores: Stores) -> None:
    add_vitals(cast(Any, stores.tables), "P3", 60)
    cast(Any, stores.online)._rows.clear()
    found = monitor(stores)
    assert found["behind"] == ["patient_vitals"]
    assert [problem.split(" ")[0] for problem in found["problems"]] == ["patient_vitals", "2", "the"]
    assert "behind the newest record" in found["problems"][-1]


def test_no_rows_are_a_problem() -> None:
    empty = Stores(PILOT, cast(Any, InMemoryTableStore()), cast(Any, InMemoryOnlineStore()))
    assert monitor(empty)["problems"][0] == "there are no feature rows"
    assert query_offline(empty)["rows"] == 0


# ------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stores: Stores, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setenv("CLINICAL_HOME", str(tmp_path))
    fake = FakeClient(tmp_path)
    monkeypatch.setattr(real_client, "status", fake.status)
    monkeypatch.setattr(feature_queries.Stores, "open", lambda trial: stores)

    def call(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(arguments)
        return (status, *capsys.readouterr())

    return call


def test_flags_combine_and_answer_in_json(command: Any) -> None:
    status, out, _ = command(
        "--compare-stores", "--query-online-features", "P2", "--query-offline-features", "2024-05-01",
        "--monitor-feature-pipeline", "--json",
    )  # fmt: skip
    answer = json.loads(out)
    assert status == 0
    assert answer["compare_stores"]["equal"] == 2
    assert answer["query_online"]["patient"] == "P2"
    assert answer["query_offline"]["rows"] == 2
    assert answer["monitor"]["problems"] == []


def test_people_see_lines(command: Any) -> None:
    status, out, _ = command("--compare-stores", "--trial", "cdisc-pilot")
    assert status == 0
    assert "equal: 2" in out


def test_an_unknown_patient_and_a_sick_pipeline_fail_the_command(command: Any, stores: Stores) -> None:
    assert command("--query-online-features", "nobody")[0] == 1
    cast(Any, stores.online)._rows.clear()
    assert command("--monitor-feature-pipeline")[0] == 1
    assert command("--compare-stores")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--query-offline-features", "May"], "write it as 2013-01-31"),
        (["--compare-stores", "2013-13-01"], "write it as"),
        (["--compare-stores", "--trial", "none-such"], "available"),
        (["-s", "--trial", "simulated"], "--trial belongs to --run and --demo"),
        (["--run", "feature_backfill", "--conf", '{"start_date": "May"}'], "start_date 'May' is no date"),
    ],
)
def test_what_is_refused_says_why(command: Any, arguments: list[str], hint: str) -> None:
    status, _, err = command(*arguments)
    assert status == 2
    assert hint in err


def test_training_steps_are_launched_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from clinical_orchestration.stack.console import Display
    from clinical_orchestration.stack.runs import Job, RunState
    from clinical_orchestration.stack.settings import StackSettings

    monkeypatch.setenv("CLINICAL_HOME", str(tmp_path))
    asked: dict[str, Any] = {}

    class Launcher:
        def find_job(self, name: str) -> Job:
            return Job(name, "repository", "location")

        def assets(self, job: Job, tasks: Any) -> list[list[str]]:
            asked["tasks"] = list(tasks)
            return [["models", "candidates"]]

        def launch(self, job: Job, config: Any, tags: Any, assets: Any = None) -> str:
            asked.update(job=job.name, config=config, assets=assets)
            return "run"

        def run_url(self, run_id: str) -> str:
            return run_id

        def follow(self, run_id: str, job: str) -> Any:
            yield RunState(run_id, job, status="SUCCESS", started=1.0, ended=2.0)

    commands = cli.Commands(
        cli.parse(["--run-training", "--trial", "simulated"]), Display(io.StringIO(), io.StringIO()),
        cast(Any, FakeClient(tmp_path)), StackSettings.load, lambda _: cast(Any, Launcher()),
    )  # fmt: skip
    assert commands.execute() == 0
    assert asked["job"] == "clinical_data_pipeline"
    assert asked["assets"] == [["models", "candidates"]]
    assert asked["tasks"][0] == "setup_mlflow_experiment"
    assert asked["config"]["resources"]["pipeline"]["config"] == {
        "trial": "simulated", "conf": {"force_training": True},
    }  # fmt: skip


def test_tasks_that_the_loaded_code_lacks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from clinical_orchestration.stack.runs import Job, Runs

    nodes = {"assetNodes": [{"assetKey": {"path": ["models", "experiment"]}, "opNames": ["setup_mlflow_experiment"]}]}
    runs = Runs("http://page", cast(Any, object()))
    monkeypatch.setattr(runs, "_ask_patiently", lambda *_: nodes)
    job = Job("clinical_data_pipeline", "repository", "location")
    assert runs.assets(job, ["setup_mlflow_experiment"]) == [["models", "experiment"]]
    with pytest.raises(UserError, match="no task train_model"):
        runs.assets(job, ["setup_mlflow_experiment", "train_model"])
