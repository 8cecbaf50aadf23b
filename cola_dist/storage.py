"""The one door to files: plain paths, ``file://``, ``s3://`` and ``embedded:NAME`` (data inside the installed package).

A ``file://`` URI is absolute and percent-encoded. How endpoint, region and account of an ``s3://`` URI are found and how long a failing
server is borne with (``COLA_STORAGE_PATIENCE_S``) is said in :mod:`cola_dist.s3`. What the user can mend (credentials, bucket, endpoint, options) is
a UserError; a missing file is a FileNotFoundError that names its URI; what the server itself fails at, when patience ends, is an OSError.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from cola_dist.errors import UserError
from cola_dist.s3 import client, objects
from cola_dist.s3.address import place, split

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_EMBEDDED = Path(__file__).parent / "embedded"


def join(uri: str, *parts: str) -> str:
    """The URI of the file ``parts`` (names as they are on disk) below ``uri``; options stay at the end."""
    scheme, options = "", ""
    if uri.startswith("s3://"):
        uri, options = split(uri)
        # What follows a ? would be read as options.
        options = options or ("?" if any("?" in part for part in parts) else "")
    elif uri.startswith("file://"):
        scheme, uri = "file://", uri.removeprefix("file://")
        parts = tuple(quote(part, errors="surrogateescape") for part in parts)
    return scheme + "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)]) + options


def name(uri: str) -> str:
    """The last part of ``uri`` as it is on disk: the file or folder itself, without what it lies in and without options."""
    if uri.startswith("s3://"):
        uri = split(uri)[0]
    elif uri.startswith("file://"):
        uri = _decoded(uri)
    else:
        uri = uri.removeprefix("embedded:")
    return uri.rstrip("/").rpartition("/")[2]


def trust_endpoints() -> None:
    """For processes that a job starts after it has reached its storage: an outage at their start is no wrong address."""
    client.trust_endpoints()


def _decoded(uri: str) -> str:
    machine, _, path = uri.removeprefix("file://").partition("/")
    if machine not in ("", "localhost"):
        raise UserError(f"{uri}: names the machine {machine}; write file:///FOLDER, or a plain path for one below this folder")
    return unquote(f"/{path}", errors="surrogateescape")


def local_path(uri: str) -> Path | None:
    """The path on this machine, or none for object storage. Raises UserError for an unknown scheme or embedded name."""
    if uri.startswith("s3://"):
        return None
    if uri.startswith("embedded:"):
        data, _, rest = uri.removeprefix("embedded:").partition("/")
        if not data or not (_EMBEDDED / data).is_dir():
            known = ", ".join(sorted(path.name for path in _EMBEDDED.glob("*") if path.is_dir()))
            raise UserError(f"{uri}: no such embedded data; this installation has: {known or 'none'}")
        return _EMBEDDED / data / rest
    if uri.startswith("file://"):
        return Path(_decoded(uri))
    if "://" in uri:
        shown = re.sub(r"//[^/]*@", "//", uri.partition("?")[0])  # without passwords and signatures
        raise UserError(f"{shown}: unknown scheme; give a path, file://, s3:// or embedded:NAME")
    return Path(uri).expanduser()


def absolute(uri: str) -> str:
    """``uri`` as processes that run in other folders understand it."""
    path = local_path(uri)
    return uri if path is None else str(path.resolve())


def read_bytes(uri: str, start: int = 0, length: int | None = None) -> bytes:
    """The whole file, or ``length`` bytes from byte ``start``; fewer where the file ends before. Raises FileNotFoundError."""
    path = local_path(uri)
    if path is not None:
        with local_errors(uri), path.open("rb") as file:
            file.seek(start)
            # Python makes room for all that is asked for, and what asks may be a damaged file's number.
            return file.read(-1 if length is None else min(length, os.fstat(file.fileno()).st_size))
    return objects.read(place(uri), start, length) if length != 0 else b""


def read_json(uri: str) -> Any:
    """What a JSON file holds. Raises FileNotFoundError, and ValueError where it holds none."""
    return json_of(read_bytes(uri))


def json_of(text: bytes | str) -> Any:
    """What a text in JSON says. Raises ValueError where it is none, or its brackets are nested deeper than Python can follow."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file so that readers see the old one or all of the new one, never a part. Folders are made as needed."""
    path = local_path(uri)
    if path is None:
        objects.write(place(uri), data)
        return
    with local_errors(uri), _replacing(path) as part:
        part.write_bytes(data)


def upload_file(path: str | Path, uri: str) -> None:
    """Copy a local file to ``uri``, in parts when it is large, atomically. Raises FileNotFoundError."""
    target = local_path(uri)
    if target is None:
        objects.upload(Path(path), place(uri))
        return
    with local_errors(uri), _replacing(target) as part:
        shutil.copyfile(path, part)


def download_file(uri: str, path: str | Path) -> None:
    """Copy ``uri`` to a local file, atomically. Raises FileNotFoundError."""
    source = local_path(uri)
    with local_errors(uri), _replacing(Path(path)) as part:
        if source is not None:
            shutil.copyfile(source, part)
        else:
            objects.download(place(uri), part)


def size(uri: str) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    path = local_path(uri)
    if path is not None:
        with local_errors(uri):
            return path.stat().st_size
    return objects.size(place(uri))


def modified(uri: str) -> float:
    """When a file was written last, in seconds since 1970 by the clock of where it lies. Raises FileNotFoundError."""
    path = local_path(uri)
    if path is not None:
        with local_errors(uri):
            return path.stat().st_mtime
    return objects.modified(place(uri))


def exists(uri: str) -> bool:
    """Whether there is a file or a folder with something in it."""
    path = local_path(uri)
    if path is not None:
        return path.is_file() or (path.is_dir() and any(path.iterdir()))
    where = place(uri)
    if where.key:  # a bucket itself is no object
        with suppress(FileNotFoundError):
            objects.size(where)
            return True
    return any(True for _ in objects.below(where))


def list_files(uri: str) -> dict[str, int]:
    """Relative name to bytes of every file below a folder, in sorted order; empty when the folder is missing.

    Others may write and delete there meanwhile: what vanishes while it is listed is left out.
    """
    path = local_path(uri)
    if path is None:
        return dict(sorted(objects.below(place(uri))))
    found: dict[str, int] = {}
    for folder, _, names in os.walk(path):
        for file in (Path(folder, entry) for entry in names):
            with suppress(FileNotFoundError):
                found[file.relative_to(path).as_posix()] = file.stat().st_size
    return dict(sorted(found.items()))


def delete(uri: str) -> None:
    """Remove a file or everything below a folder; nothing happens when there is none."""
    path = local_path(uri)
    if path is not None:
        with local_errors(uri):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        return
    objects.delete(place(uri))


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A part file beside ``path`` that takes its place on success and vanishes on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part_name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    part = Path(part_name)
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
def local_errors(uri: str) -> Iterator[None]:
    """While entered, what this machine's file system says of ``uri`` is raised as all of this module's errors are."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(uri) from error
    except PermissionError as error:
        raise UserError(f"{uri}: permission denied; check who owns {error.filename}") from error
    except (NotADirectoryError, FileExistsError) as error:
        raise UserError(f"{uri}: {error.filename} is a file where a folder is needed") from error
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(
            f"{uri}: cannot be written ({error.strerror}): make room there or raise the quota, then go on (a training run with --resume)"
        ) from error
