"""Dagster's side of the platform: assets, checks, jobs and schedules. The work itself is done by the rooms below."""
