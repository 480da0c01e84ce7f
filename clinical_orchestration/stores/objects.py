"""Plain objects in S3 (reports, plots, exports), through the MinIO client; tables are in :mod:`.tables`."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from clinical_orchestration.settings import ClientSettings, Variables

if TYPE_CHECKING:
    from minio import Minio


class ObjectNotFoundError(LookupError):
    """There is no object of this name in the bucket."""


@dataclass(frozen=True)
class StoredObject:
    """One object of a listing: its key, size in bytes and time of the last change (UTC)."""

    key: str
    size: int
    modified: datetime | None


class Objects(Protocol):
    """Bytes by key, in one bucket."""

    def uri(self, key: str) -> str:
        """Return the object's address, such as ``s3://clinical-mlops/reports/1.html``."""
        ...

    def ensure_bucket(self) -> bool:
        """Create the bucket if it is absent; return whether it was created."""
        ...

    def put(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> str:
        """Write an object, over what is there, and return its address."""
        ...

    def get(self, key: str) -> bytes:
        """Return an object's bytes.

        Raises:
            ObjectNotFoundError: there is none.
        """
        ...

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """Yield the objects whose key starts with `prefix`, by key."""
        ...


class ObjectStore:
    """One bucket of an S3 service (MinIO, SeaweedFS, AWS)."""

    def __init__(self, client: Minio, bucket: str, region: str | None = None) -> None:
        self._client = client
        self._region = region
        self.bucket = bucket

    @classmethod
    def from_settings(cls, settings: ClientSettings | None = None, *, bucket: str | None = None) -> ObjectStore:
        """Return a bucket of the deployment that the environment describes (default: ``clinical_data_bucket``)."""
        from minio import Minio

        settings = settings or ClientSettings()
        address = urlsplit(settings.s3_endpoint)
        client = Minio(
            address.netloc,
            access_key=settings.s3_access_key or None,
            secret_key=settings.s3_secret_key.get_secret_value() or None,
            secure=address.scheme == "https",
            region=settings.s3_region,
        )
        return cls(client, bucket or Variables().clinical_data_bucket, settings.s3_region)

    def uri(self, key: str) -> str:
        """See :class:`Objects`."""
        return f"s3://{self.bucket}/{key}"

    def ensure_bucket(self) -> bool:
        """See :class:`Objects`."""
        from minio.error import S3Error

        if self._client.bucket_exists(self.bucket):
            return False
        try:
            self._client.make_bucket(self.bucket, self._region)
        except S3Error as error:
            if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise
            return False
        return True

    def put(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> str:
        """See :class:`Objects`."""
        self._client.put_object(self.bucket, key, io.BytesIO(data), len(data), content_type)
        return self.uri(key)

    def get(self, key: str) -> bytes:
        """See :class:`Objects`."""
        from minio.error import S3Error

        try:
            answer = self._client.get_object(self.bucket, key)
        except S3Error as error:
            if error.code == "NoSuchKey":
                raise ObjectNotFoundError(f"there is no object {self.uri(key)}") from None
            raise
        try:
            return bytes(answer.read())
        finally:
            answer.close()
            answer.release_conn()

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """See :class:`Objects`."""
        for found in self._client.list_objects(self.bucket, prefix=prefix, recursive=True):
            yield StoredObject(found.object_name, found.size or 0, found.last_modified)


def download(objects: Objects, prefix: str, root: Path) -> Path:
    """Copy the objects directly below `prefix` into a folder below `root`, and return that folder.

    A file that is there with the object's size and time is kept; files whose object is gone are removed.

    Raises:
        ObjectNotFoundError: there is no object below the prefix.
    """
    prefix = prefix.rstrip("/") + "/"
    address = objects.uri(prefix)
    found = {}
    for stored in objects.list(prefix):
        name = stored.key.removeprefix(prefix)
        if name and "/" not in name and not name.startswith("."):
            found[name] = stored
    if not found:
        raise ObjectNotFoundError(f"there is no object below {address}")
    folder = root / hashlib.sha256(address.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name not in found:
            path.unlink()
    for name, stored in found.items():
        path = folder / name
        modified = stored.modified.timestamp() if stored.modified else None
        if path.is_file() and path.stat().st_size == stored.size and path.stat().st_mtime == modified:
            continue
        partial = folder / f".{name}.partial"
        partial.write_bytes(objects.get(stored.key))
        if modified is not None:
            os.utime(partial, (modified, modified))
        partial.replace(path)  # a run that is killed leaves no half file under the name
    return folder
