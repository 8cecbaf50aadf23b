"""How far the latent actions say what the pretrained generator already tells apart: alignment, measured on fixed held-out clips by one rank."""

from __future__ import annotations

import torch
from torch import Tensor

from cola_dist.config import RunConfig
from cola_dist.data.stream import ClipReader
from cola_dist.diagnostics.alignment import MIN_EPISODES, alignment
from cola_dist.methods import Clips, Place, build_method
from cola_dist.methods.cotrain import CoTrain
from cola_dist.models.autoencoder import Autoencoder


class Reference:
    """Transitions of held-out clips as the generator sees them before any training, without actions: what z is compared with, always the same."""

    def __init__(self, config: RunConfig, reader: ClipReader, bf16: bool, device: torch.device, autoencoder: Autoencoder) -> None:
        """Reads ``diagnostics.alignment_clips`` clips and asks a freshly built generator once. It is not kept."""
        self._seed = config.train.seed
        batches = [reader.read_many(range(start, stop)) for start, stop in _parts(config)]
        self._clips = [Clips(*(torch.tensor(a) for a in (b.video, b.position, b.source))).to(device) for b in batches]
        names = [str(sample).rpartition("@")[0] for batch in batches for sample in batch.sample]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        self.enough = len(numbers) >= MIN_EPISODES
        if not self.enough:
            return
        pretrained = build_method(config, bf16, autoencoder, Place(device)).to(device).eval()
        assert isinstance(pretrained, CoTrain)
        changes = torch.cat([pretrained.feature_changes(clips).cpu() for clips in self._clips])
        rows = len(changes) // len(names)
        self._episode = torch.tensor([numbers[name] for name in names]).repeat_interleave(rows)
        self._source = torch.cat([clips.source.cpu() for clips in self._clips]).repeat_interleave(rows)
        self._changes = _less_source(changes, self._source)

    def compare(self, method: CoTrain) -> dict[str, float]:
        """`alignment` of the method's z with the pretrained generator's features; empty where there are too few episodes for it."""
        if not self.enough:
            return {}
        z = torch.cat([method.latent_rows(clips).cpu() for clips in self._clips])
        return alignment(_less_source(z, self._source), self._changes, self._episode, self._seed)


def _parts(config: RunConfig) -> list[tuple[int, int]]:
    clips, size = config.diagnostics.alignment_clips, config.diagnostics.batch
    return [(start, min(start + size, clips)) for start in range(0, clips, size)]


def _less_source(rows: Tensor, source: Tensor) -> Tensor:
    """Rows less the mean of their source: that both sides know which source a clip is of is no alignment."""
    rows = rows.clone()
    for one in source.unique():
        rows[source == one] -= rows[source == one].mean(0)
    return rows
