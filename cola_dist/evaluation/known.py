"""Clips whose true actions are known. Probes read the actions, nothing else does."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cola_dist.config import DataConfig
from cola_dist.data.decode import CorruptClip
from cola_dist.data.labels import ACTIONS, read_rows
from cola_dist.data.shards import CorruptMember
from cola_dist.data.stream import ClipReader, open_reader


@dataclass(frozen=True)
class KnownRows:
    """Clips with actions and, a row per transition (M of them), what is known of it."""

    video: Tensor
    """uint8 ``[B, T, 3, H, W]``."""
    actions: Tensor
    """fp32 ``[M, A]``."""
    episode: Tensor
    """int64 ``[M]``, a number per episode."""
    heldout: Tensor
    """bool ``[M]``."""


def known_rows(config: DataConfig, seed: int, clips: int, device: torch.device, source: str | None = None) -> KnownRows | None:
    """Up to ``clips`` clips of each split, of all sources or of the one of that name; none where a split has no actions."""
    videos, actions, episodes, heldout = [], [], [], []
    for split in ("train", "heldout"):
        for clip in _clips_with_actions(open_reader(config, seed, split), clips, source):
            videos.append(clip.video)
            actions.append(clip.actions)
            episodes += [clip.episode] * len(clip.actions)
            heldout += [split == "heldout"] * len(clip.actions)
    if not any(heldout) or all(heldout):
        return None
    names = {episode: number for number, episode in enumerate(dict.fromkeys(episodes))}
    numbers = torch.tensor([names[episode] for episode in episodes])
    return KnownRows(torch.tensor(np.stack(videos)).to(device), torch.tensor(np.concatenate(actions)), numbers, torch.tensor(heldout))


def sources_with_actions(reader: ClipReader) -> list[str]:
    """Names of the sources of which an episode of the reader's split has actions."""
    episodes = zip(reader.folders, reader.episodes, strict=True)
    return [folder.source for folder, known in episodes if any(ACTIONS in episode.members for episode in known)]


@dataclass(frozen=True)
class _KnownClip:
    video: np.ndarray
    actions: np.ndarray
    episode: str


def _clips_with_actions(reader: ClipReader, count: int, source: str | None) -> list[_KnownClip]:
    """Up to ``count`` clips (uint8 [T, 3, H, W]) with their actions [T-1, A], uncropped, by the order of the split."""
    having = [name for name in sources_with_actions(reader) if source in (None, name)]
    known = [number for number, folder in enumerate(reader.folders) if folder.source in having]
    found: list[_KnownClip] = []
    position = 0
    while known and len(found) < count and position < 64 * count:
        ref = reader.order.clip(position)
        episode = reader.episodes[ref.source][ref.episode]
        if ref.source in known and ACTIONS in episode.members and ref.stride == 1:
            # What cannot be read is left out here; training counts and reports it.
            with contextlib.suppress(CorruptMember, CorruptClip):
                clip = reader.decode(ref, crop=None)
                rows = read_rows(reader.folders[ref.source], episode, ACTIONS)
                found.append(_KnownClip(clip, rows[ref.start : ref.start + len(clip) - 1], f"{ref.source}/{episode.key}"))
        position += 1
    return found
