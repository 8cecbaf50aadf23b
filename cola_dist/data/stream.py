"""Order → Ray Data → batches of one worker.

One Ray Data task reads and decodes the clips of one rank for a few consecutive steps and returns them as one block. Blocks have equal size and
keep their order, so Ray Data's own splitter deals them to the ranks in turn; each rank still checks that it got the positions that are its own.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data.block import BlockAccessor, BlockMetadata

from cola_dist import storage
from cola_dist.config import DataConfig
from cola_dist.data import order as orders
from cola_dist.data.cache import EpisodeCache
from cola_dist.data.decode import CorruptClip, Crop, decode_clip, to_clip
from cola_dist.data.disk_cache import DiskCache
from cola_dist.data.latents import ENCODER_CPUS, EncodeLatents, Encoder
from cola_dist.data.memory import Recycler
from cola_dist.data.shards import CorruptMember, Episode, ShardFolder, open_folder, read_member
from cola_dist.errors import UserError

MAX_ATTEMPTS = 16
SKIP_REASONS = ("checksum", "undecodable")
"""Why a clip is skipped: its bytes are not those that were packed, or they were packed but do not decode."""
_RATE_TOLERANCE = 1.25
_READS_IN_TRANSIT = 2
"""Reads per rank that Ray Data itself holds back: each of its iterators is one block behind, its splitter one per rank."""
_BLOCKS_PER_TASK = 16
"""Blocks that one Ray Data task makes one after another where one reader is enough: Ray Data spends milliseconds on each task, before the first one
starts too."""
_READERS_PER_SPARE = 4
"""Where several readers work, so many of them share one more read task than they have cores: Ray Data takes 0.15 s to follow a task by the next one,
a read takes about a second, and the cores would stand idle meanwhile."""


@dataclass(frozen=True)
class Batch:
    """Clips of one rank for one step: ``video`` uint8 [B, T, 3, H, W], ``position`` and ``source`` int64 [B].

    ``sample`` [B] names each clip, ``source/episode@start``. ``skipped`` [B] holds, where unreadable clips of the same source were replaced, one
    line for each: reason, file and what is wrong. ``cost`` float64 [B, 3] is what each clip took: bytes fetched, seconds of fetching them, seconds
    of decoding. ``failed`` [B] is empty, or says why the whole batch could not be read. ``latents`` float32 [B, L, C, h, w] is there where the
    stream encodes them.
    """

    video: np.ndarray
    position: np.ndarray
    source: np.ndarray
    sample: np.ndarray
    skipped: np.ndarray
    cost: np.ndarray
    failed: np.ndarray
    latents: np.ndarray | None = None


@dataclass(frozen=True)
class Clip:
    """One row of a batch, besides its video."""

    source: int
    sample: str
    skipped: str
    cost: tuple[float, float, float]


class ClipReader:
    """Reads the clips that an order names. Picklable: it travels to Ray Data tasks."""

    def __init__(
        self, folders: tuple[ShardFolder, ...], config: DataConfig, seed: int, split: str, global_batch: int | None = None
    ) -> None:
        """``folders`` in the order of ``_uris``; the rest as for ``open_reader``.

        Raises ``UserError`` if a folder has no episode of the split that is long enough, or two folders share a name.
        """
        self.folders, self.config, self.split = folders, config, split
        self.episodes: tuple[tuple[Episode, ...], ...] = tuple(folder.split(split) for folder in folders)
        self._open_caches()
        uris = _uris(config, split)
        sources = [
            orders.Source(folder.source, config.mixture.get(uri, 0.0), tuple(_span(e, config) for e in episodes), folder.content_hash)
            for folder, uri, episodes in zip(folders, uris, self.episodes, strict=True)
        ]
        names = [s.name for s in sources]
        if len(set(names)) < len(names):
            raise UserError(
                f"data.mixture: two shard folders are both named {max(names, key=names.count)!r}: pack one of them again with another --source"
            )
        stages = {}
        if split == "train" and config.stages:
            if global_batch is None:
                raise ValueError("data.stages are given by step: global_batch is needed to tell their positions")
            name_of = dict(zip(uris, names, strict=True))
            stages = {
                step * global_batch: {name_of[uri]: weight for uri, weight in mixture.items()} for step, mixture in config.stages.items()
            }
        try:
            self.order = orders.Order(sources, config.frames, config.mixture_block, seed, stages, config.temperature)
        except ValueError as error:
            raise UserError(f"data ({split} split): {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        # What a process has decoded and counted stays with it: the reader travels to others.
        return {name: value for name, value in vars(self).items() if name not in ("_cache", "_disk", "_memory", "_fetched")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_caches()
        storage.trust_endpoints()

    def _open_caches(self) -> None:
        self._cache = EpisodeCache(self.config.decoded_cache_bytes)
        self._disk = DiskCache(self.config.disk_cache, self.config.disk_cache_bytes) if self.config.disk_cache else None
        self._memory = Recycler()
        self._fetched = [0.0, 0.0]

    def decode(self, ref: orders.ClipRef, crop: Crop, into: np.ndarray | None = None) -> np.ndarray:
        """The clip that ``ref`` names, uint8 [T, 3, H, W], written to ``into`` where it is given. Raises ``CorruptMember`` or ``CorruptClip``."""
        episode = self.episodes[ref.source][ref.episode]
        frames, resolution = self.config.frames, self.config.resolution
        kept = self._cache.frames((ref.source, ref.episode), episode.frames, lambda: self._video(ref))
        if kept is not None:
            return to_clip(kept[ref.start : ref.start + (frames - 1) * ref.stride + 1 : ref.stride], resolution, crop, into)
        return decode_clip(self._video(ref), ref.start, frames, ref.stride, resolution, crop, into)

    def read(self, position: int, into: np.ndarray) -> Clip:
        """Write the clip at a position to ``into``, uint8 [T, 3, H, W]. What it is, and of unreadable ones that it replaces a line each."""
        skipped: list[str] = []
        self._fetched, began = [0.0, 0.0], time.perf_counter()
        for attempt in range(MAX_ATTEMPTS):
            ref = self.order.clip(position, attempt)
            folder, episode = self.folders[ref.source], self.episodes[ref.source][ref.episode]
            crop = orders.crop_of(ref.key, self.config.crop_scale) if self.config.random_crop and self.split == "train" else None
            try:
                self.decode(ref, crop, into)
            except (CorruptMember, CorruptClip) as error:
                reason = SKIP_REASONS[isinstance(error, CorruptClip)]
                skipped.append(f"{reason}: {folder.source}/{episode.shard}:{episode.key}.mp4: {error}")
                continue
            read_bytes, seconds = self._fetched
            cost = (read_bytes, seconds, time.perf_counter() - began - seconds)
            return Clip(ref.source, f"{folder.source}/{episode.key}@{ref.start}", "\n".join(skipped), cost)
        raise UserError(
            f"{MAX_ATTEMPTS} clips in a row could not be read for position {position}, the last: {skipped[-1]}: "
            f"find the damage with `python jobs/data.py lint {folder.uri}` and pack it again"
        )

    def read_many(self, positions: Iterable[int]) -> Batch:
        """Clips at the given positions as one batch. Its memory is used again once nobody holds any of it."""
        positions = list(positions)
        shape = (self.config.frames, 3, self.config.resolution, self.config.resolution)
        video = self._memory.take((len(positions), *shape))
        clips = [self.read(position, place) for position, place in zip(positions, video, strict=True)]
        return Batch(
            video=video,
            position=np.array(positions, dtype=np.int64),
            source=np.array([clip.source for clip in clips], dtype=np.int64),
            sample=np.array([clip.sample for clip in clips], dtype=object),
            skipped=np.array([clip.skipped for clip in clips], dtype=object),
            cost=np.array([clip.cost for clip in clips]),
            failed=np.array([""] * len(clips), dtype=object),
        )

    def unread(self, positions: Iterable[int], reason: str) -> Batch:
        """In place of a batch that could not be read at all: the reason, for whoever waits for the batch."""
        positions = list(positions)
        count, size = len(positions), self.config.resolution
        names = np.array([""] * count, dtype=object)
        return Batch(
            video=np.zeros((count, self.config.frames, 3, size, size), np.uint8),
            position=np.array(positions, dtype=np.int64),
            source=np.zeros(count, np.int64),
            sample=names,
            skipped=names,
            cost=np.zeros((count, 3)),
            failed=np.array([reason] * count, dtype=object),
        )

    def _video(self, ref: orders.ClipRef) -> bytes:
        """The episode's mp4, from the node's disk or from where the shards are."""
        folder, episode = self.folders[ref.source], self.episodes[ref.source][ref.episode]
        began = time.perf_counter()

        def fetch() -> bytes:
            data = read_member(folder, episode, "mp4")
            self._fetched[0] += len(data)
            return data

        data = self._disk.get(episode.members["mp4"].sha256, fetch) if self._disk else fetch()
        self._fetched[1] += time.perf_counter() - began
        return data


def open_reader(config: DataConfig, seed: int, split: str = "train", global_batch: int | None = None) -> ClipReader:
    """Open every shard folder of the mixture and its stages. Raises ``UserError`` for what is missing, damaged or too short.

    Stages hold for the split ``train`` and need ``global_batch``, clips per step, to place them. The split ``heldout`` is of the first mixture
    alone, so that held-out clips are the same over the whole run.
    """
    return ClipReader(tuple(open_folder(uri) for uri in _uris(config, split)), config, seed, split, global_batch)


def _uris(config: DataConfig, split: str) -> list[str]:
    """Shard folders in order of first appearance, so that a later stage leaves the sources before it where they are."""
    stages = [config.stages[step] for step in sorted(config.stages)] if split == "train" else []
    return list(dict.fromkeys(itertools.chain(config.mixture, *stages)))


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


def dataset(
    reader: ClipReader,
    plan: StreamPlan,
    wait_for: Callable[[int], None],
    encoder_factory: Callable[[], Encoder] | None = None,
    gpus: bool = False,
    readers: int = 1,
) -> ray.data.Dataset:
    """The Ray Data dataset of a plan: one block per read, one row per clip. As many as ``readers`` reads are made at the same time.

    With ``data.latents``, actors that ``encoder_factory`` gives their encoder add latents to each block; ``gpus`` gives each actor a GPU.

    ``wait_for(step)`` returns once training has come to that step. Each read waits until it is ``prefetch_reads`` reads ahead of training, so the
    object store holds that much and no more. (Ray Data's own limit on the object store makes its scheduler spin on a whole core as long as a
    finished block has to wait.)
    """
    config = reader.config
    tasks = readers + -(-readers // _READERS_PER_SPARE) if readers > 1 else 1
    # Besides what is decoded and what Ray Data holds back, each running task has a read in work. The reads of a task come one after another, so
    # several readers need tasks of one read.
    ahead = config.prefetch_reads + _READS_IN_TRANSIT + (-(-tasks // plan.world) if readers > 1 else 0)
    blocks_per_task = 1 if config.latents or readers > 1 else _BLOCKS_PER_TASK
    source = _ClipSource(
        ray.put(reader), plan, plan.reads(config.steps_per_read), _Pace(wait_for, ahead * config.steps_per_read), blocks_per_task
    )
    steps, share = min(config.steps_per_read, plan.last_step - plan.first_step), plan.global_batch // plan.world
    # Ray Data joins the blocks of a task until they reach this size, and cuts those half as large again: just below one read's size it does neither.
    # No size suits clips both without their latents and with them. So with latents there is none, and a task makes a single block:
    # that costs about a millisecond per read before the first one starts.
    block_bytes = steps * share * config.frames * 3 * config.resolution**2
    ray.data.DataContext.get_current().target_max_block_size = None if config.latents else int(0.9 * block_bytes)
    clips = ray.data.read_datasource(
        source,
        # Ray counts ten thousandths of a CPU: rounded down, as many tasks fit as are meant.
        num_cpus=math.floor(1e4 * config.reader_cpus * readers / tasks) / 1e4,
        concurrency=-(-plan.world * ahead // blocks_per_task) + 1,
        override_num_blocks=len(source.chunks()),
        **_placement(),
    )
    if not config.latents:
        return clips
    if encoder_factory is None:
        raise ValueError("data.latents: encoder_factory is needed to encode")
    return clips.map_batches(
        EncodeLatents,
        # One rank's clips of one step at a time: what a training step would encode. Blocks are whole steps, so they are neither joined nor cut.
        batch_size=share,
        batch_format="numpy",
        fn_constructor_args=(encoder_factory, config.latents_cache),
        compute=ray.data.ActorPoolStrategy(size=config.latent_workers),
        num_cpus=ENCODER_CPUS,
        num_gpus=1 if gpus else 0,
    )


def _placement() -> dict[str, Any]:
    """Options of read tasks: on nodes without accelerators where the cluster has any with room, else anywhere."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    accelerated = [node["NodeID"] for node in nodes if node["Resources"].get("GPU")]
    if not accelerated or len(accelerated) == len(nodes):
        return {}
    return {"label_selector": {"ray.io/node-id": f"!in({','.join(accelerated)})"}, "fallback_strategy": [{"label_selector": {}}]}


@dataclass(frozen=True)
class _Pace:
    """Lets a read begin once training is at most ``ahead`` steps behind it."""

    wait_for: Callable[[int], None]
    ahead: int

    def until_due(self, step: int, plan: StreamPlan) -> None:
        if step - self.ahead > plan.first_step:
            self.wait_for(step - self.ahead)


class _ClipSource(ray.data.Datasource):  # type: ignore[misc]
    """The reads of a plan as a Ray Data source: a few tasks, each of which yields its blocks as they are due."""

    def __init__(self, reader: Any, plan: StreamPlan, reads: list[tuple[int, int, int]], pace: _Pace, blocks_per_task: int) -> None:
        super().__init__()
        self._reader, self._plan, self._reads, self._pace, self._blocks_per_task = reader, plan, reads, pace, blocks_per_task

    def chunks(self) -> list[list[tuple[int, int, int]]]:
        """The reads of each task. Reads shorter than the others, at the end of the plan, get a task each: see ``dataset``."""
        first, last, _ = self._reads[0]
        whole = [read for read in self._reads if read[1] - read[0] == last - first]
        size = self._blocks_per_task
        return [whole[i : i + size] for i in range(0, len(whole), size)] + [[r] for r in self._reads[len(whole) :]]

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ray.data.ReadTask]:
        share = self._plan.global_batch // self._plan.world
        return [
            ray.data.ReadTask(
                partial(_read_blocks, self._reader, self._plan, chunk, self._pace),
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


def _read_blocks(reader_ref: Any, plan: StreamPlan, reads: list[tuple[int, int, int]], pace: _Pace) -> Iterator[Any]:
    reader = _reader_of_process(reader_ref)
    for first, last, rank in reads:
        pace.until_due(first, plan)
        positions = (orders.rank_positions(step, plan.global_batch, rank, plan.world) for step in range(first, last))
        wanted = list(itertools.chain.from_iterable(positions))
        try:
            batch = reader.read_many(wanted)
        except (UserError, OSError) as error:
            # As data: an exception would end Ray Data's pipeline before training could write a checkpoint.
            batch = reader.unread(wanted, str(error))
        yield BlockAccessor.batch_to_block({name: column for name, column in vars(batch).items() if column is not None})


def batches(iterator: ray.data.DataIterator, plan: StreamPlan, rank: int, prefetch: int) -> Iterator[Batch]:
    """This rank's batch of each step of the plan, in order.

    Raises ``UserError`` where a batch could not be read, and ``RuntimeError`` if Ray Data delivers anything else.
    """
    share = plan.global_batch // plan.world
    stream = iter(iterator.iter_batches(batch_size=share, prefetch_batches=prefetch, batch_format="numpy"))
    for step in range(plan.first_step, plan.last_step):
        batch = Batch(**next(stream))
        expected = np.arange(share) + orders.rank_positions(step, plan.global_batch, rank, plan.world).start
        if not np.array_equal(batch.position, expected):
            raise RuntimeError(
                f"step {step}, rank {rank}: expected positions {expected[0]}…{expected[-1]}, Ray Data delivered {batch.position.tolist()}"
            )
        if reasons := set(batch.failed) - {""}:
            raise UserError(min(reasons))
        yield batch


def _span(episode: Episode, config: DataConfig) -> orders.EpisodeSpan:
    if episode.fps * _RATE_TOLERANCE < config.rate_hz:
        raise UserError(
            f"data.rate_hz is {config.rate_hz:g} but episode {episode.key!r} in {episode.shard} has {episode.fps:g} frames per second: "
            f"lower data.rate_hz to {episode.fps:g}"
        )
    return orders.EpisodeSpan(episode.frames, max(1, round(episode.fps / config.rate_hz)))
