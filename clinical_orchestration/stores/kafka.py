"""Kafka: read topics from explicit offsets, produce with full acknowledgement, look after topics and lag.

The reader trusts no consumer group: its caller names the first offset of every partition and learns, with each batch,
the offset after it, gaps of compacted or transactional topics included. Group offsets are only published, for tools
that show lag (:meth:`TopicAdmin.commit_group`).

The adapters use confluent-kafka, imported when a client is built. Times are milliseconds since the epoch, as Kafka
keeps them; :attr:`Message.time` is the UTC time.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from clinical_orchestration.settings import ClientSettings

Headers = tuple[tuple[str, bytes], ...]


class KafkaUnavailableError(RuntimeError):
    """No broker answered in time; the message says which address was tried and what to do."""


class UnknownTopicError(LookupError):
    """The topic does not exist; the message names it."""


class OffsetOutOfRangeError(RuntimeError):
    """An offset asked for is no longer, or not yet, in its partition."""


class DeliveryError(RuntimeError):
    """Some records were not acknowledged.

    Attributes:
        delivered: positions of those that were, by their index in the call.
        failed: reasons by index in the call. A record that timed out may still have reached the log: sending it again
            can repeat it, which the silver step recognises as a duplicate.
    """

    def __init__(self, failed: Mapping[int, str], delivered: Mapping[int, Position]) -> None:
        self.failed = dict(failed)
        self.delivered = dict(delivered)
        reasons = ", ".join(sorted(set(self.failed.values())))
        super().__init__(
            f"{len(self.failed)} of {len(self.failed) + len(self.delivered)} records were not delivered: {reasons}"
        )


class TransactionFailedError(RuntimeError):
    """A transaction did not end well; whether it was committed is known only after the next start."""


class FencedError(TransactionFailedError):
    """Another writer with the same transactional id took over: this one must stop."""


class RecordRefusedError(RuntimeError):
    """Records are too large for their topic; nothing of the transaction was stored.

    Attributes:
        refused: reasons by index in the call.
    """

    def __init__(self, refused: Mapping[int, str]) -> None:
        self.refused = dict(refused)
        super().__init__(f"{len(self.refused)} records were refused: {', '.join(sorted(set(self.refused.values())))}")


class Position(NamedTuple):
    """Where one record is in Kafka."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}-{self.partition}-{self.offset}"


class Message(NamedTuple):
    """One record as read from a partition. `timestamp_ms` is -1 where the record has none."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()

    @property
    def position(self) -> str:
        """``<topic>-<partition>-<offset>``, the `source_position` of the bronze row."""
        return f"{self.topic}-{self.partition}-{self.offset}"

    @property
    def time(self) -> datetime | None:
        """The record's UTC time, or None."""
        return datetime.fromtimestamp(self.timestamp_ms / 1000, tz=UTC) if self.timestamp_ms >= 0 else None

    def header(self, name: str) -> str | None:
        """Return the last header called `name` as text, or None."""
        for key, value in reversed(self.headers):
            if key == name and value is not None:
                return value.decode("utf-8", "replace")
        return None


class Record(NamedTuple):
    """One record to produce. `timestamp_ms` None takes the time of production."""

    topic: str
    value: bytes | None
    key: bytes | None = None
    headers: Headers = ()
    timestamp_ms: int | None = None


class OffsetRange(NamedTuple):
    """First offset that is kept, and the offset after the last committed one."""

    begin: int
    end: int


@dataclass(slots=True)
class Batch:
    """Messages of one topic and, for every partition asked for, the offset to read next."""

    messages: list[Message]
    positions: dict[int, int] = field(default_factory=dict)


class TopicReader(Protocol):
    """Reads topics by explicit offsets."""

    def topics(self) -> list[str]:
        """Return the names of all topics that are not internal, sorted."""

    def topic_id(self, topic: str) -> str:
        """Return the identity of this incarnation of the topic; it changes when a topic is deleted and made again."""

    def offsets(self, topic: str) -> dict[int, OffsetRange]:
        """Return the kept offset range of every partition; the end counts committed transactions only.

        Raises:
            UnknownTopicError: there is no such topic.
            KafkaUnavailableError: no broker answers.
        """

    def read(self, topic: str, ranges: Mapping[int, OffsetRange], *, max_messages: int) -> Iterator[Batch]:
        """Yield the messages of partition -> [begin, end) in batches of at most `max_messages`.

        Within a partition the order is that of the log. The last batch's positions are the ends of all ranges.

        Raises:
            OffsetOutOfRangeError: retention removed an offset meanwhile.
            KafkaUnavailableError: no broker answers.
        """

    def close(self) -> None:
        """Release connections."""


class Producer(Protocol):
    """Produces records and answers only when every replica in sync has them."""

    def send(self, records: Sequence[Record], *, timeout: float = 30.0) -> list[Position]:
        """Produce all records and return their positions, in the order given.

        Args:
            records: what to produce; records of one key keep their order.
            timeout: seconds after which records not acknowledged count as failed.

        Raises:
            DeliveryError: at least one record was not acknowledged; it names which.
        """

    def close(self) -> None:
        """Release connections."""


class Transactions(Protocol):
    """Produces records in transactions, as the one writer of its transactional id."""

    def start(self) -> None:
        """Take the transactional id over from any earlier writer."""

    def commit(self, records: Sequence[Record]) -> None:
        """Produce all records in one transaction, or none."""

    def close(self) -> None:
        """Release connections."""


class TopicAdmin(Protocol):
    """Makes topics and publishes group offsets."""

    def ensure_topics(self, topics: Iterable[str], *, partitions: int = 3) -> list[str]:
        """Make the topics that do not exist and return their names. Existing topics are left as they are."""

    def keep_forever(self, topics: Iterable[str]) -> None:
        """Let the topics keep their messages whatever their age; old timestamps would expire them at once."""

    def commit_group(self, group: str, offsets: Mapping[tuple[str, int], int]) -> None:
        """Publish next offsets by (topic, partition) as those of a consumer group without members."""

    def group_offsets(self, group: str) -> dict[tuple[str, int], int]:
        """Return the published next offsets of a group by (topic, partition)."""

    def lag(self, group: str, topics: Iterable[str]) -> dict[tuple[str, int], int]:
        """Return, by (topic, partition), how many offsets the group is behind the end."""

    def close(self) -> None:
        """Release connections."""


def _advice(servers: str) -> str:
    return (
        f"no Kafka broker answered at {servers}; start it (./pipeline-manager.sh --start --level 0), "
        "or set KAFKA_BOOTSTRAP_SERVERS to a broker that runs"
    )


def _ignore_event(*_: object) -> None:
    """Drop broker connection events: requests and deliveries carry their own errors."""


class ConfluentTopicAdmin:
    """:class:`TopicAdmin` by confluent-kafka."""

    def __init__(self, bootstrap_servers: str, *, timeout: float = 10.0, options: Mapping[str, Any] | None = None):
        from confluent_kafka.admin import AdminClient

        self._servers = bootstrap_servers
        self._timeout = timeout
        config = {"bootstrap.servers": bootstrap_servers, "error_cb": _ignore_event, **(options or {})}
        self._client = AdminClient(config, logger=_silent_logger())

    def _result(self, future: Any, what: str) -> Any:
        from concurrent.futures import TimeoutError as FutureTimeoutError

        from confluent_kafka import KafkaError, KafkaException

        try:
            return future.result(self._timeout + 1)
        except FutureTimeoutError as error:
            raise KafkaUnavailableError(_advice(self._servers)) from error
        except KafkaException as error:
            code = error.args[0].code()
            if code in _unavailable_codes():
                raise KafkaUnavailableError(_advice(self._servers)) from error
            if code in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION):
                raise UnknownTopicError(f"there is no topic {what}") from error
            raise RuntimeError(f"{what}: {error.args[0].str()}") from error

    def _asked(self, ask: Callable[[], Any], what: str) -> dict[Any, Any]:
        """Return the results of a read request, repeated while leaders move: directly after a topic is made, say."""
        from confluent_kafka import KafkaException

        deadline = time.monotonic() + self._timeout
        while True:
            futures = ask()
            try:
                for future in futures.values():
                    future.result(self._timeout + 1)
            except KafkaException as error:
                if error.args[0].code() in _moving_codes() and time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
            except TimeoutError:
                pass  # named below
            return {key: self._result(future, what) for key, future in futures.items()}

    def partitions(self) -> dict[str, list[int]]:
        """Return the partitions of every topic that is not internal.

        Raises:
            KafkaUnavailableError: no broker answers.
        """
        from confluent_kafka import KafkaException

        try:
            metadata = self._client.list_topics(timeout=self._timeout)
        except KafkaException as error:
            raise KafkaUnavailableError(_advice(self._servers)) from error
        return {
            name: sorted(topic.partitions)
            for name, topic in metadata.topics.items()
            if topic.error is None and not name.startswith("__")
        }

    def topics(self) -> list[str]:
        """Return the names of all topics that are not internal, sorted."""
        return sorted(self.partitions())

    def topic_id(self, topic: str) -> str:
        """Return the broker's UUID of this incarnation of the topic."""
        from confluent_kafka import TopicCollection

        def ask() -> Any:
            return self._client.describe_topics(TopicCollection([topic]), request_timeout=self._timeout)

        return str(self._asked(ask, topic)[topic].topic_id)

    def offsets(self, topic: str) -> dict[int, OffsetRange]:
        """Return the kept offset range of every partition of `topic`."""
        from confluent_kafka import IsolationLevel, TopicPartition
        from confluent_kafka.admin import OffsetSpec

        partitions = self.partitions().get(topic)
        if partitions is None:
            raise UnknownTopicError(f"there is no topic {topic}")
        bounds: list[dict[int, int]] = []
        for spec in (OffsetSpec.earliest(), OffsetSpec.latest()):
            wanted = {TopicPartition(topic, partition): spec for partition in partitions}

            def ask(wanted: dict[Any, Any] = wanted) -> Any:
                return self._client.list_offsets(
                    wanted, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=self._timeout
                )

            bounds.append({key.partition: answer.offset for key, answer in self._asked(ask, topic).items()})
        begins, ends = bounds
        return {partition: OffsetRange(begins[partition], ends[partition]) for partition in partitions}

    def ensure_topics(
        self, topics: Iterable[str], *, partitions: int = 3, config: Mapping[str, str] | None = None
    ) -> list[str]:
        """Make the topics that do not exist and return their names, replicated as the broker's default says.

        `config` holds topic settings, such as ``cleanup.policy``, for those that are made.
        """
        from confluent_kafka import KafkaError, KafkaException
        from confluent_kafka.admin import NewTopic

        existing = set(self.partitions())
        missing = [
            NewTopic(topic, num_partitions=partitions, config=dict(config or {}))
            for topic in dict.fromkeys(topics)
            if topic not in existing
        ]
        made = []
        if missing:
            futures = self._client.create_topics(missing, request_timeout=self._timeout)
            for topic, future in futures.items():
                try:
                    future.result(self._timeout + 1)
                except KafkaException as error:
                    if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                        raise RuntimeError(f"topic {topic} could not be made: {error.args[0].str()}") from error
                else:
                    made.append(topic)
            self._await_topics([topic.topic for topic in missing])
        return made

    def _await_topics(self, topics: Sequence[str]) -> None:
        """Wait until the metadata shows the new topics, so that the caller's next request finds them."""
        deadline = time.monotonic() + self._timeout
        while not set(topics) <= set(self.partitions()):
            if time.monotonic() > deadline:
                raise KafkaUnavailableError(f"the broker at {self._servers} does not show the topics it just made")
            time.sleep(0.05)

    def keep_forever(self, topics: Iterable[str]) -> None:
        """Set ``retention.ms`` to -1: age no longer removes messages."""
        from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

        def resource(topic: str) -> Any:
            entry = ConfigEntry("retention.ms", "-1", incremental_operation=AlterConfigOpType.SET)
            return ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])

        resources = [resource(topic) for topic in topics]
        if resources:
            futures = self._client.incremental_alter_configs(resources, request_timeout=self._timeout)
            for topic, future in futures.items():
                self._result(future, topic.name)

    def delete_topics(self, topics: Iterable[str]) -> None:
        """Delete topics and their messages; for tests and for a study's end."""
        for topic, future in self._client.delete_topics(list(topics), request_timeout=self._timeout).items():
            self._result(future, topic)

    def delete_records(self, topic: str, before: Mapping[int, int]) -> None:
        """Delete the messages of each partition before an offset, as retention does."""
        from confluent_kafka import TopicPartition

        wanted = [TopicPartition(topic, partition, offset) for partition, offset in before.items()]
        for future in self._client.delete_records(wanted, request_timeout=self._timeout).values():
            self._result(future, topic)

    def commit_group(self, group: str, offsets: Mapping[tuple[str, int], int]) -> None:
        """Publish next offsets as those of a consumer group without members."""
        from confluent_kafka import ConsumerGroupTopicPartitions, TopicPartition

        if not offsets:
            return
        wanted = [TopicPartition(topic, partition, offset) for (topic, partition), offset in offsets.items()]

        def ask() -> Any:
            return self._client.alter_consumer_group_offsets(
                [ConsumerGroupTopicPartitions(group, wanted)], request_timeout=self._timeout
            )

        what = f"consumer group {group}"
        deadline = time.monotonic() + self._timeout
        while True:
            # the answer as a whole says nothing about its partitions: each has an error of its own
            answer = self._asked(ask, what)[group]
            refused = [item.error for item in answer.topic_partitions if item.error is not None]
            if not refused:
                return
            passing = all(error.code() in _moving_codes() | _new_topic_codes() for error in refused)
            if not passing or time.monotonic() > deadline:
                raise RuntimeError(f"{what}: {refused[0].str()}")
            time.sleep(0.05)

    def group_offsets(self, group: str) -> dict[tuple[str, int], int]:
        """Return the published next offsets of a group."""
        from confluent_kafka import ConsumerGroupTopicPartitions

        def ask() -> Any:
            return self._client.list_consumer_group_offsets(
                [ConsumerGroupTopicPartitions(group)], request_timeout=self._timeout
            )

        answer = self._asked(ask, f"consumer group {group}")[group]
        return {(item.topic, item.partition): item.offset for item in answer.topic_partitions if item.offset >= 0}

    def groups(self) -> dict[str, str]:
        """Return the state of every consumer group by its name, such as ``stable`` or ``empty``.

        Raises:
            KafkaUnavailableError: no broker answers.
        """
        self.partitions()  # without a broker the list of groups is empty instead of an error
        future = self._client.list_consumer_groups(request_timeout=self._timeout)
        answer = self._result(future, "the consumer groups")
        if answer.errors:
            raise RuntimeError(f"the consumer groups: {answer.errors[0]}")
        return {item.group_id: item.state.name.lower() for item in answer.valid}

    def lag(self, group: str, topics: Iterable[str]) -> dict[tuple[str, int], int]:
        """Return how many offsets the group is behind the end of each partition."""
        committed = self.group_offsets(group)
        return {
            (topic, partition): bounds.end - max(committed.get((topic, partition), bounds.begin), bounds.begin)
            for topic in topics
            for partition, bounds in self.offsets(topic).items()
        }

    def close(self) -> None:
        """Release nothing: the client closes its sockets when it is collected."""


class ConfluentTopicReader:
    """:class:`TopicReader` by confluent-kafka; not for use by several threads at once."""

    def __init__(
        self,
        bootstrap_servers: str,
        *,
        group: str = "clinical-ingestion",
        timeout: float = 10.0,
        stall_timeout: float = 30.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._servers = bootstrap_servers
        self._stall_timeout = stall_timeout
        self._options = dict(options or {})
        self._group = group
        self._admin = ConfluentTopicAdmin(bootstrap_servers, timeout=timeout, options=options)

    def topics(self) -> list[str]:
        """Return the names of all topics that are not internal, sorted."""
        return self._admin.topics()

    def topic_id(self, topic: str) -> str:
        """Return the broker's UUID of this incarnation of the topic."""
        return self._admin.topic_id(topic)

    def offsets(self, topic: str) -> dict[int, OffsetRange]:
        """Return the kept offset range of every partition of `topic`."""
        return self._admin.offsets(topic)

    def read(self, topic: str, ranges: Mapping[int, OffsetRange], *, max_messages: int) -> Iterator[Batch]:
        """Yield the messages of the ranges in batches; see :class:`TopicReader`."""
        from confluent_kafka import Consumer, KafkaError, TopicPartition

        ends = {partition: bounds.end for partition, bounds in ranges.items() if bounds.end > bounds.begin}
        positions = {partition: bounds.begin for partition, bounds in ranges.items()}
        if not ends:
            return
        consumer = Consumer(
            {
                "bootstrap.servers": self._servers,
                "group.id": self._group,  # required by the client; never committed to from here
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "error",  # an offset out of range is an error, never a jump
                "enable.partition.eof": True,  # tells the position behind a gap at the end of a partition
                "isolation.level": "read_committed",
                "fetch.wait.max.ms": 50,
                "error_cb": _ignore_event,
                **self._options,
            },
            logger=_silent_logger(),
        )
        try:
            consumer.assign([TopicPartition(topic, partition, positions[partition]) for partition in ends])
            pending = dict(ends)
            messages: list[Message] = []
            heard = time.monotonic()
            while pending:
                received = consumer.consume(min(max_messages - len(messages), 10_000), timeout=0.5)
                if received:
                    heard = time.monotonic()
                elif time.monotonic() - heard > self._stall_timeout:
                    raise KafkaUnavailableError(
                        f"nothing arrived from topic {topic} for {self._stall_timeout:.0f} s; {_advice(self._servers)}"
                    )
                for item in received:
                    partition = item.partition()
                    error = item.error()
                    if error is not None:
                        if error.code() == KafkaError._PARTITION_EOF:
                            # of a partition that was read to its end already, it is the end of what came since
                            if partition in pending:
                                positions[partition] = max(positions[partition], item.offset())
                        elif error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
                            raise OffsetOutOfRangeError(f"topic {topic}, partition {partition}: {error.str()}")
                        elif error.fatal() or not (error.retriable() or error.code() in _unavailable_codes()):
                            raise RuntimeError(f"topic {topic}: {error.str()}")
                    elif partition in pending:
                        offset = item.offset()
                        if offset >= pending[partition]:
                            positions[partition] = pending[partition]
                        else:
                            stamp = item.timestamp()[1]
                            headers = tuple(item.headers() or ())
                            messages.append(Message(topic, partition, offset, stamp, item.key(), item.value(), headers))
                            positions[partition] = offset + 1
                    if partition in pending and positions[partition] >= pending[partition]:
                        positions[partition] = pending.pop(partition)
                        consumer.incremental_unassign([TopicPartition(topic, partition)])
                if len(messages) >= max_messages and pending:
                    yield Batch(messages, dict(positions))
                    messages = []
                    heard = time.monotonic()
            yield Batch(messages, dict(positions))
        finally:
            consumer.close()

    def close(self) -> None:
        """Release connections."""
        self._admin.close()


class ConfluentProducer:
    """:class:`Producer` by confluent-kafka: idempotent, acks=all, safe to share between threads.

    Args:
        bootstrap_servers: the brokers.
        delivery_timeout: seconds after which librdkafka gives a record up; the upper bound of every :meth:`send`.
        linger: seconds to wait for more records before a request leaves.
        options: further librdkafka settings, such as TLS and SASL.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        *,
        delivery_timeout: float = 20.0,
        linger: float = 0.002,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._delivery_timeout = delivery_timeout
        self._config = {
            "bootstrap.servers": bootstrap_servers,
            "acks": "all",
            "enable.idempotence": True,
            "linger.ms": linger * 1000,
            "delivery.timeout.ms": int(delivery_timeout * 1000),
            "queue.buffering.max.messages": 200_000,
            # the one codec that every client reads without another library, kafka-python included
            "compression.type": "gzip",
            "compression.level": 1,
            "partitioner": "murmur2_random",  # the Java client's choice: one key, one partition, whoever writes
            "error_cb": _ignore_event,
            **(options or {}),
        }
        self._client = self._connect()
        self._closed = threading.Event()
        self._poller: threading.Thread | None = None
        self._lock = threading.Lock()

    def _connect(self) -> Any:
        from confluent_kafka import Producer as Client

        return Client(self._config, logger=_silent_logger())

    def _renew(self, broken: Any) -> None:
        """Replace a client that librdkafka declared dead, such as one whose log was truncated under it."""
        with self._lock:
            if self._client is broken:
                broken.flush(1)  # its queued records report their failure
                self._client = self._connect()

    def _start_poller(self) -> None:
        """One thread serves the delivery reports of all senders; started by the first send, after any fork."""
        with self._lock:
            if self._poller is None:
                self._poller = threading.Thread(target=self._poll, name="kafka-delivery", daemon=True)
                self._poller.start()

    def _poll(self) -> None:
        while not self._closed.is_set():
            self._client.poll(0.2)

    def send(self, records: Sequence[Record], *, timeout: float | None = None) -> list[Position]:
        """Produce all records and return their positions; see :class:`Producer`.

        The wait is bounded by `timeout` (seconds) or, without it, by the delivery timeout.
        """
        from confluent_kafka import KafkaError, KafkaException

        if not records:
            return []
        renewed = False
        self._start_poller()
        limit = timeout if timeout is not None else self._delivery_timeout + 2
        deadline = time.monotonic() + limit
        results: list[Position | str | None] = [None] * len(records)
        collector = _Collector(results)
        for index, record in enumerate(records):
            # without a timestamp librdkafka takes the time of production
            stamp = {} if record.timestamp_ms is None else {"timestamp": record.timestamp_ms}
            while True:
                client = self._client
                try:
                    client.produce(
                        record.topic,
                        value=record.value,
                        key=record.key,
                        headers=list(record.headers) or None,
                        on_delivery=collector.callback(index),
                        **stamp,
                    )
                except BufferError:
                    if time.monotonic() > deadline:
                        collector.fail(index, "the local queue stayed full")
                        break
                    client.poll(0.05)
                except KafkaException as error:
                    if error.args[0].code() == KafkaError._FATAL and not renewed:
                        renewed = True
                        self._renew(client)
                        continue
                    collector.fail(index, error.args[0].str())
                    break
                else:
                    break
        collector.done.wait(max(0.0, deadline - time.monotonic()))
        delivered: dict[int, Position] = {}
        failed: dict[int, str] = {}
        for index, result in enumerate(list(results)):
            if isinstance(result, Position):
                delivered[index] = result
            else:
                failed[index] = result or f"not acknowledged within {limit:g} s"
        if failed:
            raise DeliveryError(failed, delivered)
        return [delivered[index] for index in range(len(records))]

    def close(self) -> None:
        """Send what is still queued, for at most the delivery timeout, and stop."""
        self._client.flush(self._delivery_timeout)
        self._closed.set()
        if self._poller is not None:
            self._poller.join(2)


class ConfluentTransactions:
    """Produces records in transactions: readers of committed records see all of one or nothing, also after a kill.

    One writer has a transactional id at a time. :meth:`start` ends what an earlier writer with this id left open, and
    that writer, should it live, can commit nothing any more. Not for use by several threads at once.

    Args:
        bootstrap_servers: the brokers.
        transactional_id: the writer's name; the same after a restart.
        timeout: seconds for one transaction; the broker ends an abandoned one after twice this time.
        options: further librdkafka settings, such as TLS and SASL.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        transactional_id: str,
        *,
        timeout: float = 20.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._servers = bootstrap_servers
        self._timeout = timeout
        self._config = {
            "bootstrap.servers": bootstrap_servers,
            "transactional.id": transactional_id,
            "transaction.timeout.ms": int(timeout * 2000),
            "acks": "all",
            "enable.idempotence": True,
            "linger.ms": 2,
            "compression.type": "gzip",
            "compression.level": 1,
            "partitioner": "murmur2_random",
            "error_cb": _ignore_event,
            **(options or {}),
        }
        self._client: Any = None

    def start(self) -> None:
        """Take the transactional id over.

        Raises:
            KafkaUnavailableError: no broker answers in time.
        """
        from confluent_kafka import KafkaException
        from confluent_kafka import Producer as Client

        self.close()
        client = Client(self._config, logger=_silent_logger())
        try:
            client.init_transactions(self._timeout)
        except KafkaException as error:
            raise KafkaUnavailableError(f"{_advice(self._servers)} ({error.args[0].name()})") from error
        self._client = client

    def commit(self, records: Sequence[Record]) -> None:
        """Produce all records in one transaction and commit it.

        Raises:
            RecordRefusedError: a record cannot be stored; nothing was.
            TransactionFailedError: it is not known whether the records were stored: :meth:`start` anew, then read
                what was.
        """
        from confluent_kafka import KafkaError, KafkaException

        if self._client is None:
            raise TransactionFailedError("the transactional producer is not started")
        client, refused = self._client, dict[int, str]()
        deadline = time.monotonic() + self._timeout

        def callback(index: int) -> Callable[[Any, Any], None]:
            def report(error: Any, _: Any) -> None:
                if error is not None and error.code() in too_large:
                    refused[index] = error.name()

            return report

        too_large = (KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_MSG_SIZE)
        try:
            client.begin_transaction()
            for index, record in enumerate(records):
                try:
                    client.produce(
                        record.topic,
                        value=record.value,
                        key=record.key,
                        headers=list(record.headers) or None,
                        on_delivery=callback(index),
                    )
                except KafkaException as error:
                    if error.args[0].code() not in too_large:
                        raise
                    refused[index] = error.args[0].name()
            while not refused:
                try:
                    client.commit_transaction(max(0.1, deadline - time.monotonic()))
                    return
                except KafkaException as error:
                    if refused or not error.args[0].retriable() or time.monotonic() > deadline:
                        raise
        except (KafkaException, BufferError) as error:
            client.poll(0)  # reports that came with the error
            cause = error.args[0] if isinstance(error, KafkaException) else None
            fenced = cause is not None and cause.code() in (
                KafkaError._FENCED,
                KafkaError.PRODUCER_FENCED,
                KafkaError.INVALID_PRODUCER_EPOCH,
            )
            if fenced or not refused:
                self.close()
                name = cause.name() if cause is not None else type(error).__name__
                raise (FencedError if fenced else TransactionFailedError)(
                    "another writer with the same transactional id took over"
                    if fenced
                    else f"the transaction did not end well: {name}"
                ) from error
        # A transaction with a refused record is never committed. Its end is left to a producer of a new epoch: with
        # this one, the gap in the sequence numbers would let later transactions fail (OUT_OF_ORDER_SEQUENCE_NUMBER).
        self.start()
        raise RecordRefusedError(refused)

    def close(self) -> None:
        """Release connections; an open transaction is left to the next :meth:`start`."""
        client, self._client = self._client, None
        if client is not None:
            client.purge()
            client.flush(1)


class _Collector:
    """Counts the delivery reports of one :meth:`ConfluentProducer.send`."""

    def __init__(self, results: list[Position | str | None]) -> None:
        self._results = results
        self._left = len(results)
        self._lock = threading.Lock()
        self.done = threading.Event()

    def fail(self, index: int, reason: str) -> None:
        self._set(index, reason)

    def callback(self, index: int) -> Callable[[Any, Any], None]:
        def report(error: Any, message: Any) -> None:
            self._set(
                index,
                error.str() if error is not None else Position(message.topic(), message.partition(), message.offset()),
            )

        return report

    def _set(self, index: int, result: Position | str) -> None:
        with self._lock:
            self._results[index] = result
            self._left -= 1
            if not self._left:
                self.done.set()


def _unavailable_codes() -> frozenset[int]:
    from confluent_kafka import KafkaError

    return frozenset(
        {
            KafkaError._TRANSPORT,
            KafkaError._ALL_BROKERS_DOWN,
            KafkaError._TIMED_OUT,
            KafkaError._RESOLVE,
            KafkaError.REQUEST_TIMED_OUT,
            KafkaError.BROKER_NOT_AVAILABLE,
            KafkaError.LEADER_NOT_AVAILABLE,
            KafkaError.COORDINATOR_NOT_AVAILABLE,
        }
    )


def _moving_codes() -> frozenset[int]:
    """Return the errors of a partition whose leader changes, which pass by themselves within moments."""
    from confluent_kafka import KafkaError

    return frozenset(
        {
            KafkaError.LEADER_NOT_AVAILABLE,
            KafkaError.NOT_LEADER_FOR_PARTITION,
            KafkaError.FENCED_LEADER_EPOCH,
            KafkaError.UNKNOWN_LEADER_EPOCH,
            KafkaError.OFFSET_NOT_AVAILABLE,
            KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        }
    )


def _new_topic_codes() -> frozenset[int]:
    """Return what a group's coordinator answers while it has not heard of a topic that was just made."""
    from confluent_kafka import KafkaError

    return frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.NOT_COORDINATOR})


def _silent_logger() -> Any:
    """A logger that drops librdkafka's lines: they repeat every second while a broker is away."""
    import logging

    logger = logging.getLogger("clinical_orchestration.kafka.client")
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    return logger


def topic_reader(settings: ClientSettings | None = None) -> ConfluentTopicReader:
    """Return a reader for the broker that the environment names."""
    settings = settings or _settings()
    return ConfluentTopicReader(settings.kafka_bootstrap_servers, options=settings.kafka_options)


def topic_admin(settings: ClientSettings | None = None, *, timeout: float = 10.0) -> ConfluentTopicAdmin:
    """Return an admin client for the broker that the environment names."""
    settings = settings or _settings()
    return ConfluentTopicAdmin(settings.kafka_bootstrap_servers, timeout=timeout, options=settings.kafka_options)


def producer(settings: ClientSettings | None = None) -> ConfluentProducer:
    """Return a producer for the broker that the environment names."""
    settings = settings or _settings()
    return ConfluentProducer(settings.kafka_bootstrap_servers, options=settings.kafka_options)


@contextlib.contextmanager
def open_producer(settings: ClientSettings | None = None) -> Iterator[ConfluentProducer]:
    """Give a producer that is flushed and closed at the end of the block."""
    client = producer(settings)
    try:
        yield client
    finally:
        client.close()


def _settings() -> ClientSettings:
    from clinical_orchestration.settings import ClientSettings as Settings

    return Settings()
