"""What lies in a run's folder of checkpoints, as its listing, manifests and marks show it: no tensors are read here.

Who has read a checkpoint and found that it is not what its manifest says writes ``damaged.json`` into its folder. From then on all processes pass it
over alike, without reading it again. It stays where it is: a person may mend it, and says so by `jobs/checkpoints.py verify`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from cola_dist import storage
from cola_dist.errors import UserError

FORMAT_VERSION = 2
MANIFEST, DAMAGED, VERIFIED = "manifest.json", "damaged.json", "verified.json"
_NAME = re.compile(r"step-(\d+)-.+")


class DamagedCheckpoint(UserError):
    """The checkpoint in folder ``uri`` is not what its manifest says; ``why`` names the first fault."""

    def __init__(self, uri: str, why: str) -> None:
        super().__init__(uri, why)
        self.uri, self.why = uri, why

    def __str__(self) -> str:
        return f"checkpoint {self.uri} is damaged ({self.why}): `jobs/checkpoints.py verify` says which others are whole, --resume takes the newest"


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


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint's manifest says of it, none of its tensors read."""

    uri: str
    position: Position
    shapes: Mapping[str, tuple[int, ...]]
    files: Mapping[str, str]
    """sha256 of each file."""
    bytes: Mapping[str, int]
    """Size of each file; empty in manifests that are older than this entry."""


@dataclass(frozen=True)
class Entry:
    """A checkpoint's folder as a listing and its manifest show it, none of its tensors read."""

    uri: str
    files: Mapping[str, int]
    """Name to bytes of all that is there."""
    manifest: Manifest | None
    """None after an interrupted write, and where it cannot be read."""
    fault: str
    """Why it is known to be damaged; empty for one that is whole as far as this shows."""

    @property
    def name(self) -> str:
        """Its folder's own name."""
        return storage.name(self.uri)

    @property
    def step(self) -> int:
        """The step, which an interrupted write has in its name alone."""
        found = _NAME.fullmatch(self.name)
        assert found is not None, "survey leaves other names out"
        return int(found[1])

    @property
    def committed(self) -> bool:
        """Whether its write came to an end."""
        return MANIFEST in self.files

    @property
    def state(self) -> str:
        """In a word what is known of it without reading it."""
        if not self.committed:
            return "no manifest"
        return "damaged" if self.fault else "whole" if VERIFIED in self.files else "unverified"


def survey(folder: str) -> list[Entry]:
    """All that lies in a folder of checkpoints, oldest first: one listing, and one small read each."""
    found: dict[str, dict[str, int]] = {}
    for name, size in storage.list_files(folder).items():
        checkpoint, _, file = name.partition("/")
        if file and _NAME.fullmatch(checkpoint):
            found.setdefault(checkpoint, {})[file] = size
    return [_entry(storage.join(folder, name), files) for name, files in sorted(found.items())]


def _entry(uri: str, files: Mapping[str, int]) -> Entry:
    if MANIFEST not in files:
        return Entry(uri, files, None, "")
    try:
        manifest = _manifest(uri)
    except FileNotFoundError:  # a run that goes on has dropped it since it was listed
        return Entry(uri, {}, None, "")
    except DamagedCheckpoint as error:
        return Entry(uri, files, None, error.why)
    sizes = manifest.bytes or dict.fromkeys(manifest.files, None)
    faults = [read_mark(uri)] if DAMAGED in files else size_faults(sizes, files)
    return Entry(uri, files, manifest, next(iter(faults), ""))


def size_faults(sizes: Mapping[str, int | None], there: Mapping[str, int]) -> list[str]:
    """What a listing already shows to be wrong with files of these sizes (None: unknown)."""
    missing = [f"{name} is missing" for name in sizes if name not in there]
    return missing + [
        f"{name} has {there[name]} bytes, {size} were written" for name, size in sizes.items() if size not in (None, there.get(name, size))
    ]


def prune(folder: str, keep: int) -> None:
    """Drop all but the newest ``keep`` checkpoints, of those that are whole as far as sizes and marks show.

    Others do not count, so a damaged one never takes the place of a whole one; nor are they removed, which `jobs/checkpoints.py gc` does. Reading
    the files each time would cost as much as restoring them: a change that leaves their size is found when they are read.
    """
    for entry in [entry for entry in survey(folder) if entry.committed and not entry.fault][:-keep]:
        remove(entry.uri)


def remove(uri: str) -> None:
    """Delete a checkpoint. Its manifest goes first: what is left by a deletion that is cut short is no checkpoint."""
    storage.delete(storage.join(uri, MANIFEST))
    storage.delete(uri)


def mark(uri: str, fault: str) -> None:
    """Write down that the checkpoint in folder ``uri`` was read and is damaged, or with an empty ``fault`` that it is whole."""
    new, old = (DAMAGED, VERIFIED) if fault else (VERIFIED, DAMAGED)
    storage.write_bytes(storage.join(uri, new), json.dumps({"why": fault}).encode())
    storage.delete(storage.join(uri, old))


def read_mark(uri: str) -> str:
    """Why the checkpoint in folder ``uri`` was marked as damaged."""
    try:
        return str(storage.read_json(storage.join(uri, DAMAGED))["why"])
    except (OSError, ValueError, KeyError):
        return "marked as damaged"


def committed(folder: str) -> list[str]:
    """URIs of the committed checkpoints in ``folder``, oldest first."""
    return _committed(folder, marked=True)


def latest(run_uri: str) -> str | None:
    """URI of a run's newest committed checkpoint that is not marked as damaged; none if there is none."""
    found = _committed(storage.join(run_uri, "checkpoints"), marked=False)
    return found[-1] if found else None


def _committed(folder: str, marked: bool) -> list[str]:
    files = storage.list_files(folder)
    names = {name.split("/")[0] for name in files if name.endswith(f"/{MANIFEST}")}
    found = (name for name in sorted(names) if _NAME.fullmatch(name) and (marked or f"{name}/{DAMAGED}" not in files))
    return [storage.join(folder, name) for name in found]


def read_position(uri: str) -> Position:
    """Where the checkpoint in folder ``uri`` stands, from its manifest alone. Raises ``UserError`` if that is missing or damaged."""
    return read_manifest(uri).position


def read_manifest(uri: str) -> Manifest:
    """The manifest of the checkpoint in folder ``uri``. Raises ``UserError`` where it is missing or of another format, ``DamagedCheckpoint``."""
    try:
        return _manifest(uri)
    except FileNotFoundError as error:
        raise UserError(f"{error} is missing: give the folder of a run or of a checkpoint of cola-dist") from error


def _manifest(uri: str) -> Manifest:
    where = storage.join(uri, MANIFEST)
    try:
        found = storage.read_json(where)
        version = found["format"]
        sound = version != FORMAT_VERSION or _is_sound(found)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(uri, f"{MANIFEST} cannot be read") from error
    if not sound:
        raise DamagedCheckpoint(uri, f"{MANIFEST} cannot be read")
    if version != FORMAT_VERSION:
        raise UserError(
            f"checkpoint {uri} has format {version}, this version reads {FORMAT_VERSION}: resume it with the version that wrote it"
        )
    # Each is read, and written to this machine's disk where the checkpoint lies in object storage, at the place that its name leads to.
    for name in found["files"]:
        if not re.fullmatch(r"rank-\d{5,10}\.safetensors", name):
            raise UserError(
                f"{where} names the file {name!r}, which is none of a checkpoint: do not use this folder, somebody else made it"
            )
    shapes = {name: tuple(shape) for name, shape in found["shapes"].items()}
    return Manifest(uri, Position(**found["position"]), shapes, found["files"], found.get("bytes", {}))


def _is_sound(manifest: Mapping[str, Any]) -> bool:
    """Whether all that is read of it is there, and of its kind."""
    position, files, shapes = (manifest.get(name) for name in ("position", "files", "shapes"))
    if not (isinstance(position, dict) and isinstance(files, dict) and isinstance(shapes, dict)):
        return False
    named = {one.name: one.default is MISSING and one.default_factory is MISSING for one in fields(Position)}
    sizes = manifest.get("bytes", {})
    return (
        {name for name, needed in named.items() if needed} <= position.keys() <= named.keys()
        and isinstance(position["step"], int)
        and all(isinstance(sides, list) and all(type(side) is int and side >= 0 for side in sides) for sides in shapes.values())
        and all(isinstance(sha256, str) for sha256 in files.values())
        and isinstance(sizes, dict)
        and all(isinstance(size, int) for size in sizes.values())
    )
