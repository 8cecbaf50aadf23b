"""Weights as their authors publish them: ``config.json`` beside safetensors, whole or in shards, or beside one file of torch's own format."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cola_dist.errors import UserError

_AGAIN = "copy the folder again from its origin"
_LARGEST_HEADER = 100 * 1024**2
"""What the format allows."""
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Loaded:
    """What became of the tensors of published files."""

    tensors: int
    """Taken over."""
    dropped: tuple[str, ...]
    """Left out on purpose, by the name of the part and how many tensors of it."""
    sha256: str
    """Of the names and contents of all files, in order."""


def read_config(uri: str, option: str, inside: Sequence[str]) -> dict[str, Any]:
    """``config.json`` of the folder ``uri`` that ``option`` points to. Raises `UserError`, which names the one of ``inside`` that has one."""
    from cola_dist import storage

    where = f"{uri}/config.json"
    try:
        config = json.loads(storage.read_bytes(storage.join(uri, "config.json")))
    except FileNotFoundError:
        meant = next((part for part in inside if storage.exists(storage.join(uri, part, "config.json"))), "")
        hint = f"did you mean {uri}/{meant}?" if meant else f"point {option} to a folder with config.json and weights"
        raise UserError(f"{where} is missing: {hint}") from None
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}): {_AGAIN}") from None
    if not isinstance(config, dict):
        raise UserError(f"{where} holds no table of fields: point {option} to a folder with config.json and weights")
    return config


def weight_files(uri: str) -> list[str]:
    """Names of the files in a published folder that hold its weights, in order. Raises `UserError` where there is none or one is missing."""
    from cola_dist import storage

    names = [name for name in storage.list_files(uri) if "/" not in name]
    index = [name for name in names if name.endswith(".safetensors.index.json")]
    if index:
        where = storage.join(uri, index[0])
        try:
            wanted = sorted(set(json.loads(storage.read_bytes(where))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{where} is not an index of shards ({error!r}): {_AGAIN}") from None
        if lost := [name for name in wanted if name not in names]:
            raise UserError(f"{where} names {len(wanted)} shards, {len(lost)} of them are missing ({lost[0]} …): {_AGAIN}")
        return wanted
    for suffixes in ((".safetensors",), _PICKLED):
        found = [name for name in names if name.endswith(suffixes)]
        if len(found) == 1:
            return found
        if found:
            raise UserError(f"{uri} holds several files of weights ({', '.join(found)}) and no index: keep the one that is meant")
    raise UserError(f"{uri} holds no weights: point to a folder with config.json and *.safetensors (or one of {', '.join(_PICKLED)})")


def tensor_shapes(uri: str) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a published folder of safetensors, for what its config.json does not tell: their headers alone are read.

    Raises `UserError`.
    """
    from cola_dist import storage

    shapes: dict[str, tuple[int, ...]] = {}
    for name in weight_files(uri):
        where = storage.join(uri, name)
        if not name.endswith(".safetensors"):
            raise UserError(f"{where}: this model is read from safetensors only: convert it")
        try:
            size = int.from_bytes(storage.read_bytes(where, 0, 8), "little")
            header = json.loads(storage.read_bytes(where, 8, min(size, _LARGEST_HEADER)))
            shapes |= {key: tuple(entry["shape"]) for key, entry in header.items() if key != "__metadata__"}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{where} has no header of safetensors ({error!r}): {_AGAIN}") from None
    return shapes


def load_published(model: nn.Module, uri: str, drops: str) -> Loaded:
    """Copy a published folder's tensors into ``model`` (parameters and buffers, fp32), one after another. Returns what became of them.

    ``drops`` is a regular expression of names to leave out; its first group names the part. Raises `UserError` for a tensor that the model lacks or
    has in another shape, one that it misses, a file that cannot be read, and values that are not numbers.
    """
    from cola_dist import storage

    wanted: dict[str, Tensor] = model.state_dict(keep_vars=True)
    left, dropped, digest = set(wanted), dict[str, int](), hashlib.sha256()
    for name in weight_files(uri):
        where = storage.join(uri, name)
        with _local(where) as path:
            digest.update(f"{name}\n{_sha256(path)}\n".encode())
            for key, tensor in _tensors(path, where):
                if found := re.match(drops, key):
                    dropped[found.group(1)] = dropped.get(found.group(1), 0) + 1
                    continue
                _copy(key, tensor, wanted, where)
                left.discard(key)
    if left:
        raise UserError(f"{uri} lacks {len(left)} of {len(wanted)} tensors of {type(model).__name__} ({min(left)} …): {_other_family(uri)}")
    return Loaded(len(wanted), tuple(f"{part} ({count})" for part, count in dropped.items()), digest.hexdigest())


def _copy(key: str, tensor: Tensor, wanted: dict[str, Tensor], where: str) -> None:
    if key not in wanted:
        raise UserError(f"{where} has a tensor {key} that the model does not know: {_other_family(where)}")
    if tensor.shape != wanted[key].shape:
        raise UserError(
            f"{where}: tensor {key} is {tuple(tensor.shape)}, the model needs {tuple(wanted[key].shape)}: {_other_family(where)}"
        )
    if not torch.isfinite(tensor).all():
        raise UserError(f"{where}: tensor {key} holds values that are not finite numbers: {_AGAIN}")
    with torch.no_grad():
        wanted[key].copy_(tensor)


def _other_family(where: str) -> str:
    return f"{where} is of another family or version than its config.json says, or incomplete: {_AGAIN}"


def _tensors(path: Path, where: str) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a file, mapped to memory: no more than one is copied at a time."""
    from safetensors import SafetensorError, safe_open

    try:
        if where.partition("?")[0].endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    yield key, file.get_tensor(key)
            return
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{where} cannot be read ({error}): {_AGAIN}") from None
    except Exception as error:  # what pickle raises has no common base
        raise UserError(f"{where} holds more than tensors ({error}): convert it to safetensors where you trust it") from None
    inner: Any = held.get("state_dict", held) if isinstance(held, dict) else held
    if not isinstance(inner, dict) or not all(isinstance(value, Tensor) for value in inner.values()):
        raise UserError(f"{where} holds no table of tensors: convert it to safetensors")
    yield from inner.items()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _local(uri: str) -> Iterator[Path]:
    """The file on this machine: where it lies, or a copy as long as it is needed."""
    from cola_dist import storage

    path = storage.local_path(uri)
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, storage.name(uri))
        storage.download_file(uri, copy)
        yield copy
