"""Weights as their authors publish them: ``config.json`` beside safetensors, whole or in shards, or beside one file of torch's own format."""

from __future__ import annotations

import hashlib
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cola_dist.errors import UserError

_AGAIN = "copy the folder again from its origin"
_LARGEST_HEADER = 100 * 1024**2
"""What the format allows."""
LARGEST_SIZE, LONGEST_LIST, MOST_LAYERS = 2**20, 4096, 128
"""Of what a ``config.json`` may ask for: a number, a list, and a number or list that says how many layers there are."""
MOST_TOKENS = 512
"""Rows of a prompt's embedding; what published text encoders make."""
_T = TypeVar("_T")
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Place:
    """Where weights are put, and who reads them."""

    device: torch.device
    """``meta`` is nowhere: files are read and checked, and nothing is kept."""
    together: bool = False
    """Every rank of the process group loads at the same time: the first one reads, the others are sent what it has read."""


HERE = Place(torch.device("cpu"))
"""In host memory, by whoever asks."""


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
        config = storage.read_json(storage.join(uri, "config.json"))
    except FileNotFoundError:
        meant = next((part for part in inside if storage.exists(storage.join(uri, part, "config.json"))), "")
        hint = f"did you mean {uri}/{meant}?" if meant else f"point {option} to a folder with config.json and weights"
        raise UserError(f"{where} is missing: {hint}") from None
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}): {_AGAIN}") from None
    if not isinstance(config, dict):
        raise UserError(f"{where} holds no table of fields: point {option} to a folder with config.json and weights")
    for name, value in config.items():
        _check_size(where, name, value)
    return config


def _check_size(where: str, name: str, value: Any) -> None:
    """Raises `UserError` for a number or list of a ``config.json`` that no model has, before one is made of it."""
    most = MOST_LAYERS if re.search("layers|block|depth|mult", name) else LARGEST_SIZE
    if type(value) is int and abs(value) > most:
        raise UserError(f"{where}: {name} is {value}, more than {most}: {_AGAIN}")
    if isinstance(value, list) and len(value) > min(most, LONGEST_LIST):
        raise UserError(f"{where}: {name} has {len(value)} entries, more than {min(most, LONGEST_LIST)}: {_AGAIN}")
    inner = value.items() if isinstance(value, dict) else ((name, item) for item in value) if isinstance(value, list) else ()
    for key, item in inner:
        _check_size(where, key, item)


def weight_files(uri: str) -> list[str]:
    """Names of the files in a published folder that hold its weights, in order. Raises `UserError` where there is none or one is missing."""
    from cola_dist import storage

    names = [name for name in storage.list_files(uri) if "/" not in name]
    index = [name for name in names if name.endswith(".safetensors.index.json")]
    if index:
        where = storage.join(uri, index[0])
        try:
            wanted = sorted(set(storage.read_json(where)["weight_map"].values()))
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
            header = storage.json_of(storage.read_bytes(where, 8, min(size, _LARGEST_HEADER)))
            shapes |= {key: tuple(entry["shape"]) for key, entry in header.items() if key != "__metadata__"}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{where} has no header of safetensors ({error!r}): {_AGAIN}") from None
    return shapes


def without_weights(build: Callable[[], nn.Module]) -> Any:
    """What ``build`` makes, with parameters that have no memory and cost no drawing; buffers are as they are. `load_published` fills it."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return build()


def load_published(model: nn.Module, uri: str, drops: str, place: Place = HERE, sha256: str = "") -> Loaded:
    """Put a published folder's tensors into ``model`` (parameters and buffers, fp32), one after another. Returns what became of them.

    No more than one tensor is in host memory at a time where ``place`` is not there. ``drops`` is a regular expression of names to leave out; its
    first group names the part. ``sha256`` is that of the only file, where it is known. Raises `UserError`, on every rank that loads, for a tensor
    that the model lacks or has in another shape, one that it misses, a file that cannot be read or is another one, and values that are not numbers.
    """
    loaded = _read_once(lambda: _load(model, uri, drops, place, sha256), place)
    if not place.together or dist.get_world_size() == 1:
        return loaded
    for key, tensor in model.state_dict(keep_vars=True).items():
        sent = (
            tensor.detach().to(place.device) if dist.get_rank() == 0 else torch.empty(tensor.shape, dtype=tensor.dtype, device=place.device)
        )
        dist.broadcast(sent, src=0)
        if dist.get_rank():
            _put(model, key, sent, place)
    return loaded


def _read_once(read: Callable[[], _T], place: Place) -> _T:
    """What ``read`` gives, by the first rank for all where they load together. Raises its `UserError` on all of them."""
    if not place.together or dist.get_world_size() == 1:
        return read()
    told: list[Any] = [None, ""]
    if dist.get_rank() == 0:
        try:
            told[0] = read()
        except UserError as error:
            told[1] = str(error)
    dist.broadcast_object_list(told, src=0)
    if told[1]:
        raise UserError(told[1])
    found: _T = told[0]
    return found


def load_null_prompt(uri: str, width: int, place: Place = HERE) -> tuple[Tensor, Loaded]:
    """The embedding of the empty prompt in the safetensors file ``uri``, fp32 ``[n, width]`` in host memory, and which file it was.

    The file holds one tensor, ``[n, width]`` or ``[1, n, width]``. Raises `UserError`, on every rank that loads, for anything else.
    """
    return _read_once(lambda: _null_prompt(uri, width), place)


def _null_prompt(uri: str, width: int) -> tuple[Tensor, Loaded]:
    from cola_dist import storage

    wanted = f"world.null_prompt is to be a .safetensors file with one tensor [n, {width}] of at most {MOST_TOKENS} rows"
    if not uri.partition("?")[0].endswith(".safetensors") or not storage.exists(uri):
        raise UserError(f"{uri} is no file of safetensors that is there: {wanted}, the text encoder's output for an empty prompt")
    with _local(uri) as path:
        tensors = {key: tensor.clone() for key, tensor in _tensors(path, uri)}
        content = _sha256(path)
    if len(tensors) != 1:
        raise UserError(f"{uri} holds {len(tensors)} tensors: {wanted}")
    ((key, tensor),) = tensors.items()
    rows = tensor[0] if tensor.ndim == 3 and len(tensor) == 1 else tensor
    if rows.ndim != 2 or rows.shape[1] != width or not 1 <= len(rows) <= MOST_TOKENS or not rows.is_floating_point():
        raise UserError(f"{uri}: tensor {key} is {tuple(tensor.shape)} of {tensor.dtype}: {wanted} (world.text_width is {width})")
    if not torch.isfinite(rows).all():
        raise UserError(f"{uri}: tensor {key} holds values that are not finite numbers: {_AGAIN}")
    return rows.float(), Loaded(1, (), content)


def _load(model: nn.Module, uri: str, drops: str, place: Place, sha256: str) -> Loaded:
    from cola_dist import storage

    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    left, dropped, digest = set(wanted), dict[str, int](), hashlib.sha256()
    for name in weight_files(uri):
        where = storage.join(uri, name)
        with _local(where) as path:
            content = _sha256(path)
            if sha256 not in ("", content):
                raise UserError(f"{where} does not have the sha256 that its config.json names: {_AGAIN}")
            digest.update(f"{name}\n{content}\n".encode())
            for key, tensor in _tensors(path, where):
                if found := re.match(drops, key):
                    dropped[found.group(1)] = dropped.get(found.group(1), 0) + 1
                    continue
                _check(key, tensor, wanted, where)
                _put(model, key, tensor, place)
                left.discard(key)
    if left:
        raise UserError(f"{uri} lacks {len(left)} of {len(wanted)} tensors of {type(model).__name__} ({min(left)} …): {_other_family(uri)}")
    return Loaded(len(wanted), tuple(f"{part} ({count})" for part, count in dropped.items()), digest.hexdigest())


def load_role(module: nn.Module, export: str, role: str, place: Place) -> None:
    """Put a role's weights and buffers from an export's folder into ``module``. A LAM's own forward model is left out. Raises `UserError`."""
    from cola_dist import storage

    load_published(module, storage.join(export, role), r"(forward_model)\.", place)


def _check(key: str, tensor: Tensor, wanted: dict[str, tuple[int, ...]], where: str) -> None:
    if key not in wanted:
        raise UserError(f"{where} has a tensor {key} that the model does not know: {_other_family(where)}")
    if tuple(tensor.shape) != wanted[key]:
        raise UserError(f"{where}: tensor {key} is {tuple(tensor.shape)}, the model needs {wanted[key]}: {_other_family(where)}")
    if not torch.isfinite(tensor).all():
        raise UserError(f"{where}: tensor {key} holds values that are not finite numbers: {_AGAIN}")


def _put(model: nn.Module, key: str, tensor: Tensor, place: Place) -> None:
    """Give a parameter (or buffer) of ``model`` the values of ``tensor``, and memory where it has none yet."""
    if place.device.type == "meta":
        return
    owner, _, name = key.rpartition(".")
    module = model.get_submodule(owner)
    held = getattr(module, name)
    with torch.no_grad():
        if held.is_meta:
            # Copied, because what safetensors gives is a view of the file.
            made = torch.empty(held.shape, dtype=held.dtype, device=place.device).copy_(tensor)
            setattr(module, name, nn.Parameter(made, held.requires_grad))
        else:
            held.copy_(tensor)


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
        _check_stored(path)
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{where} cannot be read ({error}): {_AGAIN}") from None
    except Exception as error:  # what pickle raises has no common base
        raise UserError(f"{where} holds more than tensors ({error}): convert it to safetensors where you trust it") from None
    inner: Any = held.get("state_dict", held) if isinstance(held, dict) else held
    if not isinstance(inner, dict) or not all(isinstance(value, Tensor) for value in inner.values()):
        raise UserError(f"{where} holds no table of tensors: convert it to safetensors")
    yield from inner.items()


def _check_stored(path: Path) -> None:
    """Raises ``ValueError`` for an archive whose members are compressed or lie over each other: torch writes none, and would unfold it in memory."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or sum(m.file_size for m in members) > path.stat().st_size:
        raise ValueError("an archive that unfolds to more than it is")


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
