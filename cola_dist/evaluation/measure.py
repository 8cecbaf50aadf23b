"""What one process of an evaluation does: read clips, roll them out, measure. It knows nothing of other processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from cola_dist.config import RunConfig
from cola_dist.data.stream import Batch, ClipReader
from cola_dist.evaluation import actions, films, video
from cola_dist.evaluation.exported import load_export
from cola_dist.evaluation.networks import MetricNetwork, NetworkFile
from cola_dist.evaluation.protocol import Protocol, partner_of
from cola_dist.methods.base import Clips

SHOWN = 4
"""Clips in films."""


@dataclass(frozen=True)
class Task:
    """All that a process needs to know. Small but for the reader's index."""

    export: str
    config: RunConfig
    """The export's, with the data and the flow that are asked for."""
    reader: ClipReader
    protocol: Protocol
    networks: Mapping[str, str]
    """``lpips`` and ``fvd``, where they are given, to the URI of the file."""


class Measurer:
    """The models and networks of a task, loaded once."""

    def __init__(self, task: Task) -> None:
        """Load everything on the protocol's device. Raises ``UserError`` for what is missing or does not fit."""
        self.task, self._context = task, task.protocol.context
        self._device = torch.device(task.protocol.device)
        self._method = load_export(task.export, self._device)
        self._method.config = task.config
        self._networks = {name: MetricNetwork(self._file(name), uri, self._device) for name, uri in task.networks.items()}

    def rows(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """A row per clip: what it is, and its figures by name; lists ``fvd_truth`` and ``fvd_own`` ``[400]`` where FVD has its network."""
        a, b = self._read(positions), self._read([partner_of(self.task.reader, position) for position in positions])
        clips, partners = self._clips(a), self._clips(b)
        scenes = actions.play(self._method, clips, partners, self._context)
        figures = self._video_figures(scenes) | actions.action_figures(scenes, self._context)
        figures |= actions.leakage_figures(self._method, clips, partners)
        columns = {name: values.cpu().tolist() for name, values in figures.items()}
        about = {
            "position": a.position.tolist(),
            "clip": a.sample.tolist(),
            "source": [self.task.reader.folders[source].source for source in a.source.tolist()],
            "other_clip": b.sample.tolist(),
            "replaced": [f"{one}{two}" for one, two in zip(a.skipped, b.skipped, strict=True)],
        }
        named = about | columns
        return [dict(zip(named, values, strict=True)) for values in zip(*named.values(), strict=True)]

    def pictures(self, positions: Sequence[int]) -> dict[str, bytes]:
        """Films of the clips at ``positions``, by file name: rollouts, action transfer, and where there are codes their atlas in the first scene."""
        partners = [partner_of(self.task.reader, position) for position in positions]
        clips, others = self._clips(self._read(positions)), self._clips(self._read(partners))
        scenes = actions.play(self._method, clips, others, self._context)
        fps = self.task.protocol.rate_hz
        found = {
            "rollouts.mp4": films.side_by_side([scenes.truth, scenes.own, scenes.other], fps),
            "transfer.mp4": films.side_by_side([scenes.truth, scenes.scene, scenes.transfer], fps),
        }
        first = Clips(clips.video[:1], clips.position[:1], clips.source[:1])
        codes = actions.atlas(self._method, first, self._context)
        if codes is not None:
            found |= {"atlas.mp4": films.atlas_film(codes, fps), "atlas.png": films.atlas_sheet(codes, fps)}
        return found

    def probe(self, source: str, clips: int) -> dict[str, dict[str, float]] | None:
        """`actions.probe_source` as plain numbers."""
        scores = actions.probe_source(self._method, self.task.config, source, clips, self._device)
        return None if scores is None else {name: asdict(score) for name, score in scores.items()}

    def _video_figures(self, scenes: actions.Scenes) -> dict[str, Tensor]:
        truth, own, context = scenes.truth, scenes.own, self._context
        still = torch.cat([truth[:, :context], truth[:, context - 1 : context].expand(-1, truth.shape[1] - context, -1, -1, -1)], 1)
        figures = {
            "psnr": video.psnr(own, truth, context),
            "ssim": video.ssim(own, truth, context),
            "copy_psnr": video.psnr(still, truth, context),
            "copy_ssim": video.ssim(still, truth, context),
        }
        if "lpips" in self._networks:
            figures |= {
                "lpips": video.lpips(self._networks["lpips"], own, truth, context),
                "copy_lpips": video.lpips(self._networks["lpips"], still, truth, context),
            }
        if "fvd" in self._networks:
            figures |= {f"fvd_{name}": video.fvd_features(self._networks["fvd"], shown) for name, shown in (("truth", truth), ("own", own))}
        return figures

    def _read(self, positions: Sequence[int]) -> Batch:
        return self.task.reader.read_many(positions)

    def _clips(self, batch: Batch) -> Clips:
        return Clips(torch.tensor(batch.video), torch.tensor(batch.position), torch.tensor(batch.source)).to(self._device)

    def _file(self, name: str) -> NetworkFile:
        file = self.task.protocol.lpips if name == "lpips" else self.task.protocol.fvd
        assert file is not None
        return file
