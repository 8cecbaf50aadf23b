"""Adaptations to a robot's real actions by the share of its episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from cola_dist import storage
from cola_dist.errors import UserError
from cola_dist.report.blocks import Block, Figures, Section, Table, Text
from cola_dist.report.drawing import Key, Panel, Plate, slug
from cola_dist.report.film import Shelf
from cola_dist.report.judged import Judgement
from cola_dist.report.words import number

_REAL = Key("real actions", "#0072b2", marker="o")
_LAM = Key("the LAM's latent actions", "#7d7f88", (0, (6, 2)))
_PANELS = {
    "delta-PSNR (dB)": {"delta_psnr": _REAL, "delta_psnr_lam": _LAM},
    "PSNR of rollouts (dB)": {"rollout_psnr": _REAL, "rollout_psnr_lam": _LAM},
    "utilisation of codes": {"utilisation": _REAL},
}
_COLUMNS = {
    "rollout_psnr": "PSNR (dB), own actions",
    "rollout_psnr_other": "another clip's",
    "rollout_psnr_null": "none",
    "rollout_psnr_lam": "LAM's",
    "delta_psnr": "delta-PSNR (dB)",
    "delta_psnr_lam": "of the LAM's",
    "utilisation": "utilisation",
    "perplexity": "perplexity",
}
_READING = (
    "Held-out clips rolled out from their first frame with their own real actions, another clip's, and none; and with what the LAM infers from the "
    "clip itself, which an adapter may come up to. One run per share; smaller shares are part of larger ones."
)


def adaptations(judged: Sequence[Judgement], shelf: Shelf) -> Section:
    """Curve, table and the last share's rollouts of each series."""
    blocks: list[Block] = []
    for one in judged:
        name = storage.name(one.uri)
        rows = [
            [f"{100 * point['share']:g} %", str(point["episodes"]), *(number(point[key]) if key in point else "" for key in _COLUMNS)]
            for point in one.found
        ]
        films = {f"All of {100 * one.found[-1]['share']:g} %": (video, "Rollouts: truth, own real actions, another clip's.")
                 for video in _videos(one.found[-1])[-1:]}  # fmt: skip
        blocks += [Figures(_plate(name, one.found)), Table(["share", "episodes", *_COLUMNS.values()], rows, name)]
        blocks += shelf.videos(f"Rollouts of {name}", films)
    blocks.append(Text(_READING, small=True))
    return Section("adaptation", "Driven by real actions", " ".join(map(_said, judged)), blocks)


def _plate(name: str, points: Sequence[Mapping[str, Any]]) -> Plate:
    panels = []
    for title, lines in _PANELS.items():
        key = next(iter(lines))
        values = ", ".join(f"{number(point[key])} at {100 * point['share']:g} %" for point in points if key in point)
        panels.append(Panel(partial(_draw, title=title, lines=lines, points=points), f"{title} by share of episodes: {values}."))
    return Plate(slug("adaptation", name), f"{name}: by the share of episodes whose actions may be used", panels, [_REAL, _LAM])


def _draw(axis: Axes, title: str, lines: Mapping[str, Key], points: Sequence[Mapping[str, Any]]) -> None:
    shares = [100 * point["share"] for point in points]
    for name, key in lines.items():
        values = [point.get(name, float("nan")) for point in points]
        axis.plot(shares, values, color=key.colour, linestyle=key.dashes, marker=key.marker or None)
    axis.set(title=title, xlabel="episodes (%)", xscale="log")
    axis.set_xticks(shares, [f"{share:g}" for share in shares])
    axis.minorticks_off()


def _videos(point: Mapping[str, Any]) -> list[str]:
    """Films of a point's run, the newest last; none where the run is gone, which a page can do without."""
    looks = storage.join(str(point.get("run", "")), "looks")
    try:
        return [storage.join(looks, name) for name in sorted(storage.list_files(looks)) if name.endswith(".mp4")]
    except (OSError, UserError):
        return []


def _said(one: Judgement) -> str:
    first, last = one.found[0], one.found[-1]
    said = (
        f"With {100 * last['share']:g} % of the episodes own real actions are worth {number(last.get('delta_psnr', float('nan')))} dB over "
    )
    said += f"another clip's, where the LAM's own latent actions are worth {number(last.get('delta_psnr_lam', float('nan')))}"
    if first is not last:
        said += f"; with {100 * first['share']:g} % ({first['episodes']} episodes) {number(first.get('delta_psnr', float('nan')))}"
    return f"{said}."
