"""Spark jobs on real Spark: a script's main in Spark Connect, the same script by SparkSubmit, and an end by force."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from clinical_orchestration.settings import ClientSettings
from clinical_orchestration.stack.java import SPARK_OPTIONS, find_java
from clinical_orchestration.stores.spark_jobs import JobState, SparkJobs, spark_jobs, wait

pytestmark = pytest.mark.integration

SCRIPT = """
import time


def main(spark, arguments):
    total = spark.range(int(arguments[0])).selectExpr("sum(id) AS total").collect()[0]["total"]
    print(f"total {total}, {spark.conf.get('spark.sql.shuffle.partitions')} partitions", flush=True)
    if "wait" in arguments:
        time.sleep(600)


if __name__ == "__main__":
    import sys

    from pyspark.sql import SparkSession

    main(SparkSession.builder.getOrCreate(), sys.argv[1:])
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CLINICAL_HOME", str(tmp_path))
    monkeypatch.delenv("SPARK_REST_URL", raising=False)
    path = tmp_path / "sums.py"
    path.write_text(SCRIPT)
    return str(path)


def await_line(jobs: SparkJobs, job: str, start: str) -> None:
    deadline = time.monotonic() + 180
    while not any(line.startswith(start) for line in jobs.logs(job, 1000)):
        assert not jobs.status(job).over, jobs.logs(job)
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_main_in_spark_connect(spark_env: dict[str, str], script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_REMOTE", spark_env["SPARK_REMOTE"])
    jobs = spark_jobs(ClientSettings(), master_url="")
    job = jobs.submit(script, ["1000"], properties={"spark.sql.shuffle.partitions": "3"})
    done = wait(jobs, job.job_id, timeout_seconds=240)
    assert done.state is JobState.FINISHED, jobs.logs(job.job_id)
    assert "total 499500, 3 partitions" in jobs.logs(job.job_id)

    bad = wait(jobs, jobs.submit(script, ["many"]).job_id, timeout_seconds=240)
    assert (bad.state, bad.message.split(":")[0]) == (JobState.FAILED, "ValueError")

    endless = jobs.submit(script, ["10", "wait"]).job_id
    await_line(jobs, endless, "total 45")
    assert jobs.kill(endless)
    assert jobs.status(endless).state is JobState.KILLED


def test_the_same_script_by_spark_submit(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # what a Spark Connect session leaves in the environment of its process, such as a notebook's
    monkeypatch.setenv("SPARK_CONNECT_MODE_ENABLED", "1")
    jobs = spark_jobs(ClientSettings(), master_url="local[1]", java=find_java(), java_options=SPARK_OPTIONS)
    properties = {"spark.sql.shuffle.partitions": "3", "spark.ui.enabled": "false", "spark.driver.memory": "512m"}
    job = jobs.submit(script, ["1000"], name="sums", properties=properties)
    done = wait(jobs, job.job_id, timeout_seconds=300)
    assert done.state is JobState.FINISHED, jobs.logs(job.job_id)
    assert "total 499500, 3 partitions" in jobs.logs(job.job_id, 1000)
