"""The steps of a training job before and after the training: which run, is everything there, what came out."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cola_dist import storage
from cola_dist.config import RunConfig
from cola_dist.data.stream import open_reader
from cola_dist.errors import UserError
from cola_dist.methods import build_method
from cola_dist.settings import Job, apply_overrides, differences, from_yaml
from cola_dist.train.checkpoint import Checkpoint, latest
from cola_dist.train.hardware import computes_bf16
from cola_dist.train.observer import to_clips
from cola_dist.train.stage import check_fit


def new_run_id(recipe: str) -> str:
    """A fresh run id that sorts by time."""
    return f"{recipe}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def resolve(job: Job, fresh_run: str) -> tuple[RunConfig, str]:
    """The configuration and the run's folder: a new one, or the one to resume. Raises ``UserError`` if that one does not fit what is asked."""
    config = replace(job.config, output=_absolute(job.config.output))
    if job.resume is None:
        return config, storage.join(config.output, fresh_run)
    run_uri = _absolute(job.resume) if "/" in job.resume else storage.join(config.output, job.resume)
    try:
        saved = from_yaml(storage.read_bytes(storage.join(run_uri, "config.yaml")).decode(), f"{run_uri}/config.yaml")
    except FileNotFoundError as error:
        raise UserError(f"no run to resume in {run_uri}: give --resume a run id below --output, or a run's folder") from error
    if job.recipe_given and saved.recipe != config.recipe:
        raise UserError(f"run {run_uri} is of recipe {saved.recipe!r}, not {config.recipe!r}: leave the recipe out, or name its own")
    wanted = apply_overrides(saved, job.overrides)
    changed = differences(saved, wanted)
    if changed:
        raise UserError(
            f"run {run_uri} cannot be resumed with other settings ({'; '.join(changed)}): leave these options out, or start a new run"
        )
    if latest(run_uri) is None:
        raise UserError(f"run {run_uri} has no checkpoint yet: start a new run")
    return wanted, run_uri


def preflight(config: RunConfig, run_uri: str) -> dict[str, Any]:
    """Open all that the run needs and try one clip of each source through the models, on the CPU. Raises ``UserError`` for what is wrong.

    Returns what ``--dry-run`` prints: parameters per role, clips per source, the loss of one small batch.
    """
    readers = {split: open_reader(config.data, config.train.seed, split) for split in ("train", "heldout")}
    method = build_method(config, computes_bf16(config.train.precision, torch.device("cpu")))
    reader = readers["train"]
    uri = latest(run_uri)
    if uri is not None:
        check_fit(Checkpoint(uri), config, method, reader.order.hash)
    first = {reader.read(position)[1]: position for position in reversed(range(config.data.mixture_block))}
    batch = reader.read_many(sorted(first.values()))
    output = method(to_clips(batch), 0)
    loss = float(output.loss.detach())
    if loss != loss:
        raise UserError("the first clips give a loss that is not a number: the pretrained model or the clips are damaged")
    return {
        "parameters": {role: sum(p.numel() for _, p in method.role_parameters(role)) for role in method.roles()},
        "windows": {split: {s.name: r.order.windows(i) for i, s in enumerate(r.order.sources)} for split, r in readers.items()},
        "first_clips": batch.sample.tolist(),
        "batch": list(batch.video.shape),
        "loss": loss,
    }


def summary(result: Mapping[str, Any], wall_seconds: float) -> dict[str, Any]:
    """The JSON object of a training job, from what rank 0 wrote."""
    record = result["record"]
    hashes, evaluations, seconds = record["hashes"], record["evaluations"], record["step_seconds"]
    start, final = evaluations.get("start", {}), _final(evaluations)
    line = {k: result[k] for k in ("run_id", "status", "steps", "checkpoint", "export", "clips_per_s", "mlflow_run")}
    line |= {"error": result["error"]} if result["error"] else {}
    line["wall_seconds"] = round(wall_seconds, 1)
    for name, role, moment in (
        ("world_hash_start", "world", "warmup_start"),
        ("world_hash_warmup_end", "world", "warmup_end"),
        ("lam_hash_warmup_end", "lam", "warmup_end"),
        ("lam_hash_joint_start", "lam", "joint_start"),
    ):
        line |= {name: hashes[moment][role]} if role in hashes.get(moment, {}) else {}
    for name in ("perplexity", "sensitivity_gap", "flow_loss"):
        line |= {f"{name}_start": start[name]} if name in start else {}
        line |= {name: final[name]} if name in final else {}
    line |= {k: v for k, v in final.items() if k.startswith("probe_r2") or k in ("verdict", "utilisation", "max_usage", "effective_rank")}
    line |= {f"{phase}_step_seconds": value for phase, value in seconds.items()}
    line |= {f"{phase}_peak_memory_bytes": value for phase, value in record["peak_memory"].items()}
    return line


def _final(evaluations: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    for name in ("joint_end", "pretrain_end", "warmup_end"):
        if name in evaluations:
            return evaluations[name]
    return {}


def _absolute(uri: str) -> str:
    path = storage.local_path(uri)
    return uri if path is None else str(Path(path).resolve())
