"""Checkpoints: fragments of parameters and Adam moments in safetensors, one file per rank, and a manifest that is written last.

A fragment is a run of elements of one parameter, so a checkpoint does not depend on the number of workers or the ZeRO stage that wrote it, and
all ranks together write one model state. Writing happens in a thread; the step waits only for the copy to host memory. A folder without a
manifest is an interrupted write and does not count. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cola_dist import storage
from cola_dist.errors import UserError
from cola_dist.train.engine import Fragment

FORMAT_VERSION = 2
KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
_COMMIT_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Position:
    """Where a run stands: everything but the tensors."""

    step: int
    """The next step; as many global batches were consumed."""
    phase: str
    """The phase that the fragments come from."""
    recipe: str
    order_hash: str
    """Identity of the sequence of clips before ``step``."""
    adam_steps: Mapping[str, int]
    frozen: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Roles saved by reference: ``{"uri": …, "sha256": hash of their weights}``."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """Indicators and hashes gathered so far, for the final report."""


class Checkpoint:
    """A committed checkpoint, for reading. Object storage is copied to a temporary folder first."""

    def __init__(self, uri: str) -> None:
        """Open the checkpoint in folder ``uri``. Raises ``UserError`` if a file is missing or not what the manifest says."""
        self.uri = uri
        manifest = _read_manifest(uri)
        self.position = Position(**manifest["position"])
        self._local = tempfile.TemporaryDirectory(prefix="cola-checkpoint-") if storage.local_path(uri) is None else None
        self._index: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in manifest["shapes"].items()}
        self.buffers: dict[str, Tensor] = {}
        for name, sha256 in manifest["files"].items():
            self._open(self._fetch(name, sha256))

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

    def _fetch(self, name: str, sha256: str) -> Path:
        uri = storage.join(self.uri, name)
        path = storage.local_path(uri)
        try:
            if path is None:
                assert self._local is not None
                path = Path(self._local.name) / name
                storage.download_file(uri, str(path))
            found = _sha256(path)
        except FileNotFoundError as error:
            raise UserError(f"checkpoint file {uri} is missing: delete the folder to fall back to the checkpoint before it") from error
        if found != sha256:
            raise UserError(
                f"checkpoint file {uri} is damaged (sha256 differs from the manifest): delete the folder to fall back to the checkpoint before it"
            )
        return path

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
        except (SafetensorError, ValueError) as error:
            raise UserError(
                f"checkpoint file {path.name} in {self.uri} cannot be read ({error}): delete the folder to fall back to the one before"
            ) from error


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
                save_file(tensors, path)
                sha256 = _sha256(path)
                storage.upload_file(str(path), storage.join(uri, name))
            storage.write_bytes(storage.join(uri, f"rank-{self._rank:05d}.json"), json.dumps({"file": name, "sha256": sha256}).encode())
            if self._rank == 0:
                self._commit(uri, manifest)
                self.newest = Commit(time.time(), time.time() - began)
        except Exception as error:  # reported by the next wait(), in the training thread
            self._error = error

    def _commit(self, uri: str, manifest: dict[str, Any]) -> None:
        """Write the manifest once every rank's file is there, then drop checkpoints beyond the newest ``keep``."""
        wanted = {f"rank-{rank:05d}.json" for rank in range(self._world)}
        deadline = time.monotonic() + _COMMIT_TIMEOUT_S
        while not wanted <= storage.list_files(uri).keys():
            if time.monotonic() > deadline:
                raise TimeoutError(f"checkpoint {uri}: not all {self._world} ranks wrote their part within {_COMMIT_TIMEOUT_S:.0f} s")
            time.sleep(0.05)
        parts = [_read_json(storage.join(uri, name)) for name in sorted(wanted)]
        manifest["files"] = {part["file"]: part["sha256"] for part in parts}
        storage.write_bytes(storage.join(uri, "manifest.json"), json.dumps(manifest).encode())
        for old in committed(self._folder)[: -self._keep]:
            storage.delete(old)


def committed(folder: str) -> list[str]:
    """URIs of the committed checkpoints in ``folder``, oldest first."""
    names = {name.split("/")[0] for name in storage.list_files(folder) if name.endswith("/manifest.json")}
    return [storage.join(folder, name) for name in sorted(names)]


def latest(run_uri: str) -> str | None:
    """URI of the newest committed checkpoint of a run; none if there is none."""
    found = committed(storage.join(run_uri, "checkpoints"))
    return found[-1] if found else None


def read_position(uri: str) -> Position:
    """Where the checkpoint in folder ``uri`` stands, from its manifest alone. Raises ``UserError`` if that is missing or damaged."""
    return Position(**_read_manifest(uri)["position"])


def weights_hash(weights: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, shapes and fp32 bytes of a role's weights, which come in order of names."""
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def _read_manifest(uri: str) -> dict[str, Any]:
    where = storage.join(uri, "manifest.json")
    manifest = _read_json(where)
    if manifest.get("format") != FORMAT_VERSION:
        raise UserError(
            f"checkpoint {uri} has format {manifest.get('format')}, this version reads {FORMAT_VERSION}: resume it with the version that wrote it"
        )
    if not _is_sound(manifest):
        raise UserError(f"{where} is damaged: delete the folder to fall back to the checkpoint before it")
    # Each is read, and written to this machine's disk where the checkpoint lies in object storage, at the place that its name leads to.
    for name in manifest["files"]:
        if not re.fullmatch(r"rank-\d{5,10}\.safetensors", name):
            raise UserError(
                f"{where} names the file {name!r}, which is none of a checkpoint: do not use this folder, somebody else made it"
            )
    return manifest


def _is_sound(manifest: Mapping[str, Any]) -> bool:
    """Whether all that is read of it is there, and of its kind."""
    position, files, shapes = (manifest.get(name) for name in ("position", "files", "shapes"))
    if not (isinstance(position, dict) and isinstance(files, dict) and isinstance(shapes, dict)):
        return False
    named = {one.name: one.default is MISSING and one.default_factory is MISSING for one in fields(Position)}
    return (
        {name for name, needed in named.items() if needed} <= position.keys() <= named.keys()
        and isinstance(position["step"], int)
        and all(isinstance(sides, list) and all(type(side) is int and side >= 0 for side in sides) for sides in shapes.values())
        and all(isinstance(sha256, str) for sha256 in files.values())
    )


def _read_json(uri: str) -> dict[str, Any]:
    try:
        value = storage.read_json(uri)
    except FileNotFoundError as error:
        raise UserError(f"{uri} is missing: give the folder of a run or of a checkpoint of cola-dist") from error
    except ValueError as error:
        raise UserError(f"{uri} is damaged: delete the folder to fall back to the checkpoint before it") from error
    if not isinstance(value, dict):
        raise UserError(f"{uri} is damaged: delete the folder to fall back to the checkpoint before it")
    return value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
