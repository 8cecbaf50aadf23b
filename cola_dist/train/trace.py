"""The audit trail of a run: for each step its loss and a digest of the sample ids of its global batch.

The digest is a sum of hashes, so it does not depend on how the batch was shared out. Segments are written at checkpoints; a run that falls back
to a checkpoint writes the same steps again, and the newer line stands.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from cola_dist import storage

DIGEST_MODULUS = 1 << 40
"""Digests of ranks are added as float64, which is exact below 2**53: up to 8,192 ranks."""


@dataclass(frozen=True)
class TraceLine:
    """One step: mean loss over the global batch, and the digest of its sample ids."""

    step: int
    loss: float
    ids: int


def digest(sample_ids: Iterable[str]) -> int:
    """Digest of a set of sample ids; digests of disjoint sets add up modulo ``DIGEST_MODULUS``."""
    return sum(int.from_bytes(hashlib.blake2b(s.encode(), digest_size=5).digest(), "big") for s in sample_ids) % DIGEST_MODULUS


class Trace:
    """Collects lines and writes them below ``RUN/trace``."""

    def __init__(self, run_uri: str) -> None:
        self._folder = storage.join(run_uri, "trace")
        self._lines: list[TraceLine] = []

    def add(self, line: TraceLine) -> None:
        """Keep a line until the next flush."""
        self._lines.append(line)

    def flush(self) -> None:
        """Write the lines since the last flush as one file."""
        if self._lines:
            text = "".join(json.dumps(vars(line)) + "\n" for line in self._lines)
            storage.write_bytes(storage.join(self._folder, f"{self._lines[0].step:08d}-{self._lines[-1].step:08d}.jsonl"), text.encode())
            self._lines = []


def read_trace(run_uri: str) -> list[TraceLine]:
    """All lines of a run, by step."""
    folder = storage.join(run_uri, "trace")
    lines: dict[int, TraceLine] = {}
    for name in sorted(storage.list_files(folder)):
        for text in storage.read_bytes(storage.join(folder, name)).decode().splitlines():
            line = TraceLine(**json.loads(text))
            lines[line.step] = line
    return [lines[step] for step in sorted(lines)]
