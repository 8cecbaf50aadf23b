"""The steps of a training job before and after the training: which run, is everything there, what came out."""

from __future__ import annotations

import math
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
import yaml

from cola_dist import storage
from cola_dist.config import RunConfig
from cola_dist.data.labels import labels_of
from cola_dist.data.stream import open_reader
from cola_dist.errors import UserError
from cola_dist.methods import Place, build_method
from cola_dist.redact import everywhere, redact, without_credentials
from cola_dist.settings import Job, apply_overrides, changes, differences, from_yaml, to_yaml
from cola_dist.train.adaptation import measured
from cola_dist.train.hardware import computes_bf16
from cola_dist.train.keeping import newest_whole
from cola_dist.train.observer import to_clips
from cola_dist.train.shelf import latest, read_manifest, read_position
from cola_dist.train.stage import check_fit, load_tensors


def new_run_id(recipe: str) -> str:
    """A fresh run id that sorts by time."""
    return f"{recipe}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def resolve(job: Job, fresh_run: str) -> tuple[RunConfig, str]:
    """The configuration and the run's folder: a new one, or the one to resume. Raises ``UserError`` if that one does not fit what is asked.

    Reads the checkpoint that is gone on from; a line on stderr says where a newer one is damaged.
    """
    config = replace(job.config, output=storage.absolute(job.config.output))
    if job.resume is None:
        return config, storage.join(config.output, fresh_run)
    run_uri = storage.absolute(job.resume) if "/" in job.resume else storage.join(config.output, job.resume)
    try:
        saved = from_yaml(storage.read_bytes(storage.join(run_uri, "config.yaml")).decode(), f"{run_uri}/config.yaml")
    except FileNotFoundError as error:
        raise UserError(f"no run to resume in {run_uri}: give --resume a run id below --output, or a run's folder") from error
    if job.recipe_given and saved.recipe != config.recipe:
        raise UserError(f"run {run_uri} is of recipe {saved.recipe!r}, not {config.recipe!r}: leave the recipe out, or name its own")
    checkpoint = newest_whole(run_uri, lambda line: print(line, file=sys.stderr))
    if checkpoint is None:
        raise UserError(f"run {run_uri} has no checkpoint yet: start a new run")
    wanted = apply_overrides(saved, job.overrides)
    wanted = replace(wanted, output=storage.absolute(wanted.output))
    changed = differences(saved, wanted, read_position(checkpoint).step)
    if changed:
        raise UserError(
            f"run {run_uri} cannot be resumed with other settings ({'; '.join(changed)}): leave these options out, or start a new run"
        )
    return wanted, run_uri


def write_config(config: RunConfig, run_uri: str) -> None:
    """Write ``RUN/config.yaml``. Where a run is resumed with other settings, each difference is appended to ``RUN/changes.yaml`` first.

    That file is a list of ``{step: of the newest checkpoint, changes: {field: {from: …, to: …}}}``; stderr gets a line as well.
    """
    uri = storage.join(run_uri, "config.yaml")
    checkpoint = latest(run_uri)
    if checkpoint is not None:
        changed = changes(from_yaml(storage.read_bytes(uri).decode(), uri), config)
        if changed:
            step = read_position(checkpoint).step
            text = yaml.safe_dump(everywhere([{"step": step, "changes": changed}], without_credentials), sort_keys=False)
            _append(storage.join(run_uri, "changes.yaml"), text)
            listed = "; ".join(f"{name}: {change['from']!r} before, {change['to']!r} now" for name, change in changed.items())
            print(redact(f"resumed at step {step} with other settings: {listed}"), file=sys.stderr)
    storage.write_bytes(uri, to_yaml(config).encode())


def _append(uri: str, text: str) -> None:
    try:
        before = storage.read_bytes(uri)
    except FileNotFoundError:
        before = b""
    storage.write_bytes(uri, before + text.encode())


def preflight(config: RunConfig, run_uri: str) -> dict[str, Any]:
    """Open all that the run needs, on the CPU. Raises ``UserError`` for what is wrong.

    Of models for GPUs the files are read and checked, and nothing is kept: this machine need not hold them. Where CPUs train, a clip of each source
    also passes through the models. Returns what ``--dry-run`` prints: parameters per role, what was taken of which files, clips per source, the loss
    of that small batch.
    """
    batch_size = config.optim.global_batch
    labels = labels_of(config)
    readers = {split: open_reader(config.data, config.train.seed, split, batch_size, labels) for split in ("train", "heldout")}
    buffers = measured(readers["train"])
    place = Place(torch.device("meta" if config.train.gpus else "cpu"))
    method = build_method(config, computes_bf16(config.train.precision, torch.device("cpu")), place=place)
    load_tensors(method, buffers.items())
    reader = readers["train"]
    uri = latest(run_uri)
    if uri is not None:
        manifest = read_manifest(uri)
        check_fit(manifest, config, method, reader.order.hash_until(manifest.position.step * batch_size))
    # A whole block holds a clip of every source of its mixture.
    starts = (0, *(step * batch_size for step in sorted(config.data.stages)))
    positions = [start + slot for start in starts for slot in range(config.data.mixture_block)]
    first = {reader.order.clip(position).source: position for position in reversed(positions)}
    batch = reader.read_many(sorted(first.values()))
    loss = None if config.train.gpus else float(method(to_clips(batch), 0).loss.detach())
    if loss is not None and math.isnan(loss):
        raise UserError("the first clips give a loss that is not a number: the pretrained model or the clips are damaged")
    return {
        "parameters": {role: sum(p.numel() for _, p in method.role_parameters(role)) for role in method.roles()},
        "files": {
            name: asdict(loaded)
            for name, loaded in (
                ("world", method.world.loaded),
                ("null prompt", method.world.prompt),
                ("autoencoder", method.autoencoder.loaded),
            )
            if loaded
        },
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
    line |= {"left_out": record["left_out"]} if record["left_out"] else {}
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
    steering = record["steering"]
    line["phases"] = [{"phase": s["phase"]["name"], "first": s["first"], "end": s["end"], "why": s["why"]} for s in steering["course"]]
    line["spent_seconds"] = round(steering["spent_seconds"], 2)
    line["rulings"] = [ruling for ruling in steering["rulings"] if ruling["act"]]
    kept = ("match_error", "verdict", "utilisation", "max_usage", "effective_rank", "copy_loss")
    line |= {k: v for k, v in final.items() if k.startswith(("probe_r2", "rollout_psnr", "delta_psnr")) or k in kept}
    line |= {f"{phase}_step_seconds": value for phase, value in seconds.items()}
    line |= {f"{phase}_data_stall_percent": round(value, 2) for phase, value in record["data_stall_percent"].items()}
    line |= {f"{phase}_peak_memory_bytes": value for phase, value in record["peak_memory"].items()}
    return line


def _final(evaluations: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The newest look at a phase's end: they stand in order of time."""
    ends = [name for name in evaluations if name.endswith("_end")]
    return evaluations[ends[-1]] if ends else {}
