"""The command ``airflow``: what people knew of its command line, on this platform."""
