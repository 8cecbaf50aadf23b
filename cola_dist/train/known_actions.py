"""The probe of a run: what its codes tell of the true actions of clips that have some. Actions are used for nothing else."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cola_dist.config import RunConfig
from cola_dist.data.decode import CorruptClip
from cola_dist.data.shards import CorruptMember, read_member
from cola_dist.data.stream import ClipReader, open_reader
from cola_dist.diagnostics.alignment import plugin_mutual_information, true_action_perplexity
from cola_dist.evaluation import probe
from cola_dist.methods.cotrain import CoTrain

_BINS = 8
"""Cells that each dimension of an action is cut into, where actions are counted."""
_NAMES = {"codes": "", "random_idm": "_random_idm", "frame_difference": "_frame_difference", "permuted": "_permuted"}


def probe_actions(config: RunConfig, method: CoTrain, device: torch.device) -> dict[str, float]:
    """What the codes tell of true actions; empty without a source that has actions in both splits.

    ``probe_r2…``: R2 of ridge maps from codes to the actions of held-out episodes, with controls; ``probe_r2`` is for the signed components
    (where to), ``probe_r2_size`` for the action's norm (how much). ``action_information`` (nats, less its permuted control),
    ``action_information_share`` (of the actions' entropy) and ``action_perplexity`` (of the true actions, in cells) count all those clips.
    """
    rows = _rows(config, device)
    if rows is None:
        return {}
    features = {
        "codes": probe.code_features(method.lam, rows.video),
        "random_idm": probe.code_features(probe.untrained_lam(config, rows.video), rows.video),
        "frame_difference": probe.difference_features(rows.video),
    }
    features = {name: values.cpu() for name, values in features.items()}
    found: dict[str, float] = {}
    for target, values in (("probe_r2", rows.actions), ("probe_r2_size", rows.actions.norm(dim=1, keepdim=True))):
        scores = probe.probe_with_controls(features, values, rows.episode, rows.heldout, config.train.seed)
        found |= {f"{target}{_NAMES[name]}": score.r2 for name, score in scores.items()}
    found["action_perplexity"] = true_action_perplexity(rows.actions, _BINS)
    codes = probe.codes_of(method.lam, rows.video).cpu()
    if codes.shape[1]:
        known = plugin_mutual_information(codes, rows.actions, rows.episode, method.lam.bottleneck.codes, _BINS, config.train.seed)
        found |= {"action_information": known.corrected, "action_information_permuted": known.permuted_mean}
        found["action_information_share"] = known.normalised
    return found


@dataclass(frozen=True)
class _Rows:
    """Clips with actions and, a row per transition, what is known of them."""

    video: Tensor
    actions: Tensor
    episode: Tensor
    heldout: Tensor


def _rows(config: RunConfig, device: torch.device) -> _Rows | None:
    videos, actions, episodes, heldout = [], [], [], []
    for split in ("train", "heldout"):
        # By the first mixture alone: looks before and after a stage must be of the same clips.
        reader = open_reader(replace(config.data, stages={}), config.train.seed, split)
        for clip in _clips_with_actions(reader, config.diagnostics.probe_clips // 2):
            videos.append(clip.video)
            actions.append(clip.actions)
            episodes += [clip.episode] * len(clip.actions)
            heldout += [split == "heldout"] * len(clip.actions)
    if not any(heldout) or all(heldout):
        return None
    names = {episode: number for number, episode in enumerate(dict.fromkeys(episodes))}
    numbers = torch.tensor([names[episode] for episode in episodes])
    return _Rows(torch.tensor(np.stack(videos)).to(device), torch.tensor(np.concatenate(actions)), numbers, torch.tensor(heldout))


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
