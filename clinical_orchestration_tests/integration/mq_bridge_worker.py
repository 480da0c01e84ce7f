"""A bridge that kills itself at a named point of a transfer, for ``test_mq_bridge_kill_points``.

The bridge is the real one. Its Kafka client and its MQ client are subclasses that know at which call they are, and end
the process there by SIGKILL, as a machine that fails does: no handler, no ``finally``, no clean-up runs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOG = "bridge.log"
"""What all bridges of a test said, in their home."""

INSIDE = ("produced", "flushed", "committing")
"""Points inside an open Kafka transaction: some of its records are in the log, all are, the commit is on its way."""

POINTS = (
    "before init", "after init", "begun", *INSIDE, "committed", "before restart", "after restart",
    *(f"{when} {call}" for call in ("listing", "browse", "remove", "put") for when in ("before", "after")),
)  # fmt: skip
"""Every point of a transfer; the producer is started again where Kafka has refused a record."""


def die() -> None:
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def run(environment: Mapping[str, str], point: str, number: int, delay: float) -> None:
    """Run the bridge of an environment until it is ended.

    Args:
        environment: variables to set, CLINICAL_HOME among them.
        point: where to die, one of :data:`POINTS`; empty: nowhere.
        number: at which time that it comes there, from 1.
        delay: seconds from the begin of a commit to the death, for ``committing``.
    """
    import confluent_kafka

    from clinical_orchestration.ingestion import mq_bridge
    from clinical_orchestration.stores import ibm_mq

    os.environ.update(environment)
    sys.stderr = open(Path(environment["CLINICAL_HOME"]) / LOG, "a")  # noqa: SIM115 - for the rest of the process
    left, started = [number], list[bool]()

    def here(name: str) -> bool:
        """Return whether this is the moment."""
        left[0] -= name == point
        return name == point and left[0] == 0

    def maybe(name: str) -> None:
        if here(name):
            die()

    class Producer(confluent_kafka.Producer):  # type: ignore[misc]
        def init_transactions(self, *args: Any) -> Any:
            what = "restart" if started else "init"
            started.append(True)
            maybe(f"before {what}")
            result = super().init_transactions(*args)
            maybe(f"after {what}")
            return result

        def begin_transaction(self) -> Any:
            result = super().begin_transaction()
            maybe("begun")
            return result

        def produce(self, *args: Any, **more: Any) -> Any:
            result = super().produce(*args, **more)
            if here("produced"):
                self.flush(10)  # into the log, not only into this process
                die()
            return result

        def commit_transaction(self, *args: Any) -> Any:
            if here("flushed"):
                self.flush(10)
                die()
            if here("committing"):
                self.flush(10)
                threading.Timer(delay, die).start()
            result = super().commit_transaction(*args)
            maybe("committed")
            return result

    class Queue(ibm_mq.RestMessageQueue):
        pass

    def watched(call: str) -> Any:
        original = getattr(ibm_mq.RestMessageQueue, call)

        def method(self: Queue, *args: Any, **more: Any) -> Any:
            maybe(f"before {call}")
            result = original(self, *args, **more)
            maybe(f"after {call}")
            return result

        return method

    for call in ("listing", "browse", "remove", "put"):
        setattr(Queue, call, watched(call))
    confluent_kafka.Producer = Producer
    ibm_mq.RestMessageQueue = Queue  # type: ignore[misc]
    sys.exit(mq_bridge.main(["run"]))
