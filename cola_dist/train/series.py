"""Adaptations with growing shares of a robot's episodes, one after another, and the curve of what they come to."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.table import Table

from cola_dist import storage
from cola_dist.config import RunConfig
from cola_dist.data.labels import labels_of
from cola_dist.data.reader import open_reader
from cola_dist.train.launch import launch
from cola_dist.train.session import open_tracker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = (
    ("rollout_psnr", "PSNR, own"),
    ("rollout_psnr_other", "another's"),
    ("rollout_psnr_null", "null"),
    ("rollout_psnr_lam", "LAM's"),
    ("delta_psnr", "delta-PSNR"),
    ("delta_psnr_lam", "of the LAM's"),
    ("sensitivity_gap", "gap"),
    ("utilisation", "utilisation"),
    ("perplexity", "perplexity"),
    ("match_error", "distance to LAM"),
)
"""Indicators of a point, and what the table calls them."""


def adapt_series(config: RunConfig, series_uri: str, shares: Sequence[float], debug: bool) -> dict[str, Any]:
    """Train with each of ``shares`` (ascending) in a run of its own beside the folder ``series_uri``, which gets ``curve.json`` and ``curve.png``.

    Ends with the first run that does not finish. In MLflow the runs are shown inside of one of their own. Returns its result, with the points.
    """
    name = storage.name(series_uri)
    # Before the first one starts: a small share may hold no episode that is long enough.
    episodes = [_episodes(_with(config, share)) for share in shares]
    tracker = open_tracker(config, series_uri)
    points: list[dict[str, Any]] = []
    status, error = "finished", ""
    try:
        for number, (share, count) in enumerate(zip(shares, episodes, strict=True)):
            run_uri = storage.join(config.output, f"{name}-share-{share:g}")
            result = launch(_with(config, share), run_uri, debug, parent=name)
            status, error = result["status"], result["error"]
            if status != "finished":
                break
            end = result["record"]["evaluations"]["adapt_end"]
            point = {key: end[key] for key, _ in _SHOWN if key in end}
            tracker.log_metrics({f"share/{key}": value for key, value in point.items()} | {"share": share}, number)
            points.append({"share": share, "episodes": count, "run": run_uri, "verdict": end["verdict"]} | point)
        if points:
            _keep(points, series_uri, tracker)
    except BaseException:
        tracker.finish("FAILED", wait=5.0)
        raise
    tracker.finish("FINISHED" if status == "finished" else "FAILED")
    return {"status": status, "series": series_uri, "points": points} | ({"error": error} if error else {})


def _with(config: RunConfig, share: float) -> RunConfig:
    return replace(config, adapt=replace(config.adapt, share_of_episodes=share))


def _episodes(config: RunConfig) -> int:
    reader = open_reader(config.data, config.train.seed, "train", config.optim.global_batch, labels_of(config))
    return sum(map(len, reader.episodes))


def _keep(points: Sequence[Mapping[str, Any]], uri: str, tracker: Any) -> None:
    figure = curve(points)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    storage.write_bytes(storage.join(uri, "curve.png"), image.getvalue())
    text = json.dumps(points, indent=1)
    storage.write_bytes(storage.join(uri, "curve.json"), text.encode())
    tracker.log_figure(figure, "curve.png")
    tracker.log_text(text, "curve.json")


def curve(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Over the share of episodes: PSNR of rollouts by what drives them, delta-PSNR, and how many codes the adapter's tokens come next to."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = (
        ("PSNR of rollouts (dB)", {"rollout_psnr": "own actions", "rollout_psnr_other": "another clip's", "rollout_psnr_null": "null"}),
        ("delta-PSNR (dB)", {"delta_psnr": "real actions"}),
        ("utilisation of codes", {"utilisation": "next to the adapter's tokens"}),
    )
    references = {"PSNR of rollouts (dB)": "rollout_psnr_lam", "delta-PSNR (dB)": "delta_psnr_lam"}
    shares = [100 * point["share"] for point in points]
    for axis, (title, lines) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for key, label in lines.items():
            axis.plot(shares, [point.get(key) for point in points], marker="o", label=label)
        if reference := references.get(title):
            axis.plot(shares, [point.get(reference) for point in points], color="grey", linestyle="--", label="LAM's latent actions")
        axis.set(
            title=title, xlabel="share of episodes with actions (%)", xscale="log", xticks=shares, xticklabels=[f"{s:g}" for s in shares]
        )
        axis.minorticks_off()
        axis.legend(fontsize=8)
    return figure


def series_table(points: Sequence[Mapping[str, Any]]) -> Table:
    """A row per share."""
    table = Table(title="held-out clips driven by real actions (PSNR in dB)")
    for column in ("share", "episodes", *(label for _, label in _SHOWN), "verdict"):
        table.add_column(column, justify="right")
    for point in points:
        figures = (f"{point[key]:.4g}" if key in point else "" for key, _ in _SHOWN)
        table.add_row(f"{100 * point['share']:g} %", str(point["episodes"]), *figures, point["verdict"])
    return table
