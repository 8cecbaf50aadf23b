"""What a study of plans says: success rates, paired comparisons, where time went; as a table, JSON, Parquet and videos."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table

from cola_dist import storage
from cola_dist.evaluation.films import side_by_side
from cola_dist.evaluation.shares import wilson
from cola_dist.evaluation.statistics import bootstrap_interval, compare_arms
from cola_dist.evaluation.tables import parquet
from cola_dist.planning.episode import Episode
from cola_dist.planning.study import RANDOM, SIMULATOR, Setup
from cola_dist.planning.watch import PARTS

_FPS = 5.0
"""Frames per second of videos."""
_COLUMNS = ("model", "seed", "number", "success", "steps", "first_distance", "best_distance", "last_distance", "seconds")


def summary(episodes: Sequence[Episode], setup: Setup) -> dict[str, Any]:
    """By model: successes with Wilson's interval, the seeds' rates with a bootstrap interval, steps, distances, seconds; and all pairs of models.

    Episodes are paired by start and goal; a pair's p is `compare_arms`' with the episode as unit (other episodes, the same weights), Holm-corrected.
    """
    request = setup.request
    models = {
        name: _of_model([e for e in episodes if e.model == name]) | {"uri": setup.uris.get(name, ""), "videos": _videos(name)}
        for name in setup.models
    }
    about = vars(request) | {"learned": list(request.learned), "seeds": list(request.seeds), "classifier_accuracy": setup.accuracy}
    return {"request": about, "unit": setup.unit, "models": models, "pairs": _pairs(episodes, setup)}


def result_table(found: dict[str, Any]) -> Table:
    """The models, a line each."""
    request = found["request"]
    table = Table(title=f"{request['domain']}, {request['task']}: {request['planner']}, horizon {request['horizon']}")
    for name in (
        "model",
        "successes",
        "steps",
        f"nearest ({found['unit']})",
        "plan steps/s",
        *PARTS,
    ):
        table.add_column(name, justify="left" if name == "model" else "right", overflow="fold")
    for name, row in found["models"].items():
        total = row["seconds"]["total"]
        shares = [f"{row['seconds'][part] / total:.0%}" for part in PARTS]
        successes = str(wilson(row["successes"], row["episodes"]))
        pace = "–" if name == RANDOM else f"{row['plan_steps_per_s']:.2f}"
        table.add_row(name, successes, f"{row['steps']:.1f}", f"{row['best_distance']:.2f}", pace, *shares)
    return table


def write_results(output: str, found: dict[str, Any], episodes: Sequence[Episode]) -> dict[str, str]:
    """``results.json``, ``episodes.parquet`` and each model's best and worst episode as video, below ``output``; where they are."""
    rows = [{name: vars(e)[name] for name in _COLUMNS} | {f"seconds_{part}": e.parts.get(part, 0.0) for part in PARTS} for e in episodes]
    files = {"results.json": json.dumps(found, indent=2).encode(), "episodes.parquet": parquet(rows)}
    for model in found["models"]:
        own = sorted((e for e in episodes if e.model == model), key=lambda e: (not e.success, e.steps, e.last_distance))
        videos = found["models"][model]["videos"]
        files |= {videos["best"]: film(own[0]), videos["worst"]: film(own[-1])}
    places = {name: storage.join(output, *name.split("/")) for name in files}
    for name, data in files.items():
        storage.write_bytes(places[name], data)
    return places


def artifacts(output: str, found: dict[str, Any]) -> dict[str, bytes]:
    """What `write_results` wrote below ``output`` and people look at, by its name in MLflow."""
    words = ["results.json", *(video for figures in found["models"].values() for video in figures["videos"].values())]
    return {f"{_place(found)}/{word}": storage.read_bytes(storage.join(output, *word.split("/"))) for word in words}


def flat(model: str, found: dict[str, Any]) -> dict[str, float]:
    """A model's figures as curves' names, beside the success rates of the references."""
    figures = {f"success_rate_{name}": found["models"][name]["rate"] for name in (SIMULATOR, RANDOM)}
    figures |= {"success_rate": found["models"][model]["rate"], "nearest": found["models"][model]["best_distance"]}
    return {f"{_place(found)}/{name}": value for name, value in figures.items()}


def film(episode: Episode) -> bytes:
    """MP4: the episode on the left, its goal on the right; the last frame stays for a second."""
    frames = torch.from_numpy(np.stack([*episode.frames, *[episode.frames[-1]] * int(_FPS)])).permute(0, 3, 1, 2)
    goal = torch.from_numpy(episode.goal.copy()).permute(2, 0, 1).expand_as(frames)
    return side_by_side([frames[None], goal[None]], _FPS)


def _place(found: dict[str, Any]) -> str:
    return f"plans/{found['request']['domain']}/{found['request']['task']}"


def _videos(model: str) -> dict[str, str]:
    """Where its best and worst episode are, below the results' folder."""
    safe = re.sub(r"[^\w.+-]", "_", model)
    return {word: f"videos/{safe}-{word}.mp4" for word in ("best", "worst")}


def _of_model(episodes: Sequence[Episode]) -> dict[str, Any]:
    share = wilson(sum(e.success for e in episodes), len(episodes))
    seeds = sorted({e.seed for e in episodes})
    rates = {seed: float(np.mean([e.success for e in episodes if e.seed == seed])) for seed in seeds}
    over_seeds = bootstrap_interval(list(rates.values()))
    total = sum(e.seconds for e in episodes)
    steps = sum(e.steps for e in episodes)
    named = {part: sum(e.parts.get(part, 0.0) for e in episodes) for part in PARTS}
    return {
        "episodes": share.of,
        "successes": share.hits,
        "rate": share.hits / share.of,
        "low": share.low,
        "high": share.high,
        "rate_by_seed": {str(seed): rate for seed, rate in rates.items()},
        "seeds_low": over_seeds.low if len(seeds) > 1 else None,
        "seeds_high": over_seeds.high if len(seeds) > 1 else None,
        "steps": steps / len(episodes),
        "best_distance": float(np.mean([e.best_distance for e in episodes])),
        "last_distance": float(np.mean([e.last_distance for e in episodes])),
        "seconds": {"total": total} | named,
        "plan_steps_per_s": steps / max(total - named["simulator"], 1e-9),
    }


def _pairs(episodes: Sequence[Episode], setup: Setup) -> list[dict[str, Any]]:
    """Every two models' difference in success rate; empty for a single episode, which allows no test."""
    results: dict[str, dict[int, float]] = {name: {} for name in setup.models}
    for episode in episodes:
        place = setup.request.seeds.index(episode.seed) * setup.request.episodes + episode.number
        results[episode.model][place] = float(episode.success)
    if len(results[RANDOM]) < 2:
        return []
    table = compare_arms(results, RANDOM, "higher")
    ordered = [(a, b) for a, b in table.tests if setup.models.index(a) < setup.models.index(b)]
    return [
        {"a": a, "b": b, "difference": t.difference, "low": _finite(t.interval.low), "high": _finite(t.interval.high)}
        | {"p": t.p, "adjusted_p": t.adjusted, "test": t.method}
        for (a, b), t in ((pair, table.tests[pair]) for pair in ordered)
    ]


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if np.isfinite(value) else None
