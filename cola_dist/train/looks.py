"""What evaluations leave behind: a file each below ``RUN/looks``, curves and pictures in MLflow, and in checkpoints what decisions need."""

from __future__ import annotations

import json
from typing import Any

from cola_dist import storage
from cola_dist.diagnostics.rules import WATCHED, Look
from cola_dist.tracking import RunTracker
from cola_dist.train.observer import Evaluation, code_histogram

VERDICTS = {"healthy": 0.0, "at risk": 1.0, "collapsed": 2.0}
"""Numbers of the verdicts in MLflow and in Prometheus."""


def look_of(step: int, phase: str, evaluation: Evaluation) -> Look:
    """The part of an evaluation that decisions need."""
    kept = {name: evaluation.indicators[name] for name in WATCHED if name in evaluation.indicators}
    return Look(step, phase, evaluation.verdict, kept)


def track(tracker: RunTracker, step: int, evaluation: Evaluation, video: bytes | None) -> None:
    """Curves, the code histogram and the rollout video of one evaluation."""
    metrics = {f"heldout/{name}": value for name, value in evaluation.indicators.items()}
    if evaluation.verdict:
        metrics["heldout/verdict"] = VERDICTS[evaluation.verdict]
        tracker.set_tags({"verdict": evaluation.verdict})
    tracker.log_metrics(metrics, step)
    figure = code_histogram(evaluation.sums, step)
    if figure is not None:
        tracker.log_figure(figure, f"codes/step-{step:08d}.png")
    if video is not None:
        tracker.log_file(video, f"rollouts/step-{step:08d}.mp4")


def write_look(run_uri: str, step: int, about: dict[str, Any], evaluation: Evaluation, video: bytes | None) -> None:
    """``RUN/looks/step-….json`` (and ``.mp4``): ``about``, indicators, verdict, code counts, and of looks with a name each clip's losses."""
    counts = evaluation.sums.get("code_counts")
    entry = about | {
        "step": step,
        "indicators": evaluation.indicators,
        "verdict": evaluation.verdict,
        "code_counts": counts.tolist() if counts is not None else [],
        "clips": evaluation.clips,
    }
    place = storage.join(run_uri, "looks", f"step-{step:08d}")
    storage.write_bytes(f"{place}.json", json.dumps(entry).encode())
    if video is not None:
        storage.write_bytes(f"{place}.mp4", video)


def read_looks(run_uri: str) -> list[dict[str, Any]]:
    """The files of a run that ``write_look`` wrote, by step."""
    folder = storage.join(run_uri, "looks")
    names = sorted(name for name in storage.list_files(folder) if name.endswith(".json"))
    return [storage.read_json(storage.join(folder, name)) for name in names]
