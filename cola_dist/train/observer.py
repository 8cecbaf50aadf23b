"""What is looked at while a run trains: indicators on held-out clips, pictures, videos, and at the end of a phase probe and rollouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from cola_dist.config import RunConfig
from cola_dist.data.labels import labels_of
from cola_dist.data.stream import Batch, open_reader
from cola_dist.diagnostics import Monitor
from cola_dist.diagnostics.alignment import gradient_agreement
from cola_dist.evaluation import adapted, films, rollout
from cola_dist.methods import Clips, Method
from cola_dist.methods.adapt import Adapt
from cola_dist.methods.cotrain import CoTrain
from cola_dist.models.autoencoder import Autoencoder
from cola_dist.train.hardware import computes_bf16
from cola_dist.train.known_actions import probe_actions
from cola_dist.train.reference import Reference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_VIDEO_FPS = 5.0


def to_clips(batch: Batch) -> Clips:
    """A batch as tensors; copied, because Ray's arrays are read-only views of shared memory."""
    latents = None if batch.latents is None else torch.tensor(batch.latents)
    actions, state = (None if rows is None else torch.tensor(rows) for rows in (batch.actions, batch.state))
    return Clips(torch.tensor(batch.video), torch.tensor(batch.position), torch.tensor(batch.source), latents, actions, state)


@dataclass(frozen=True)
class Evaluation:
    """One look at the held-out set. What only rank 0 measures, the other ranks do not have."""

    indicators: dict[str, float]
    verdict: str
    """``healthy``, ``at risk`` or ``collapsed``; empty before any training and for a method without latent actions."""
    sums: dict[str, Tensor]
    clips: dict[str, list[float]] = field(default_factory=dict)
    """Of looks with a name: per held-out clip its ``position``, and its flow losses with its ``own``, a ``shuffled`` and the ``null`` action and of
    a repeated context frame, ``copy``."""


class Observer:
    """Holds the fixed held-out clips of one rank and everything computed from them."""

    def __init__(self, config: RunConfig, rank: int, world: int, device: torch.device, autoencoder: Autoencoder) -> None:
        """Reads and decodes this rank's share of the held-out clips. Raises ``UserError`` if a source has none long enough."""
        self.config, self.rank, self.world, self.device = config, rank, world, device
        reader = open_reader(config.data, config.train.seed, "heldout", labels=labels_of(config))
        size = config.diagnostics.batch
        starts = range(rank * size, config.diagnostics.clips, world * size)
        self._batches = [to_clips(reader.read_many(range(start, start + size))) for start in starts]
        # A rank without a batch of its own measures the first one and counts it zero times: the sums then have the right shapes.
        self._weight = 1.0 if self._batches else 0.0
        if not self._batches:
            self._batches = [to_clips(reader.read_many(range(size)))]
        self._monitor = Monitor(config.diagnostics, config.lam.bottleneck.codes)
        self._reference: Reference | None = None
        if rank == 0 and config.method == "cotrain" and config.diagnostics.alignment_clips:
            bf16 = computes_bf16(config.train.precision, device)
            self._reference = Reference(config, reader, bf16, device, autoencoder)

    def evaluate(self, method: Method, step: int, asks_generator: bool, named: bool) -> Evaluation:
        """Indicators over all ranks' held-out clips. Collective.

        The conditioning starts at zero, so that every run would count as collapsed at first: at ``step`` 0 there is no verdict, and until
        ``diagnostics.grace_steps`` it is at worst ``at risk``. Where the phase does not ask the generator, the verdict leaves its sensitivity out.
        ``named`` looks, at a phase's end, also measure probe, rollouts and each clip's losses.
        """
        method.eval()
        total = self._sums(method.evaluate)
        indicators = self._monitor.indicators(total)
        verdict = self._monitor.verdict(indicators, asks_generator) if "effective_rank" in indicators else ""
        if step == 0:
            verdict = ""
        elif verdict == "collapsed" and step < self.config.diagnostics.grace_steps:
            verdict = "at risk"
        clips: dict[str, list[float]] = {}
        if isinstance(method, CoTrain):
            if named:
                clips = self._clip_losses(method)
                indicators |= self._real_actions(method) if isinstance(method, Adapt) else {}
            if self.rank == 0:
                indicators |= self._compare(method, asks_generator)
                indicators |= self._final(method) if named else {}
        method.train()
        return Evaluation(indicators, verdict, total, clips)

    def video(self, method: Method) -> bytes | None:
        """mp4 of the first held-out clips: truth | rollout with own actions | with another clip's. None where nothing can be rolled out.

        Of an adaptation the actions are the real ones.
        """
        count = self.config.diagnostics.video_clips
        if count < 2 or not isinstance(method, CoTrain):
            return None
        made = rollout.rollouts(method, self._first(count))
        return films.side_by_side([made.truth, made.own, made.other], _VIDEO_FPS)

    def _real_actions(self, method: Adapt) -> dict[str, float]:
        """PSNR of rollouts of all held-out clips with real actions. Collective."""
        return adapted.figures(self._sums(partial(adapted.psnr_sums, method)))

    def _sums(self, measure: Callable[[Clips], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``measure`` gives of each batch, added up over all ranks. Collective."""
        sums: dict[str, Tensor] = {}
        for clips in self._batches:
            for name, value in measure(clips.to(self.device)).items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value * self._weight
        flat = torch.cat([value.double().flatten() for value in sums.values()])
        dist.all_reduce(flat)
        parts = flat.split([value.numel() for value in sums.values()])
        return {name: part.view(value.shape).cpu() for (name, value), part in zip(sums.items(), parts, strict=True)}

    def _clip_losses(self, method: CoTrain) -> dict[str, list[float]]:
        own = [torch.cat([c.position.double()[:, None], method.clip_losses(c.to(self.device)).double().cpu()], 1) for c in self._batches]
        mine = torch.cat(own).tolist() if self._weight else []
        ranks: list[list[list[float]]] = [[] for _ in range(self.world)]
        dist.all_gather_object(ranks, mine)
        rows = sorted(row for rank in ranks for row in rank)
        return {name: [row[column] for row in rows] for column, name in enumerate(("position", "own", "shuffled", "null", "copy"))}

    def _compare(self, method: CoTrain, asks_generator: bool) -> dict[str, float]:
        """Alignment with the pretrained generator, and how the gradients of a held-out batch agree."""
        figures = self._reference.compare(method) if self._reference is not None else {}
        if not (self.config.diagnostics.gradients and asks_generator):
            return figures
        found = method.gradients(self._first(self.config.diagnostics.batch))
        for name, gradient in found.items():
            figures[f"gradient_norm/{name}"] = gradient_agreement(gradient, gradient)["gradient_norm/flow"]
        if {"flow/lam", "bottleneck/lam"} <= found.keys():
            agreement = gradient_agreement(found["flow/lam"], found["bottleneck/lam"])
            figures |= {name: value for name, value in agreement.items() if name == "gradient_cosine"}
        return figures

    def _final(self, method: CoTrain) -> dict[str, float]:
        figures = {}
        if not isinstance(method, Adapt):  # which has had more of them rolled out
            figures = rollout.rollout_figures(rollout.rollouts(method, self._first(self.config.diagnostics.batch)))
        if self.config.diagnostics.probe_clips:
            figures |= probe_actions(self.config, method, self.device)
        return figures

    def _first(self, count: int) -> Clips:
        return self._batches[0].split(count)[0].to(self.device)


def code_histogram(sums: Mapping[str, Tensor], step: int) -> Figure | None:
    """Bars of code use per slot, sorted by use; none for a method without codes."""
    from matplotlib.figure import Figure

    if "code_counts" not in sums:
        return None
    counts = sums["code_counts"]
    figure = Figure(figsize=(6, 1.6 + 1.4 * len(counts)), layout="constrained")
    for slot, axis in enumerate(figure.subplots(len(counts), 1, sharex=True, squeeze=False)[:, 0]):
        shares = (counts[slot] / counts[slot].sum().clamp(min=1)).tolist()
        axis.bar(range(len(shares)), shares)
        axis.axhline(1 / len(shares), color="grey", linewidth=0.8, linestyle="--")
        axis.set_ylabel(f"slot {slot}")
    axis.set_xlabel("code")
    figure.suptitle(f"share of transitions per code at step {step}; dashed: uniform")
    return figure
