"""A robot's real actions, and states where asked for, as labels of clips: which episodes have them, how they are read, how they scatter."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cola_dist.config import RunConfig
from cola_dist.data.decode import CorruptClip
from cola_dist.data.shards import CorruptMember, Episode, ShardFolder, read_member
from cola_dist.errors import UserError

ACTIONS, STATE = "actions.npy", "state.npy"
_SMALLEST_STD = 1e-6
"""A number that varies less is taken for constant, and is not divided by its deviation."""


@dataclass(frozen=True)
class Labels:
    """What is read beside the frames of each clip: actions ``[T-1, A]``, and states ``[T, S]`` with ``state``."""

    state: bool = False
    share: float = 1.0
    """Share of each source's training episodes that may be used."""
    seed: int = 0
    """Chooses those episodes."""
    action_dim: int = 0
    """A that every source must have; 0 = whatever the first one has."""
    state_dim: int = 0
    """Likewise S."""


def labels_of(config: RunConfig) -> Labels | None:
    """What the method of ``config`` needs to know of its clips; none where frames are enough."""
    if config.method != "adapt":
        return None
    adapt = config.adapt
    return Labels(adapt.use_state, adapt.share_of_episodes, config.train.seed, adapt.action_dim, adapt.state_dim)


def labelled(folder: ShardFolder, split: str, labels: Labels) -> tuple[Episode, ...]:
    """The episodes of a split that have what is asked for: in training the share that may be used, in ``heldout`` all of them.

    Shares are nested: with the same seed a smaller one is part of every larger one. Raises `UserError` where a split has no such episode.
    """
    wanted = {ACTIONS: "actions"} | ({STATE: "state"} if labels.state else {})
    found = folder.split(split)
    for ext, what in wanted.items():
        found = tuple(episode for episode in found if ext in episode.members)
        if not found:
            remedy = "leave it out of data.mixture" if ext == ACTIONS else "set --adapt.use-state False, or leave it out of data.mixture"
            raise UserError(f"data.mixture: source {folder.source!r} ({folder.uri}) has no {what} in its {split} split: {remedy}")
    return chosen(found, folder.source, labels) if split == "train" else found


def chosen(episodes: Sequence[Episode], source: str, labels: Labels) -> tuple[Episode, ...]:
    """The share of ``episodes`` that may be used, at least one, in their order: those that a keyed hash puts first."""

    def rank(episode: Episode) -> bytes:
        return hashlib.blake2b(f"{labels.seed}/{source}/{episode.key}".encode(), digest_size=8).digest()

    kept = {episode.key for episode in sorted(episodes, key=rank)[: max(1, math.ceil(labels.share * len(episodes)))]}
    return tuple(episode for episode in episodes if episode.key in kept)


def read_rows(folder: ShardFolder, episode: Episode, ext: str, dim: int = 0) -> np.ndarray:
    """Actions ``[frames - 1, A]`` or states ``[frames, S]`` of an episode, float32.

    Raises `CorruptClip` where they are none, not one row a transition or frame, not finite, or (with ``dim``) rows of another length.
    """
    rows_wanted = episode.frames - (ext == ACTIONS)
    try:
        loaded = np.load(io.BytesIO(read_member(folder, episode, ext)), allow_pickle=False)
        rows: np.ndarray = loaded.astype(np.float32)
    except (ValueError, TypeError, EOFError) as error:
        raise CorruptClip(f"{episode.key}.{ext} cannot be read ({error})") from error
    if rows.ndim != 2 or len(rows) != rows_wanted or dim not in (0, rows.shape[1]):
        raise CorruptClip(f"{episode.key}.{ext} has shape {list(rows.shape)} where [{rows_wanted}, {dim or 'any'}] belongs")
    if not np.isfinite(rows).all():
        raise CorruptClip(f"{episode.key}.{ext} holds values that are not finite")
    return rows


def check_strides(folder: ShardFolder, episodes: Sequence[Episode], strides: Sequence[int], rate_hz: float) -> None:
    """Raises `UserError` unless every frame of an episode is used: an action leads from one stored frame to the next.

    The actions between frames further apart could be summed (displacements) or not at all (a gripper's command), which nobody can tell from numbers.
    """
    for episode, stride in zip(episodes, strides, strict=True):
        if stride != 1:
            raise UserError(
                f"data.rate_hz is {rate_hz:g} but episode {episode.key!r} of source {folder.source!r} has {episode.fps:g} frames and actions per "
                f"second: pack it again with --cut.fps {rate_hz:g}, or set --data.rate-hz {episode.fps:g} (as in co-training)"
            )


def dims_of(folders: Sequence[ShardFolder], episodes: Sequence[Sequence[Episode]], labels: Labels) -> tuple[int, int]:
    """A and S (0 where no state is asked for), which all sources must share. Reads one episode of each. Raises `UserError`."""
    dims = []
    for ext, wanted, option in ((ACTIONS, labels.action_dim, "action"), (STATE, labels.state_dim, "state")):
        if ext == STATE and not labels.state:
            dims.append(0)
            continue
        first = ""
        for folder, found in zip(folders, episodes, strict=True):
            size = _sound_rows(folder, found[0], ext).shape[1]
            if wanted and size != wanted:
                than = f"{first} {wanted}" if first else f"the adapter takes {wanted} (adapt.{option}_dim)"
                raise UserError(
                    f"data.mixture: {option}s of source {folder.source!r} have {size} numbers, {than}: adapt to one kind of robot at a time"
                )
            wanted, first = size, first or f"those of source {folder.source!r} have"
        dims.append(wanted)
    return dims[0], dims[1]


def action_scale(folders: Sequence[ShardFolder], episodes: Sequence[Sequence[Episode]], dims: tuple[int, int]) -> dict[str, np.ndarray]:
    """``action_mean``, ``action_std`` ``[A]`` and ``state_mean``, ``state_std`` ``[S]``, float32, over all rows of ``episodes``.

    What hardly varies has a deviation of 1. Raises `UserError` for an episode whose rows cannot be read or have another length.
    """
    found: dict[str, np.ndarray] = {}
    for name, ext, dim in (("action", ACTIONS, dims[0]), ("state", STATE, dims[1])):
        count, total, squares = 0, np.zeros(dim), np.zeros(dim)
        for folder, own in zip(folders, episodes, strict=True):
            for episode in own if dim else ():
                rows = _sound_rows(folder, episode, ext, dim).astype(np.float64)
                count, total, squares = count + len(rows), total + rows.sum(0), squares + np.square(rows).sum(0)
        mean = total / max(count, 1)
        std = np.sqrt(np.maximum(squares / max(count, 1) - mean**2, 0))
        found |= {f"{name}_mean": mean.astype(np.float32), f"{name}_std": np.where(std < _SMALLEST_STD, 1, std).astype(np.float32)}
    return found


def _sound_rows(folder: ShardFolder, episode: Episode, ext: str, dim: int = 0) -> np.ndarray:
    """`read_rows`, before anything is trained: what is damaged is the user's to mend."""
    try:
        return read_rows(folder, episode, ext, dim)
    except (CorruptMember, CorruptClip) as error:
        raise UserError(
            f"source {folder.source!r}: {error}: find the damage with `python jobs/data.py lint {folder.uri}` and pack it again"
        ) from error
