"""The tables behind Airflow's view, in the database of the Dagster instance.

Dagster's own tables are only read. ``airflow_dag_runs`` has a row for every run of a DAG, with what Dagster does not
keep (run id, logical date, data interval, conf, note); ``airflow_run_attempts`` names the Dagster runs behind it: the
first, and those that clearing or re-execution added; ``airflow_task_instances`` and ``airflow_task_tries`` are made
from the event log and hold nothing else but notes and states that somebody set by hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from clinical_orchestration.platform.pooling import prove_idle_connections

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine

metadata = sa.MetaData()
_UTC = sa.DateTime(timezone=True)

dag_runs = sa.Table(
    "airflow_dag_runs",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("dag_id", sa.Text, nullable=False),
    sa.Column("run_id", sa.Text, nullable=False),
    sa.Column("dagster_run_id", sa.Text, nullable=False, unique=True),  # of the newest attempt
    sa.Column("logical_date", _UTC, nullable=False),
    sa.Column("data_interval_start", _UTC, nullable=False),
    sa.Column("data_interval_end", _UTC, nullable=False),
    sa.Column("run_type", sa.Text, nullable=False),
    sa.Column("external_trigger", sa.Boolean, nullable=False),
    sa.Column("conf", JSONB, nullable=False),
    sa.Column("note", sa.Text),
    sa.Column("created_at", _UTC, nullable=False),
    sa.Column("held", sa.Boolean, nullable=False, server_default=sa.false()),  # waits for its DAG to be unpaused
    sa.Column("state_set", sa.Text),  # set by hand, after the run had ended
    sa.Column("projected_event", sa.BigInteger, nullable=False, server_default="0"),  # newest event that tasks show
    sa.Column("projected_final", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.UniqueConstraint("dag_id", "run_id", name="airflow_dag_runs_run_id"),
    sa.Index("airflow_dag_runs_logical", "dag_id", "logical_date"),
)

run_attempts = sa.Table(
    "airflow_run_attempts",
    metadata,
    sa.Column("dagster_run_id", sa.Text, primary_key=True),
    sa.Column(
        "dag_run", sa.BigInteger, sa.ForeignKey("airflow_dag_runs.id", ondelete="CASCADE"), nullable=False, index=True
    ),
    sa.Column("number", sa.Integer, nullable=False),
)

task_instances = sa.Table(
    "airflow_task_instances",
    metadata,
    sa.Column("dag_run", sa.BigInteger, sa.ForeignKey("airflow_dag_runs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("task_id", sa.Text, primary_key=True),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("state", sa.Text),
    sa.Column("start_date", _UTC),
    sa.Column("end_date", _UTC),
    sa.Column("duration", sa.Float),
    sa.Column("try_number", sa.Integer, nullable=False),
    sa.Column("max_tries", sa.Integer, nullable=False),
    sa.Column("pool", sa.Text, nullable=False),
    sa.Column("queued_when", _UTC),
    sa.Column("updated_at", _UTC, nullable=False),
    sa.Column("note", sa.Text),
    sa.Column("state_set", sa.Text),
)

task_tries = sa.Table(
    "airflow_task_tries",
    metadata,
    sa.Column("dag_run", sa.BigInteger, sa.ForeignKey("airflow_dag_runs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("task_id", sa.Text, primary_key=True),
    sa.Column("try_number", sa.Integer, primary_key=True),
    sa.Column("state", sa.Text),
    sa.Column("start_date", _UTC),
    sa.Column("end_date", _UTC),
    sa.Column("dagster_run_id", sa.Text, nullable=False),
)

paused_dags = sa.Table(  # DAGs without a schedule, whose switch Dagster does not have
    "airflow_paused_dags",
    metadata,
    sa.Column("dag_id", sa.Text, primary_key=True),
    sa.Column("paused_at", _UTC, nullable=False),
)

dataset_ids = sa.Table(
    "airflow_datasets",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("uri", sa.Text, nullable=False, unique=True),
    sa.Column("created_at", _UTC, nullable=False),
)

# Dagster's tables, the columns that are read
runs = sa.table(
    "runs",
    sa.column("id", sa.BigInteger),
    sa.column("run_id", sa.Text),
    sa.column("pipeline_name", sa.Text),
    sa.column("status", sa.Text),
    sa.column("run_body", sa.Text),
    sa.column("create_timestamp", sa.DateTime),
    sa.column("update_timestamp", sa.DateTime),
    sa.column("start_time", sa.Float),
    sa.column("end_time", sa.Float),
)
run_tags = sa.table(
    "run_tags", sa.column("run_id", sa.Text), sa.column("key", sa.Text), sa.column("value", sa.Text)
)  # fmt: skip
event_logs = sa.table(
    "event_logs",
    sa.column("id", sa.BigInteger),
    sa.column("run_id", sa.Text),
    sa.column("dagster_event_type", sa.Text),
    sa.column("timestamp", sa.DateTime),
    sa.column("step_key", sa.Text),
    sa.column("asset_key", sa.Text),
)
instigators = sa.table("instigators", sa.column("selector_id", sa.Text), sa.column("status", sa.Text))
job_ticks = sa.table(
    "job_ticks",
    sa.column("selector_id", sa.Text),
    sa.column("status", sa.Text),
    sa.column("timestamp", sa.DateTime),
)

KEPT_READERS = 4
_LOCK = 0x436C696E6F7263  # advisory lock around the creation of the tables


def create_tables(engine: Engine) -> None:
    """Create the tables that are absent; safe in several processes at once."""
    with engine.begin() as connection:
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        metadata.create_all(connection)


def open_engine(url: str, *, size: int = 4) -> Engine:
    """Return an engine over a small pool; a connection that the server closed is replaced unseen.

    Args:
        url: ``postgresql://...``; it holds the password and is shown nowhere.
        size: connections kept; twice as many may be open at once.
    """
    return _engine(sa.make_url(url).set(drivername="postgresql+psycopg2"), size)


def twin_for_reads(engine: Engine) -> Engine:
    """Return an engine on the same database whose statements stand alone, each one round trip; it ends with it.

    Args:
        engine: of :func:`open_engine`.
    """
    twin = _engine(engine.url, KEPT_READERS, isolation_level="AUTOCOMMIT")
    sa.event.listen(engine, "engine_disposed", lambda _: twin.dispose())
    return twin


def _engine(url: sa.URL, size: int, **options: Any) -> Engine:
    engine = sa.create_engine(
        url,
        pool_size=size,
        max_overflow=size,
        pool_recycle=3600,
        hide_parameters=True,
        connect_args={"connect_timeout": 5, "application_name": "airflow-view", "options": "-c timezone=UTC"},
        **options,
    )
    prove_idle_connections(engine)
    return engine


def has_dagster(connection: Connection) -> bool:
    """Whether Dagster has made its tables yet."""
    return sa.inspect(connection).has_table("event_logs")
