"""Online features: the newest feature row of each patient, in Redis, for serving.

A patient's features are one Redis hash ``{prefix}{patient_id}:features``. Its fields are the features by name, each
as the text of the double (``repr``, so reading gives exactly the number that was written; a null feature has no
field), and :data:`META_FIELDS`:

- ``feature_time``: ISO 8601, UTC, always with microseconds, so that texts sort like times;
- ``trial``: name of the trial profile the features belong to;
- ``loaded_at``: when this row was written, ISO 8601, UTC;
- ``feature_set``: :func:`clinical_orchestration.features.definitions.feature_set_id` of the profile.

A key lives :data:`TIME_TO_LIVE` after the last load that saw the patient. This module imports neither Spark nor a
frame library: the model server uses it on every request.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import redis

_T = TypeVar("_T")

TIME_TO_LIVE = timedelta(hours=72)
META_FIELDS = ("feature_time", "trial", "loaded_at", "feature_set")
DEFAULT_PREFIX = "patient:"

_SUFFIX = ":features"
_BATCH = 500  # commands in one pipeline: a round trip for many patients, and still small replies

# One atomic step a patient, so that two loaders at once cannot put an older row over a newer one. ARGV: time to live
# in seconds, then field, value, field, value ... in which ``loaded_at`` does not count as a difference.
_PUT_SCRIPT = """
local incoming = {}
for i = 2, #ARGV, 2 do incoming[ARGV[i]] = ARGV[i + 1] end
local stored_time = redis.call('HGET', KEYS[1], 'feature_time')
if stored_time then
  if stored_time > incoming['feature_time'] then return 'older' end
  if stored_time == incoming['feature_time'] then
    local stored = redis.call('HGETALL', KEYS[1])
    local same = #stored == #ARGV - 1
    for i = 1, #stored, 2 do
      if stored[i] ~= 'loaded_at' and incoming[stored[i]] ~= stored[i + 1] then same = false break end
    end
    if same then
      redis.call('EXPIRE', KEYS[1], ARGV[1])
      return 'unchanged'
    end
  end
end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 'written'
"""


class OnlineStoreError(RuntimeError):
    """The online store does not answer; the message names its address, never a password."""


@dataclass(frozen=True)
class OnlineFeatures:
    """One patient's newest features.

    Attributes:
        patient_id: the patient.
        trial: name of the trial profile.
        feature_time: the time t at which the features hold (UTC).
        features: value by feature name; a name that is absent is null.
        feature_set: id of the set of features, see ``features.definitions.feature_set_id``.
        loaded_at: when the row was written to the online store (UTC); None for a row not yet written.
    """

    patient_id: str
    trial: str
    feature_time: datetime
    features: dict[str, float | None]
    feature_set: str
    loaded_at: datetime | None = None

    def age(self, now: datetime | None = None) -> timedelta:
        """Return how long ago, seen from `now` (default: the clock), the features held."""
        return (now or datetime.now(UTC)) - self.feature_time

    def select(self, names: Sequence[str]) -> dict[str, float | None]:
        """Return the values of `names` in that order, None where a feature is null."""
        return {name: self.features.get(name) for name in names}

    def same_values(self, other: OnlineFeatures) -> bool:
        """Say whether both rows state the same: patient, trial, time, feature set and every number, bit for bit."""
        return _fields(self) == _fields(other) and self.patient_id == other.patient_id


@dataclass(frozen=True)
class OnlineSummary:
    """What is online of a patient, without the values.

    Attributes:
        trial: name of the trial profile.
        feature_time: the time t at which the features hold (UTC).
        feature_set: id of the set of features.
        features: how many features are not null.
    """

    trial: str
    feature_time: datetime
    feature_set: str
    features: int


@dataclass(frozen=True)
class OnlineLoad:
    """What one load did, in patients."""

    written: int = 0
    unchanged: int = 0
    older: int = 0

    @property
    def total(self) -> int:
        """Patients that were offered."""
        return self.written + self.unchanged + self.older

    def __add__(self, other: OnlineLoad) -> OnlineLoad:
        return OnlineLoad(self.written + other.written, self.unchanged + other.unchanged, self.older + other.older)


class OnlineStore(Protocol):
    """The newest features of each patient."""

    def put(self, rows: Iterable[OnlineFeatures]) -> OnlineLoad:
        """Write each row unless the store holds a newer one of that patient.

        A row that is already there, unchanged, only starts its time to live again. A row of the same feature time
        with other values (late records arrived) replaces the stored one.

        Raises:
            OnlineStoreError: the store does not answer.
        """
        ...

    def get(self, patient_id: str) -> OnlineFeatures | None:
        """Return a patient's features, or None where there are none (never loaded, or expired).

        Raises:
            OnlineStoreError: the store does not answer.
        """
        ...

    def get_many(self, patient_ids: Sequence[str]) -> dict[str, OnlineFeatures]:
        """Return the features of those `patient_ids` that have any, in one round trip for hundreds of patients.

        Raises:
            OnlineStoreError: the store does not answer.
        """
        ...

    def summaries(self, patient_ids: Sequence[str]) -> dict[str, OnlineSummary]:
        """Return what is online of those `patient_ids` that have anything, much faster than with all values.

        Raises:
            OnlineStoreError: the store does not answer.
        """
        ...

    def count(self) -> int:
        """Return how many patients have features now.

        Raises:
            OnlineStoreError: the store does not answer.
        """
        ...

    def ping(self) -> None:
        """Return when the store answers.

        Raises:
            OnlineStoreError: it does not.
        """
        ...


def format_time(moment: datetime) -> str:
    """Return an aware `moment` as UTC ISO 8601 text with microseconds, so that texts sort like times."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def _fields(row: OnlineFeatures) -> dict[str, str]:
    """Return the hash fields of a row without ``loaded_at``."""
    fields = {
        name: repr(float(value)) for name, value in row.features.items() if value is not None and not math.isnan(value)
    }
    fields["feature_time"] = format_time(row.feature_time)
    fields["trial"] = row.trial
    fields["feature_set"] = row.feature_set
    return fields


def _parse(patient_id: str, fields: Mapping[str, str]) -> OnlineFeatures | None:
    """Return the row that the hash says; None for no hash."""
    if "feature_time" not in fields:
        return None
    loaded_at = fields.get("loaded_at")
    return OnlineFeatures(
        patient_id=patient_id,
        trial=fields.get("trial", ""),
        feature_time=datetime.fromisoformat(fields["feature_time"]),
        features={name: float(value) for name, value in fields.items() if name not in META_FIELDS},
        feature_set=fields.get("feature_set", ""),
        loaded_at=datetime.fromisoformat(loaded_at) if loaded_at else None,
    )


def _summary(meta: Mapping[str, str], features: int) -> OnlineSummary:
    return OnlineSummary(
        meta.get("trial", ""), datetime.fromisoformat(meta["feature_time"]), meta.get("feature_set", ""), features
    )


def _batches(items: Iterable[_T]) -> Iterator[list[_T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


class RedisOnlineStore:
    """Online features in Redis or Valkey.

    The connection opens with the first command. Commands of many patients go in pipelines.

    Args:
        redis_url: such as ``redis://127.0.0.1:6379/0``.
        prefix: text before the patient's id in each key (variable ``feature_store_redis_prefix``).
        timeout_seconds: longest wait for the connection and for an answer.
        retries: how often a command is tried again that the connection failed.
        longest_pause_seconds: between two tries; the first is one second, each next twice as long.
    """

    def __init__(
        self,
        redis_url: str,
        prefix: str = DEFAULT_PREFIX,
        *,
        timeout_seconds: float = 5.0,
        retries: int = 3,
        longest_pause_seconds: float = 10.0,
    ) -> None:
        self._url = redis_url
        self._prefix = prefix
        self._timeout = timeout_seconds
        self._retries = retries
        self._longest_pause = longest_pause_seconds
        self._opened: redis.Redis | None = None
        self._lock = threading.Lock()

    def key(self, patient_id: str) -> str:
        """Return the Redis key of a patient's hash."""
        return f"{self._prefix}{patient_id}{_SUFFIX}"

    def _client(self) -> redis.Redis:
        import redis
        from redis.backoff import ExponentialBackoff
        from redis.retry import Retry

        with self._lock:
            if self._opened is None:
                self._opened = redis.Redis.from_url(
                    self._url,
                    decode_responses=True,
                    socket_timeout=self._timeout,
                    socket_connect_timeout=self._timeout,
                    health_check_interval=30,
                    retry=Retry(ExponentialBackoff(cap=self._longest_pause, base=1.0), self._retries),
                )
            return self._opened

    def _ask(self, question: Callable[[redis.Redis], _T]) -> _T:
        """Return the answer of `question`, with the driver's errors turned into ours."""
        import redis

        try:
            return question(self._client())
        except (redis.ConnectionError, redis.TimeoutError) as error:
            where = self._client().connection_pool.connection_kwargs
            address = where.get("path") or f"{where.get('host', '?')}:{where.get('port', '?')}"
            raise OnlineStoreError(
                f"the online feature store at {address} does not answer ({type(error).__name__}); is Redis running?"
            ) from error

    def put(self, rows: Iterable[OnlineFeatures]) -> OnlineLoad:
        """Write rows, see :meth:`OnlineStore.put`."""
        total = OnlineLoad()
        seconds = str(int(TIME_TO_LIVE.total_seconds()))
        for batch in _batches(rows):

            def send(client: redis.Redis, batch: list[OnlineFeatures] = batch) -> list[str]:
                script = client.register_script(_PUT_SCRIPT)
                loaded_at = format_time(datetime.now(UTC))
                with client.pipeline(transaction=False) as pipeline:
                    for row in batch:
                        arguments: list[str] = [seconds]
                        for name, value in {**_fields(row), "loaded_at": loaded_at}.items():
                            arguments += (name, value)
                        script(keys=[self.key(row.patient_id)], args=arguments, client=pipeline)
                    outcomes: list[str] = pipeline.execute()
                return outcomes

            outcomes = self._ask(send)
            total += OnlineLoad(*(outcomes.count(name) for name in ("written", "unchanged", "older")))
        return total

    def get(self, patient_id: str) -> OnlineFeatures | None:
        """Return one patient's features, see :meth:`OnlineStore.get`."""
        fields: Any = self._ask(lambda client: client.hgetall(self.key(patient_id)))
        return _parse(patient_id, fields)

    def get_many(self, patient_ids: Sequence[str]) -> dict[str, OnlineFeatures]:
        """Return many patients' features, see :meth:`OnlineStore.get_many`."""
        found: dict[str, OnlineFeatures] = {}
        for batch in _batches(patient_ids):

            def ask(client: redis.Redis, batch: list[str] = batch) -> list[dict[str, str]]:
                with client.pipeline(transaction=False) as pipeline:
                    for patient_id in batch:
                        pipeline.hgetall(self.key(patient_id))
                    answers: list[dict[str, str]] = pipeline.execute()
                return answers

            for patient_id, fields in zip(batch, self._ask(ask), strict=True):
                if row := _parse(patient_id, fields):
                    found[patient_id] = row
        return found

    def summaries(self, patient_ids: Sequence[str]) -> dict[str, OnlineSummary]:
        """Return what is online of many patients, see :meth:`OnlineStore.summaries`."""
        found: dict[str, OnlineSummary] = {}
        for batch in _batches(patient_ids):

            def ask(client: redis.Redis, batch: list[str] = batch) -> list[Any]:
                with client.pipeline(transaction=False) as pipeline:
                    for patient_id in batch:
                        pipeline.hmget(self.key(patient_id), list(META_FIELDS))
                        pipeline.hlen(self.key(patient_id))
                    answers: list[Any] = pipeline.execute()
                return answers

            answers = self._ask(ask)
            for patient_id, meta, fields in zip(batch, answers[::2], answers[1::2], strict=True):
                said = {name: value for name, value in zip(META_FIELDS, meta, strict=True) if value is not None}
                if "feature_time" in said:
                    found[patient_id] = _summary(said, int(fields) - len(said))
        return found

    def count(self) -> int:
        """Count patients, see :meth:`OnlineStore.count`; scans the keys, so not for every request."""
        pattern = _escape_glob(self._prefix) + "*" + _SUFFIX
        return self._ask(lambda client: sum(1 for _ in client.scan_iter(match=pattern, count=1000)))

    def time_to_live(self, patient_id: str) -> timedelta | None:
        """Return how long a patient's features still live, or None where there are none."""
        seconds: Any = self._ask(lambda client: client.ttl(self.key(patient_id)))
        return timedelta(seconds=int(seconds)) if int(seconds) >= 0 else None

    def ping(self) -> None:
        """Ask the server for a sign of life, see :meth:`OnlineStore.ping`."""
        self._ask(lambda client: client.ping())

    def close(self) -> None:
        """Close the connections; the next command opens new ones."""
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()


def _escape_glob(text: str) -> str:
    """Return `text` so that Redis' MATCH takes it literally."""
    return "".join(f"\\{character}" if character in "*?[]^-\\" else character for character in text)


@dataclass
class InMemoryOnlineStore:
    """The same behaviour in this process's memory, for tests and for trying things out.

    Args:
        clock: returns the present (aware); tests move it to see keys expire.
    """

    clock: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    _rows: dict[str, tuple[dict[str, str], datetime]] = field(default_factory=dict)

    def _live(self, patient_id: str) -> dict[str, str] | None:
        fields, expires = self._rows.get(patient_id, ({}, self.clock()))
        return fields if expires > self.clock() else None

    def put(self, rows: Iterable[OnlineFeatures]) -> OnlineLoad:
        """Write rows, see :meth:`OnlineStore.put`."""
        total = OnlineLoad()
        now = self.clock()
        for row in rows:
            fields = _fields(row)
            stored = self._live(row.patient_id)
            if stored is not None and stored["feature_time"] > fields["feature_time"]:
                total += OnlineLoad(older=1)
                continue
            if stored is not None and {**stored, "loaded_at": ""} == {**fields, "loaded_at": ""}:
                self._rows[row.patient_id] = (stored, now + TIME_TO_LIVE)
                total += OnlineLoad(unchanged=1)
                continue
            self._rows[row.patient_id] = ({**fields, "loaded_at": format_time(now)}, now + TIME_TO_LIVE)
            total += OnlineLoad(written=1)
        return total

    def get(self, patient_id: str) -> OnlineFeatures | None:
        """Return one patient's features, see :meth:`OnlineStore.get`."""
        fields = self._live(patient_id)
        return None if fields is None else _parse(patient_id, fields)

    def get_many(self, patient_ids: Sequence[str]) -> dict[str, OnlineFeatures]:
        """Return many patients' features, see :meth:`OnlineStore.get_many`."""
        return {patient_id: row for patient_id in patient_ids if (row := self.get(patient_id)) is not None}

    def summaries(self, patient_ids: Sequence[str]) -> dict[str, OnlineSummary]:
        """Return what is online of many patients, see :meth:`OnlineStore.summaries`."""
        found = {}
        for patient_id in patient_ids:
            fields = self._live(patient_id)
            if fields is not None:
                found[patient_id] = _summary(fields, sum(name not in META_FIELDS for name in fields))
        return found

    def count(self) -> int:
        """Count patients, see :meth:`OnlineStore.count`."""
        return sum(1 for patient_id in self._rows if self._live(patient_id) is not None)

    def time_to_live(self, patient_id: str) -> timedelta | None:
        """Return how long a patient's features still live, or None where there are none."""
        return None if self._live(patient_id) is None else self._rows[patient_id][1] - self.clock()

    def ping(self) -> None:
        """Always answers."""
