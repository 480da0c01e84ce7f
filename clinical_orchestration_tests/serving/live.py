"""A real model server in a process of its own, and models for it in a real registry."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from clinical_orchestration.features.definitions import feature_set_id
from clinical_orchestration.modeling.results import Estimate, Evaluation
from clinical_orchestration.stores.registry import ModelRegistry, TrainingRecord
from clinical_orchestration.trials import TrialProfile

_SOME = Estimate(0.7, 0.6, 0.8)
EVALUATION = Evaluation(
    rows=100, subjects=20, events=30, prevalence=0.3, auroc=_SOME, auprc=_SOME, brier=_SOME, ece=_SOME,
    calibration_slope=_SOME, calibration_intercept=_SOME, bins=(), operating_points=(), groups=(), seed=0, replicates=0,
)  # fmt: skip


def register(
    registry: ModelRegistry, profile: TrialProfile, names: Sequence[str], estimator: Any, example: Any, mark: str
) -> str:
    """Store a fitted estimator as a version of the trial's model; return its number."""
    record = TrainingRecord(
        trial=profile.name,
        fingerprint=mark,
        candidate="test",
        feature_names=tuple(names),
        feature_set=feature_set_id(profile),
        training_set_uri="memory://gold/training_set",
        training_set_version=0,
        training_set_digest="0" * 16,
        table_versions={},
        row_counts={},
        params={"made_for": "serving"},
        profile={},
        code_version="0",
    )
    run = registry.log_training(registry.ensure_experiment(), record, estimator, example)
    return registry.register(profile.model_name, run.run_id, EVALUATION).version


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class LiveServer:
    url: str
    process: subprocess.Popen[bytes]
    seconds_to_health: float

    def get(self, path: str) -> Any:
        return httpx.get(self.url + path, timeout=10).json()

    def until_version(self, version: str, trial: str, seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while (state := self.get("/health")["models"][trial])["model_version"] != version:
            assert time.monotonic() < deadline, state
            time.sleep(0.1)

    def until_logged(self, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while (log := self.get("/health")["prediction_log"])["backlog"]:
            assert time.monotonic() < deadline, log
            time.sleep(0.2)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def live_server(home: Path, environment: Mapping[str, str]) -> Iterator[LiveServer]:
    """Start ``python -m clinical_orchestration.serving`` and end it with SIGTERM."""
    port = free_port()
    home.mkdir(parents=True, exist_ok=True)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.monotonic()
    with (home / "serving.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "clinical_orchestration.serving", "--port", str(port)],
            env={**env, **environment, "CLINICAL_HOME": str(home)},
            stdout=log,
            stderr=log,
        )
    server = LiveServer(f"http://127.0.0.1:{port}", process, 0.0)
    try:
        while True:
            try:
                httpx.get(server.url + "/health", timeout=5)
                break
            except httpx.TransportError:
                assert process.poll() is None, (home / "serving.log").read_text()
                assert time.monotonic() - started < 60
                time.sleep(0.02)
        server.seconds_to_health = time.monotonic() - started
        yield server
    finally:
        process.terminate()
        try:
            process.wait(25)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
