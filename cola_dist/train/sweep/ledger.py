"""What a sweep has written down: ``SWEEP/trials.json``, from which it is resumed and reported on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cola_dist import storage
from cola_dist.errors import UserError
from cola_dist.redact import redact
from cola_dist.train.sweep.plan import Trial

FINISHED, STOPPED, FAILED, RUNNING = "finished", "stopped", "failed", "running"
STATUSES = (FINISHED, STOPPED, FAILED, RUNNING)


@dataclass(frozen=True)
class Entry:
    """A trial that has begun, and how it went. One that is ``running`` is gone on with when the sweep is resumed."""

    id: str
    number: int
    arm: str
    domain: str
    seed: int
    params: Mapping[str, Any]
    run: str
    """The run's folder."""
    status: str = RUNNING
    why: str = ""
    """One line: what ended it."""
    spent_seconds: float = 0.0
    """Accelerator-seconds of all its workers."""
    steps: int = 0
    value: float | None = None
    """The sweep's metric at the newest evaluation that has it; none also where that is no finite number."""

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to do."""
        return self.status != RUNNING


@dataclass
class Ledger:
    """The entries of a sweep by trial id, in the order in which trials began. Every change of a status is on disk when the call returns."""

    uri: str
    entries: dict[str, Entry] = field(default_factory=dict)

    def begin(self, trial: Trial, run: str) -> None:
        """A trial has begun, or goes on after the sweep was resumed."""
        known = self.entries.get(trial.id)
        plain = {key: value for key, value in asdict(trial).items() if key != "params"}
        self.entries[trial.id] = known or Entry(**plain, params=dict(trial.params), run=run)
        self.write()

    def hear(self, id: str, steps: int, spent_seconds: float, value: float | None) -> None:
        """An evaluation of a running trial, with the metric if it has that; it reaches the disk with the next change of a status."""
        entry = replace(self.entries[id], steps=steps, spent_seconds=spent_seconds)
        self.entries[id] = entry if value is None else replace(entry, value=value if math.isfinite(value) else None)

    def end(self, id: str, status: str, why: str) -> Entry:
        """A trial has come to its end. Returns what is written down of it."""
        entry = replace(self.entries[id], status=status, why=redact(" ".join(why.split())))
        self.entries[id] = entry
        self.write()
        return entry

    def count(self) -> dict[str, int]:
        """Trials by status."""
        return {status: sum(entry.status == status for entry in self.entries.values()) for status in STATUSES}

    def of(self, status: str) -> list[Entry]:
        """The entries with that status."""
        return [entry for entry in self.entries.values() if entry.status == status]

    def best(self, mode: str) -> Entry | None:
        """The finished trial with the best value; those that were stopped early had less compute."""
        valued = [entry for entry in self.of(FINISHED) if entry.value is not None]
        pick = min if mode == "min" else max
        return pick(valued, key=lambda entry: entry.value or 0.0, default=None)

    def write(self) -> None:
        """Put all that was heard on disk."""
        text = json.dumps([asdict(one) for one in self.entries.values()], indent=1)
        storage.write_bytes(self.uri, text.encode())


def read_ledger(uri: str) -> Ledger:
    """The ledger at ``uri``, empty where there is none yet. Raises ``UserError`` for one that is damaged."""
    try:
        rows = storage.read_json(uri)
        entries = [Entry(**row) for row in rows]
    except FileNotFoundError:
        return Ledger(uri)
    except (ValueError, TypeError) as error:
        raise UserError(f"{uri} is not the trials of a sweep of this version ({error}): restore it, or start a new sweep") from error
    return Ledger(uri, {entry.id: entry for entry in entries})
