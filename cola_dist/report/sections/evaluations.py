"""A run on held-out clips: video metrics, what its latent actions are worth, what codes do."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cola_dist import storage
from cola_dist.evaluation.results import ALL, METRICS
from cola_dist.evaluation.statistics import Interval
from cola_dist.report.blocks import Block, Fold, Section, Table, Text
from cola_dist.report.film import Shelf
from cola_dist.report.judged import Judgement
from cola_dist.report.words import interval, listing, number

_FILMS = {
    "rollouts.mp4": ("Rollouts", "A row is a clip; columns: the truth, a rollout with the clip's own actions, one with another clip's."),
    "transfer.mp4": ("Actions carried over", "Columns: clip A, actions of A in the scene of B, clip B."),
    "atlas.mp4": ("Atlas", "One first frame, a rollout per code, by rows from the top left: code 0, 1, 2 and so on."),
}
_READING = "Means over clips, in brackets the 95 % bootstrap interval over them; clips of one episode are not independent."
_PROBE = "Ridge maps to true actions, on held-out episodes: of the codes, and of what anybody could have without training."


def evaluations(judged: Sequence[Judgement], shelf: Shelf) -> Section:
    """Tables, films and protocol of each evaluation."""
    blocks: list[Block] = []
    for one in judged:
        name = f"Export {one.found['protocol']['export'][:12]}, protocol {one.found['protocol']['key']}"
        films = {title: (storage.join(one.uri, file), alt) for file, (title, alt) in _FILMS.items() if file in one.found["files"]}
        blocks += [_figures(name, one.found["figures"]), *shelf.videos(f"{name}: films", films), *_probes(one.found["probe"])]
        blocks += [Text(note, small=True) for note in one.found["notes"]]
        blocks.append(Fold("Protocol", [Table(["", ""], [[key, _text(value)] for key, value in one.found["protocol"].items()])]))
    blocks.append(Text(_READING, small=True))
    return Section("evaluation", "Held-out clips", " ".join(map(_said, judged)), blocks)


def _figures(name: str, figures: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [[metric, unit, *(_interval(group.get(metric)) for group in figures.values())] for metric, unit in METRICS.items()]
    if "fvd" in figures[ALL]:
        rows.append(["fvd", "↓", *(number(group["fvd"]["value"], 4) if "fvd" in group else "" for group in figures.values())])
    columns = ["metric", "", *(f"{group} ({values['clips']} clips)" for group, values in figures.items())]
    return Table(columns, [row for row in rows if any(row[2:])], name)


def _interval(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    low, high = (math.nan if figure[end] is None else figure[end] for end in ("low", "high"))
    return interval(Interval(figure["mean"], low, high, figure["n"]))


def _probes(probes: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[Block]:
    rows = [[source, features, number(s["r2"]), number(s["l1"])] for source, found in probes.items() for features, s in found.items()]
    return [Table(["source", "features", "R2 ↑", "L1 (deviations) ↓"], rows, "Probe"), Text(_PROBE, small=True)] if rows else []


def _text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 400 else f"{text[:400]} …"


def _said(one: Judgement) -> str:
    whole = one.found["figures"][ALL]
    delta = whole["delta_psnr"]
    heard = "is not told from nothing"
    if delta["low"] is not None and delta["low"] > 0:
        heard = "is above nothing"
    said = f"Own actions are worth {_interval(delta)} dB of PSNR over another clip's on {whole['clips']} clips, which {heard}."
    codes = [f"{number(found['codes']['r2'])} in {source} (frame differences {number(found['frame_difference']['r2'])})"
             for source, found in one.found["probe"].items()]  # fmt: skip
    return said + (f" A probe reads true actions from the codes with an R2 of {listing(codes)}." if codes else "")
