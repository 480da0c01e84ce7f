"""Uses the platform as `dagster-airlift` uses an Airflow: prints what it found as JSON.

python airlift.py URL            # ADMIN as `name:password` in the environment
"""

import datetime
import json
import os
import sys

from dagster_airlift.core import AirflowBasicAuthBackend, AirflowInstance

DAG_ID = "model_monitoring"


def main() -> None:
    name, _, password = os.environ.get("ADMIN", "admin:admin").partition(":")
    airflow = AirflowInstance(AirflowBasicAuthBackend(sys.argv[1], name, password), "clinical")
    began = datetime.datetime.now(datetime.timezone.utc)  # noqa: UP017
    dags = {dag.dag_id: dag for dag in airflow.list_dags()}
    tasks = {task.task_id: task for task in airflow.get_task_infos(dag_id=DAG_ID)}
    run = airflow.trigger_dag(DAG_ID)
    airflow.wait_for_run_completion(DAG_ID, run, timeout=120)
    later = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=5)  # noqa: UP017
    batch, total = airflow.get_dag_runs_batch([DAG_ID], end_date_gte=began, end_date_lte=later)
    listed = airflow.get_dag_runs(DAG_ID, began, later)
    step = "detect_data_drift"
    instance = airflow.get_task_instance(DAG_ID, step, run)
    found = {
        "dags": sorted(dags),
        "url": dags[DAG_ID].url,
        "tasks": sorted(tasks),
        "downstream": tasks["start_monitoring"].downstream_task_ids,
        "source": airflow.get_dag_source_code(dags[DAG_ID].file_token),
        "state": airflow.get_run_state(DAG_ID, run),
        "run": run,
        "batch": [one.run_id for one in batch],
        "batch_total": total,
        "listed": [one.run_id for one in listed],
        "task_state": instance.state,
        "task_seconds": instance.end_date.timestamp() - instance.start_date.timestamp(),
        "task_batch": sorted(
            one.task_id for one in airflow.get_task_instance_batch(DAG_ID, list(tasks), run, ["success"])
        ),
        "task_range": len(airflow.get_task_instance_batch_time_range([DAG_ID], ["success"], began, later)),
        "log": airflow.get_task_instance_logs(DAG_ID, step, run, 1),
        "datasets": [one.uri for one in airflow.get_all_datasets(dag_ids=[DAG_ID])],
        "variables": len(airflow.list_variables()),
    }
    airflow.unpause_dag(DAG_ID)
    airflow.delete_run(DAG_ID, run)
    found["left"] = [one.run_id for one in airflow.get_dag_runs(DAG_ID, began, later)]
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
