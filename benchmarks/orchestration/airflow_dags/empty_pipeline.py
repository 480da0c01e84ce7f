"""The graph of `clinical_data_pipeline` for Airflow, with tasks that do nothing.

Its operator is one that Airflow really runs; tasks of the EmptyOperator are only marked as done.
"""

from datetime import UTC, datetime

from airflow import DAG
from airflow.operators.python import PythonOperator

from clinical_orchestration.contract import CLINICAL_DATA_PIPELINE


def nothing():
    pass


with DAG("empty_pipeline", schedule=None, start_date=datetime(2024, 1, 1, tzinfo=UTC), catchup=False):
    tasks = {task: PythonOperator(task_id=task, python_callable=nothing) for task in CLINICAL_DATA_PIPELINE.tasks}
    for upstream, downstream in CLINICAL_DATA_PIPELINE.edges:
        tasks[upstream] >> tasks[downstream]
