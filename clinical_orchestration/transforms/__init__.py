"""Records as received to canonical rows: pure functions and rules as data, no I/O and no Dagster."""
