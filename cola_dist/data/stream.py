"""Order → Ray Data → batches of one worker.

One Ray Data task reads and decodes the clips of one rank for a few consecutive steps and returns them as one block. Blocks have equal size and
keep their order, so Ray Data's own splitter deals them to the ranks in turn; each rank still checks that it got the positions that are its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cola_dist.config import DataConfig
from cola_dist.data import order as orders
from cola_dist.data.decode import CorruptClip, decode_clip
from cola_dist.data.shards import CorruptMember, Episode, ShardFolder, open_folder, read_member
from cola_dist.errors import UserError

if TYPE_CHECKING:
    import ray.data

MAX_ATTEMPTS = 16
_RATE_TOLERANCE = 1.25


@dataclass(frozen=True)
class Batch:
    """Clips of one rank for one step: ``video`` uint8 [B, T, 3, H, W], ``position`` and ``source`` int64 [B].

    ``sample`` [B] names each clip, ``source/episode@start``. ``skipped`` [B] holds, where unreadable clips of the same source were replaced, one
    line for each: file and reason.
    """

    video: np.ndarray
    position: np.ndarray
    source: np.ndarray
    sample: np.ndarray
    skipped: np.ndarray


class ClipReader:
    """Reads the clips that an order names. Picklable: it travels to Ray Data tasks."""

    def __init__(self, folders: tuple[ShardFolder, ...], config: DataConfig, seed: int, split: str) -> None:
        """Raises ``UserError`` if a folder has no episode of the split that is long enough, or two folders share a name."""
        self.folders, self.config, self.split = folders, config, split
        self.episodes: tuple[tuple[Episode, ...], ...] = tuple(folder.split(split) for folder in folders)
        sources = [
            orders.Source(folder.source, weight, tuple(_span(e, config) for e in episodes), folder.content_hash)
            for folder, weight, episodes in zip(folders, config.mixture.values(), self.episodes, strict=True)
        ]
        names = [s.name for s in sources]
        if len(set(names)) < len(names):
            raise UserError(
                f"data.mixture: two shard folders are both named {max(names, key=names.count)!r}: pack one of them again with another --source"
            )
        try:
            self.order = orders.Order(sources, config.frames, config.mixture_block, seed)
        except ValueError as error:
            raise UserError(f"data ({split} split): {error}") from error

    def decode(self, ref: orders.ClipRef, crop: tuple[float, float, float] | None) -> np.ndarray:
        """The clip that ``ref`` names, uint8 [T, 3, H, W]. Raises ``CorruptMember`` or ``CorruptClip``."""
        mp4 = read_member(self.folders[ref.source], self.episodes[ref.source][ref.episode], "mp4")
        return decode_clip(mp4, ref.start, self.config.frames, ref.stride, self.config.resolution, crop)

    def read(self, position: int) -> tuple[np.ndarray, int, str, str]:
        """The clip at a position (uint8 [T, 3, H, W]), its source, its sample id, and a line for each unreadable clip that it replaces."""
        skipped: list[str] = []
        for attempt in range(MAX_ATTEMPTS):
            ref = self.order.clip(position, attempt)
            folder, episode = self.folders[ref.source], self.episodes[ref.source][ref.episode]
            crop = orders.crop_of(ref.key, self.config.crop_scale) if self.config.random_crop and self.split == "train" else None
            try:
                clip = self.decode(ref, crop)
            except (CorruptMember, CorruptClip) as error:
                skipped.append(f"{folder.source}/{episode.shard}:{episode.key}.mp4: {error}")
                continue
            return clip, ref.source, f"{folder.source}/{episode.key}@{ref.start}", "\n".join(skipped)
        raise UserError(
            f"{MAX_ATTEMPTS} clips in a row could not be read for position {position}, the last: {skipped[-1]}: "
            f"find the damage with `python jobs/pack.py lint {folder.uri}` and pack it again"
        )

    def read_many(self, positions: Iterable[int]) -> Batch:
        """Clips at the given positions as one batch."""
        positions = list(positions)
        clips, sources, samples, skipped = zip(*(self.read(position) for position in positions), strict=True)
        return Batch(
            video=np.stack(clips),
            position=np.array(positions, dtype=np.int64),
            source=np.array(sources, dtype=np.int64),
            sample=np.array(samples, dtype=object),
            skipped=np.array(skipped, dtype=object),
        )


def open_reader(config: DataConfig, seed: int, split: str = "train") -> ClipReader:
    """Open every shard folder of the mixture. Raises ``UserError`` for what is missing, damaged or too short."""
    return ClipReader(tuple(open_folder(uri) for uri in config.mixture), config, seed, split)


@dataclass(frozen=True)
class StreamPlan:
    """Which steps are streamed, and how the global batch is shared out."""

    first_step: int
    last_step: int
    """One past the last step."""
    global_batch: int
    world: int

    def reads(self, steps_per_read: int) -> list[tuple[int, int, int]]:
        """(first step, one past the last step, rank) of each read, in delivery order."""
        groups = range(self.first_step, self.last_step, steps_per_read)
        return [(first, min(first + steps_per_read, self.last_step), rank) for first in groups for rank in range(self.world)]


def dataset(reader: ClipReader, plan: StreamPlan) -> ray.data.Dataset:
    """The Ray Data dataset of a plan: one block per read, one row per clip."""
    import ray.data

    reads = plan.reads(reader.config.steps_per_read)

    def read(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        first, last, rank = reads[int(rows["id"][0])]
        steps = (orders.rank_positions(step, plan.global_batch, rank, plan.world) for step in range(first, last))
        return vars(reader.read_many(itertools.chain.from_iterable(steps)))

    return ray.data.range(len(reads), override_num_blocks=len(reads)).map_batches(read, batch_size=1, num_cpus=reader.config.reader_cpus)


def batches(iterator: ray.data.DataIterator, plan: StreamPlan, rank: int, prefetch: int) -> Iterator[Batch]:
    """This rank's batch of each step of the plan, in order. Raises ``RuntimeError`` if Ray Data delivers anything else."""
    share = plan.global_batch // plan.world
    stream = iter(iterator.iter_batches(batch_size=share, prefetch_batches=prefetch, batch_format="numpy"))
    for step in range(plan.first_step, plan.last_step):
        batch = Batch(**next(stream))
        expected = np.arange(share) + orders.rank_positions(step, plan.global_batch, rank, plan.world).start
        if not np.array_equal(batch.position, expected):
            raise RuntimeError(
                f"step {step}, rank {rank}: expected positions {expected[0]}…{expected[-1]}, Ray Data delivered {batch.position.tolist()}"
            )
        yield batch


def _span(episode: Episode, config: DataConfig) -> orders.EpisodeSpan:
    if episode.fps * _RATE_TOLERANCE < config.rate_hz:
        raise UserError(
            f"data.rate_hz is {config.rate_hz:g} but episode {episode.key!r} in {episode.shard} has {episode.fps:g} frames per second: "
            f"lower data.rate_hz to {episode.fps:g}"
        )
    return orders.EpisodeSpan(episode.frames, max(1, round(episode.fps / config.rate_hz)))
