"""What a shard folder holds, in figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from cola_dist import storage
from cola_dist.data.shards import ShardFolder, read_packing

_MOST_LINES = 12
_QUANTILES = {"shortest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "longest": 1.0}


def summarise(folder: ShardFolder) -> dict[str, Any]:
    """Counts, sizes and origins from the index and ``packing.json`` alone, without a look into the shards.

    ``seconds`` are quantiles of the episodes' lengths; ``fps`` and ``sizes`` count episodes; ``datasets`` has a row for each data set and licence;
    ``recordings`` and ``segments`` are what became of the input, by outcome, and empty where that is not recorded. Raises UserError for a damaged
    ``packing.json``.
    """
    packing = read_packing(folder.uri) or {"recordings": {}, "segments": {}, "skipped": []}
    frames = sum(episode.frames for episode in folder.episodes)
    seconds = np.array([episode.frames / episode.fps for episode in folder.episodes])
    origins: dict[tuple[str, str], list[float]] = {}
    for episode, length in zip(folder.episodes, seconds, strict=True):
        about = _origin(episode.provenance)
        origins.setdefault((str(about.get("dataset", "")), str(about.get("licence", ""))), []).append(float(length))
    return {
        "folder": folder.uri,
        "source": folder.source,
        "domain": folder.domain,
        "content_hash": folder.content_hash,
        "episodes": len(folder.episodes),
        "train": len(folder.split("train")),
        "heldout": len(folder.split("heldout")),
        "with_actions": sum("actions.npy" in episode.members for episode in folder.episodes),
        "frames": frames,
        "hours": float(seconds.sum()) / 3600,
        "seconds": {name: float(np.quantile(seconds, at)) for name, at in _QUANTILES.items()},
        "fps": _counted(f"{episode.fps:.4g}" for episode in folder.episodes),
        "sizes": _counted(f"{episode.width} x {episode.height}" for episode in folder.episodes),
        "shards": len(folder.shards),
        "bytes": sum(folder.shards.values()),
        "bytes_per_frame": sum(folder.shards.values()) / frames,
        "datasets": [
            {"dataset": dataset, "licence": licence, "episodes": len(lengths), "hours": sum(lengths) / 3600}
            for (dataset, licence), lengths in sorted(origins.items(), key=lambda entry: -sum(entry[1]))
        ],
        "recordings": packing["recordings"],
        "segments": packing["segments"],
        "left_out": len(packing["skipped"]),
    }


def table_of(figures: Mapping[str, Any]) -> Table:
    """What ``summarise`` found, for a person: a row per figure, long lists cut short."""
    table = Table(title=str(figures["folder"]), show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in figures.items():
        if value != {}:
            table.add_row(name.replace("_", " "), Text("\n".join(_lines(value))))
    return table


def _lines(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        lines = [f"{name}: {_number(count)}" for name, count in value.items()]
    elif isinstance(value, list):
        lines = [", ".join(f"{name} {_number(part)}" for name, part in row.items()) for row in value]
    else:
        lines = [_number(value)]
    return lines if len(lines) <= _MOST_LINES else [*lines[:_MOST_LINES], f"and {len(lines) - _MOST_LINES} more"]


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" if isinstance(value, float) else str(value)


def _origin(provenance: str) -> Mapping[str, Any]:
    """What an episode's provenance says; nothing where another writer left none that can be read."""
    try:
        about = storage.json_of(provenance)
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())
