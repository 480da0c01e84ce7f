"""In-memory registry, online store and prediction table with the behaviour of the real ones, and a small trial."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from fastapi.testclient import TestClient

from clinical_orchestration.serving.app import create_app
from clinical_orchestration.serving.ports import Champion, LoadedModel, RegistryUnavailableError
from clinical_orchestration.stores.online import InMemoryOnlineStore, OnlineFeatures, OnlineStoreError
from clinical_orchestration.trials import TrialProfile, load_trial

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
FEATURES = ("age_years", "heart_rate_latest", "lab_alt_latest")
PILOT, SIMULATED = load_trial("cdisc-pilot"), load_trial("simulated")


def constant(value: float) -> Callable[[Any], Any]:
    return lambda rows: np.full(len(rows), value)


def model(predict: Callable[[Any], Any] | float = 0.3, names: tuple[str, ...] = FEATURES) -> LoadedModel:
    return LoadedModel(names, constant(predict) if isinstance(predict, float) else predict)


@dataclass
class FakeRegistry:
    """Versions by model name; the alias may be moved at any time."""

    versions: dict[tuple[str, str], LoadedModel | Exception] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    out: bool = False
    loads: list[str] = field(default_factory=list)

    def promote(self, version: str, loaded: LoadedModel | Exception, name: str = PILOT.model_name) -> None:
        self.versions[name, version] = loaded
        self.aliases[name] = version

    def champion(self, model_name: str) -> Champion | None:
        if self.out:
            raise RegistryUnavailableError("http://registry does not answer")
        version = self.aliases.get(model_name)
        return Champion(model_name, version) if version else None

    def load(self, champion: Champion) -> LoadedModel:
        self.loads.append(champion.version)
        loaded = self.versions[champion.model_name, champion.version]
        if isinstance(loaded, Exception):
            raise loaded
        return loaded


class FakeOnlineStore(InMemoryOnlineStore):
    out = False
    unreadable: frozenset[str] = frozenset()

    def get_many(self, patient_ids: Sequence[str]) -> dict[str, OnlineFeatures]:
        self.ping()
        if self.unreadable & set(patient_ids):
            raise ValueError("could not convert string to float")
        return super().get_many(patient_ids)

    def ping(self) -> None:
        if self.out:
            raise OnlineStoreError("the online feature store at 127.0.0.1:1 does not answer")

    def add(
        self, patient_id: str, age: timedelta = timedelta(days=1), trial: str = PILOT.name, **features: float
    ) -> None:
        row = OnlineFeatures(patient_id, trial, NOW - age, dict(features or {"age_years": 70.0}), "set")
        self.put([row])


@dataclass
class FakeSink:
    """Rows and recorded positions; `fail` makes the next appends raise, before or after the commit."""

    rows: list[Mapping[str, Any]] = field(default_factory=list)
    stored: dict[str, int] = field(default_factory=dict)
    out: bool = False
    fail_after_commit: int = 0
    commits: int = 0

    def last_sequence(self, log_id: str) -> int:
        self._check()
        return self.stored.get(log_id, 0)

    def append(self, rows: Sequence[Mapping[str, Any]], log_id: str, after: int, last_sequence: int) -> None:
        self._check()
        assert self.stored.get(log_id, 0) == after
        assert len(rows) == last_sequence - after
        self.rows += rows
        self.stored[log_id] = last_sequence
        self.commits += 1
        if self.fail_after_commit:
            self.fail_after_commit -= 1
            raise TimeoutError("the answer was lost")

    def compact(self) -> None:
        pass

    def _check(self) -> None:
        if self.out:
            raise OSError("s3 does not answer")

    def ids(self) -> list[str]:
        return [row["prediction_id"] for row in self.rows]


@dataclass
class Server:
    client: TestClient
    registry: FakeRegistry
    online: FakeOnlineStore
    sink: FakeSink
    app: Any

    def predict(self, body: Any, expected: int = 200) -> Any:
        answer = self.client.post("/predict", json=body)
        assert answer.status_code == expected, answer.text
        return answer.json()

    def until_served(self, version: str, trial: str = PILOT.name) -> None:
        wait_for(lambda: (served := self.app.state.manager.current(trial)) is not None and served.version == version)


def wait_for(condition: Callable[[], object], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.005)


@contextmanager
def running(folder: Path, profiles: Sequence[TrialProfile] = (PILOT, SIMULATED), **options: Any) -> Any:
    """A server with fakes; version 1 serves the pilot unless `model` says otherwise (None: nothing)."""
    registry = options.pop("registry", None) or FakeRegistry()
    first = options.pop("model", model())
    if first is not None:
        registry.promote("1", first)
    online, sink = FakeOnlineStore(clock=lambda: NOW), options.pop("sink", None) or FakeSink()
    app = create_app(
        champions=lambda: registry,
        features=lambda: online,
        predictions=lambda: sink,
        profiles=profiles,
        default_trial=PILOT.name,
        spool_folder=folder / "spool",
        poll_seconds=options.pop("poll_seconds", 0.02),
        flush_seconds=options.pop("flush_seconds", 0.02),
        clock=lambda: NOW,
        **options,
    )
    with TestClient(app, raise_server_exceptions=False) as client:
        server = Server(client, registry, online, sink, app)
        if first is not None:
            server.until_served("1")
        else:
            wait_for(lambda: app.state.manager.polled)
        yield server
    assert not [thread.name for thread in threading.enumerate() if thread.name in {"scoring", "champions"}]
