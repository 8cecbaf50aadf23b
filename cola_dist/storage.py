"""The one door to files: plain paths, ``file://``, ``s3://`` and ``embedded:NAME`` (data inside the installed package).

S3 endpoint, region and keys come from the environment (``AWS_ENDPOINT_URL``, ``AWS_REGION``, ``AWS_ACCESS_KEY_ID`` …), from nowhere else.
What the user can mend (credentials, bucket, endpoint) is a UserError; a missing file is a FileNotFoundError that names its URI; what the
server itself fails at, after retries with growing pauses, is an OSError.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
from botocore import exceptions as failures
from botocore.config import Config

from cola_dist.errors import UserError

_EMBEDDED = Path(__file__).parent / "embedded"
_ATTEMPTS = 5
_NOT_FOUND = {"NoSuchKey", "404", "NotFound"}
_DENIED = {"403", "401", "AccessDenied", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_AWAY = (
    failures.EndpointConnectionError,
    failures.ConnectionError,
    failures.ProxyConnectionError,
    failures.ConnectTimeoutError,
    failures.ReadTimeoutError,
    failures.ConnectionClosedError,
)
T = TypeVar("T")


def join(uri: str, *parts: str) -> str:
    """The URI of something below ``uri``."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def local_path(uri: str) -> Path | None:
    """The path on this machine, or none for object storage. Raises UserError for an unknown scheme or embedded name."""
    if uri.startswith("s3://"):
        return None
    if uri.startswith("embedded:"):
        name, _, rest = uri.removeprefix("embedded:").partition("/")
        if not name or not (_EMBEDDED / name).is_dir():
            known = ", ".join(sorted(path.name for path in _EMBEDDED.glob("*") if path.is_dir()))
            raise UserError(f"{uri}: no such embedded data; this installation has: {known or 'none'}")
        return _EMBEDDED / name / rest
    if uri.startswith("file://"):
        return Path(uri.removeprefix("file://"))
    if "://" in uri:
        raise UserError(f"{uri}: unknown scheme; give a path, file://, s3:// or embedded:NAME")
    return Path(uri).expanduser()


def read_bytes(uri: str, start: int = 0, length: int | None = None) -> bytes:
    """The whole file, or ``length`` bytes from byte ``start``; fewer where the file ends before. Raises FileNotFoundError."""
    path = local_path(uri)
    if path is not None:
        with _local_errors(uri), path.open("rb") as file:
            file.seek(start)
            return file.read(-1 if length is None else length)
    if length == 0:
        return b""
    bucket, key = _bucket_key(uri)
    ranged = {"Range": f"bytes={start}-{'' if length is None else start + length - 1}"} if start or length is not None else {}

    def get() -> bytes:
        try:
            answer = _client().get_object(Bucket=bucket, Key=key, **ranged)
        except failures.ClientError as error:
            if error.response["Error"]["Code"] in ("InvalidRange", "416"):
                return b""  # the file ends before the range begins
            raise
        data: bytes = answer["Body"].read()
        if "ContentRange" in answer:
            return data
        # The server ignored the range and sent the whole file.
        return data[start : None if length is None else start + length]

    with _s3_errors(uri):
        return _retried(get)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file so that readers see the old one or all of the new one, never a part. Folders are made as needed."""
    path = local_path(uri)
    if path is None:
        bucket, key = _bucket_key(uri)
        with _s3_errors(uri):
            _client().put_object(Bucket=bucket, Key=key, Body=data)
        return
    with _local_errors(uri), _replacing(path) as part:
        part.write_bytes(data)


def upload_file(path: str | Path, uri: str) -> None:
    """Copy a local file to ``uri``, in parts when it is large, atomically. Raises FileNotFoundError."""
    target = local_path(uri)
    if target is None:
        bucket, key = _bucket_key(uri)
        with _s3_errors(uri), Path(path).open("rb") as file:
            _client().upload_fileobj(file, bucket, key)
        return
    with _local_errors(uri), _replacing(target) as part:
        shutil.copyfile(path, part)


def download_file(uri: str, path: str | Path) -> None:
    """Copy ``uri`` to a local file, atomically. Raises FileNotFoundError."""
    source = local_path(uri)
    with _local_errors(uri), _replacing(Path(path)) as part:
        if source is not None:
            shutil.copyfile(source, part)
            return
        bucket, key = _bucket_key(uri)
        with _s3_errors(uri):
            _client().download_file(bucket, key, str(part))


def size(uri: str) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    path = local_path(uri)
    if path is not None:
        with _local_errors(uri):
            return path.stat().st_size
    bucket, key = _bucket_key(uri)
    with _s3_errors(uri):
        return int(_client().head_object(Bucket=bucket, Key=key)["ContentLength"])


def exists(uri: str) -> bool:
    """Whether there is a file or a folder with something in it."""
    path = local_path(uri)
    if path is not None:
        return path.is_file() or (path.is_dir() and any(path.iterdir()))
    try:
        size(uri)
    except FileNotFoundError:
        return any(True for _ in _objects(uri))
    return True


def list_files(uri: str) -> dict[str, int]:
    """Relative name to bytes of every file below a folder, in sorted order; empty when the folder is missing.

    Others may write and delete there meanwhile: what vanishes while it is listed is left out.
    """
    path = local_path(uri)
    if path is None:
        return dict(sorted(_objects(uri)))
    found: dict[str, int] = {}
    for folder, _, names in os.walk(path):
        for file in (Path(folder, name) for name in names):
            with suppress(FileNotFoundError):
                found[file.relative_to(path).as_posix()] = file.stat().st_size
    return dict(sorted(found.items()))


def delete(uri: str) -> None:
    """Remove a file or everything below a folder; nothing happens when there is none."""
    path = local_path(uri)
    if path is not None:
        with _local_errors(uri):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        return
    bucket, key = _bucket_key(uri)
    with _s3_errors(uri):
        for name in list_files(uri):
            _client().delete_object(Bucket=bucket, Key=f"{key}/{name}" if key else name)
        if key:
            _client().delete_object(Bucket=bucket, Key=key)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A part file beside ``path`` that takes its place on success and vanishes on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files private; a finished one gets what the user's umask would have given.
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _local_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(uri) from error
    except PermissionError as error:
        raise UserError(f"{uri}: permission denied; check who owns {error.filename}") from error
    except (NotADirectoryError, FileExistsError) as error:
        raise UserError(f"{uri}: {error.filename} is a file where a folder is needed") from error


def _bucket_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise UserError(f"{uri}: no bucket; write s3://BUCKET/FOLDER")
    return bucket, key.strip("/")


def _objects(uri: str) -> Iterator[tuple[str, int]]:
    bucket, key = _bucket_key(uri)
    prefix = f"{key}/" if key else ""
    with _s3_errors(uri):
        for page in _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # some servers list folders as empty objects
                    yield entry["Key"].removeprefix(prefix), int(entry["Size"])


def _client() -> Any:
    """The S3 client for this process and the environment as it is now."""
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _client_for(os.getpid(), settings)


@functools.lru_cache(maxsize=4)
def _client_for(_process: int, _settings: tuple[tuple[str, str], ...]) -> Any:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config: dict[str, Any] = {"connect_timeout": 10, "read_timeout": 60}
    if endpoint:
        config["s3"] = {"addressing_style": "path"}
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        config["retries"] = {"mode": "standard", "total_max_attempts": _ATTEMPTS}
    # S3-compatible servers refuse or corrupt the newer default checksums.
    for name, field in (
        ("AWS_REQUEST_CHECKSUM_CALCULATION", "request_checksum_calculation"),
        ("AWS_RESPONSE_CHECKSUM_VALIDATION", "response_checksum_validation"),
    ):
        config[field] = os.environ.get(name, "when_required")
    try:
        return boto3.session.Session().client("s3", config=Config(**config))
    except ValueError as error:
        raise UserError(f"AWS_ENDPOINT_URL: not a URL; write http://HOST:PORT, not {_endpoint()}") from error


def _retried(get: Callable[[], T]) -> T:
    """Repeat a read whose body broke off: botocore retries requests, not the bodies of their answers."""
    for attempt in range(1, _ATTEMPTS):
        try:
            return get()
        except (failures.ResponseStreamingError, failures.IncompleteReadError, failures.ReadTimeoutError):
            time.sleep(0.1 * 2**attempt)
    return get()


@contextmanager
def _s3_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except failures.ClientError as error:
        raise _translated(error, uri) from error
    except (failures.NoCredentialsError, failures.PartialCredentialsError) as error:
        raise UserError(f"{uri}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
    except failures.ParamValidationError as error:
        raise UserError(f"{uri}: not a valid bucket or key name") from error
    except _AWAY as error:
        raise UserError(f"{uri}: object storage at {_endpoint()} does not answer; check AWS_ENDPOINT_URL and the network") from error


def _translated(error: Any, uri: str) -> Exception:
    bucket, _ = _bucket_key(uri)
    code = str(error.response.get("Error", {}).get("Code", "unknown"))
    if code == "NoSuchBucket":
        return _no_bucket(uri)
    if code in _NOT_FOUND:
        # A HEAD answer has no body: it does not say whether the bucket or the key is missing.
        return FileNotFoundError(uri) if error.operation_name != "HeadObject" or _bucket_exists(bucket) else _no_bucket(uri)
    if code in _DENIED:
        return UserError(
            f"{uri}: access to bucket {bucket} at {_endpoint()} denied ({code}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return OSError(f"{uri}: object storage at {_endpoint()} failed at {error.operation_name}: {code}")


def _bucket_exists(bucket: str) -> bool:
    try:
        _client().head_bucket(Bucket=bucket)
    except failures.ClientError as error:
        return error.response["ResponseMetadata"]["HTTPStatusCode"] != 404
    return True


def _no_bucket(uri: str) -> UserError:
    return UserError(f"{uri}: bucket {_bucket_key(uri)[0]} does not exist at {_endpoint()}; create it or correct the name")


def _endpoint() -> str:
    """Host and port only: an endpoint URL may carry a password."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not url:
        return "AWS"
    parts = urlsplit(url)
    try:
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        port = ""
    return f"{parts.hostname}{port}" if parts.hostname else "a malformed address"
