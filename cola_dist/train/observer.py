"""What is looked at while a run trains: indicators on held-out clips, pictures, videos, and the probe at the end of a phase."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor

from cola_dist.config import RunConfig
from cola_dist.data.decode import CorruptClip, encode_mp4
from cola_dist.data.shards import CorruptMember, read_member
from cola_dist.data.stream import Batch, ClipReader, open_reader
from cola_dist.diagnostics import Monitor
from cola_dist.evaluation import probe, rollout
from cola_dist.methods import Clips, Method
from cola_dist.methods.cotrain import CoTrain

_VIDEO_FPS = 5.0


def to_clips(batch: Batch) -> Clips:
    """A batch as tensors; copied, because Ray's arrays are read-only views of shared memory."""
    return Clips(torch.tensor(batch.video), torch.tensor(batch.position), torch.tensor(batch.source))


@dataclass(frozen=True)
class Evaluation:
    """One look at the held-out set."""

    indicators: dict[str, float]
    verdict: str
    """``healthy``, ``at risk`` or ``collapsed``; empty for a method without latent actions."""
    sums: dict[str, Tensor]


class Observer:
    """Holds the fixed held-out clips of one rank and everything computed from them."""

    def __init__(self, config: RunConfig, rank: int, world: int, device: torch.device) -> None:
        """Reads and decodes this rank's share of the held-out clips. Raises ``UserError`` if a source has none long enough."""
        self.config, self.rank, self.device = config, rank, device
        reader = open_reader(config.data, config.train.seed, "heldout")
        size = config.diagnostics.batch
        starts = range(rank * size, config.diagnostics.clips, world * size)
        self._batches = [to_clips(reader.read_many(range(start, start + size))) for start in starts]
        # A rank without a batch of its own measures the first one and counts it zero times: the sums then have the right shapes.
        self._weight = 1.0 if self._batches else 0.0
        if not self._batches:
            self._batches = [to_clips(reader.read_many(range(size)))]
        self._monitor = Monitor(config.diagnostics, config.lam.bottleneck.codes)

    def evaluate(self, method: Method) -> Evaluation:
        """Indicators over all ranks' held-out clips. Collective."""
        method.eval()
        sums: dict[str, Tensor] = {}
        for clips in self._batches:
            for name, value in method.evaluate(clips.to(self.device)).items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value * self._weight
        method.train()
        flat = torch.cat([value.double().flatten() for value in sums.values()])
        dist.all_reduce(flat)
        parts = flat.split([value.numel() for value in sums.values()])
        total = {name: part.view(value.shape).cpu() for (name, value), part in zip(sums.items(), parts, strict=True)}
        indicators = self._monitor.indicators(total)
        verdict = self._monitor.verdict(indicators) if "perplexity" in indicators else ""
        return Evaluation(indicators, verdict, total)

    def video(self, method: Method) -> bytes | None:
        """mp4 of the first held-out clips: truth | rollout with own actions | with another clip's. None where nothing can be rolled out."""
        count = self.config.diagnostics.video_clips
        if count < 2 or not isinstance(method, CoTrain):
            return None
        first = self._batches[0].to(self.device)
        clips = Clips(first.video[:count], first.position[:count], first.source[:count])
        frames = rollout.grid(rollout.rollouts(method, clips)).numpy().transpose(0, 2, 3, 1)
        even = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
        return encode_mp4(np.ascontiguousarray(even), _VIDEO_FPS)

    def probe(self, method: Method) -> dict[str, float]:
        """R2 of ridge maps from codes to the true actions of held-out episodes, with its controls; empty without a source that has actions.

        ``probe_r2`` is for the signed components (where to), ``probe_r2_size`` for the action's norm (how much).
        """
        if self.config.diagnostics.probe_clips == 0 or not isinstance(method, CoTrain):
            return {}
        videos, actions, episodes, heldout = [], [], [], []
        for split in ("train", "heldout"):
            reader = open_reader(self.config.data, self.config.train.seed, split)
            for clip in _clips_with_actions(reader, self.config.diagnostics.probe_clips // 2):
                videos.append(clip.video)
                actions.append(clip.actions)
                episodes += [clip.episode] * len(clip.actions)
                heldout += [split == "heldout"] * len(clip.actions)
        if not any(heldout) or all(heldout):
            return {}
        video = torch.tensor(np.stack(videos)).to(self.device)
        features = {
            "codes": probe.code_features(method.lam, video),
            "random_idm": probe.code_features(probe.untrained_lam(self.config, video), video),
            "frame_difference": probe.difference_features(video),
        }
        names = {episode: number for number, episode in enumerate(dict.fromkeys(episodes))}
        numbers = torch.tensor([names[episode] for episode in episodes])
        features = {name: rows.cpu() for name, rows in features.items()}
        known = torch.tensor(np.concatenate(actions))
        suffix = {"codes": "", "random_idm": "_random_idm", "frame_difference": "_frame_difference", "permuted": "_permuted"}
        found: dict[str, float] = {}
        for target, values in (("probe_r2", known), ("probe_r2_size", known.norm(dim=1, keepdim=True))):
            scores = probe.probe_with_controls(features, values, numbers, torch.tensor(heldout), self.config.train.seed)
            found |= {f"{target}{suffix[name]}": score.r2 for name, score in scores.items()}
        return found


@dataclass(frozen=True)
class _KnownClip:
    video: np.ndarray
    actions: np.ndarray
    episode: str


def _clips_with_actions(reader: ClipReader, count: int) -> list[_KnownClip]:
    """Up to ``count`` clips (uint8 [T, 3, H, W]) with their actions [T-1, A], uncropped, by the order of the split."""
    known = [s for s, episodes in enumerate(reader.episodes) if any("actions.npy" in e.members for e in episodes)]
    found: list[_KnownClip] = []
    position = 0
    while known and len(found) < count and position < 64 * count:
        ref = reader.order.clip(position)
        episode = reader.episodes[ref.source][ref.episode]
        if ref.source in known and "actions.npy" in episode.members and ref.stride == 1:
            # What cannot be read is left out here; training counts and reports it.
            with contextlib.suppress(CorruptMember, CorruptClip):
                clip = reader.decode(ref, crop=None)
                rows = _load_actions(read_member(reader.folders[ref.source], episode, "actions.npy"))
                found.append(_KnownClip(clip, rows[ref.start : ref.start + len(clip) - 1], f"{ref.source}/{episode.key}"))
        position += 1
    return found


def _load_actions(data: bytes) -> np.ndarray:
    rows: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    return rows.astype(np.float32)


def code_histogram(sums: Mapping[str, Tensor], step: int) -> Figure | None:
    """Bars of code use per slot, sorted by use; none for a method without codes."""
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
