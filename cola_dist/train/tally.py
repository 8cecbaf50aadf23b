"""Counts and means over the steps since the last log line, summed over ranks."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cola_dist.data.stream import Batch, ClipReader
from cola_dist.errors import UserError

_JUDGED_FROM = 64
_log = logging.getLogger("cola_dist.data")


class Tally:
    """Per source clips seen and skipped since the start of this worker group; means of metrics since the last ``reduce``."""

    def __init__(self, reader: ClipReader, max_bad_share: float) -> None:
        self._names = [source.name for source in reader.order.sources]
        self._uris = [folder.uri for folder in reader.folders]
        self._max_bad_share = max_bad_share
        self._seen = np.zeros(len(self._names))
        self._skipped = np.zeros(len(self._names))
        self._totals = np.zeros((2, len(self._names)))
        self._last_line = ""
        self._metrics: dict[str, Tensor] = {}
        self._waited, self._steps = 0.0, 0

    def add(self, batch: Batch, waited: float, metrics: Mapping[str, Tensor]) -> None:
        """Count one step of this rank: its clips, the seconds that it waited for them, and its metrics."""
        np.add.at(self._seen, batch.source, 1)
        for source, lines in zip(batch.source, batch.skipped, strict=True):
            for line in filter(None, str(lines).split("\n")):
                self._skipped[source] += 1
                self._last_line = line
                _log.warning("skipped %s", line)
        for name, value in metrics.items():
            self._metrics[name] = self._metrics.get(name, torch.zeros_like(value)) + value
        self._waited += waited
        self._steps += 1

    def reduce(self) -> dict[str, float]:
        """Means over steps and ranks of every metric since the last call, and clips seen and skipped by source so far. Collective."""
        world = dist.get_world_size()
        own = [float(v) / self._steps for v in self._metrics.values()]
        word = torch.tensor([*own, self._waited / self._steps, *self._seen, *self._skipped], dtype=torch.float64)
        if dist.get_backend() == "nccl":
            word = word.cuda()
        dist.all_reduce(word)
        values = word.cpu().numpy()
        means = dict(zip([*self._metrics, "data_wait_seconds"], (values[: len(own) + 1] / world).tolist(), strict=True))
        self._totals = values[len(own) + 1 :].reshape(2, -1)
        self._metrics, self._waited, self._steps = {}, 0.0, 0
        for kind, row in zip(("seen", "skipped"), self._totals, strict=True):
            means |= {f"clips_{kind}/{name}": float(count) for name, count in zip(self._names, row, strict=True)}
        return means

    def check(self) -> None:
        """Raises ``UserError``, on every rank alike, if a source's share of unreadable clips is above the limit."""
        for name, uri, seen, skipped in zip(self._names, self._uris, *self._totals, strict=True):
            asked = seen + skipped
            if asked >= _JUDGED_FROM and skipped / asked > self._max_bad_share:
                example = f", for example {self._last_line}" if self._last_line else ""
                raise UserError(
                    f"source {name!r}: {skipped:.0f} of {asked:.0f} clips could not be read ({skipped / asked:.1%}, limit data.max_bad_share "
                    f"{self._max_bad_share:.1%}){example}: find the damage with `python jobs/data.py lint {uri}`"
                )
