"""Requests a second and latency of the model server, as a Markdown table.

    python -m benchmarks.serving [--seconds 5]

Starts Redis, MLflow with S3, and the server on free ports; the model is the platform's ensemble (logistic regression,
random forest of 200 trees, XGBoost) over the features of the default trial, trained on random numbers, because only its
size matters here. The load comes from one process of its own on the same machine. Rounds of all cases are interleaved;
the median round is shown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from clinical_orchestration.features.definitions import feature_names, feature_set_id
from clinical_orchestration.modeling.train import candidates
from clinical_orchestration.stack.testing import embedded
from clinical_orchestration.stores.online import OnlineFeatures, RedisOnlineStore
from clinical_orchestration.stores.registry import ModelRegistry
from clinical_orchestration.trials import load_trial
from clinical_orchestration_tests.serving.live import live_server, register

PATIENTS = 250
PROFILE = load_trial("cdisc-pilot")
NAMES = feature_names(PROFILE)


def request(body: Any, host: str, path: str = "/predict") -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def connection(address: tuple[str, int], requests: list[bytes], until: float, times: list[float]) -> None:
    reader, writer = await asyncio.open_connection(*address)
    number = 0
    while time.perf_counter() < until:
        started = time.perf_counter()
        writer.write(requests[number % len(requests)])
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        times.append(time.perf_counter() - started)
        assert head.startswith(b"HTTP/1.1 200"), head
        number += 1
    writer.close()


def load(url: str, bodies: list[Any], connections: int, seconds: float, answer: Any) -> None:
    """Runs in a process of its own."""
    parts = urlsplit(url)
    address = (parts.hostname or "", parts.port or 0)
    requests = [request(body, parts.netloc) for body in bodies]

    async def run() -> list[float]:
        times: list[float] = []
        until = time.perf_counter() + seconds
        await asyncio.gather(
            *(
                connection(address, requests[start::connections] or requests, until, times)
                for start in range(connections)
            )
        )
        return times

    answer.put(asyncio.run(run()))


def measure(url: str, bodies: list[Any], connections: int, seconds: float) -> tuple[float, float, float]:
    """Return requests a second, p50 and p99 in milliseconds."""
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    process = context.Process(target=load, args=(url, bodies, connections, seconds, answer))
    process.start()
    times = answer.get(timeout=seconds + 60)
    process.join()
    p50, p99 = np.percentile(times, [50, 99]) * 1000
    return len(times) / seconds, float(p50), float(p99)


def fill(environment: dict[str, str]) -> list[dict[str, float]]:
    """Register the model, load the patients; return their features."""
    import pandas as pd

    rng = np.random.default_rng(0)
    rows = rng.normal(50, 10, size=(2000, len(NAMES)))
    labels = (rows[:, 0] + rng.normal(0, 10, len(rows)) > 60).astype(int)
    rows[rng.random(rows.shape) < 0.1] = np.nan
    frame = pd.DataFrame(rows, columns=list(NAMES))
    registry = ModelRegistry(environment["MLFLOW_TRACKING_URI"])
    estimator = candidates(0)["ensemble"]().fit(frame, labels)
    version = register(
        registry, PROFILE, NAMES, estimator, pd.DataFrame([[50.0] * len(NAMES)], columns=list(NAMES)), "b"
    )
    registry.set_champion(PROFILE.model_name, version)
    features = [
        {name: round(float(value), 3) for name, value in zip(NAMES, row, strict=True) if not np.isnan(value)}
        for row in rows[:PATIENTS]
    ]
    store, now = RedisOnlineStore(environment["REDIS_URL"]), datetime.now(UTC) - timedelta(days=1)
    store.put(
        OnlineFeatures(f"P{number}", PROFILE.name, now, dict(values), feature_set_id(PROFILE))
        for number, values in enumerate(features)
    )
    return features


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of the model server.")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="serving-benchmark-") as folder,
        embedded(Path(folder, "stack"), "mlflow", "redis") as environment,
    ):
        features = fill(environment)
        with live_server(Path(folder, "home"), environment) as server:
            server.until_version("1", PROFILE.name)
            patients = [{"patient_id": f"P{number}"} for number in range(PATIENTS)]
            given = [{"features": values} for values in features]
            hundred = [{"instances": [patients[(start + i) % PATIENTS] for i in range(100)]} for start in range(10)]
            cases = {
                "`patient_id`": patients,
                "`features`": given,
                "batch of 100 `patient_id`": hundred,
            }
            found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
            measure(server.url, patients, 4, 1.0)
            for _ in range(chosen.rounds):
                for name, bodies in cases.items():
                    for connections in (1, 8):
                        found.setdefault((name, connections), []).append(
                            measure(server.url, bodies, connections, chosen.seconds)
                        )
            print(f"Model: ensemble, {len(NAMES)} features.")
            print(f"First answer of /health {server.seconds_to_health:.1f} s after the start.\n")
            print("| request | connections | requests/s | p50 ms | p99 ms |\n|---|---|---|---|---|")
            for (name, connections), rounds in found.items():
                rate, p50, p99 = (statistics.median(column) for column in zip(*rounds, strict=True))
                print(f"| {name} | {connections} | {rate:,.0f} | {p50:.1f} | {p99:.1f} |")
            started = time.monotonic()
            server.until_logged(120)
            log = server.get("/health")["prediction_log"]
            print(f"\nAll {log['written']:,} predictions were in the table {time.monotonic() - started:.1f} s later.")
            print(f"Dropped: {log['dropped']}, failed writes: {log['write_failures']}.")


if __name__ == "__main__":
    main()
