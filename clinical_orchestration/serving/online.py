"""Reading online features at the rate of requests.

The hash of :mod:`clinical_orchestration.stores.online` holds hundreds of fields, and taking such an answer apart field
by field costs the driver more than everything else in a request (1 to 2 ms for the pilot's 300 features). A script of
one line lets Redis answer with the whole hash as one JSON text instead, which takes a fourth of that. Where scripts are
not allowed, hashes are read as they are.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson

from clinical_orchestration.stores.online import (
    DEFAULT_PREFIX,
    META_FIELDS,
    OnlineFeatures,
    OnlineStoreError,
    RedisOnlineStore,
)

if TYPE_CHECKING:
    import redis

_logger = logging.getLogger(__name__)

_SCRIPT = "return cjson.encode(redis.call('HGETALL', KEYS[1]))"
_SCRIPT_ID = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()  # as EVALSHA wants it
_META = frozenset(META_FIELDS)
_BATCH = 100  # hashes in one round trip


class RedisFeatureReader:
    """See :class:`clinical_orchestration.serving.ports.FeatureReader`. Used from one thread.

    Args:
        redis_url: such as ``redis://127.0.0.1:6379/0``.
        prefix: text before the patient's id in each key.
        timeout_seconds: longest wait for the connection and for an answer. Short: requests wait for it.
    """

    def __init__(self, redis_url: str, prefix: str = DEFAULT_PREFIX, *, timeout_seconds: float = 1.0) -> None:
        self._url = redis_url
        self._key = RedisOnlineStore(redis_url, prefix).key
        self._timeout = timeout_seconds
        self._scripts = True
        self._opened: redis.Redis | None = None

    def get_many(self, patient_ids: Sequence[str]) -> dict[str, OnlineFeatures]:
        """Return the features of those patients that have any.

        Raises:
            OnlineStoreError: Redis does not answer, or refuses.
            ValueError: a hash is not as the loader writes it.
        """
        found: dict[str, OnlineFeatures] = {}
        for start in range(0, len(patient_ids), _BATCH):
            batch = patient_ids[start : start + _BATCH]
            for patient_id, fields in zip(batch, self._hashes(batch), strict=True):
                if fields:
                    found[patient_id] = _row(patient_id, fields)
        return found

    def ping(self) -> None:
        """Return when Redis answers.

        Raises:
            OnlineStoreError: it does not.
        """
        import redis

        try:
            self._client().ping()
        except redis.RedisError as error:
            raise self._unavailable(error) from None

    def _hashes(self, patient_ids: Sequence[str]) -> list[Mapping[str, str]]:
        import redis

        try:
            if self._scripts:
                try:
                    return [_fields(text) for text in self._run_script(patient_ids)]
                except redis.ResponseError as error:
                    refused = isinstance(error, redis.exceptions.NoPermissionError)
                    if not refused and "unknown command" not in str(error).lower():
                        raise
                    _logger.warning("Redis allows no scripts (%s): reading features the slow way", type(error).__name__)
                    self._scripts = False
            with self._client().pipeline(transaction=False) as pipeline:
                for patient_id in patient_ids:
                    pipeline.hgetall(self._key(patient_id))
                answers: list[Mapping[str, str]] = pipeline.execute()
            return answers
        except redis.ResponseError as error:
            if "WRONGTYPE" in str(error):
                raise ValueError("a key of the online store is no hash") from None
            raise self._unavailable(error) from None
        except redis.RedisError as error:
            raise self._unavailable(error) from None

    def _run_script(self, patient_ids: Sequence[str]) -> list[str]:
        import redis

        for attempt in (1, 2):
            with self._client().pipeline(transaction=False) as pipeline:
                for patient_id in patient_ids:
                    pipeline.execute_command("EVALSHA", _SCRIPT_ID, 1, self._key(patient_id))  # type: ignore[no-untyped-call]
                try:
                    answers: list[str] = pipeline.execute()
                    return answers
                except redis.exceptions.NoScriptError:  # a new server, or one that was restarted
                    if attempt == 2:
                        raise
                    self._client().script_load(_SCRIPT)
        raise RuntimeError("unreachable: the loop returns or raises")

    def _client(self) -> redis.Redis:
        if self._opened is None:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry

            self._opened = redis.Redis.from_url(
                self._url,
                decode_responses=True,
                socket_timeout=self._timeout,
                socket_connect_timeout=self._timeout,
                # one more attempt at once, for a connection that Redis closed; none after a time-out: requests wait
                retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
                health_check_interval=30,
            )
        return self._opened

    def _unavailable(self, error: Exception) -> OnlineStoreError:
        parts = urlsplit(self._url)
        where = f"{parts.hostname}:{parts.port or 6379}" if parts.hostname else parts.path
        # the driver's own text may name keys, and keys hold patients' identifiers
        return OnlineStoreError(f"the online feature store at {where} does not answer ({type(error).__name__})")


def _fields(text: str) -> dict[str, str]:
    """Return the hash in the script's answer: a flat list, or an empty object for no hash."""
    items: Any = orjson.loads(text)
    return dict(zip(items[::2], items[1::2], strict=True)) if items else {}


def _row(patient_id: str, fields: Mapping[str, str]) -> OnlineFeatures:
    """Return the row that a hash says.

    Raises:
        ValueError: it is not as the loader writes it.
    """
    moment = datetime.fromisoformat(fields.get("feature_time", ""))
    if moment.tzinfo is None:
        raise ValueError("feature_time has no offset")
    return OnlineFeatures(
        patient_id=patient_id,
        trial=fields.get("trial", ""),
        feature_time=moment,
        features={name: float(value) for name, value in fields.items() if name not in _META},
        feature_set=fields.get("feature_set", ""),
    )
