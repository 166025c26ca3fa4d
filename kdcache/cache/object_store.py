"""A store in an object store, by way of fsspec: S3, and what else fsspec supports.

In, out and invariants: those of `store.Store`.

S3's credentials and address come from where AWS's own tools find them (~/.aws, AWS_PROFILE,
AWS_ENDPOINT_URL, ...); all else can be set in fsspec's configuration (~/.config/fsspec/*.json).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from kdcache.errors import MissingDependency, StorageConflict, StorageError, conflict_at

# A store that does not answer is an error in about a minute; s3fs alone would try for six.
S3_CLIENT = {
    "connect_timeout": 5,
    "read_timeout": 6,
    "retries": {"mode": "standard", "max_attempts": 3},
}
S3_ROUNDS = 2
# The first botocore with these for PutObject. s3fs drops what botocore does not have.
IF_NONE_MATCH_SINCE, IF_MATCH_SINCE = (1, 35, 2), (1, 35, 69)
EXISTS, CONCURRENT, NOT_IMPLEMENTED = 412, 409, 501  # replies to a put with If-None-Match
PUT_ROUNDS = 5


class ObjectStore:
    """Objects below a prefix of an object store, where a put is whole or not at all.

    `write_new` is atomic on S3, where the server honours If-None-Match, as Amazon's does. A server
    that ignores it, an old botocore and fsspec's other file systems get a check before the put;
    `conditional` is False where that can be known.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        protocol = url.partition("://")[0]
        options: dict[str, Any] = {}
        if protocol in ("s3", "s3a"):
            ours = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
            options["config_kwargs"] = {**S3_CLIENT, **ours}
        try:
            # Other processes write here too, so no listing may be an old one.
            self._fs, self._prefix = fsspec.core.url_to_fs(
                self.url, use_listings_cache=False, **options
            )
        except ImportError as error:
            raise MissingDependency(
                f"{self.url} needs a package ({error}): for s3, pip install 'kdcache[s3]'"
            ) from error
        except ValueError as error:
            raise StorageError(f"cannot open {self.url}: {error}") from error
        self.conditional = False
        if options:
            # On top of the client's own attempts.
            self._fs.retries = S3_ROUNDS
            self.conditional = _botocore_version() >= IF_NONE_MATCH_SINCE

    def read(self, key: str) -> bytes | None:
        with self._storage_errors("read"):
            return self._get(key)

    def size(self, key: str) -> int:
        with self._storage_errors("read"):
            try:
                return int(self._fs.size(f"{self._prefix}/{key}"))
            except FileNotFoundError:
                return 0

    def write_new(self, key: str, data: bytes) -> bool:
        with self._storage_errors("write"):
            for _ in range(PUT_ROUNDS):
                # First, because a put whose reply was lost is there already: equal bytes are
                # success.
                held = self._get(key)
                if held is not None:
                    break
                if self._put_new(key, data):
                    return True
        if held != data:
            raise conflict_at(self.url, key)
        return False

    def _get(self, key: str) -> bytes | None:
        try:
            return bytes(self._fs.cat_file(f"{self._prefix}/{key}"))
        except FileNotFoundError:
            return None

    def _put_new(self, key: str, data: bytes) -> bool:
        """Put an object; False where the server has one, or another is being put."""
        if self.conditional:
            bucket, name, _ = self._fs.split_path(f"{self._prefix}/{key}")
            arguments = {"Bucket": bucket, "Key": name, "Body": data, "IfNoneMatch": "*"}
            try:
                # Not pipe_file(mode="create"): s3fs before 2024.12 takes and ignores that mode.
                self._fs.call_s3("put_object", **arguments)
                return True
            except OSError as error:
                status = _http_status(error)
                if status in (EXISTS, CONCURRENT):
                    return False
                # A server without If-None-Match: from now on the check before the put is all there
                # is.
                if status != NOT_IMPLEMENTED:
                    raise
                self.conditional = False
        self._fs.pipe_file(f"{self._prefix}/{key}", data)
        return True

    def replace(self, key: str, old: bytes, new: bytes) -> None:
        with self._storage_errors("write"):
            for _ in range(PUT_ROUNDS):
                # The tag first: whatever changes the object after this makes the put fail.
                tag = (
                    self._fs.info(f"{self._prefix}/{key}").get("ETag") if self.conditional else None
                )
                held = self._get(key)
                if held != old or self._put_over(key, new, tag):
                    break
        if held not in (old, new):
            raise conflict_at(self.url, key)

    def _put_over(self, key: str, data: bytes, tag: str | None) -> bool:
        """Replace the object with this tag; False where it is no longer there."""
        if tag is None or _botocore_version() < IF_MATCH_SINCE:
            self._fs.pipe_file(f"{self._prefix}/{key}", data)
            return True
        bucket, name, _ = self._fs.split_path(f"{self._prefix}/{key}")
        try:
            self._fs.call_s3("put_object", Bucket=bucket, Key=name, Body=data, IfMatch=tag)
        except OSError as error:
            if _http_status(error) not in (EXISTS, CONCURRENT):
                raise
            return False
        return True

    def delete(self, key: str) -> None:
        with self._storage_errors("write"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._prefix}/{key}")

    def sizes(self) -> dict[str, int]:
        with self._storage_errors("read"):
            try:
                found: dict[str, dict[str, Any]] = self._fs.find(self._prefix, detail=True)
            except FileNotFoundError:
                return {}
        return {name[len(self._prefix) + 1 :]: int(x["size"]) for name, x in found.items()}

    def create(self, objects: dict[str, bytes], last: str) -> None:
        if self.size(last):
            return
        for key in sorted(objects, key=lambda key: key == last):
            try:
                self.write_new(key, objects[key])
            except StorageConflict as error:
                # Another creator's `last` stays: the caller reads it, and compares the specs.
                if key != last:
                    raise StorageConflict(
                        f"{error}; another process creates this store, or was killed doing so: "
                        "remove what is there, or choose another path"
                    ) from error

    def lock_shard(self, number: int) -> bool:
        return True

    def unlock_shard(self, number: int) -> None: ...

    def release_locks(self, whole: bool = True) -> None: ...

    @contextmanager
    def _storage_errors(self, verb: str) -> Iterator[None]:
        try:
            yield
        except _client_errors() as error:
            words = (str(error).splitlines() or [repr(error)])[0]
            if isinstance(error, PermissionError):
                words += "; check the credentials"
            raise StorageError(f"cannot {verb} {self.url}: {words}") from error


def _client_errors() -> tuple[type[BaseException], ...]:
    """OSError, and what S3's client raises besides: no credentials, no such host."""
    try:
        from aiohttp import ClientError as HttpError
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return OSError, RuntimeError, ValueError
    return OSError, RuntimeError, ValueError, BotoCoreError, ClientError, HttpError


def _http_status(error: OSError) -> int | None:
    """Of the reply behind an error of s3fs, which keeps botocore's error as the cause."""
    response = getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return None if status is None else int(status)


def _botocore_version() -> tuple[int, ...]:
    from botocore import __version__

    return tuple(int(part) for part in __version__.split(".")[:3])
