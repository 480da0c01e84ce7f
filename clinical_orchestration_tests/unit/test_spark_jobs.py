"""Spark jobs: the cluster's REST protocol, processes of this machine, and waiting for both."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clinical_orchestration.settings import ClientSettings
from clinical_orchestration.stores import spark_jobs as module
from clinical_orchestration.stores.spark_jobs import (
    JobState,
    ProcessJobs,
    SparkJobError,
    SparkMasterUnavailableError,
    SparkMonitor,
    StandaloneJobs,
    UnknownJobError,
    spark_jobs,
    submit_command,
    wait,
)
from clinical_orchestration_tests.spark_cluster import SparkCluster, spark_cluster


@pytest.fixture
def cluster() -> Iterator[SparkCluster]:
    with spark_cluster() as found:
        yield found


def standalone(cluster: SparkCluster, **options: Any) -> StandaloneJobs:
    return StandaloneJobs(cluster.url, "spark://master:7077", ui_url=cluster.url, **options)


# --- standalone cluster ----------------------------------------------------------------------------------------------


def test_a_script_is_submitted_as_the_protocol_wants_it(cluster: SparkCluster) -> None:
    properties = {"spark.executor.memory": "1g"}
    status = standalone(cluster).submit("/apps/score.py", ["--day", "1"], name="scores", properties=properties)
    assert (status.state, status.name) == (JobState.SUBMITTED, "scores")
    (request,) = cluster.requests
    assert request["action"] == "CreateSubmissionRequest"
    assert request["mainClass"] == "org.apache.spark.deploy.SparkSubmit"
    assert request["sparkProperties"] == {
        "spark.master": "spark://master:7077", "spark.app.name": "scores", "spark.executor.memory": "1g",
    }  # fmt: skip
    assert request["appArgs"][-3:] == ["/apps/score.py", "--day", "1"]
    assert "spark.executor.memory=1g" in request["appArgs"]


def test_a_jar_is_submitted_by_its_main_class(cluster: SparkCluster) -> None:
    standalone(cluster).submit("org.example.Job@s3a://apps/job.jar", ["x"])
    (request,) = cluster.requests
    assert (request["mainClass"], request["appResource"]) == ("org.example.Job", "s3a://apps/job.jar")
    assert request["appArgs"] == ["x"]
    assert request["sparkProperties"]["spark.jars"] == "s3a://apps/job.jar"


def test_status_follows_the_driver_to_its_end(cluster: SparkCluster) -> None:
    jobs = standalone(cluster)
    job = jobs.submit("/apps/score.py").job_id
    seen: list[JobState] = []

    def move(status: Any) -> None:
        seen.append(status.state)
        cluster.advance(job, {"submitted": "RUNNING", "running": "FINISHED"}.get(status.state, "FINISHED"))

    assert wait(jobs, job, poll_seconds=0.01, on_change=move).state is JobState.FINISHED
    assert seen == [JobState.SUBMITTED, JobState.RUNNING, JobState.FINISHED]


def test_a_failed_driver_says_why_in_one_line(cluster: SparkCluster) -> None:
    jobs = standalone(cluster)
    job = jobs.submit("/apps/score.py").job_id
    cluster.advance(job, "ERROR", "java.io.IOException: no space left")
    status = jobs.status(job)
    assert status.state is JobState.FAILED
    assert status.message == "Exception from the cluster: java.io.IOException: no space left"
    cluster.advance(job, "FAILED")
    assert jobs.status(job).message == "the driver failed; its log says why"


def test_kill_says_whether_there_was_something_to_kill(cluster: SparkCluster) -> None:
    jobs = standalone(cluster)
    job = jobs.submit("/apps/score.py").job_id
    assert jobs.kill(job)
    assert jobs.status(job).state is JobState.KILLED
    assert not jobs.kill(job)
    with pytest.raises(UnknownJobError):
        jobs.kill("driver-none")


def test_logs_and_list_come_through_the_masters_page(cluster: SparkCluster) -> None:
    jobs = standalone(cluster)
    first, second = jobs.submit("/apps/a.py").job_id, jobs.submit("/apps/b.py").job_id
    cluster.advance(first, "RUNNING")
    assert [status.job_id for status in jobs.jobs()] == [second, first]
    assert jobs.logs(first) == [f"stderr of {first}", f"stdout of {first}"]
    assert jobs.logs(first, 1) == [f"stdout of {first}"]
    with pytest.raises(SparkJobError, match="none has it yet"):
        jobs.logs(second)
    with pytest.raises(SparkJobError, match="SPARK_UI_URL"):
        StandaloneJobs(cluster.url, "spark://master:7077").logs(first)


def test_refusals_carry_the_servers_words_without_its_stack_trace(cluster: SparkCluster) -> None:
    jobs = standalone(cluster)
    with pytest.raises(UnknownJobError, match="knows no job driver-none"):
        jobs.status("driver-none")
    with pytest.raises(UnknownJobError, match="is no id"):
        jobs.status("../create")
    with pytest.raises(SparkJobError, match=r"CreateSubmissionRequest failed!$"):
        jobs._ask("POST", "create", {"action": "CreateSubmissionRequest"})


def test_a_master_that_is_away_is_named() -> None:
    with pytest.raises(SparkMasterUnavailableError, match=r"http://127\.0\.0\.1:9 does not answer"):
        StandaloneJobs("http://127.0.0.1:9", "spark://127.0.0.1:9").submit("/apps/a.py")


def test_progress_counts_the_tasks_of_an_application(cluster: SparkCluster) -> None:
    cluster.applications = [{"id": "app-1", "name": "scores", "attempts": [{"completed": False}]}]
    job = {"numTasks": 8, "numCompletedTasks": 8, "numFailedTasks": 1, "status": "SUCCEEDED"}
    cluster.application_jobs["app-1"] = [job, {**job, "numCompletedTasks": 3, "status": "RUNNING"}]
    progress = SparkMonitor(cluster.url).progress("app-1")
    assert (progress.tasks, progress.completed_tasks, progress.failed_tasks) == (16, 11, 2)
    assert (progress.jobs, progress.running_jobs, progress.completed) == (2, 1, False)
    with pytest.raises(UnknownJobError):
        SparkMonitor(cluster.url).progress("app-2")


# --- processes -------------------------------------------------------------------------------------------------------


def submitting(folder: Path, code: str) -> ProcessJobs:
    """Return jobs whose "SparkSubmit" is a Python that runs `code` with the application's arguments."""
    return ProcessJobs(folder, [sys.executable, "-c", code])


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "job.py"
    path.write_text("print('a script')\n")
    return str(path)


def test_a_process_leaves_its_state_and_log_for_any_later_process(tmp_path: Path, script: str) -> None:
    jobs = submitting(tmp_path / "jobs", "import sys; print(sys.argv[1:])")
    job = jobs.submit(script, ["7"], properties={"spark.a": "b"})
    done = wait(jobs, job.job_id, timeout_seconds=30, poll_seconds=0.05)
    assert (done.state, done.name) == (JobState.FINISHED, "job")
    assert done.started_at is not None
    assert done.ended_at is not None
    assert done.ended_at >= done.started_at
    later = ProcessJobs(tmp_path / "jobs")
    assert [status.state for status in later.jobs()] == [JobState.FINISHED]
    assert later.logs(job.job_id) == [str(["--name", "job", "--conf", "spark.a=b", script, "7"])]
    assert not later.kill(job.job_id)


def test_a_command_that_fails_is_a_failed_job(tmp_path: Path, script: str) -> None:
    jobs = submitting(tmp_path / "jobs", "import sys; print('last words'); sys.exit(3)")
    done = wait(jobs, jobs.submit(script).job_id, timeout_seconds=30, poll_seconds=0.05)
    assert (done.state, done.message) == (JobState.FAILED, "SparkSubmit ended with status 3; see the log")
    assert jobs.logs(done.job_id) == ["last words"]


def await_line(jobs: ProcessJobs, job: str, line: str) -> None:
    deadline = time.monotonic() + 30
    while line not in jobs.logs(job):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_kill_ends_the_runner_and_what_it_started(tmp_path: Path, script: str) -> None:
    code = "import os, time; print(os.getpid(), flush=True); print('ready', flush=True); time.sleep(600)"
    jobs = submitting(tmp_path / "jobs", code)
    job = jobs.submit(script).job_id
    await_line(jobs, job, "ready")
    assert jobs.status(job).state is JobState.RUNNING
    with pytest.raises(TimeoutError, match="it goes on"):
        wait(jobs, job, timeout_seconds=0.1, poll_seconds=0.05)
    child = int(jobs.logs(job)[0])
    assert jobs.kill(job)
    assert jobs.status(job).state is JobState.KILLED
    assert module._created(child) is None
    assert not jobs.kill(job)


def test_a_runner_that_was_killed_from_outside_is_a_failed_job(tmp_path: Path, script: str) -> None:
    jobs = submitting(tmp_path / "jobs", "import time; print('ready', flush=True); time.sleep(600)")
    job = jobs.submit(script).job_id
    await_line(jobs, job, "ready")
    pid = json.loads((tmp_path / "jobs" / job / "process.json").read_text())["pid"]
    os.killpg(pid, signal.SIGKILL)
    done = wait(jobs, job, timeout_seconds=10, poll_seconds=0.05)
    assert (done.state, done.message) == (JobState.FAILED, "its process ended without saying why; see the log")


def test_the_number_of_another_process_is_not_mistaken_for_the_job(tmp_path: Path, script: str) -> None:
    jobs = submitting(tmp_path / "jobs", "")
    job = jobs.submit(script).job_id
    wait(jobs, job, timeout_seconds=30, poll_seconds=0.05)
    place = tmp_path / "jobs" / job
    (place / "state.json").write_text(json.dumps({"state": "running"}))
    (place / "process.json").write_text(json.dumps({"pid": os.getpid(), "created": 1.0}))
    assert jobs.status(job).state is JobState.FAILED
    assert not jobs.kill(job)  # this test lives


def test_without_spark_connect_the_reason_is_in_the_state(tmp_path: Path) -> None:
    path = tmp_path / "job.py"
    path.write_text("def main(spark):\n    pass\n")
    jobs = ProcessJobs(tmp_path / "jobs", environment={"SPARK_REMOTE": "sc://127.0.0.1:9"})
    done = wait(jobs, jobs.submit(str(path)).job_id, timeout_seconds=30, poll_seconds=0.05)
    assert done.state is JobState.FAILED
    assert done.message.startswith("SparkUnavailableError: Spark Connect does not answer at 127.0.0.1:9")


def test_a_script_without_main_says_what_is_expected(tmp_path: Path, script: str) -> None:
    jobs = ProcessJobs(tmp_path / "jobs")
    done = wait(jobs, jobs.submit(script).job_id, timeout_seconds=30, poll_seconds=0.05)
    assert done.state is JobState.FAILED
    assert "has no function main(spark)" in done.message


def test_what_cannot_be_found_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(SparkJobError, match="there is no file"):
        ProcessJobs(tmp_path).submit("missing.py")
    with pytest.raises(SparkJobError, match="there is no file"):
        submitting(tmp_path, "").submit("some.module")
    with pytest.raises(UnknownJobError):
        ProcessJobs(tmp_path).status("../../etc")
    assert ProcessJobs(tmp_path / "none").jobs() == []


def test_variables_of_the_environment_can_be_taken_out(
    tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARK_REMOTE", "sc://elsewhere")
    code = "import os; print(os.environ.get('SPARK_REMOTE'), os.environ['ADDED'])"
    jobs = ProcessJobs(tmp_path / "jobs", [sys.executable, "-c", code], {"SPARK_REMOTE": None, "ADDED": "x"})
    done = wait(jobs, jobs.submit(script).job_id, timeout_seconds=30, poll_seconds=0.05)
    assert jobs.logs(done.job_id) == ["None x"]


def test_job_folders_are_private(tmp_path: Path, script: str) -> None:
    jobs = submitting(tmp_path / "jobs", "")
    job = jobs.submit(script).job_id
    assert (tmp_path / "jobs" / job).stat().st_mode & 0o077 == 0
    wait(jobs, job, timeout_seconds=30, poll_seconds=0.05)


# --- choice ----------------------------------------------------------------------------------------------------------


def test_the_deployment_decides_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLINICAL_HOME", str(tmp_path))
    settings = ClientSettings()
    monkeypatch.delenv("SPARK_REST_URL", raising=False)
    connect = spark_jobs(settings, master_url="")
    assert isinstance(connect, ProcessJobs)
    assert connect._command is None
    local = spark_jobs(settings, master_url="local[2]", java="/opt/java")
    assert isinstance(local, ProcessJobs)
    assert local._command is not None
    assert local._command[0] == "/opt/java"
    assert local._command[-2:] == ["--master", "local[2]"]
    assert local._environment["SPARK_REMOTE"] is None
    monkeypatch.setenv("SPARK_REST_URL", "http://master:6066")
    cluster = spark_jobs(settings, master_url="")
    assert isinstance(cluster, StandaloneJobs)
    assert cluster._master == "spark://master:7077"


def test_spark_home_brings_its_own_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "spark-submit").touch()
    monkeypatch.setenv("SPARK_HOME", str(tmp_path))
    assert submit_command("yarn") == [str(tmp_path / "bin" / "spark-submit"), "--master", "yarn"]
