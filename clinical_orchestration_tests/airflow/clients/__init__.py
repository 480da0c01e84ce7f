"""Scripts that run in environments of their own with what others use to speak to Airflow; each prints JSON."""
