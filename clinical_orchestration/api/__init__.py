"""The Airflow REST API, `/api/v1`."""
