"""Airflow's view of this platform: DAGs, DAG runs and task instances over Dagster's jobs, runs and steps.

The REST API and the command line both work on this package; it knows neither HTTP nor terminals.
"""
