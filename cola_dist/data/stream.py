"""Order → Ray Data → batches of one worker.

One Ray Data task reads and decodes the clips of one rank for a few consecutive steps and returns them as one block. Blocks have equal size and
keep their order, so Ray Data's own splitter deals them to the ranks in turn; each rank still checks that it got the positions that are its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data.block import BlockAccessor, BlockMetadata

from cola_dist.data import order as orders
from cola_dist.data.latents import ENCODER_CPUS, EncodeLatents, Encoder
from cola_dist.data.reader import SKIP_REASONS, Batch, Clip, ClipReader, open_reader
from cola_dist.errors import UserError

__all__ = ["SKIP_REASONS", "Batch", "Clip", "ClipReader", "StreamPlan", "batches", "dataset", "open_reader"]

_READS_IN_TRANSIT = 2
"""Reads per rank that Ray Data itself holds back: each of its iterators is one block behind, its splitter one per rank."""
_BLOCKS_PER_TASK = 16
"""Blocks that one Ray Data task makes one after another where one reader is enough: Ray Data spends milliseconds on each task, before the first one
starts too."""
_READERS_PER_SPARE = 4
"""Where several readers work, so many of them share one more read task than they have cores: Ray Data takes 0.15 s to follow a task by the next one,
a read takes about a second, and the cores would stand idle meanwhile."""


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
    block_bytes = steps * share * (config.frames * 3 * config.resolution**2 + reader.label_bytes)
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
