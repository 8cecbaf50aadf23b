"""What is done with objects, each with patience: read, write, list and delete."""

from __future__ import annotations

import functools
import io
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from boto3.s3.transfer import TransferConfig
from botocore import exceptions as failures

from cola_dist.s3.address import Place
from cola_dist.s3.client import Broken, Trying, client, patiently, server

_PIECE = 2**20  # bytes of a body read at once
_ONE_PUT = 8 * 2**20  # bytes; larger ones go up in parts


def read(where: Place, start: int, length: int | None) -> bytes:
    """``length`` bytes from byte ``start``, or all; fewer where the object ends before. Raises FileNotFoundError."""
    ranged = {"Range": f"bytes={start}-{'' if length is None else start + length - 1}"} if start or length is not None else {}

    def attempt(trying: Trying) -> bytes:
        try:
            answer = client(where).get_object(Bucket=where.bucket, Key=where.key, **ranged)
        except failures.ClientError as error:
            if error.response["Error"]["Code"] in ("InvalidRange", "416"):
                return b""  # the object ends before the range begins
            raise
        with closing(answer["Body"]) as body:
            return _taken(body, answer.get("ContentRange"), start, length, trying)

    return patiently(where, attempt)


def _taken(body: Any, content_range: str | None, start: int, length: int | None, trying: Trying) -> bytes:
    """What was asked for out of an answer's body. ``content_range`` is none when the server ignored the range and sends all."""
    stop = None if length is None else start + length
    if content_range is not None:
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", content_range)
        first, last, total = map(int, found.groups()) if found else (-1, -1, -1)
        if first != start or last + 1 != (total if stop is None else min(stop, total)):
            raise Broken(f"asked for bytes from {start} to {stop}, got {content_range}")
        start, stop = 0, None
    pieces, at = [], 0
    while stop is None or at < stop:
        # An end before the promised length raises here.
        piece = body.read(_PIECE if stop is None else min(_PIECE, stop - at))
        if not piece:
            break
        trying.moved()
        pieces.append(piece[max(0, start - at) :])
        at += len(piece)
    return b"".join(pieces)


def write(where: Place, data: bytes) -> None:
    """Store an object; readers see the old one or all of the new one."""

    def attempt(trying: Trying) -> None:
        # A file object: bytes would go out in one call, and the time-out would hold for all of them together.
        if len(data) <= _ONE_PUT:
            client(where).put_object(Bucket=where.bucket, Key=where.key, Body=io.BytesIO(data))
        else:
            _send(where, io.BytesIO(data), trying)

    patiently(where, attempt)


def upload(path: Path, where: Place) -> None:
    """Store a local file, in parts when it is large. Raises FileNotFoundError."""

    def attempt(trying: Trying) -> None:
        with path.open("rb") as file:
            _send(where, file, trying)

    patiently(where, attempt)


def _send(where: Place, file: Any, trying: Trying) -> None:
    try:
        client(where).upload_fileobj(file, where.bucket, where.key, Callback=trying.moved)
    except failures.ClientError as error:
        # The parts had been put together, but the answer was lost; or the server forgot them.
        if error.response["Error"]["Code"] == "NoSuchUpload":
            raise Broken("the server lost an upload") from error
        raise


def download(where: Place, path: Path) -> None:
    """Copy an object to a local file, in parts when it is large. Raises FileNotFoundError."""

    transfer = TransferConfig()

    def attempt(trying: Trying) -> None:
        promised = client(where).head_object(Bucket=where.bucket, Key=where.key)["ContentLength"]
        client(where).download_file(where.bucket, where.key, str(path), Callback=trying.moved, Config=transfer)
        if (found := path.stat().st_size) != promised:
            # A server that ignores ranges sends the whole object for every part: ask for it once.
            transfer.multipart_threshold = sys.maxsize
            raise Broken(f"{found} of {promised} bytes")

    patiently(where, attempt)


def size(where: Place) -> int:
    """Bytes of an object. Raises FileNotFoundError."""
    return patiently(where, lambda _: int(client(where).head_object(Bucket=where.bucket, Key=where.key)["ContentLength"]))


def modified(where: Place) -> float:
    """When an object was written, in seconds since 1970 by the server's clock. Raises FileNotFoundError."""
    return patiently(where, lambda _: float(client(where).head_object(Bucket=where.bucket, Key=where.key)["LastModified"].timestamp()))


def below(where: Place) -> Iterator[tuple[str, int]]:
    """(name below the place, bytes) of every object below it."""
    prefix = f"{where.key}/" if where.key else ""
    asked: dict[str, str] = {}
    while True:
        following = functools.partial(_page, where, prefix, asked)
        page = patiently(where, following)
        for entry in page.get("Contents", ()):
            if not entry["Key"].endswith("/"):  # some servers list folders as empty objects
                yield entry["Key"].removeprefix(prefix), int(entry["Size"])
        token = page.get("NextContinuationToken")
        if not token:
            return
        if token == asked.get("ContinuationToken"):
            raise OSError(f"{where.uri}: object storage at {server(where)} lists the same page again and again")
        asked = {"ContinuationToken": token}


def _page(where: Place, prefix: str, asked: dict[str, str], _: Trying) -> Any:
    return client(where).list_objects_v2(Bucket=where.bucket, Prefix=prefix, **asked)


def delete(where: Place) -> None:
    """Remove an object and everything below the place."""
    for key in [*(f"{where.key}/{name}" if where.key else name for name, _ in list(below(where))), *([where.key] if where.key else [])]:
        patiently(where, functools.partial(_delete_one, where, key))


def _delete_one(where: Place, key: str, _: Trying) -> None:
    client(where).delete_object(Bucket=where.bucket, Key=key)
