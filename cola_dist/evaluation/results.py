"""From rows of clips to figures with intervals, and how they are shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.table import Table

from cola_dist.evaluation.statistics import Interval, bootstrap_interval
from cola_dist.evaluation.video import frechet_distance

ALL = "all clips"
METRICS: Mapping[str, str] = {
    "psnr": "dB ↑",
    "copy_psnr": "dB, last context frame repeated",
    "ssim": "↑",
    "copy_ssim": "last context frame repeated",
    "lpips": "↓",
    "copy_lpips": "last context frame repeated",
    "other_psnr": "dB, another clip's actions",
    "delta_psnr": "dB ↑ psnr - other_psnr",
    "cycle_error": "share of range ↓",
    "shuffled_error": "control: another clip's actions",
    "cycle_margin": "↑ shuffled_error - cycle_error",
    "cut_gain": "dB, own less null action at a cut",
    "ordinary_gain": "dB, the same where nothing is cut",
    "leakage": "dB ↓ cut_gain - ordinary_gain",
}
"""Figures of a clip in the order of the table, with their unit and which way is better."""
_SETS = ("fvd_truth", "fvd_own")


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Figures by source, `ALL` first.

    Per metric ``mean``, ``low`` and ``high`` (bootstrap over clips, 95 %; null where one clip allows none) and ``n``.

    ``fvd`` is a distance of two sets and has a ``value`` and ``n``; it is missing where a source has fewer than two clips. ``episodes`` is how many
    the clips are cut from: an interval takes clips for independent, and is too narrow where that is few.
    """
    sources = list(dict.fromkeys(row["source"] for row in rows))
    groups = {ALL: list(rows)} | {source: [row for row in rows if row["source"] == source] for source in sources}
    return {name: _figures(group) for name, group in groups.items()}


def per_clip(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows without the features that only sets are compared by."""
    return [{name: value for name, value in row.items() if name not in _SETS} for row in rows]


def flat(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Means as curves' names, ``evaluation/METRIC`` for all clips and ``evaluation/METRIC/SOURCE``."""
    named = {}
    for group, metrics in figures.items():
        for metric, figure in metrics.items():
            if isinstance(figure, Mapping):
                end = "" if group == ALL else f"/{group}"
                named[f"evaluation/{metric}{end}"] = float(figure["value" if metric == "fvd" else "mean"])
    return named


def figures_table(figures: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row per metric, a column per source; in brackets the 95 % interval over clips."""
    table = Table("metric", "", *(f"{name} ({values['clips']})" for name, values in figures.items()), title="means over clips")
    for metric, unit in METRICS.items():
        if metric in figures[ALL]:
            table.add_row(metric, unit, *(_shown(values[metric]) for values in figures.values()))
    if "fvd" in figures[ALL]:
        table.add_row("fvd", "↓", *(f"{values['fvd']['value']:.4g}" if "fvd" in values else "" for values in figures.values()))
    return table


def probe_table(probes: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """R2 and L1 (in standard deviations) of the ridge maps to true actions, a row per source and features."""
    table = Table("source", "features", "R2 ↑", "L1 ↓", title="what a ridge map reads of true actions, held-out episodes")
    for source, scores in probes.items():
        for name, score in scores.items():
            table.add_row(source, name, f"{score['r2']:.3f}", f"{score['l1']:.3f}")
    return table


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"clips": len(rows), "episodes": len({row["clip"].rpartition("@")[0] for row in rows})}
    for metric in METRICS:
        if metric in rows[0]:
            found[metric] = _plain(bootstrap_interval([row[metric] for row in rows]))
    if _SETS[0] in rows[0] and len(rows) > 1:
        truth, own = (torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in _SETS)
        found["fvd"] = {"value": frechet_distance(own, truth), "n": len(rows)}
    return found


def _plain(interval: Interval) -> dict[str, float | None]:
    ends = {name: None if math.isnan(value) else value for name, value in (("low", interval.low), ("high", interval.high))}
    return {"mean": interval.mean, **ends, "n": interval.n}


def _shown(figure: Mapping[str, float | None]) -> str:
    ends = f" [{figure['low']:.4g}, {figure['high']:.4g}]" if figure["low"] is not None else ""
    return f"{figure['mean']:.4g}{ends}"
