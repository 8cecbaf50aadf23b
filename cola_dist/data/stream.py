"""Order → Ray Data → batches of one worker.

One Ray Data task reads and decodes the clips of one rank for a few consecutive steps and returns them as one block. Blocks have equal size and
keep their order, so Ray Data's own splitter deals them to the ranks in turn; each rank still checks that it got the positions that are its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data.block import BlockAccessor, BlockMetadata

from cola_dist.config import DataConfig
from cola_dist.data import order as orders
from cola_dist.data.cache import EpisodeCache
from cola_dist.data.decode import CorruptClip, decode_clip, to_clip
from cola_dist.data.shards import CorruptMember, Episode, ShardFolder, open_folder, read_member
from cola_dist.errors import UserError

MAX_ATTEMPTS = 16
_RATE_TOLERANCE = 1.25
_READS_IN_TRANSIT = 2
"""Reads per rank that Ray Data itself holds back: each of its iterators is one block behind, its splitter one per rank."""
_BLOCKS_PER_TASK = 16
"""Blocks that one Ray Data task makes one after another: Ray Data spends milliseconds on each task, before the first one starts too."""


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
        self._cache = EpisodeCache(config.decoded_cache_bytes)
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

    def __getstate__(self) -> dict[str, Any]:
        # What a process has decoded stays with it: the reader travels to others.
        return vars(self) | {"_cache": EpisodeCache(self.config.decoded_cache_bytes)}

    def decode(self, ref: orders.ClipRef, crop: tuple[float, float, float] | None) -> np.ndarray:
        """The clip that ``ref`` names, uint8 [T, 3, H, W]. Raises ``CorruptMember`` or ``CorruptClip``."""
        folder, episode = self.folders[ref.source], self.episodes[ref.source][ref.episode]
        frames, resolution = self.config.frames, self.config.resolution
        kept = self._cache.frames((ref.source, ref.episode), episode.frames, lambda: read_member(folder, episode, "mp4"))
        if kept is not None:
            return to_clip(kept[ref.start : ref.start + (frames - 1) * ref.stride + 1 : ref.stride], resolution, crop)
        return decode_clip(read_member(folder, episode, "mp4"), ref.start, frames, ref.stride, resolution, crop)

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
            f"find the damage with `python jobs/data.py lint {folder.uri}` and pack it again"
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


def dataset(reader: ClipReader, plan: StreamPlan, wait_for: Callable[[int], None]) -> ray.data.Dataset:
    """The Ray Data dataset of a plan: one block per read, one row per clip.

    ``wait_for(step)`` returns once training has come to that step. Each read waits until it is ``prefetch_reads`` reads ahead of training, so the
    object store holds that much and no more. (Ray Data's own limit on the object store makes its scheduler spin on a whole core as long as a
    finished block has to wait.)
    """
    config = reader.config
    source = _ClipSource(ray.put(reader), plan, plan.reads(config.steps_per_read), wait_for)
    steps = min(config.steps_per_read, plan.last_step - plan.first_step)
    block_bytes = steps * plan.global_batch // plan.world * config.frames * 3 * config.resolution**2
    # Ray Data joins the blocks of a task until they reach this size, and cuts those half as large again: just below one read's size it does neither.
    ray.data.DataContext.get_current().target_max_block_size = int(0.9 * block_bytes)
    ahead = plan.world * (config.prefetch_reads + _READS_IN_TRANSIT)
    return ray.data.read_datasource(
        source,
        num_cpus=config.reader_cpus,
        concurrency=-(-ahead // _BLOCKS_PER_TASK) + 1,
        override_num_blocks=len(source.chunks()),
    )


class _ClipSource(ray.data.Datasource):  # type: ignore[misc]
    """The reads of a plan as a Ray Data source: a few tasks, each of which yields its blocks as they are due."""

    def __init__(self, reader: Any, plan: StreamPlan, reads: list[tuple[int, int, int]], wait_for: Callable[[int], None]) -> None:
        super().__init__()
        self._reader, self._plan, self._reads, self._wait_for = reader, plan, reads, wait_for

    def chunks(self) -> list[list[tuple[int, int, int]]]:
        """The reads of each task. Reads shorter than the others, at the end of the plan, get a task each: see ``dataset``."""
        first, last, _ = self._reads[0]
        whole = [read for read in self._reads if read[1] - read[0] == last - first]
        return [whole[i : i + _BLOCKS_PER_TASK] for i in range(0, len(whole), _BLOCKS_PER_TASK)] + [[r] for r in self._reads[len(whole) :]]

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ray.data.ReadTask]:
        share = self._plan.global_batch // self._plan.world
        return [
            ray.data.ReadTask(
                partial(_read_blocks, self._reader, self._plan, chunk, self._wait_for),
                BlockMetadata(
                    num_rows=sum(last - first for first, last, _ in chunk) * share, size_bytes=None, exec_stats=None, input_files=None
                ),
            )
            for chunk in self.chunks()
        ]


_readers: dict[Any, ClipReader] = {}


def _reader_of_process(reader_ref: Any) -> ClipReader:
    """One reader per process and stream, so that the tasks which a process runs in turn share its cache."""
    if reader_ref not in _readers:
        _readers.clear()
        _readers[reader_ref] = ray.get(reader_ref)
    return _readers[reader_ref]


def _read_blocks(reader_ref: Any, plan: StreamPlan, reads: list[tuple[int, int, int]], wait_for: Callable[[int], None]) -> Iterator[Any]:
    reader = _reader_of_process(reader_ref)
    ahead = reader.config.steps_per_read * (reader.config.prefetch_reads + _READS_IN_TRANSIT)
    for first, last, rank in reads:
        if first - ahead > plan.first_step:
            wait_for(first - ahead)
        positions = (orders.rank_positions(step, plan.global_batch, rank, plan.world) for step in range(first, last))
        yield BlockAccessor.batch_to_block(vars(reader.read_many(itertools.chain.from_iterable(positions))))


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
