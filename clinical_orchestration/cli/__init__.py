"""The command ``airflow``: what people know of Airflow 2.11's command line, on this platform.

One module a command group below :mod:`.groups`, each with a ``GROUP`` that :mod:`.airflow` lists. What a command needs
is imported when it runs.
"""
