"""What a sweep looks like: every trial as a line over its settings, and for two settings at a time the mean of the metric."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from cola_dist.train.sweep.ledger import FINISHED, STOPPED, Entry
from cola_dist.train.sweep.space import Space

_MOST_LEVELS = 8
"""A numeric setting with more different values is cut into bins of equally many trials."""
_BINS = 5
_MOST_MAPS = 6
_SPREAD = 0.04
"""Part of an axis over which trials with the same value are spread, so that their lines can be told apart."""


@dataclass(frozen=True)
class _Setting:
    """One thing in which trials differ."""

    name: str
    of: Callable[[Entry], Any]
    levels: tuple[Any, ...]
    """The different values in order: numbers by size, else as the space lists them."""

    @property
    def numeric(self) -> bool:
        return all(_is_number(level) for level in self.levels)

    @property
    def log(self) -> bool:
        return self.numeric and min(self.levels) > 0 and max(self.levels) / min(self.levels) >= 30


def parallel_coordinates(space: Space, entries: Sequence[Entry]) -> bytes | None:
    """PNG: a line for each trial through its settings to the metric, by which it is coloured; none where fewer than two trials have one."""
    valued = [entry for entry in entries if entry.status in (FINISHED, STOPPED) and entry.value is not None]
    settings = _settings(space, valued)
    if len(valued) < 2 or not settings:
        return None
    values = [entry.value or 0.0 for entry in valued]
    result = _Setting(space.metric, lambda entry: entry.value, tuple(sorted(set(values))))
    axes_of = [*settings, result]
    figure = Figure(figsize=(2 + 1.9 * len(axes_of), 5), layout="constrained")
    axis = figure.subplots()
    norm, colours = Normalize(min(values), max(values)), colormaps["viridis" if space.mode == "max" else "viridis_r"]
    # The best lie on top.
    for number, entry in sorted(enumerate(valued), key=lambda pair: pair[1].value or 0.0, reverse=space.mode == "min"):
        shift = _SPREAD * ((number * 0.618) % 1 - 0.5)
        heights = [_height(setting, setting.of(entry)) + (0 if setting is result else shift) for setting in axes_of]
        style = "-" if entry.status == FINISHED else ":"
        axis.plot(range(len(axes_of)), heights, style, color=colours(norm(entry.value or 0.0)), linewidth=1.6, alpha=0.85)
    for place, setting in enumerate(axes_of):
        _draw_scale(axis, place, setting)
    axis.set_xticks(range(len(axes_of)), [_label(setting.name) for setting in axes_of])
    axis.tick_params(axis="x", length=0, pad=8)
    axis.set_yticks([])
    axis.set_ylim(-0.06, 1.06)
    axis.set_xlim(-0.15, len(axes_of) - 1 + 0.45)
    for spine in axis.spines.values():
        spine.set_visible(False)
    figure.colorbar(ScalarMappable(norm, colours), ax=axis, label=_scale(space), pad=0.02)
    stopped = sum(entry.status == STOPPED for entry in valued)
    figure.suptitle(f"{len(valued)} trials of {space.name}" + (f", {stopped} of them stopped early (dotted)" if stopped else ""))
    return _png(figure)


def heat_maps(space: Space, entries: Sequence[Entry]) -> bytes | None:
    """PNG: the mean of the metric of finished trials for each pair of settings, with the number of trials; none where no two finished."""
    valued = [entry for entry in entries if entry.status == FINISHED and entry.value is not None]
    settings = _settings(space, valued)
    if len(settings) == 1 and (seeds := _seeds(valued)) is not None:
        settings = [*settings, seeds]
    pairs = list(itertools.combinations(settings, 2))[:_MOST_MAPS]
    if len(valued) < 2 or not pairs:
        return None
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    maps = [_means(pair, valued) for pair in pairs]
    norm = Normalize(min(np.nanmin(means) for means, _, _ in maps), max(np.nanmax(means) for means, _, _ in maps))
    colours = colormaps["viridis" if space.mode == "max" else "viridis_r"]
    for axis, (down, across), (means, counts, labels) in zip(grid, pairs, maps, strict=False):
        axis.imshow(means, cmap=colours, norm=norm, aspect="auto")
        axis.set_xticks(range(means.shape[1]), labels[1], rotation=30, ha="right")
        axis.set_yticks(range(means.shape[0]), labels[0])
        axis.set_xlabel(across.name)
        axis.set_ylabel(down.name)
        for row, column in itertools.product(*map(range, means.shape)):
            if counts[row, column]:
                dark = norm(means[row, column]) > 0.5
                shade = "white" if dark == (space.mode == "min") else "black"
                text = f"{means[row, column]:.4g}\nn={counts[row, column]}"
                axis.text(column, row, text, ha="center", va="center", fontsize=8, color=shade)
    for axis in grid[len(pairs) :]:
        axis.set_visible(False)
    figure.colorbar(ScalarMappable(norm, colours), ax=list(grid), label=f"mean {_scale(space)}")
    figure.suptitle(f"{len(valued)} finished trials of {space.name}")
    return _png(figure)


def _settings(space: Space, entries: Sequence[Entry]) -> list[_Setting]:
    """What the trials differ in; their seeds, where that is all."""
    listed = {name: values if isinstance(values, tuple) else () for name, values in space.fields.items()}
    found = [
        _setting("arm", lambda entry: entry.arm, entries, space.arms),
        _setting("domain", lambda entry: entry.domain, entries, list(space.domains)),
        *(_setting(name, lambda entry, name=name: entry.params[name], entries, values) for name, values in listed.items()),  # type: ignore[misc]
    ]
    return [setting for setting in found if setting is not None] or [setting for setting in [_seeds(entries)] if setting is not None]


def _seeds(entries: Sequence[Entry]) -> _Setting | None:
    return _setting("seed", lambda entry: entry.seed, entries, ())


def _setting(name: str, of: Callable[[Entry], Any], entries: Sequence[Entry], listed: Sequence[Any]) -> _Setting | None:
    found = {of(entry): None for entry in entries}
    if len(found) < 2:
        return None
    return _Setting(name, of, tuple(sorted(found) if all(map(_is_number, found)) else [value for value in listed if value in found]))


def _height(setting: _Setting, value: Any) -> float:
    """Where on its axis a value stands, from 0 to 1."""
    if not setting.numeric:
        return setting.levels.index(value) / (len(setting.levels) - 1)
    low, high = setting.levels[0], setting.levels[-1]
    if low == high:
        return 0.5
    if setting.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return float((value - low) / (high - low))


def _draw_scale(axis: Axes, place: int, setting: _Setting) -> None:
    axis.plot([place, place], [-0.03, 1.03], color="0.35", linewidth=1.0, zorder=3)
    marks: Sequence[Any] = setting.levels
    if setting.numeric and len(setting.levels) > _MOST_LEVELS:
        low, high = setting.levels[0], setting.levels[-1]
        marks = np.geomspace(low, high, 5).tolist() if setting.log else np.linspace(low, high, 5).tolist()
    for mark in marks:
        text = f"{mark:.3g}" if _is_number(mark) else str(mark)
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.0}
        axis.text(place + 0.03, _height(setting, mark), text, fontsize=8, va="center", bbox=box, zorder=4)


def _means(pair: tuple[_Setting, _Setting], entries: Sequence[Entry]) -> tuple[Any, Any, list[list[str]]]:
    """Of two settings: mean of the metric ``[first][second]``, number of trials, and the labels of both."""
    places, labels = zip(*(_cells(setting, entries) for setting in pair), strict=True)
    totals, counts = np.zeros((len(labels[0]), len(labels[1]))), np.zeros((len(labels[0]), len(labels[1])), int)
    for entry, row, column in zip(entries, *places, strict=True):
        totals[row, column] += entry.value or 0.0
        counts[row, column] += 1
    return np.where(counts, totals / np.maximum(counts, 1), np.nan), counts, list(labels)


def _cells(setting: _Setting, entries: Sequence[Entry]) -> tuple[list[int], list[str]]:
    """The row or column of each trial, and what to write there."""
    values = [setting.of(entry) for entry in entries]
    if not setting.numeric or len(setting.levels) <= _MOST_LEVELS:
        names = [f"{level:.3g}" if _is_number(level) else str(level) for level in setting.levels]
        return [setting.levels.index(value) for value in values], names
    edges = np.quantile(values, np.linspace(0, 1, _BINS + 1))
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, _BINS - 1)
    return bins.tolist(), [f"{low:.2g}…{high:.2g}" for low, high in itertools.pairwise(edges)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scale(space: Space) -> str:
    return f"{space.metric} ({'lower' if space.mode == 'min' else 'higher'} is better)"


def _label(name: str) -> str:
    """A dotted name on two lines, where it is long."""
    head, _, tail = name.rpartition(".")
    return f"{head}.\n{tail}" if head and len(name) > 14 else name


def _png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return image.getvalue()
