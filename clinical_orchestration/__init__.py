"""Clinical-trials ML platform on Dagster: from raw trial records to a served, monitored model."""

__version__ = "0.1.0"
