"""Datasets and their events."""

from __future__ import annotations

from typing import Any

from clinical_orchestration.airflow.control import Control
from clinical_orchestration.airflow.datasets import Dataset, DatasetEvent, Datasets
from clinical_orchestration.api.call import Body, Call, show_time
from clinical_orchestration.api.problems import Problem, not_found

_EVENT_ORDER = ("source_dag_id", "source_task_id", "source_run_id", "source_map_index", "timestamp")


class DatasetRoutes:
    """Handlers of datasets, named by Airflow's operation ids. No DAG waits for a dataset: nothing is queued."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self.datasets = Datasets(control)

    def get_datasets(self, call: Call) -> dict[str, Any]:
        """``GET /datasets``."""
        limit, offset = call.page()
        order = call.order(("id", "uri", "created_at", "updated_at"), "id")
        found = self.datasets.all()
        pattern, dags = (call.text("uri_pattern") or "").lower(), call.texts("dag_ids")
        if pattern:
            found = [one for one in found if pattern in one.uri.lower()]
        if dags:
            found = [one for one in found if any(dag_id in dags for dag_id, _ in one.producers)]
        found.sort(key=lambda one: getattr(one, order.lstrip("-")), reverse=order.startswith("-"))
        page = found[offset : offset + limit]
        return {"datasets": [_show(one) for one in page], "total_entries": len(found)}

    def get_dataset(self, call: Call) -> dict[str, Any]:
        """``GET /datasets/{uri}``."""
        uri = call.path["uri"]
        found = self.datasets.get(uri)
        if found is None:
            raise not_found("Dataset not found", f"The Dataset with uri: `{uri}` was not found")
        return _show(found)

    def get_dataset_events(self, call: Call) -> dict[str, Any]:
        """``GET /datasets/events``."""
        limit, offset = call.page()
        order = call.order(_EVENT_ORDER, "timestamp")
        source = {name: call.text(f"source_{name}") for name in ("dag_id", "task_id", "run_id")}
        index = call.integer("source_map_index")
        dataset_id = call.integer("dataset_id")
        if index not in (None, 0, -1):
            return {"dataset_events": [], "total_entries": 0}
        events, total = self.datasets.events(
            limit=limit,
            offset=offset,
            newest_first=order.startswith("-"),
            order=order.lstrip("-"),
            dataset_id=dataset_id or None,
            source={name: value for name, value in source.items() if value},
        )
        return {"dataset_events": [_show_event(one) for one in events], "total_entries": total}

    def create_dataset_event(self, call: Call) -> dict[str, Any]:
        """``POST /datasets/events``."""
        body = Body(call.body(), ("dataset_uri", "extra"))
        uri = body.text("dataset_uri", required=True) or ""
        try:
            event = self.datasets.report(uri, body.mapping("extra") or {})
        except KeyError:
            raise not_found("Dataset not found", f"Dataset with uri: '{uri}' not found") from None
        return _show_event(event, {"from_rest_api": True, **(body.mapping("extra") or {})})

    def get_upstream_dataset_events(self, call: Call) -> dict[str, Any]:
        """``GET /dags/{dag_id}/dagRuns/{dag_run_id}/upstreamDatasetEvents``: no run is started by a dataset."""
        dag_id, run_id = call.path["dag_id"], call.path["dag_run_id"]
        if self.control.runs.get_run(dag_id, run_id) is None:
            raise not_found(
                "DAGRun not found", f"DAGRun with DAG ID: '{dag_id}' and DagRun ID: '{run_id}' not found"
            )  # fmt: skip
        return {"dataset_events": [], "total_entries": 0}

    def get_dag_dataset_queued_event(self, call: Call) -> Any:
        """``GET /dags/{dag_id}/datasets/queuedEvent/{uri}``."""
        raise self._queued(call, f"dag_id: `{call.path['dag_id']}` and dataset uri: `{call.path['uri']}`")

    def delete_dag_dataset_queued_event(self, call: Call) -> Any:
        """``DELETE /dags/{dag_id}/datasets/queuedEvent/{uri}``."""
        raise self._queued(call, f"dag_id: `{call.path['dag_id']}` and dataset uri: `{call.path['uri']}`")

    def get_dag_dataset_queued_events(self, call: Call) -> Any:
        """``GET /dags/{dag_id}/datasets/queuedEvent``."""
        raise self._queued(call, f"dag_id: `{call.path['dag_id']}`")

    def delete_dag_dataset_queued_events(self, call: Call) -> Any:
        """``DELETE /dags/{dag_id}/datasets/queuedEvent``."""
        raise self._queued(call, f"dag_id: `{call.path['dag_id']}`")

    def get_dataset_queued_events(self, call: Call) -> Any:
        """``GET /datasets/queuedEvent/{uri}``."""
        raise self._queued(call, f"dataset uri: `{call.path['uri']}`")

    def delete_dataset_queued_events(self, call: Call) -> Any:
        """``DELETE /datasets/queuedEvent/{uri}``."""
        raise self._queued(call, f"dataset uri: `{call.path['uri']}`")

    def _queued(self, call: Call, what: str) -> Problem:
        call.time("before")
        return not_found("Queue event not found", f"Queue event with {what} was not found")


def _show(dataset: Dataset) -> dict[str, Any]:
    created, updated = show_time(dataset.created_at), show_time(dataset.updated_at)
    return {
        "id": dataset.id,
        "uri": dataset.uri,
        "extra": {},
        "created_at": created,
        "updated_at": updated,
        "producing_tasks": [
            {"dag_id": dag_id, "task_id": task_id, "created_at": created, "updated_at": updated}
            for dag_id, task_id in dataset.producers
        ],
        "consuming_dags": [],
        "aliases": [],
    }


def _show_event(event: DatasetEvent, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "id": event.id,
        "dataset_id": event.dataset_id,
        "dataset_uri": event.uri,
        "extra": extra or {},
        "source_dag_id": event.dag_id,
        "source_task_id": event.task_id,
        "source_run_id": event.run_id,
        "source_map_index": -1,
        "created_dagruns": [],
        "timestamp": show_time(event.at),
    }
