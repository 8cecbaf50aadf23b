"""A log on disk that one process writes and another delivers: what ``tracking`` keeps while MLflow is slow or away.

A spool is a folder: ``meta.json`` (where to, under which name), ``events.jsonl`` (one event per line, only ever appended),
``files/`` (artifacts until they are delivered), ``delivered.json`` (run id and byte offset) and ``lock``. An appended line is in the
kernel's hands when the call returns: it survives ``kill -9`` of the process, not a power cut (there is no ``fsync``).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_log = logging.getLogger("cola_dist.tracking")


@dataclass(frozen=True)
class Meta:
    """What the spool is about. ``uri`` holds no credentials; ``identity`` is what the run is found by in MLflow, ``parent`` the identity of the run
    that it is nested in."""

    uri: str
    experiment: str
    run_name: str
    artifacts: str | None
    identity: str
    parent: str | None = None


@dataclass(frozen=True)
class Delivered:
    """How far MLflow has the spool: the id of its run and the byte offset in ``events.jsonl``."""

    run_id: str | None = None
    offset: int = 0


@dataclass
class Group:
    """Consecutive events that are sent together; ``end`` is the byte offset behind the last of them."""

    events: list[dict[str, Any]] = field(default_factory=list)
    end: int = 0


class Spool:
    """The delivering side of a spool folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events = folder / "events.jsonl"

    def meta(self) -> Meta | None:
        """What the spool is about; None if ``folder`` is no spool."""
        path = self.folder / "meta.json"
        return Meta(**json.loads(path.read_text())) if path.exists() else None

    def write_meta(self, meta: Meta) -> None:
        """Replace ``meta.json`` in one step."""
        _write_json(self.folder / "meta.json", asdict(meta))

    def delivered(self) -> Delivered:
        """How far the spool is delivered; the start if nothing is."""
        path = self.folder / "delivered.json"
        return Delivered(**json.loads(path.read_text())) if path.exists() else Delivered()

    def write_delivered(self, delivered: Delivered) -> None:
        """Replace ``delivered.json`` in one step."""
        _write_json(self.folder / "delivered.json", asdict(delivered))

    def backlog_bytes(self) -> int:
        """Bytes of events behind what is delivered; a line that a kill cut short counts."""
        return self.events.stat().st_size - self.delivered().offset if self.events.exists() else 0

    def groups(self, offset: int, points: int) -> Iterator[Group]:
        """The complete events behind byte ``offset``: metric events in groups of about ``points`` values, all others one by one."""
        if not self.events.exists():
            return
        group, size = Group(), 0
        with self.events.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                offset += len(line)
                try:
                    event = json.loads(line)
                except ValueError:  # the rest of a line that a kill cut short
                    continue
                if group.events and ("metrics" not in event or size >= points):
                    yield group
                    group, size = Group(), 0
                group.events.append(event)
                group.end = offset
                size += len(event.get("metrics", ()))
                if "metrics" not in event:
                    yield group
                    group, size = Group(), 0
        if group.events:
            yield group

    def remove_files(self, group: Group) -> None:
        """Remove the artifacts of a group that is delivered."""
        for event in group.events:
            if "file" in event:
                shutil.rmtree((self.folder / event["file"]).parent, ignore_errors=True)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[bool]:
        """Hold the spool for delivery; False if somebody else holds it. The kernel lets go of it when the holder dies."""
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


class SpoolWriter:
    """The writing side of a spool folder, one per run at a time. A full disk costs entries and one warning, never the run."""

    def __init__(self, spool: Spool) -> None:
        self._folder = spool.folder
        (self._folder / "files").mkdir(parents=True, exist_ok=True)
        # A line that a kill cut short must not swallow the next one.
        self._torn = spool.events.exists() and not _ends_with_newline(spool.events)
        self._file = os.open(spool.events, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._warned = False

    def append(self, event: dict[str, Any]) -> None:
        """Append ``event`` with the time of now in milliseconds."""
        line = json.dumps({**event, "time": time.time_ns() // 1_000_000}, separators=(",", ":")).encode() + b"\n"
        if self._torn:
            line = b"\n" + line
        try:
            self._torn = os.write(self._file, line) < len(line)
        except OSError as error:
            self._torn = True
            self._warn(error)

    def add_file(self, data: bytes, name: str) -> None:
        """Keep ``data`` until it is delivered as the artifact ``name``. Raises ValueError if that is no relative path."""
        parts = inside(name)
        path = self._folder / "files" / uuid.uuid4().hex / parts[-1]
        try:
            path.parent.mkdir()
            path.write_bytes(data)
        except OSError as error:
            self._warn(error)
        else:
            self.append({"file": str(path.relative_to(self._folder)), "folder": "/".join(parts[:-1])})

    def close(self) -> None:
        """Take no further events. A second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            _log.warning("tracking loses entries: cannot write to %s (%s); free the disk, training goes on", self._folder, error.strerror)
        self._warned = True


def inside(name: str) -> list[str]:
    """The parts of an artifact's name. Raises ValueError if it is no relative path that stays where it is put."""
    parts = name.split("/")
    if not all(parts) or {".", ".."} & set(parts):
        raise ValueError(f"artifact name {name!r} must be a relative path without '.' and '..'")
    return parts


def _write_json(path: Path, content: dict[str, Any]) -> None:
    part = path.with_suffix(f".{uuid.uuid4().hex}")
    part.write_text(json.dumps(content))
    part.replace(path)


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
