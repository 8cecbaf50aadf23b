"""Counts and means over the steps since the last log line, summed over ranks: what the data cost, and what of it was bad."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cola_dist.data.stream import SKIP_REASONS, Batch, ClipReader
from cola_dist.errors import UserError

_JUDGED_FROM = 64
_log = logging.getLogger("cola_dist.data")


class Tally:
    """Per source clips seen and skipped by reason since the start of this worker group; cost of the data and means of metrics since the last
    ``reduce``."""

    def __init__(self, reader: ClipReader, max_bad_share: float) -> None:
        self._names = [source.name for source in reader.order.sources]
        self._uris = [folder.uri for folder in reader.folders]
        self._max_bad_share = max_bad_share
        # One row for the clips seen, one for each reason of skipping.
        self._counts = np.zeros((1 + len(SKIP_REASONS), len(self._names)))
        self._totals = np.zeros_like(self._counts)
        self._cost = np.zeros(3)
        self._clips = 0
        self._last_line = ""
        self._metrics: dict[str, Tensor] = {}
        self._waited, self._steps = 0.0, 0
        self._since = time.perf_counter()

    def add(self, batch: Batch, waited: float, metrics: Mapping[str, Tensor]) -> None:
        """Count one step of this rank: its clips, the seconds that it waited for the next ones, and its metrics."""
        np.add.at(self._counts[0], batch.source, 1)
        self._cost += batch.cost.sum(0)
        self._clips += len(batch.source)
        for source, lines in zip(batch.source, batch.skipped, strict=True):
            for line in filter(None, str(lines).split("\n")):
                self._counts[1 + SKIP_REASONS.index(line.partition(":")[0]), source] += 1
                self._last_line = line
                _log.warning("skipped %s", line)
        for name, value in metrics.items():
            self._metrics[name] = self._metrics.get(name, torch.zeros_like(value)) + value
        self._waited += waited
        self._steps += 1

    def reduce(self) -> dict[str, float]:
        """Means over steps and ranks of every metric since the last call; what the data cost since then; clips skipped so far. Collective.

        ``data_stall_percent`` is the share of the time since the last call in which a worker waited for its clips; ``data/read_ms`` and
        ``data/decode_ms`` are per clip, in a reader; a clip that is still decoded in memory costs no reading.
        """
        world, elapsed = dist.get_world_size(), time.perf_counter() - self._since
        own = [float(v) / self._steps for v in self._metrics.values()]
        own += [self._waited / self._steps, 100 * self._waited / elapsed]
        word = torch.tensor([*own, *self._cost, self._clips, *self._counts.flat], dtype=torch.float64)
        if dist.get_backend() == "nccl":
            word = word.cuda()
        dist.all_reduce(word)
        values = word.cpu().numpy()
        means = dict(zip([*self._metrics, "data_wait_seconds", "data_stall_percent"], (values[: len(own)] / world).tolist(), strict=True))
        fetched, reading, decoding, clips = values[len(own) : len(own) + 4].tolist()
        means |= {
            "data/read_bytes_per_s": fetched / elapsed,
            "data/read_ms": 1e3 * reading / clips,
            "data/decode_ms": 1e3 * decoding / clips,
        }
        self._totals = values[len(own) + 4 :].reshape(self._counts.shape)
        self._metrics, self._waited, self._steps, self._cost, self._clips = {}, 0.0, 0, np.zeros(3), 0
        self._since = time.perf_counter()
        return means | {f"clips_skipped/{reason}/{name}": count for (name, reason), count in self.skipped().items()}

    def skipped(self) -> dict[tuple[str, str], float]:
        """Clips skipped on all ranks by (source, reason), as of the last ``reduce``."""
        return {
            (name, reason): float(count)
            for reason, row in zip(SKIP_REASONS, self._totals[1:], strict=True)
            for name, count in zip(self._names, row, strict=True)
        }

    def check(self) -> None:
        """Raises ``UserError``, on every rank alike, if a source's share of unreadable clips is above the limit."""
        for name, uri, seen, skipped in zip(self._names, self._uris, self._totals[0], self._totals[1:].sum(0), strict=True):
            asked = seen + skipped
            if asked >= _JUDGED_FROM and skipped / asked > self._max_bad_share:
                example = f", for example {self._last_line}" if self._last_line else ""
                raise UserError(
                    f"source {name!r}: {skipped:.0f} of {asked:.0f} clips could not be read ({skipped / asked:.1%}, limit data.max_bad_share "
                    f"{self._max_bad_share:.1%}){example}: find the damage with `python jobs/data.py lint {uri}`"
                )
