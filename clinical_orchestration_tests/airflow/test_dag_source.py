"""The code of the real pipelines: every step names its file and line, and the source of a DAG shows it."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from dagster._core.remote_representation.external_data import RepositorySnap

from clinical_orchestration.airflow.catalog import Dag, dags_of
from clinical_orchestration.api.dags import source_of
from clinical_orchestration.contract import PIPELINES
from clinical_orchestration.definitions import defs
from clinical_orchestration.defs.training import assets as training


@pytest.fixture(scope="module")
def dags() -> dict[str, Dag]:
    repository = defs.get_repository_def()
    jobs = {job.name: job.get_job_snapshot() for job in repository.get_all_jobs() if not job.name.startswith("__")}
    found = dags_of(RepositorySnap.from_def(repository), jobs, location="clinical")
    return {dag.dag_id: dag for dag in found}


def test_every_step_says_where_its_code_is(dags: dict[str, Dag]) -> None:
    assert set(dags) >= {pipeline.name for pipeline in PIPELINES}
    for dag in dags.values():
        assert dag.files
        for task in dag.tasks.values():
            assert (task.code is None) == (task.step is None), task.task_id
            if task.code is not None:
                file, line = task.code
                below = Path(file).read_text(encoding="utf-8").splitlines()[line - 1 :]
                start = next(text for text in below if text.startswith("def "))
                assert start.startswith(f"def {task.step}("), task.task_id


def test_the_source_of_a_dag_is_the_code_of_its_assets(dags: dict[str, Dag]) -> None:
    dag = dags["clinical_data_pipeline"]
    text = source_of(dag)
    assert inspect.getsource(training) in text
    assert "/dagster/assets/models/candidates" in text
    assert "training/assets.py:" in text
    assert "def detect_data_drift(" not in text
    assert "def detect_data_drift(" in source_of(dags["model_monitoring"])


def test_code_on_another_machine_is_named(dags: dict[str, Dag], monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(self: Path, encoding: str) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", absent)
    text = source_of(dags["feature_backfill"])
    assert "is on the machine of the code location clinical" in text
    assert "engineer_features  " in text
