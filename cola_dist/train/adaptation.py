"""What a run of jobs/adapt.py takes over before it begins: models and their settings from a co-trained run, sizes and scale from the actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from cola_dist import storage
from cola_dist.config import RunConfig
from cola_dist.data.labels import action_scale, labels_of
from cola_dist.data.reader import ClipReader, open_reader
from cola_dist.errors import UserError
from cola_dist.evaluation.exported import export_folder, read_run_config
from cola_dist.settings import Job, apply_overrides, base_of, leaves, parse_job

_MODELS = ("lam.", "conditioning.", "autoencoder.kind", "world.")
_OPEN = ("conditioning.dropout", "world.pretrained")
"""Settings of the models that a start leaves open; another generator may be its averaged one, ``export/world_ema``."""


def parse_adapt(argv: Sequence[str], prog: str) -> tuple[Job, tuple[float, ...]]:
    """Parse ``[RUN] [recipe] [--shares S …] [options]``, RUN being what to start from. Returns the job, and the shares if several were asked for.

    Raises `UserError`.
    """
    words, shares = _taken(list(argv), "--shares")
    run = [words.pop(0)] if words and not words[0].startswith("-") else []
    start = ["--adapt.start", *run] if run else []
    job = parse_job([*words, *start], default_recipe="tiny-adapt", prog=prog, method="adapt")
    if job.resume is None and not job.config.adapt.start:
        raise UserError(f"nothing to start from: give the folder of a finished run of jobs/cotrain.py, as in {prog} RUN")
    if job.resume is not None and (run or shares):
        raise UserError("a resumed run keeps its start and its share of episodes: leave RUN and --shares out, or start a new run")
    try:
        found = tuple(float(word) for word in shares or ())
    except ValueError:
        raise UserError(f"--shares is {' '.join(shares or ())!r}: give shares of the episodes, as in --shares 0.01 0.05 0.2 1") from None
    if shares is not None and (not found or not all(0 < share <= 1 for share in found)):
        raise UserError(f"--shares is {' '.join(shares)!r}: each must be above 0 and at most 1, which is all episodes")
    return job, tuple(sorted(set(found)))


def _taken(words: list[str], option: str) -> tuple[list[str], list[str] | None]:
    """``words`` without an option and its values, and these; none where it was not given."""
    at = next((i for i, word in enumerate(words) if word.partition("=")[0] == option), None)
    if at is None:
        return words, None
    end = next((i for i in range(at + 1, len(words)) if words[i].startswith("--")), len(words))
    given = [*filter(None, [words[at].partition("=")[2]]), *words[at + 1 : end]]
    return words[:at] + words[end:], given


def started(job: Job) -> Job:
    """A new run's job with the models of ``adapt.start`` and their settings, clips as those were trained on, and the sizes of actions and states.

    Raises `UserError` where there is no export, an option contradicts it, or the sources' actions do not fit.
    """
    asked = job.config
    given = asked.adapt.start
    folder = export_folder(given if "/" in given or storage.exists(given) else storage.join(asked.output, given))
    path = storage.local_path(folder)
    folder = folder if path is None else str(path.resolve())
    start = read_run_config(folder)
    base = base_of(asked.recipe)
    data = replace(base.data, frames=start.data.frames, resolution=start.data.resolution, rate_hz=start.data.rate_hz)
    models = {name: getattr(start, name) for name in ("lam", "conditioning", "autoencoder", "world", "flow")}
    config = apply_overrides(replace(base, data=data, **models), job.overrides)
    had, wanted = dict(leaves(start)), dict(leaves(config))
    for name in had:
        if name.startswith(_MODELS) and name not in _OPEN and had[name] != wanted[name]:
            raise UserError(f"{name} is {wanted[name]!r}, but {folder} was trained with {had[name]!r}: leave this option out")
    return replace(job, config=replace(config, adapt=replace(config.adapt, start=folder)))


def sized(config: RunConfig) -> RunConfig:
    """``config`` with the sizes of actions and states that its sources have. Raises `UserError` where they lack them or differ."""
    actions, state = open_reader(config.data, config.train.seed, "train", config.optim.global_batch, labels_of(config)).label_dims
    return replace(config, adapt=replace(config.adapt, action_dim=actions, state_dim=state))


def measured(reader: ClipReader) -> dict[str, Tensor]:
    """Buffers of the adapter, by name, that hold the scale of the actions and states in ``reader``; none where it reads none. Raises `UserError`."""
    if reader.labels is None:
        return {}
    scale = action_scale(reader.folders, reader.episodes, reader.label_dims)
    return {f"adapter.{name}": torch.tensor(values) for name, values in scale.items()}


def measured_by_one(reader: ClipReader, rank: int) -> dict[str, Tensor]:
    """`measured` by rank 0 for all. Collective."""
    if reader.labels is None:
        return {}
    found = [measured(reader) if rank == 0 else {}]
    dist.broadcast_object_list(found, src=0)
    return found[0]
