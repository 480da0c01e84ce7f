"""A database of its own for each test, in the PostgreSQL of the session."""

from clinical_orchestration_tests.databases import stored_configuration as database

__all__ = ["database"]
