"""Sweep folders as jobs/sweep.py leaves them, made up: curves of any level and spread, with verdicts, rulings and videos."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cola_dist.data.decode import encode_mp4

CODES, BLOCKS, TOTAL = 32, 4, 1000


@dataclass(frozen=True)
class Made:
    """How one trial comes out."""

    arm: str
    seed: int
    domain: str = "robot"
    loss: float = 0.05
    """Final flow loss."""
    warmup: int = 400
    verdict: str = "healthy"
    params: Mapping[str, Any] = field(default_factory=dict)
    status: str = "finished"
    why: str = ""
    seconds: float = 600.0
    rulings: Sequence[Mapping[str, Any]] = ()
    indicators: Mapping[str, float] = field(default_factory=dict)
    """Final values that are to be exact."""

    @property
    def name(self) -> str:
        lengths = "".join(f"-{value}" for value in self.params.values())
        return f"{self.arm}-{self.domain}-{self.seed}{lengths}"


def write_sweep(folder: Path, trials: Sequence[Made], every: int = 100, video: bool = True, **about: Any) -> Path:
    """``sweep.json``, ``trials.json`` and a run folder for each of ``trials``."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for made in trials:
        run = folder / "runs" / "".join(letter if letter.isalnum() else "-" for letter in made.name)
        if made.status in ("finished", "stopped"):
            write_run(run, made, every, video)
        entry = {name: getattr(made, name) for name in ("arm", "domain", "seed", "status", "why")}
        steps = TOTAL if made.status == "finished" else 300
        listed.append(
            entry | {"id": made.name, "params": dict(made.params), "run": str(run), "spent_seconds": made.seconds, "steps": steps}
        )
    sweep = {
        "recipe": "tiny",
        "space": {"train.seed": sorted({made.seed for made in trials})},
        "command": "python jobs/sweep.py tiny --budget-seconds 600",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "budget_seconds": 600.0,
        "metric": "flow_loss",
        "mlflow_parent": "",
        "started": "2026-01-01T00:00:00Z",
    }
    (folder / "sweep.json").write_text(json.dumps(sweep | about))
    (folder / "trials.json").write_text(json.dumps(listed))
    return folder


def write_run(run: Path, made: Made, every: int, video: bool) -> None:
    """Looks every so many steps, at the start and at the phases' ends; ``result.json`` with course and rulings."""
    (run / "looks").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32(f"{made.arm} {made.domain} {made.seed}".encode()))
    phases = [("warmup", 0, made.warmup), ("joint", made.warmup, TOTAL)]
    spans = [span for span in phases if span[2] > span[1]]
    ends = {end: f"{phase}_end" for phase, _, end in spans}
    for step in sorted({*range(0, TOTAL + 1, every), *ends}):
        if made.status == "stopped" and (step > 300 or step in ends):
            continue
        phase = next(phase for phase, _, end in spans if step <= end and (step < end or step in ends))
        final = step == TOTAL
        entry = {
            "phase": phase,
            "name": "start" if step == 0 else ends.get(step, ""),
            "spent_seconds": made.seconds * step / TOTAL,
            "step": step,
            "indicators": _indicators(made, step, rng) | (dict(made.indicators) if final else {}),
            "verdict": made.verdict if step else "",
            "code_counts": [_counts(made, step, rng) for _ in range(2)],
            "clips": {},
        }
        (run / "looks" / f"step-{step:08d}.json").write_text(json.dumps(entry))
        if video and step in ends:
            (run / "looks" / f"step-{step:08d}.mp4").write_bytes(film(made.seed))
    course = [{"phase": {"name": phase}, "first": first, "end": end, "why": ""} for phase, first, end in spans]
    steering = {"course": course, "rulings": list(made.rulings)}
    (run / "result.json").write_text(json.dumps({"record": {"steering": steering}}))


def _indicators(made: Made, step: int, rng: np.random.Generator) -> dict[str, float]:
    alive = made.verdict != "collapsed"
    grown = 1 / (1 + math.exp(-(step - 350) / 90)) if alive else 0.02
    joint = max(0, step - made.warmup) / TOTAL
    noise = 1 + 0.03 * rng.normal()
    loss = made.loss + 0.02 * math.exp(-step / 250)
    figures = {
        "flow_loss": made.loss if step == TOTAL else loss,
        "flow_loss/tau3": loss / 2,
        "copy_loss": 0.09,
        "copy_loss/tau3": 0.06,
        "perplexity": 1.2 + 24 * grown * noise,
        "perplexity/joint": 1.4 + 200 * grown * noise,
        "utilisation": min(1.0, 0.1 + grown),
        "max_usage": 0.95 - 0.8 * grown,
        "effective_rank": 1.2 + 5 * grown * noise,
        "z_std": 0.2 + 0.4 * grown,
        "sensitivity_gap": 0.004 * grown * (1 + joint) * noise,
        "modulation_share": 0.3 * grown,
        **{f"modulation_share/block{block}": 0.2 * grown * (1 + block / BLOCKS) for block in range(BLOCKS)},
        "gradient_cosine": 0.2 * rng.normal(),
        "alignment/cosine": 0.05 + 0.4 * grown * noise,
        "alignment/cosine/permuted": 0.04 + 0.005 * rng.normal(),
        "alignment/cka": 0.03 + 0.3 * grown * noise,
        "alignment/cka/permuted": 0.02 + 0.005 * rng.normal(),
    }
    if step in (0, made.warmup, TOTAL):
        figures |= {
            "probe_r2": 0.15 * grown * joint * noise,
            "probe_r2_permuted": -0.002,
            "probe_r2_size": 0.3 * grown * noise,
            "rollout_psnr": 22 + 3 * grown,
            "delta_psnr": 1.5 * grown * noise,
            "action_perplexity": 6.0,
            "action_information_share": 0.2 * grown,
        }
    return figures


def _counts(made: Made, step: int, rng: np.random.Generator) -> list[float]:
    evenness = 0.6 * (step / TOTAL if made.verdict != "collapsed" else 0.02)
    shares = np.exp(-np.arange(CODES) * (1 - evenness) / 3)
    return rng.multinomial(4096, shares / shares.sum()).astype(float).tolist()


@cache
def film(seed: int) -> bytes:
    """Two rows of three pictures in which a square moves."""
    frames = np.full((6, 100, 150, 3), 40, np.uint8)
    for t in range(6):
        for row in range(2):
            for column in range(3):
                left = 50 * column + 5 + 4 * t * (1 if column < 2 else -1) % 30
                frames[t, 50 * row + 15 : 50 * row + 30, left : left + 12] = (200, 60 * row + 60, 40 * (seed % 4) + 60)
    return encode_mp4(frames, 5.0)


def study_trials(levels: Mapping[str, float], seeds: int, spread: float, domain: str = "robot", draw: int = 0, **more: Any) -> list[Made]:
    """Trials of arms at levels of the final flow loss, with noise of their own and one that arms share by seed."""
    rng = np.random.default_rng(draw)
    shared = 0.001 * rng.normal(size=seeds)
    return [
        Made(arm, seed, domain, loss=level + shared[seed] + spread * rng.normal(), **more)
        for arm, level in levels.items()
        for seed in range(seeds)
    ]
