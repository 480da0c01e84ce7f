"""The page process of the platform, port 8085: front page, ``/health``, and the Dagster UI under ``/dagster/``."""
