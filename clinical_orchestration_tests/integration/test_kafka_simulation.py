"""A simulation that is killed while it streams into a real broker ends with each message there once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter

import pytest

from clinical_orchestration.ingestion.simulate import MARKER_TOPIC
from clinical_orchestration.simulation import simulate
from clinical_orchestration.stores.kafka import ConfluentTopicAdmin, ConfluentTopicReader
from clinical_orchestration.tables import DOMAINS
from clinical_orchestration.trials import load_trial

pytestmark = pytest.mark.integration

MESSAGES = 9_000
PROGRAM = f"""
import sys
from clinical_orchestration.ingestion.simulate import ensure_simulated
from clinical_orchestration.settings import Variables
from clinical_orchestration.stores import kafka
from clinical_orchestration.trials import load_trial

def tell(count):
    sys.stdout.write("progress\\n")
    sys.stdout.flush()

with kafka.open_producer() as producer:
    report = ensure_simulated(kafka.topic_reader(), producer, kafka.topic_admin(), load_trial("simulated"),
                              Variables().topics(), messages={MESSAGES}, progress=tell)
sys.stdout.write(f"{{report.produced}} {{report.present}}\\n")
"""


def test_a_simulation_that_was_killed_is_completed_and_then_left_alone(kafka_env: dict[str, str]) -> None:
    name = uuid.uuid4().hex[:8]
    topics = {domain: f"{domain.replace('_', '-')}-{name}" for domain in DOMAINS}
    environment = {
        **os.environ,
        **kafka_env,
        **{f"CLINICAL_VAR_KAFKA_{domain.upper()}_TOPIC": topic for domain, topic in topics.items()},
    }
    moments = random.Random(11)

    def run(kill: bool) -> list[str]:
        command = [sys.executable, "-c", PROGRAM]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            if not kill:
                return [line.strip() for line in process.stdout]
            assert process.stdout.readline() == "progress\n"
            time.sleep(moments.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            return []

    run(kill=True)
    run(kill=True)
    produced, present = map(int, run(kill=False)[-1].split())
    assert produced + present == MESSAGES
    assert present >= 2_000  # what was acknowledged before the kills was not sent again
    assert run(kill=False)[-1] == f"0 {MESSAGES}"

    profile = load_trial("simulated")
    assert profile.sources.simulation is not None
    expected = {m.sequence: m.value for m in simulate(profile.sources.simulation, profile.study_id, messages=MESSAGES)}
    reader = ConfluentTopicReader(kafka_env["KAFKA_BOOTSTRAP_SERVERS"])
    times: Counter[int] = Counter()
    for topic in topics.values():
        for batch in reader.read(topic, reader.offsets(topic), max_messages=10_000):
            for message in batch.messages:
                sequence = int(message.header("sequence") or -1)
                times[sequence] += 1
                assert message.value == expected[sequence]
    assert times.keys() == expected.keys()
    assert set(times.values()) == {1}
    ConfluentTopicAdmin(kafka_env["KAFKA_BOOTSTRAP_SERVERS"]).delete_topics([*topics.values(), MARKER_TOPIC])
