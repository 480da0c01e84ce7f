"""Datasets: the assets, and their materializations as events.

The URI of an asset is ``asset://`` and its key. No DAG of this platform waits for datasets, so nothing is ever queued.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from clinical_orchestration.airflow.database import dag_runs, dataset_ids, event_logs, run_attempts

if TYPE_CHECKING:
    from clinical_orchestration.airflow.control import Control

SCHEME = "asset://"
_KIND = "ASSET_MATERIALIZATION"


@dataclass(frozen=True)
class Dataset:
    """One asset; `producers` are (DAG, task)."""

    id: int
    uri: str
    created_at: datetime
    updated_at: datetime
    producers: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class DatasetEvent:
    """One materialization, and the task instance that made it; no source where it was reported from outside."""

    id: int
    dataset_id: int
    uri: str
    at: datetime
    dag_id: str | None
    task_id: str | None
    run_id: str | None


class Datasets:
    """Reads assets and their materializations."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def all(self) -> list[Dataset]:
        """Return every asset of the DAGs, by id."""
        self._control.runs.prepare()
        producers: dict[str, list[tuple[str, str]]] = {}
        for dag in self._control.catalog().dags.values():
            for task in dag.tasks.values():
                for asset in task.assets:
                    producers.setdefault(SCHEME + asset, []).append((dag.dag_id, task.task_id))
        engine = self._control.runs.engine
        with engine.begin() as connection:
            known = {row.uri: row for row in connection.execute(sa.select(dataset_ids))}
            absent = sorted(set(producers) - set(known))
            if absent:
                now = datetime.now(UTC)
                connection.execute(
                    insert(dataset_ids)
                    .values([{"uri": uri, "created_at": now} for uri in absent])
                    .on_conflict_do_nothing()
                )
                known = {row.uri: row for row in connection.execute(sa.select(dataset_ids))}
            newest = self._newest(connection)
        return sorted(
            (
                Dataset(
                    known[uri].id,
                    uri,
                    known[uri].created_at.astimezone(UTC),
                    newest.get(uri) or known[uri].created_at.astimezone(UTC),
                    tuple(made_by),
                )
                for uri, made_by in producers.items()
            ),
            key=lambda one: one.id,
        )

    def get(self, uri: str) -> Dataset | None:
        """Return one asset by its URI."""
        return next((one for one in self.all() if one.uri == uri), None)

    def events(
        self,
        *,
        limit: int,
        offset: int,
        newest_first: bool,
        dataset_id: int | None = None,
        source: Mapping[str, str] | None = None,
        order: str = "timestamp",
    ) -> tuple[list[DatasetEvent], int]:
        """Return a page of materializations and how many there are.

        Args:
            limit: events at most.
            offset: events to pass over.
            newest_first: descending order.
            dataset_id: of one asset only.
            source: ``dag_id``, ``task_id``, ``run_id`` that made them.
            order: ``timestamp``, ``source_dag_id``, ``source_task_id`` or ``source_run_id``.
        """
        self._control.runs.take_up()
        datasets = {one.uri: one for one in self.all()}
        wanted = [one.uri for one in datasets.values() if dataset_id in (None, one.id)]
        keys = {_stored_key(uri): uri for uri in wanted}
        if not keys:
            return [], 0
        rows = event_logs.outerjoin(run_attempts, run_attempts.c.dagster_run_id == event_logs.c.run_id).outerjoin(
            dag_runs, dag_runs.c.id == run_attempts.c.dag_run
        )
        conditions = [event_logs.c.dagster_event_type == _KIND, event_logs.c.asset_key.in_(list(keys))]
        for name, made_by in (("dag_id", dag_runs.c.dag_id), ("run_id", dag_runs.c.run_id)):
            if source and source.get(name) is not None:
                conditions.append(made_by == source[name])
        if source and source.get("task_id") is not None:
            conditions.append(event_logs.c.step_key == source["task_id"])
        column: Any = {
            "timestamp": event_logs.c.id, "source_dag_id": dag_runs.c.dag_id, "source_task_id": event_logs.c.step_key,
            "source_run_id": dag_runs.c.run_id,
        }.get(order, event_logs.c.id)  # fmt: skip
        query = (
            sa.select(
                event_logs.c.id, event_logs.c.asset_key, event_logs.c.timestamp, event_logs.c.step_key,
                dag_runs.c.dag_id, dag_runs.c.run_id,
            )
            .select_from(rows)
            .where(*conditions)
            .order_by(column.desc() if newest_first else column.asc(), event_logs.c.id)
            .limit(limit)
            .offset(offset)
        )  # fmt: skip
        with self._control.runs.engine.connect() as connection:
            found = connection.execute(query).all()
            total = connection.execute(
                sa.select(sa.func.count()).select_from(rows).where(*conditions)
            ).scalar_one()  # fmt: skip
        return [
            DatasetEvent(
                event_id, datasets[keys[key]].id, keys[key], at.replace(tzinfo=UTC), dag_id,
                step if dag_id is not None else None, run_id,
            )
            for event_id, key, at, step, dag_id, run_id in found
        ], total  # fmt: skip

    def report(self, uri: str, extra: Mapping[str, Any]) -> DatasetEvent:
        """Report that an asset was made outside; Dagster records a materialization without a run.

        Raises:
            KeyError: there is no such asset.
        """
        from dagster import AssetKey, AssetMaterialization

        dataset = self.get(uri)
        if dataset is None:
            raise KeyError(uri)
        key = AssetKey(uri.removeprefix(SCHEME).split("/"))
        self._control.instance().report_runless_asset_event(
            AssetMaterialization(asset_key=key, metadata={"extra": dict(extra), "from_rest_api": True})
        )
        events, _ = self.events(limit=1, offset=0, newest_first=True, dataset_id=dataset.id)
        return events[0]

    def _newest(self, connection: sa.Connection) -> dict[str, datetime]:
        query = (
            sa.select(event_logs.c.asset_key, sa.func.max(event_logs.c.timestamp))
            .where(event_logs.c.dagster_event_type == _KIND, event_logs.c.asset_key.is_not(None))
            .group_by(event_logs.c.asset_key)
        )
        return {uri_of(key): at.replace(tzinfo=UTC) for key, at in connection.execute(query)}


def uri_of(stored_key: str) -> str:
    """Return the URI of an asset from the key as Dagster stores it, a JSON list."""
    parts: Sequence[str] = orjson.loads(stored_key)
    return SCHEME + "/".join(parts)


def _stored_key(uri: str) -> str:
    from dagster import AssetKey

    return AssetKey(uri.removeprefix(SCHEME).split("/")).to_string()
