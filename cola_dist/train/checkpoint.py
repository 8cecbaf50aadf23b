"""Checkpoints: fragments of parameters and Adam moments in safetensors, one file per rank, and a manifest that is written last.

A fragment is a run of elements of one parameter, so a checkpoint does not depend on the number of workers or the ZeRO stage that wrote it, and
all ranks together write one model state. Writing happens in a thread; the step waits only for the copy to host memory. A folder without a
manifest is an interrupted write and does not count. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cola_dist import storage
from cola_dist.errors import UserError
from cola_dist.train.engine import Fragment
from cola_dist.train.shelf import FORMAT_VERSION, MANIFEST, DamagedCheckpoint, Position, prune, read_manifest, size_faults

KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
COMMIT_TIMEOUT_S = 1800.0
"""After so long a checkpoint's write is given up."""


class Checkpoint:
    """A committed checkpoint, for reading. Object storage is copied to a temporary folder first."""

    def __init__(self, uri: str) -> None:
        """Open the checkpoint in folder ``uri``. Raises ``DamagedCheckpoint`` if a file is missing or not what the manifest says."""
        self.uri = uri
        self.manifest = read_manifest(uri)
        self.position, self.shapes = self.manifest.position, self.manifest.shapes
        self._local = tempfile.TemporaryDirectory(prefix="cola-checkpoint-") if storage.local_path(uri) is None else None
        self._index: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = {}
        self.buffers: dict[str, Tensor] = {}
        for name, sha256 in self.manifest.files.items():
            path = fetch(uri, name, self._local.name if self._local else "")
            if fault := file_fault(path, sha256):
                raise DamagedCheckpoint(uri, fault)
            self._open(path)

    def read(self, kind: str, name: str, start: int = 0, length: int | None = None) -> Tensor:
        """Elements ``[start, start + length)`` of the flattened parameter (or moment) ``name``, fp32, 1-D."""
        stop = self._numel(name) if length is None else start + length
        parts = [
            (max(start, first), min(stop, first + size), first, path, key)
            for first, size, path, key in self._index.get((kind, name), ())
            if max(start, first) < min(stop, first + size)
        ]
        # Before there is memory for it: the shape is the manifest's word, the parts are there.
        if sum(high - low for low, high, *_ in parts) != stop - start:
            raise UserError(
                f"checkpoint {self.uri} lacks {kind} of {name}: it is of another model; resume it with the recipe {self.position.recipe!r}"
            )
        out = torch.empty(stop - start)
        for low, high, first, path, key in parts:
            with safe_open(path, framework="pt") as file:
                out[low - start : high - start] = file.get_slice(key)[low - first : high - first]
        return out

    def has(self, kind: str, name: str) -> bool:
        """Whether that parameter was saved, or its moment or average."""
        return (kind, name) in self._index

    def weights(self, role: str, kind: str = "weight") -> Iterator[tuple[str, Tensor]]:
        """Every saved parameter of a role, whole, one at a time; none if the role was frozen (or has no such kind)."""
        for name in [name for k, name in self._index if k == kind and name.startswith(f"{role}.")]:
            yield name, self.read(kind, name).view(self.shapes[name])

    def _numel(self, name: str) -> int:
        if name not in self.shapes:
            raise UserError(
                f"checkpoint {self.uri} has no parameter {name}: it is of another model; resume it with the recipe {self.position.recipe!r}"
            )
        return math.prod(self.shapes[name])

    def _open(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    kind, start, name = key.split(":", 2)
                    if kind == "buffer":
                        self.buffers[name] = file.get_tensor(key)
                    else:
                        (size,) = file.get_slice(key).get_shape()
                        self._index.setdefault((kind, name), []).append((int(start), size, path, key))
        except ValueError as error:  # names or shapes that no checkpoint has
            raise DamagedCheckpoint(self.uri, f"{path.name} cannot be read: {error}") from error


def fetch(uri: str, name: str, folder: str) -> Path:
    """The file ``name`` of the checkpoint in folder ``uri``; out of object storage as a copy in ``folder``. It may not be there."""
    where = storage.join(uri, name)
    path = storage.local_path(where)
    if path is None:
        path = Path(folder) / name
        with contextlib.suppress(FileNotFoundError):
            storage.download_file(where, str(path))
    return path


def file_fault(path: Path, sha256: str) -> str:
    """What is wrong with a checkpoint's file, or nothing."""
    try:
        if _sha256(path) != sha256:
            return f"{path.name} is damaged: its sha256 differs from the manifest's"
        with safe_open(path, framework="pt"):
            return ""
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EIO:  # rights and the like are not the file's fault
            raise
        return f"{path.name} cannot be read: {error}"


@dataclass(frozen=True)
class Commit:
    """Of a checkpoint that is whole: when it was committed, in Unix seconds, and how many seconds that took since its beginning."""

    at: float
    seconds: float


class CheckpointWriter:
    """Writes the checkpoints of one worker group, one at a time, in a thread."""

    def __init__(self, run_uri: str, rank: int, world: int, attempt: str, keep: int) -> None:
        """``attempt`` names this worker group: a group that died while writing leaves files that no other group's manifest can mix with."""
        self._folder = storage.join(run_uri, "checkpoints")
        self._rank, self._world, self._attempt, self._keep = rank, world, attempt, keep
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.newest: Commit | None = None
        """The newest commit of this group; on rank 0 alone, which makes it."""

    def save(
        self,
        position: Position,
        fragments: Sequence[Fragment],
        buffers: Mapping[str, Tensor],
        ema: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> str:
        """Copy this rank's share to host memory and start writing it. Every rank calls this at the same step. Returns the checkpoint's URI.

        ``ema`` maps fragment names to this rank's averaged weights. Raises the error of the write before, if it had one.
        """
        self.wait()
        began, tensors = time.time(), {}
        for f in fragments:
            if f.owned:
                for kind, tensor in (("weight", f.weight), ("exp_avg", f.exp_avg), ("exp_avg_sq", f.exp_avg_sq), ("ema", ema.get(f.name))):
                    if tensor is not None:
                        tensors[f"{kind}:{f.start}:{f.name}"] = tensor.detach().to("cpu", torch.float32, copy=True)
        if self._rank == 0:
            tensors |= {f"buffer:0:{name}": tensor.detach().to("cpu", copy=True) for name, tensor in buffers.items()}
        uri = storage.join(self._folder, f"step-{position.step:08d}-{self._attempt}")
        manifest = {
            "format": FORMAT_VERSION,
            "position": asdict(position),
            "shapes": {n: list(s) for n, s in shapes.items()},
            "world": self._world,
        }
        self._thread = threading.Thread(target=self._run, args=(uri, tensors, manifest, began), name="checkpoint-writer")
        self._thread.start()
        return uri

    def wait(self) -> None:
        """Wait until this rank's write has ended (on rank 0: until the checkpoint is committed). Raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, uri: str, tensors: dict[str, Tensor], manifest: dict[str, Any], began: float) -> None:
        try:
            name = f"rank-{self._rank:05d}.safetensors"
            with tempfile.TemporaryDirectory(prefix="cola-checkpoint-") as folder:
                path = Path(folder) / name
                with storage.local_errors(str(path)):
                    _save_file(tensors, path)
                sha256 = _sha256(path)
                storage.upload_file(str(path), storage.join(uri, name))
                part = {"file": name, "sha256": sha256, "bytes": path.stat().st_size}
            storage.write_bytes(storage.join(uri, f"rank-{self._rank:05d}.json"), json.dumps(part).encode())
            if self._rank == 0:
                self._commit(uri, manifest)
                self.newest = Commit(time.time(), time.time() - began)
        except Exception as error:  # reported by the next wait(), in the training thread
            self._error = error

    def _commit(self, uri: str, manifest: dict[str, Any]) -> None:
        """Write the manifest once every rank's file is there, then drop checkpoints beyond the newest ``keep``."""
        wanted = {f"rank-{rank:05d}.json" for rank in range(self._world)}
        deadline = time.monotonic() + COMMIT_TIMEOUT_S
        while not wanted <= (there := storage.list_files(uri)).keys():
            if time.monotonic() > deadline:
                raise TimeoutError(f"checkpoint {uri}: not all {self._world} ranks wrote their part within {COMMIT_TIMEOUT_S:.0f} s")
            time.sleep(0.05)
        parts = [storage.read_json(storage.join(uri, name)) for name in sorted(wanted)]
        manifest["files"] = {part["file"]: part["sha256"] for part in parts}
        manifest["bytes"] = {part["file"]: part["bytes"] for part in parts}
        if faults := size_faults(manifest["bytes"], there):
            raise OSError(f"checkpoint {uri} was not stored whole ({faults[0]}): look at the storage's quota and disks")
        storage.write_bytes(storage.join(uri, MANIFEST), json.dumps(manifest).encode())
        prune(self._folder, self._keep)


def weights_hash(weights: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, shapes and fp32 bytes of a role's weights, which come in order of names."""
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def _save_file(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises ``OSError`` for what the system says, which the library puts into a text."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
