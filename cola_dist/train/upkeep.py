"""What a person does with the checkpoints of a run: look at them, read them through, export one, clear up."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from rich.table import Table

from cola_dist import storage
from cola_dist.errors import UserError
from cola_dist.settings import from_yaml
from cola_dist.train.checkpoint import COMMIT_TIMEOUT_S
from cola_dist.train.keeping import Examined, examine, listed, none_whole
from cola_dist.train.session import export
from cola_dist.train.shelf import MANIFEST, Entry, mark, read_position, remove, survey


def entries_of(run_uri: str) -> list[Entry]:
    """What lies in the run's folder of checkpoints, oldest first. Raises ``UserError`` where there is nothing."""
    found = survey(storage.join(run_uri, "checkpoints"))
    if not found:
        raise UserError(f"{run_uri} has no checkpoints: give the folder of a run, in which there is a folder `checkpoints`")
    return found


def verify(run_uri: str) -> Iterator[Examined]:
    """Read every file of every committed checkpoint, oldest first, and mark what was found, so that resuming heeds it.

    A mark that is there already counts for nothing: this is how a mended checkpoint is made known.
    """
    for entry in entries_of(run_uri):
        found = examine(entry.uri) if entry.committed else None
        # A run that goes on may have dropped it meanwhile.
        if found is not None and storage.exists(storage.join(entry.uri, MANIFEST)):
            with suppress(UserError, OSError):  # who may only read there may look all the same
                mark(entry.uri, found.fault)
            yield found


def summary(run_uri: str, found: Sequence[Examined]) -> dict[str, Any]:
    """What reading them all came to; its status is ``failed`` where one is damaged."""
    whole = [one.name for one in found if not one.fault]
    damaged = {one.name: one.fault for one in found if one.fault}
    newest = whole[-1] if whole else None
    error = f"{len(damaged)} of {len(found)} checkpoints are damaged; the newest whole one is {newest or 'nowhere'}"
    line = {"status": "failed", "error": error} if damaged else {"status": "whole"}
    return {**line, "run": run_uri, "whole": whole, "damaged": damaged, "newest_whole": newest}


def export_run(run_uri: str, step: int | None, folder: str) -> dict[str, Any]:
    """Write the models of the newest whole checkpoint, or of the one at ``step``, into ``folder``, as a finished run does. Returns a summary.

    Raises ``UserError`` where there is no such checkpoint, it is damaged, or the folder holds something.
    """
    if storage.exists(folder):
        raise UserError(f"{folder} is there already, and others may refer to what it holds: give another --output, or remove it")
    where = storage.join(run_uri, "config.yaml")
    try:
        config = from_yaml(storage.read_bytes(where).decode(), where)
    except FileNotFoundError as error:
        raise UserError(f"{where} is missing: give the folder of a run, which begins with its settings") from error
    uri = _to_export(run_uri, step)
    export(config, uri, folder)
    return {"run": run_uri, "checkpoint": uri, "step": read_position(uri).step, "export": folder}


def _to_export(run_uri: str, step: int | None) -> str:
    entries = [entry for entry in entries_of(run_uri) if entry.committed]
    damaged: dict[str, str] = {}
    for entry in reversed(entries):
        if step in (None, entry.step):
            fault = examine(entry.uri).fault
            if not fault:
                return entry.uri
            damaged[entry.uri] = fault
    steps = ", ".join(str(entry.step) for entry in entries) or "none"
    if not damaged:
        raise UserError(f"run {run_uri} has no checkpoint{'' if step is None else f' at step {step}'}; there are: {steps}")
    if step is not None:
        raise UserError(
            f"the checkpoint of run {run_uri} at step {step} is damaged ({listed(damaged)}): give another step; there are: {steps}"
        )
    raise none_whole(run_uri, damaged)


def _written(entry: Entry) -> float:
    """When a checkpoint was committed, or the last file of an interrupted write was written, in seconds since 1970; 0 if it is gone."""
    newest = 0.0
    for name in (MANIFEST,) if entry.committed else entry.files:
        with suppress(FileNotFoundError):
            newest = max(newest, storage.modified(storage.join(entry.uri, name)))
    return newest


def _now(run_uri: str) -> float:
    """The time by the clock that says when files of the run were written, which need not be this machine's; 0 where nothing may be written there."""
    marker = storage.join(run_uri, f"clock-{secrets.token_hex(4)}")
    try:
        storage.write_bytes(marker, b"")
        return storage.modified(marker)
    except (UserError, OSError):
        return 0.0
    finally:
        with suppress(UserError, OSError):
            storage.delete(marker)


def rows_of(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """What a listing and the manifests say of checkpoints, as plain values."""
    return [
        {
            "checkpoint": entry.name,
            "step": entry.step,
            "phase": entry.manifest.position.phase if entry.manifest else None,
            "files": len(entry.files),
            "bytes": sum(entry.files.values()),
            "written": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(_written(entry))),
            "state": entry.state,
            "why": entry.fault,
        }
        for entry in entries
    ]


def table_of(run_uri: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Such rows, for a person. Times are UTC."""
    table = Table(title=run_uri)
    for name in rows[0]:
        table.add_column(name, justify="right" if name in ("step", "files", "bytes") else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:,}" if name == "bytes" else "" if value is None else str(value) for name, value in row.items()))
    return table


def clear(run_uri: str, keep: int, with_damaged: bool, for_good: bool) -> tuple[list[dict[str, Any]], list[Entry]]:
    """Remove what `clearing` says if it is ``for_good``. Returns a row for each checkpoint, and what went or would go."""
    plan = clearing(run_uri, keep, with_damaged)
    rows = rows_of([entry for entry, _, _ in plan])
    for row, (entry, goes, why) in zip(rows, plan, strict=True):
        row["gc"] = f"stays: {why}" if not goes else f"removed: {why}" if for_good else f"would go: {why}"
        if goes and for_good:
            remove(entry.uri)
    return rows, [entry for entry, goes, _ in plan if goes]


def clearing(run_uri: str, keep: int, with_damaged: bool) -> list[tuple[Entry, bool, str]]:
    """What clearing up would do with each checkpoint, oldest first: whether it goes, and why, or why not.

    Kept are the ``keep`` newest that are whole, which are read to know it; where there are fewer, all older ones that might be. Damaged ones are
    kept unless they are asked for, and where none is whole even then: somebody might want to mend one.
    """
    if keep < 1:
        raise UserError(f"--keep is {keep}: at least the newest whole checkpoint stays, so give 1 or more")
    entries = entries_of(run_uri)
    faults = {entry.uri: entry.fault for entry in entries}
    whole: list[Entry] = []
    for entry in reversed(entries):
        if entry.committed and not entry.fault and len(whole) < keep:
            faults[entry.uri] = examine(entry.uri).fault
            whole += [] if faults[entry.uri] else [entry]
    kept = {entry.uri for entry in whole}
    plan = []
    for entry in entries:
        goes, why = False, "whole"
        if not entry.committed:
            goes, why = _interrupted(entry, whole, run_uri)
        elif faults[entry.uri]:
            goes, why = with_damaged and bool(whole), f"damaged ({faults[entry.uri]})"
            why += ", and none is whole" if with_damaged and not goes else ""
        elif entry.uri not in kept:
            goes, why = True, f"older than the newest {keep} whole"
        plan.append((entry, goes, why))
    staying = [entry for entry, goes, _ in plan if not goes]
    return [(entry, *_unless_referred(entry, goes, why, staying)) for entry, goes, why in plan]


def _interrupted(entry: Entry, whole: list[Entry], run_uri: str) -> tuple[bool, str]:
    # A run writes at steps after the one that it went on from, and gives up a write after a while.
    old = any(entry.step <= one.step for one in whole) or _now(run_uri) - _written(entry) > COMMIT_TIMEOUT_S
    return (True, "interrupted write") if old else (False, "no manifest: may still be being written")


def _unless_referred(entry: Entry, goes: bool, why: str, staying: list[Entry]) -> tuple[bool, str]:
    """A role that was frozen is kept as a reference to where its weights lie: what a checkpoint that stays refers to stays too."""
    for other in staying:
        for role, reference in other.manifest.position.frozen.items() if other.manifest else ():
            if _below(reference["uri"], entry.uri):
                return False, f"step {other.step} refers to it for its frozen {role}"
    return goes, why


def _below(uri: str, folder: str) -> bool:
    inner, outer = (storage.absolute(one).partition("?")[0].rstrip("/") for one in (uri, folder))
    return f"{inner}/".startswith(f"{outer}/")
