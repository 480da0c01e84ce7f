"""Subcommands of ``clinical``: what they print, their JSON and their exit status."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from clinical_orchestration.cli import clinical
from clinical_orchestration.cli.main import main
from clinical_orchestration.features.definitions import feature_names, feature_set_id
from clinical_orchestration.ingestion import streaming
from clinical_orchestration.stores import kafka, online
from clinical_orchestration.stores import spark_jobs as spark
from clinical_orchestration.stores.kafka import Record
from clinical_orchestration.stores.online import InMemoryOnlineStore, OnlineFeatures
from clinical_orchestration.stores.tables import DeltaTableStore
from clinical_orchestration.tables import FEATURES, SILVER_COLUMNS, arrow_schema, silver
from clinical_orchestration.trials import load_trial
from clinical_orchestration_tests.factories import vitals_message
from clinical_orchestration_tests.ingestion.fake_kafka import FakeKafka

TRIAL = "simulated"
START = datetime(2025, 1, 1, tzinfo=UTC)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DeltaTableStore:
    """Tables in a folder, which the environment names as the deployment's."""
    monkeypatch.setenv("CLINICAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CLINICAL_LAKE_ROOT", str(tmp_path / "lake"))
    monkeypatch.setenv("CLINICAL_TRIAL", TRIAL)
    monkeypatch.delenv("SPARK_REST_URL", raising=False)
    return DeltaTableStore(str(tmp_path / "lake"))


@pytest.fixture
def run(lake: DeltaTableStore, capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*arguments: str) -> tuple[int, str, str]:
        status = main(arguments)
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return command


def subjects(lake: DeltaTableStore) -> None:
    rows = [
        {
            "trial": TRIAL, "patient_id": f"P{n}", "event_time": START, "received_at": START, "source": "s",
            "source_position": f"s#{n}", "ingested_at": START, "record_key": str(n), "content_hash": str(n),
            "age_years": 40.0 + 10 * n, "screen_failure": False,
        }
        for n in range(4)
    ]  # fmt: skip
    lake.append(silver("subjects"), pa.Table.from_pylist(rows, schema=arrow_schema(SILVER_COLUMNS["subjects"])))


@pytest.fixture
def criteria(tmp_path: Path) -> str:
    path = tmp_path / "old.yaml"
    path.write_text(
        "name: old\ntitle: Old patients\nindex: {at: consent}\ninclusion: [{kind: age, min: 55, id: age-55}]\n"
    )
    return str(path)


# --- cohorts ---------------------------------------------------------------------------------------------------------


def test_cohort_is_built_shown_and_listed(run: Run, lake: DeltaTableStore, criteria: str) -> None:
    subjects(lake)
    status, out, _ = run("cohort", "build", criteria, "--dry-run", "--json")
    assert (status, json.loads(out)["members"], json.loads(out)["stored"]) == (0, 2, False)
    assert run("cohort", "list")[1].startswith("no cohort was built")
    status, out, _ = run("cohort", "build", criteria)
    assert status == 0
    assert "2 of 4 patients" in out
    assert "age-55" in out
    status, out, _ = run("cohort", "show", "old", "--members")
    assert status == 0
    assert "age-55: met, age 60 years" in out
    assert "P0" not in out
    shown = json.loads(run("cohort", "show", "old", "--members", "--json")[1])
    assert shown["ok"]
    assert [patient["patient_id"] for patient in shown["patients"]] == ["P2", "P3"]
    assert [step["remaining"] for step in shown["attrition"]] == [4, 4, 2, 2]
    assert "old" in run("cohort", "list")[1]


def test_wrong_cohort_commands_say_why(run: Run, criteria: str) -> None:
    status, _, err = run("cohort", "show", "young")
    assert status == 1
    assert "no cohort 'young' was built" in err
    status, out, _ = run("cohort", "build", "none", "--json")
    assert status == 1
    assert "there are no criteria" in json.loads(out)["error"]["why"]
    status, _, err = run("cohort", "build", criteria, "--trial", "no-such-trial")
    assert (status, "available: cdisc-pilot, simulated" in err) == (1, True)
    status, _, err = run("cohort")
    assert (status, "arguments are required" in err) == (2, True)
    assert run("cohort", "criteria")[1].count("cdisc-pilot") >= 2


# --- Kafka -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> FakeKafka:
    found = FakeKafka()
    found.ensure_topics(["patient-vitals", "lab-results", "medications", "adverse-events", "subjects"])
    monkeypatch.setattr(kafka, "topic_reader", lambda *_, **__: found)
    monkeypatch.setattr(kafka, "topic_admin", lambda *_, **__: found)
    return found


def test_topics_and_lag(run: Run, broker: FakeKafka) -> None:
    broker.send([Record("patient-vitals", json.dumps(vitals_message(n)).encode()) for n in range(5)])
    broker.send([Record("patient-vitals", b"broken")])
    status, out, _ = run("kafka", "topics", "--json")
    vitals = json.loads(out)["topics"]["patient-vitals"]
    assert (status, vitals["lag"], vitals["sampled"]) == (0, 6, 6)
    assert vitals["invalid_share"] > 0
    assert "1 of 6" in run("kafka", "topics")[1]
    broker.commit_group("readers", {("patient-vitals", 0): 2})
    assert "readers" in run("kafka", "lag")[1]
    status, out, _ = run("kafka", "lag", "--group", "readers", "--above", "3", "--json")
    assert (status, json.loads(out)["groups"][0]["lag"]) == (1, 4)
    assert run("kafka", "lag", "--above", "4")[0] == 0
    status, _, err = run("kafka", "lag", "--group", "writers")
    assert (status, "there is no consumer group writers" in err) == (1, True)


def test_validation_of_a_file_fails_where_a_message_is_invalid(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "patient-vitals.jsonl"
    path.write_text(json.dumps(vitals_message(1)) + "\n")
    assert run("kafka", "validate", str(path))[0] == 0
    path.write_text(json.dumps(vitals_message(1)) + "\n" + json.dumps(vitals_message(2, patient_id="SEC", spo2=3)))
    status, out, err = run("kafka", "validate", str(path))
    assert status == 1
    assert "line 2:" in out
    assert "SEC" not in out + err
    assert json.loads(run("kafka", "validate", str(path), "--json")[1])["invalid"] == 1
    assert run("kafka", "validate", str(tmp_path / "none.jsonl"), "--domain", "subjects")[0] == 1


# --- features --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(lake: DeltaTableStore, monkeypatch: pytest.MonkeyPatch) -> InMemoryOnlineStore:
    profile = load_trial(TRIAL)
    names = feature_names(profile)
    schema: dict[str, Any] = {
        "trial": pl.String, "patient_id": pl.String, "feature_time": pl.Datetime("us", "UTC"), "feature_date": pl.Date,
        **dict.fromkeys(names, pl.Float64),
    }  # fmt: skip
    rows = [
        {
            "trial": TRIAL, "patient_id": f"P{n}", "feature_time": START + timedelta(days=n),
            "feature_date": (START + timedelta(days=n)).date(), names[0]: float(n),
        }
        for n in range(2)
    ]  # fmt: skip
    lake.append(FEATURES, pl.DataFrame(rows, schema).to_arrow())
    store = InMemoryOnlineStore()
    values: dict[str, float | None] = {**dict.fromkeys(names), names[0]: 0.0}
    store.put([OnlineFeatures("P0", TRIAL, START, values, feature_set_id(profile))])
    monkeypatch.setattr(online, "RedisOnlineStore", lambda *_, **__: store)
    return store


def test_features_online_offline_and_compared(run: Run, stored: InMemoryOnlineStore) -> None:
    found = json.loads(run("features", "get", "P0", "--json")[1])
    assert found["feature_time"] == START.isoformat()
    assert run("features", "get", "P0")[0] == 0
    status, _, err = run("features", "get", "P1")
    assert (status, "no online features of this patient" in err) == (1, True)
    days = json.loads(run("features", "offline", "--json")[1])["days"]
    assert [day["rows"] for day in days] == [1, 1]
    rows = json.loads(run("features", "offline", "2025-01-01", "2025-01-02", "--patient", "P1", "--json")[1])["rows"]
    assert [row["patient_id"] for row in rows] == ["P1"]
    status, out, _ = run("features", "compare", "--json")
    compared = json.loads(out)
    assert (status, compared["equal"], compared["missing"]) == (1, 1, 1)
    assert run("features", "compare", "2025-01-01")[0] == 0


# --- Spark -----------------------------------------------------------------------------------------------------------


def test_spark_jobs_from_submission_to_log(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; print('given', sys.argv[1:]); sys.exit('fail' in sys.argv)"
    monkeypatch.setattr(spark, "submit_command", lambda *_, **__: [sys.executable, "-c", code])
    monkeypatch.setenv("CLINICAL_VAR_SPARK_MASTER_URL", "local[1]")
    script = tmp_path / "job.py"
    script.write_text("")
    assert run("spark", "status")[1].startswith("no job was submitted")
    status, out, _ = run("spark", "submit", str(script), "--conf", "spark.a=b", "--wait", "--json", "--", "--json", "7")
    done = json.loads(out)
    assert (status, done["state"]) == (0, "finished")
    assert "'spark.a=b'" in run("spark", "logs", done["job_id"])[1]
    assert "'--json', '7'" in run("spark", "logs", done["job_id"])[1]
    status, out, err = run("spark", "submit", str(script), "--wait", "--", "fail")
    assert status == 1
    assert "failed" in out + err
    listed = json.loads(run("spark", "status", "--json")[1])["jobs"]
    assert sorted(job["state"] for job in listed) == ["failed", "finished"]
    assert "had ended already" in run("spark", "kill", done["job_id"])[1]
    assert run("spark", "status", done["job_id"], "--wait")[0] == 0
    status, _, err = run("spark", "status", "unknown")
    assert (status, "there is no job" in err) == (1, True)
    assert run("spark", "submit", str(script), "--conf", "nonsense")[0] == 2
    assert run("spark", "submit", str(tmp_path / "missing.py"))[0] == 1


def test_streaming_job_is_started_shown_and_stopped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, _ = run("spark", "stream", "status", "--json")
    assert (status, json.loads(out)["state"]) == (1, "not running")
    assert run("spark", "stream", "stop")[1] == "the streaming job does not run\n"
    asked: list[list[str]] = []
    monkeypatch.setattr(streaming, "main", lambda arguments: asked.append(arguments) or "--once" in arguments)
    assert run("spark", "stream", "start", "--interval", "5s")[0] == 0
    assert run("spark", "stream", "start", "--once")[0] == 1
    assert asked == [["start", "--interval", "5s"], ["start", "--once"]]
    assert run("spark", "stream", "stop", "--once")[0] == 2


# --- data, dispatch --------------------------------------------------------------------------------------------------


def test_tables_and_quality(run: Run, lake: DeltaTableStore) -> None:
    subjects(lake)
    found = json.loads(run("data", "tables", "--json")[1])["tables"]
    assert {row["table"]: row["rows"] for row in found}["silver/subjects"] == 4
    status, out, _ = run("data", "quality", "--json")
    assert (status, [row["table"] for row in json.loads(out)["tables"] if row["rows"]]) == (0, ["subjects"])
    later = pl.DataFrame(pl.from_arrow(lake.read(silver("subjects")))).with_columns(
        event_time=datetime(2999, 1, 1, tzinfo=UTC)
    )
    lake.append(silver("subjects"), later.to_arrow())
    status, out, _ = run("data", "quality")
    assert (status, "times_are_not_in_the_future" in out) == (1, True)


def test_models_without_mlflow_say_where_it_was_expected(run: Run) -> None:
    status, _, err = run("models", "list")
    assert (status, "MLFLOW_TRACKING_URI" in err) == (1, True)


def test_words_go_to_the_subcommands_and_flags_to_the_stack(run: Run) -> None:
    assert clinical.is_command(["kafka", "lag"])
    assert not clinical.is_command(["--stop"])
    assert not clinical.is_command([])
    assert not clinical.wants_json(["spark", "submit", "x", "--", "--json"])
    assert run("--version")[0] == 0
    assert run("nonsense")[0] == 2
    status, _, err = run("data", "tables", "--", "more")
    assert (status, "only `spark submit`" in err) == (2, True)


def test_help_lists_every_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        clinical.build_parser().parse_args(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(group in shown for group in clinical.GROUPS)
