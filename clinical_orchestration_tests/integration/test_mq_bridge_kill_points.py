"""The bridge killed at every point of a transfer, above all inside an open Kafka transaction: nothing lost or doubled.

``test_mq_bridge_kafka`` kills the bridge from outside, around its requests to MQ. Here it ends itself by SIGKILL at a
chosen call (see ``mq_bridge_worker``), so that each point is met for certain.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from clinical_orchestration.ingestion.mq_bridge import MESSAGE_ID_HEADER, NAME
from clinical_orchestration.ingestion.status_file import read_status
from clinical_orchestration_tests.ingestion.mq_standin import QueueManager
from clinical_orchestration_tests.integration import mq_bridge_worker as worker
from clinical_orchestration_tests.integration.test_mq_bridge_kafka import PATIENCE, Place, payload, place, small_records

__all__ = ["place"]  # a fixture

pytestmark = pytest.mark.integration

# a bridge is forked from a process that has everything imported: a kill costs a moment instead of a second
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["confluent_kafka", "httpx", "clinical_orchestration.ingestion.mq_bridge", worker.__name__]
)
TOO_LARGE = 880_000
"""Bytes of a result that the bridge takes and, with the topic's smaller limit, Kafka refuses."""


class Transfers:
    """A queue manager with messages, and bridges that move them."""

    def __init__(self, place: Place, qmgr: QueueManager, home: Path, seed: int) -> None:
        self.place, self.qmgr, self.home = place, qmgr, home
        self.rng = random.Random(seed)
        self.sent: dict[str, int] = {}
        """Records that each message gives, by message id; 0: it goes to the backout queue."""

    def put(self, readable: int, *, unreadable: int = 0, refused: int = 0) -> None:
        """Put messages: good ones, ones that cannot be read, and ones that Kafka refuses for their size."""
        kinds = self.rng.sample("r" * readable + "u" * unreadable + "l" * refused, readable + unreadable + refused)
        for kind in kinds:
            number = len(self.sent)
            body, records = f"{{broken {number}", 0
            if kind == "l":
                # not compressible, so that it is as large in the log
                body = json.dumps({"patient_id": f"P{number}", "note": self.rng.randbytes(TOO_LARGE // 2).hex()})
            while kind == "r" and not records:
                body, records = payload(number, self.rng)
            self.sent[self.qmgr.put(body)] = records

    def refused_wait(self) -> bool:
        """Return whether a message that Kafka refuses is on the queue."""
        return any(len(message.body) >= TOO_LARGE for message in self.qmgr.queues["LAB.RESULTS"])

    def bridge(self, point: str = "", number: int = 1, delay: float = 0.0) -> BaseProcess:
        """Start a bridge that dies at a point."""
        environment = {
            **os.environ,
            "CLINICAL_HOME": str(self.home),
            "CLINICAL_TRIAL": "simulated",
            "KAFKA_BOOTSTRAP_SERVERS": self.place.servers,
            "CLINICAL_VAR_KAFKA_LAB_RESULTS_TOPIC": self.place.topic,
            "CLINICAL_MQ_PROGRESS_TOPIC": self.place.progress,
            "CLINICAL_MQ_URL": self.qmgr.url,
            "CLINICAL_MQ_USER": self.qmgr.user,
            "CLINICAL_MQ_PASSWORD": self.qmgr.password,
            "CLINICAL_MQ_BATCH": "4",
            "CLINICAL_MQ_BACKOUT_THRESHOLD": "1",
            "CLINICAL_MQ_POLL_SECONDS": "0.02",
        }
        process = PROCESSES.Process(target=worker.run, args=(environment, point, number, delay), daemon=True)
        process.start()
        return process

    def kill_at(self, point: str, number: int = 1, delay: float = 0.0) -> None:
        """Let a bridge work until it dies at a point."""
        process = self.bridge(point, number, delay)
        process.join(60)
        alive = process.exitcode is None
        process.kill()
        process.join()
        said = (self.home / worker.LOG).read_text().splitlines()[-10:]
        assert not alive, f"the bridge never came to {point!r} ({number}): {said}"
        assert process.exitcode == -signal.SIGKILL, f"{point}: exit code {process.exitcode}"

    def finish(self) -> None:
        """Let a bridge move the rest and stop it."""
        process = self.bridge()
        deadline = time.monotonic() + PATIENCE
        while self.qmgr.queues["LAB.RESULTS"] and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
        process.join(60)
        assert process.exitcode == 0, "a stop that was asked for is no failure"
        status = read_status(self.home, NAME)
        assert status is not None
        assert status["state"] == "stopped"

    def account(self) -> tuple[int, int]:
        """Compare what readers of committed records see with what was sent.

        Returns:
            Committed records, and records in the log that belong to transactions that were ended.
        """
        assert self.qmgr.queues["LAB.RESULTS"] == []
        committed = self.place.committed()
        stored = Counter(message.header(MESSAGE_ID_HEADER) for message in committed)
        assert stored == Counter({identifier: records for identifier, records in self.sent.items() if records})
        assert max(Counter(message.value for message in committed).values()) == 1, "a record is there twice"
        aside = Counter(item.correlation_id for item in self.qmgr.queues["LAB.RESULTS.BACKOUT"])
        assert aside == Counter(identifier for identifier, records in self.sent.items() if not records)
        return len(committed), self.place.all_written() - len(committed)


def kill_everywhere(place: Place, home: Path, seed: int, points: Sequence[str]) -> None:
    small_records(place)
    with QueueManager() as qmgr:
        transfers = Transfers(place, qmgr, home, seed)
        rng = transfers.rng
        ended_inside = 0
        for point in points:
            # two batches at least have something to store, whatever the bridges before left
            transfers.put(8, unreadable=2, refused=point.endswith("restart"))
            number = 1 if point.endswith(("init", "put", "restart")) else rng.randint(1, 2)
            # of a transaction whose first record Kafka refuses, nothing gets into the log
            told = point in ("produced", "flushed") and not transfers.refused_wait()
            before = place.all_written() if told else 0
            transfers.kill_at(point, number, rng.uniform(0, 0.01))
            if told:
                assert place.all_written() > before, f"{point}: nothing of the open transaction is in the log"
                ended_inside += 1
        transfers.finish()
        committed, ended = transfers.account()
    assert ended >= ended_inside, "transactions that were open are ended"
    kinds = Counter(points)
    sys.stdout.write(
        f"\nseed {seed}: {len(transfers.sent)} messages, {committed} records, {len(points)} kills at "
        f"{len(kinds)} points, {ended} records of transactions that were ended\n"
    )


def test_a_bridge_that_dies_at_each_point_of_a_transfer_moves_each_message_once(place: Place, tmp_path: Path) -> None:
    points = list(worker.POINTS)
    random.Random(7).shuffle(points)
    kill_everywhere(place, tmp_path, 7, points)


def test_a_reader_sees_nothing_of_a_transaction_whose_writer_died_in_it(place: Place, tmp_path: Path) -> None:
    with QueueManager() as qmgr:
        transfers = Transfers(place, qmgr, tmp_path, 5)
        transfers.put(4)
        transfers.kill_at("flushed")
        assert place.all_written() > 0
        assert place.committed() == []
        assert len(qmgr.queues["LAB.RESULTS"]) == 4, "what is not committed is still on the queue"
        transfers.kill_at("committed")  # the successor: committed, and dead before it could remove anything
        assert len(qmgr.queues["LAB.RESULTS"]) == 4
        transfers.finish()
        assert transfers.account()[1] > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_sixty_deaths_at_random_points_mostly_inside_transactions(place: Place, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    points = [*worker.POINTS, *rng.choices(worker.POINTS, k=13), *rng.choices(worker.INSIDE, k=30)]
    rng.shuffle(points)
    kill_everywhere(place, tmp_path, seed, points)
