"""An evaluation of a finished run from what is asked to its files: ``results.json``, ``clips.parquet``, films, and the parts it goes on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from cola_dist import storage
from cola_dist.config import RunConfig
from cola_dist.data.stream import ClipReader, open_reader
from cola_dist.errors import UserError
from cola_dist.evaluation.exported import export_folder, read_run_config
from cola_dist.evaluation.known import sources_with_actions
from cola_dist.evaluation.measure import SHOWN, Task
from cola_dist.evaluation.networks import identify
from cola_dist.evaluation.protocol import make_protocol
from cola_dist.evaluation.results import per_clip, summarise
from cola_dist.evaluation.tables import parquet
from cola_dist.evaluation.workers import Crew, kept

RESULTS, CLIPS, FILMS = "results.json", "clips.parquet", "films.json"
_METRICS: Mapping[str, Literal["LPIPS", "FVD"]] = {"lpips": "LPIPS", "fvd": "FVD"}


@dataclass(frozen=True)
class NetworkChoice:
    """A network that only a file of the user's can give."""

    weights: str = ""
    """TorchScript file (path or s3://…; it is code: only one that you trust); empty = the metric is left out."""
    sha256: str = ""
    """What the file's SHA-256 has to be; empty = it is recorded and not checked."""


@dataclass(frozen=True)
class Request:
    """What is to be evaluated, and how."""

    run: str
    """Folder of a finished run of jobs/cotrain.py, or its export; a path or s3:// URI."""
    clips: int = 64
    """Held-out clips, the first of the run's order."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Shard folder to weight; empty = the run's first mixture."""
    frames: int = 0
    """Video frames per clip; 0 = the run's."""
    context: int = 1
    """Video frames that the generator is given."""
    sampler_steps: int = 0
    """Euler steps of a rollout; 0 = the run's."""
    guidance: float | None = None
    """Classifier-free guidance on the action; none = the run's."""
    lpips: NetworkChoice = field(default_factory=NetworkChoice)
    """LPIPS: TorchScript of two batches of frames [B, 3, H, W] in [-1, 1] to B numbers."""
    fvd: NetworkChoice = field(default_factory=NetworkChoice)
    """FVD: the usual i3d_torchscript.pt, clips [B, 3, T, 224, 224] in [-1, 1] to [B, 400]."""
    gpus: bool = False
    """Each worker on a GPU; otherwise on a CPU, whose random numbers are others."""


def plan(request: Request) -> Task:
    """What the request amounts to. Opens data and files and starts nothing. Raises ``UserError`` for what the user must mend."""
    if request.clips < 2:
        raise UserError(f"--clips {request.clips}: give at least 2, or there is no interval")
    if request.frames < 0 or request.sampler_steps < 0:
        raise UserError(f"--frames {request.frames} --sampler-steps {request.sampler_steps}: give positive numbers, or 0 for the run's own")
    config = _asked(read_run_config(request.run), request)
    try:
        reader = open_reader(config.data, config.train.seed, "heldout")
    except UserError as error:
        raise UserError(f"{error} (what is evaluated is chosen by --mixture and --frames)") from None
    choices = {name: choice for name, choice in (("lpips", request.lpips), ("fvd", request.fvd)) if choice.weights}
    files = {name: identify(_METRICS[name], choice.weights, choice.sha256) for name, choice in choices.items()}
    device = "cuda" if request.gpus else "cpu"
    protocol = make_protocol(request.run, config, reader, request.clips, request.context, device, files)
    networks = {name: storage.absolute(choice.weights) for name, choice in choices.items()}
    return Task(storage.absolute(export_folder(request.run)), config, reader, protocol, networks)


def evaluate(task: Task, folder: str, workers: int, batch: int, probe_clips: int) -> dict[str, Any]:
    """Measure ``task`` in the cluster that this process has joined, write its files to ``folder`` and return what is in ``results.json``.

    What lies in ``folder`` already is not measured again: that of the same protocol alone may lie there. Raises ``UserError`` for what the
    user must mend.
    """
    with Crew(task, workers) as crew:
        rows = crew.rows(storage.join(folder, "parts"), task.protocol.samples, batch)
        shown = list(range(min(SHOWN, task.protocol.samples)))
        films = kept(storage.join(folder, FILMS), lambda: _write(folder, crew.once("pictures", shown)))
        probes, unprobed = _probes(task, crew, folder, probe_clips)
    replaced = [row["replaced"] for row in rows if row["replaced"]]
    notes = [*_absent(task), *unprobed]
    notes += [f"{len(replaced)} clips could not be read and were replaced"] if replaced else []
    notes += [] if "atlas.png" in films else ["no atlas of codes: this run's bottleneck is continuous and has none"]
    result = {
        "protocol": asdict(task.protocol) | {"key": task.protocol.key},
        "figures": summarise(rows),
        "probe": probes,
        "probe_clips": probe_clips,
        "replaced_clips": replaced,
        "notes": notes,
        "files": [RESULTS, CLIPS, *films],
    }
    storage.write_bytes(storage.join(folder, CLIPS), parquet(per_clip(rows)))
    storage.write_bytes(storage.join(folder, RESULTS), json.dumps(result, indent=1, allow_nan=False).encode())
    return result


def _asked(config: RunConfig, request: Request) -> RunConfig:
    """The run's configuration with the data and the sampler that are asked for."""
    data, flow = config.data, config.flow
    data = replace(data, mixture=request.mixture or data.mixture, stages={}, frames=request.frames or data.frames, latents=False)
    guidance = flow.guidance if request.guidance is None else request.guidance
    return replace(config, data=data, flow=replace(flow, sampler_steps=request.sampler_steps or flow.sampler_steps, guidance=guidance))


def _absent(task: Task) -> list[str]:
    """A line for each metric that has no network: it is left out, and no other network stands in for it."""
    return [f"no {name.upper()}: give its network with --{name}.weights" for name in _METRICS if name not in task.networks]


def _probes(task: Task, crew: Crew, folder: str, clips: int) -> tuple[dict[str, Any], list[str]]:
    """Scores by source, and a line for each source that has none."""
    found, notes = {}, []
    known = set(sources_with_actions(task.reader)) & _trained_with_actions(task.config)
    for shards in task.reader.folders:
        source = shards.source
        scores = None
        if source in known and clips:
            uri = storage.join(folder, "probes", f"{source}-{clips}.json")
            scores = kept(uri, lambda source=source: crew.once("probe", source, clips))  # type: ignore[misc]
        if scores is None:
            notes.append(
                f"no probe of {source}: it has no actions in both splits" if clips else f"no probe of {source}: --probe-clips is 0"
            )
        else:
            found[source] = scores
    return found, notes


def _trained_with_actions(config: RunConfig) -> set[str]:
    """Sources whose training split has actions; none where the mixture has no training split, as a set made for evaluation has not."""
    try:
        reader: ClipReader = open_reader(config.data, config.train.seed)
    except UserError:
        return set()
    return set(sources_with_actions(reader))


def _write(folder: str, files: Mapping[str, bytes]) -> list[str]:
    for name, data in files.items():
        storage.write_bytes(storage.join(folder, name), data)
    return list(files)
