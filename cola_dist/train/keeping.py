"""Which checkpoints of a run are whole, and which one it goes on from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from cola_dist import storage
from cola_dist.errors import UserError
from cola_dist.train.checkpoint import Checkpoint, fetch, file_fault
from cola_dist.train.shelf import DAMAGED, MANIFEST, DamagedCheckpoint, latest, mark, read_manifest, survey


@dataclass(frozen=True)
class Examined:
    """A checkpoint of which every file was read."""

    uri: str
    faults: Mapping[str, str]
    """Of each file what is wrong with it, empty where nothing is. Without a readable manifest that alone."""

    @property
    def name(self) -> str:
        """Its folder's own name."""
        return storage.name(self.uri)

    @property
    def fault(self) -> str:
        """The first fault; empty for a whole checkpoint."""
        return next(filter(None, self.faults.values()), "")


def examine(uri: str) -> Examined:
    """Read every file of the checkpoint in folder ``uri``. Object storage is copied a file at a time. Raises ``UserError`` for another format."""
    try:
        manifest = read_manifest(uri)
    except DamagedCheckpoint as error:
        return Examined(uri, {MANIFEST: error.why})
    faults = {}
    for name, sha256 in manifest.files.items():
        with tempfile.TemporaryDirectory(prefix="cola-checkpoint-") as folder:
            faults[name] = file_fault(fetch(uri, name, folder), sha256)
    return Examined(uri, faults)


def newest_whole(run_uri: str, tell: Callable[[str], None], glance: bool = False) -> str | None:
    """URI of the checkpoint that the run goes on from; none if none was committed. Reads it all, and marks damaged ones on the way.

    ``tell`` gets one line where a newer one is damaged. Raises ``UserError`` where none is whole. With a ``glance`` nothing is read, what a listing
    and marks show counts alone, and ``tell`` hears only of what was not known before: for those whose workers read the checkpoint anyway.
    """
    damaged: dict[str, str] = {}
    news = False
    for entry in reversed(survey(storage.join(run_uri, "checkpoints"))):
        if not entry.committed:
            continue
        fault = entry.fault or ("" if glance else examine(entry.uri).fault)
        if not fault:
            if damaged and (news or not glance):
                tell(_fallen_back(damaged, entry.uri))
            return entry.uri
        damaged[entry.uri] = fault
        if DAMAGED not in entry.files:
            mark(entry.uri, fault)
            news = True
    if damaged:
        raise none_whole(run_uri, damaged)
    return None


def none_whole(run_uri: str, damaged: Mapping[str, str]) -> UserError:
    """What is said of a run of which all checkpoints are damaged."""
    return UserError(
        f"no checkpoint of run {run_uri} is whole ({listed(damaged)}): "
        "bring back the files that are named and run `jobs/checkpoints.py verify` on the run, or start a new run"
    )


def _fallen_back(damaged: Mapping[str, str], uri: str) -> str:
    return f"damaged checkpoint passed over: {listed(damaged)}; going on from {storage.name(uri)} instead"


def listed(damaged: Mapping[str, str]) -> str:
    """Checkpoints by name, and what is wrong with each."""
    return ", ".join(f"{storage.name(uri)} ({fault})" for uri, fault in damaged.items())


def open_together(run_uri: str, rank: int, world: int, group: Any, tell: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that all ranks can read, opened; none if none was committed. Collective: all get the same one.

    What one rank cannot read is passed over by all, and marked. Raises ``UserError`` on all where none is left.
    """
    damaged: dict[str, str] = {}
    while True:
        chosen = [latest(run_uri) if rank == 0 else None]
        dist.broadcast_object_list(chosen, src=0, group=group)
        uri = chosen[0]
        if uri is None:
            _refuse_if_none_is_whole(run_uri, rank, group)
            return None
        checkpoint, faults = None, [""] * world
        try:
            checkpoint, own = Checkpoint(uri), ""
        except DamagedCheckpoint as error:
            own = error.why
        dist.all_gather_object(faults, own, group=group)
        fault = next(filter(None, faults), "")
        if not fault:
            if damaged and rank == 0:
                tell(_fallen_back(damaged, uri))
            return checkpoint
        damaged[uri] = fault
        if rank == 0:
            mark(uri, fault)


def _refuse_if_none_is_whole(run_uri: str, rank: int, group: Any) -> None:
    entries = survey(storage.join(run_uri, "checkpoints")) if rank == 0 else []
    found = [{entry.uri: entry.fault for entry in reversed(entries) if entry.committed}]
    dist.broadcast_object_list(found, src=0, group=group)
    if found[0]:
        raise none_whole(run_uri, found[0])
