"""What one training process does around the loop: tracking, the loop, the export, the result."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save as to_safetensors

from cola_dist import logs, storage, tracking
from cola_dist.config import RunConfig
from cola_dist.methods import build_method
from cola_dist.methods.adapt import Adapt
from cola_dist.models.autoencoder import PixelAutoencoder
from cola_dist.redact import redact
from cola_dist.settings import to_yaml
from cola_dist.tracking import NullTracker, RunTracker, Tracker, run_id
from cola_dist.train.checkpoint import Checkpoint
from cola_dist.train.loop import Loop, Outcome
from cola_dist.train.stage import load_tensors
from cola_dist.train.worker import Worker

_DELIVERY_S = 20.0
_VERSIONS = ("torch", "ray", "deepspeed", "diffusers", "mlflow", "av")


def run_worker(config: RunConfig, run_uri: str, worker: Worker, parent: str | None = None) -> dict[str, Any]:
    """Train as one rank of an initialised process group. Rank 0 exports and writes ``RUN/result.json``; every rank returns the result.

    ``parent`` is the identity of the MLflow run that this one is a trial of. Raises ``UserError`` for what the user must mend.
    """
    attempt = [secrets.token_hex(4)]
    dist.broadcast_object_list(attempt, src=0)
    logs.bind(run=identity(run_uri, parent), rank=worker.rank, attempt=attempt[0])
    tracker: RunTracker = open_tracker(config, run_uri, parent) if worker.rank == 0 else NullTracker()
    try:
        loop = Loop(config, run_uri, worker, tracker, attempt[0])
        if worker.rank == 0:
            _track_origin(tracker, config, loop)
        outcome = loop.run()
    except BaseException:
        tracker.finish("FAILED", wait=5.0)
        raise
    result = [_finish(config, run_uri, outcome, tracker) if worker.rank == 0 else {}]
    dist.broadcast_object_list(result, src=0)
    return result[0]


def identity(run_uri: str, parent: str | None = None) -> str:
    """What the run in the folder ``run_uri`` is called among all: its name, below its parent's if it has one."""
    name = storage.name(run_uri)
    return name if parent is None else f"{parent}/{name}"


def spool_folder(config: RunConfig, run_uri: str) -> Path:
    """Where metrics wait for MLflow: in the run's folder, or on this machine's disk when runs live in object storage."""
    local = storage.local_path(run_uri)
    return (local if local is not None else Path(tempfile.gettempdir()) / "cola-dist" / storage.name(run_uri)) / "tracking"


def deliver_waiting(config: RunConfig) -> None:
    """Deliver what runs in the same output folder left on disk while MLflow was away. Gives up soon: the next job tries again."""
    output = storage.local_path(config.output)
    for spool in tracking.waiting(output) if output is not None else []:
        tracking.deliver(spool, timeout=_DELIVERY_S)


def tracking_uri(config: RunConfig) -> str:
    """The tracking URI of the configuration, or the database beside the runs."""
    return config.tracking.uri or f"sqlite:///{storage.local_path(config.output)}/mlflow.db"


def add_results(run: str, config: RunConfig, uri: str, files: Mapping[str, bytes], metrics: Mapping[str, float]) -> bool:
    """Add files and metrics to the MLflow run of the finished run in the folder ``run``, at ``uri`` or where its configuration says.

    Where that fails, a line on stderr says why: who has the files may go on.
    """
    try:
        ended = storage.read_json(storage.join(run, "result.json"))
        steps, mlflow_run = int(ended["steps"]), str(ended["mlflow_run"] or "")
    except (OSError, ValueError, KeyError):
        reason = f"{run}/result.json names no run there"
    else:
        reason = f"{run} never reached it"
        if mlflow_run:
            reason = tracking.attach(uri or tracking_uri(config), mlflow_run, files, metrics, steps)
    if reason:
        print(f"not in MLflow: {reason}", file=sys.stderr)
    return not reason


def open_tracker(config: RunConfig, run_uri: str, parent: str | None = None) -> Tracker:
    """The tracker of the run (or sweep) in the folder ``run_uri``, whose name is its name and, within a parent, its identity."""
    uri, name = tracking_uri(config), storage.name(run_uri)
    # A database holds no files, and MLflow would put them below whatever folder the job was started in.
    database = tracking.database_of(uri)
    artifacts = str(database.absolute().parent / "mlartifacts") if database is not None else None
    return Tracker(spool_folder(config, run_uri), uri, config.tracking.experiment, name, artifacts, identity(run_uri, parent), parent)


def _track_origin(tracker: RunTracker, config: RunConfig, loop: Loop) -> None:
    """Resolved configuration, commit, versions, hashes of data and pretrained model."""
    tracker.log_params(dict(_flat(dataclasses.asdict(config))))
    tracker.log_text(to_yaml(config), "config.yaml")
    versions = {f"version.{name}": importlib.metadata.version(name) for name in _VERSIONS}
    data = {f"data.{folder.source}": folder.content_hash for folder in loop.reader.folders}
    tracker.set_tags({"git.commit": commit(), "version.python": platform.python_version()} | versions | data)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Mapping[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return flat


def commit() -> str:
    """The commit that the package was started from, or ``unknown``."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _finish(config: RunConfig, run_uri: str, outcome: Outcome, tracker: RunTracker) -> dict[str, Any]:
    exported = export(config, outcome.checkpoint, storage.join(run_uri, "export")) if outcome.status == "finished" else ""
    result = {
        "run_id": storage.name(run_uri),
        "status": outcome.status,
        "error": redact(outcome.error),
        "steps": outcome.step,
        "checkpoint": outcome.checkpoint,
        "export": exported,
        "clips_per_s": outcome.clips_per_s,
        "record": outcome.record,
    }
    delivered = tracker.finish({"finished": "FINISHED", "interrupted": "KILLED"}.get(outcome.status, "FAILED"))  # type: ignore[arg-type]
    result |= {"mlflow_run": run_id(spool_folder(config, run_uri)), "tracked": delivered}
    storage.write_bytes(storage.join(run_uri, "result.json"), json.dumps(result, indent=1).encode())
    return result


def export(config: RunConfig, checkpoint_uri: str, folder: str) -> str:
    """Write the roles below ``folder`` (of a finished run ``RUN/export``): ``world`` (and ``world_ema``) for ``from_pretrained``, ``lam``,
    ``conditioning``, and of an adaptation ``adapter``. Returns the folder.

    What a role is made of besides trained weights is in it too: a code is its weight and the place it was put on.
    """
    checkpoint = Checkpoint(checkpoint_uri)
    # Weights need no encoder.
    method = build_method(config, bf16=False, autoencoder=PixelAutoencoder())
    for role in method.roles():
        load_tensors(method, checkpoint.weights(role))
    load_tensors(method, checkpoint.buffers.items())
    method.world.save_pretrained(storage.join(folder, "world"))
    for role in method.roles():
        if role not in ("world", "adapter"):
            weights = {name: tensor.detach().contiguous() for name, tensor in method.get_submodule(role).state_dict().items()}
            storage.write_bytes(storage.join(folder, role, "model.safetensors"), to_safetensors(weights))
            storage.write_bytes(storage.join(folder, role, "config.yaml"), to_yaml(config).encode())
    if isinstance(method, Adapt):
        method.adapter.save(storage.join(folder, "adapter"))
    averaged = list(checkpoint.weights("world", "ema"))
    if averaged:
        load_tensors(method, averaged)
        method.world.save_pretrained(storage.join(folder, "world_ema"))
    return folder
