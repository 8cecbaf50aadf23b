"""From a checked configuration to a finished run, on the driver: Ray, Ray Train, progress, interrupt, result."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.train
import ray.train.torch

from cola_dist import storage
from cola_dist.config import RunConfig
from cola_dist.data import stream
from cola_dist.data.stream import Batch, ClipReader, StreamPlan
from cola_dist.errors import UserError
from cola_dist.settings import to_yaml
from cola_dist.train.board import create_board
from cola_dist.train.loop import plan_stream
from cola_dist.train.progress import ProgressView
from cola_dist.train.session import deliver_waiting, run_worker

_REPORT_EVERY_S = 0.3
_READERS_AT_LEAST = 1


class RayWorker:
    """One Ray Train worker, seen as the loop sees it."""

    def __init__(self, board: Any, steps_per_read: int) -> None:
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self._board, self._steps_per_read = board, steps_per_read
        self._answer: Any = None
        self._asked_at = 0.0
        self._stop = False

    def batches(self, reader: ClipReader, plan: StreamPlan) -> Iterator[Batch]:
        """This rank's shard of the dataset that Ray Train made for this worker group."""
        shard = ray.train.get_dataset_shard("clips")
        return stream.batches(shard, plan, self.rank, reader.config.steps_per_read * reader.config.prefetch_reads)

    def report(self, progress: Mapping[str, Any]) -> bool:
        """Post progress a few times a second; the answer to an earlier post says whether to stop. Readers hear of each read's first step."""
        now = time.monotonic()
        if progress["step"] % self._steps_per_read == 0:
            self._board.advance.remote(progress["step"])
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._stop, self._answer = ray.get(self._answer), None
        if self._answer is None and now - self._asked_at >= _REPORT_EVERY_S:
            self._answer, self._asked_at = self._board.show.remote(dict(progress)), now
        return self._stop


def launch(config: RunConfig, run_uri: str, debug: bool = False) -> dict[str, Any]:
    """Train ``config`` in the folder ``run_uri`` (continuing what is there) and return the result that rank 0 wrote.

    Raises ``UserError`` for what the user must mend, and whatever ended the run otherwise. SIGTERM and Ctrl-C make the run write a
    checkpoint and end as ``interrupted``.
    """
    storage.write_bytes(storage.join(run_uri, "config.yaml"), to_yaml(config).encode())
    reader = stream.open_reader(config.data, config.train.seed)
    _connect(config, debug)
    board = create_board(config.train.workers)
    outcome = _Fit(_trainer(config, run_uri, board, reader))
    with _Interrupt(board), ProgressView(config) as view:
        while outcome.running():
            view.update(ray.get(board.progress.remote()))
            outcome.join(0.5)
    refused = ray.get(board.user_error.remote())
    if refused:
        raise UserError(refused)
    outcome.raise_error()
    deliver_waiting(config)
    result: dict[str, Any] = json.loads(storage.read_bytes(storage.join(run_uri, "result.json")))
    return result


def _connect(config: RunConfig, debug: bool) -> None:
    """Join the cluster that ``RAY_ADDRESS`` names (``ray job submit`` sets it), or start one in this machine for this run."""
    train = config.train
    needed = train.workers * train.cpus_per_worker + _READERS_AT_LEAST * config.data.reader_cpus
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=debug)
    else:
        cpus = max(os.cpu_count() or 1, int(-(-needed // 1)))
        # Nobody reads a cluster's metrics that lives for one run and has no dashboard; its ten processes collect them every second.
        os.environ.setdefault("RAY_enable_metrics_collection", "false")
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=debug, logging_level="INFO" if debug else "ERROR")
    have = ray.cluster_resources()
    if have.get("CPU", 0) < needed:
        raise UserError(
            f"the cluster has {have.get('CPU', 0):g} CPUs, this run needs {needed:g} ({train.workers} workers of {train.cpus_per_worker:g} "
            f"and a reader of {config.data.reader_cpus:g}): add nodes, or lower train.workers, train.cpus_per_worker or data.reader_cpus"
        )
    if train.gpus and have.get("GPU", 0) < train.workers:
        raise UserError(
            f"the cluster has {have.get('GPU', 0):g} GPUs, this run needs {train.workers}: add nodes, lower train.workers or set --train.gpus False"
        )


def _trainer(config: RunConfig, run_uri: str, board: Any, reader: ClipReader) -> ray.train.torch.TorchTrainer:
    train = config.train

    def train_worker() -> None:
        if ray.get(board.user_error.remote()):
            return
        try:
            run_worker(config, run_uri, RayWorker(board, config.data.steps_per_read))
        except UserError as error:
            ray.get(board.refuse.remote(str(error)))
            raise

    def clips() -> ray.data.Dataset:
        # Ray Train calls this when it starts a worker group: after a failure the stream begins where the newest checkpoint stands.
        return stream.dataset(reader, plan_stream(config, run_uri), lambda step: ray.get(board.reached.remote(step)))

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    # Reading a task's memory map every second costs more than reading its clips; what it finds is used for a statistic alone.
    context.memory_usage_poll_interval_s = None
    options = ray.data.ExecutionOptions(preserve_order=True)
    gpu = {"GPU": 1.0} if train.gpus else {}
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    return ray.train.torch.TorchTrainer(
        train_worker,
        scaling_config=ray.train.ScalingConfig(
            num_workers=train.workers, use_gpu=train.gpus, resources_per_worker={"CPU": train.cpus_per_worker} | gpu
        ),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if train.gpus else "gloo"),
        datasets={"clips": clips},
        dataset_config=ray.train.DataConfig(execution_options=options),
        run_config=ray.train.RunConfig(
            name=run_uri.rstrip("/").rsplit("/", 1)[-1],
            # Ray Train keeps only its own bookkeeping there: checkpoints and results are ours.
            storage_path=str(Path(tempfile.gettempdir()) / "cola-dist" / "ray-train"),
            failure_config=ray.train.FailureConfig(max_failures=train.max_restarts),
        ),
    )


class _Fit:
    """``TorchTrainer.fit`` in a thread, so that the main thread can show progress and hear signals."""

    def __init__(self, trainer: ray.train.torch.TorchTrainer) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(trainer,), name="fit", daemon=True)
        self._thread.start()

    def _run(self, trainer: ray.train.torch.TorchTrainer) -> None:
        try:
            trainer.fit()
        except BaseException as error:  # raised again by raise_error(), in the main thread
            self._error = error

    def running(self) -> bool:
        return self._thread.is_alive()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error


class _Interrupt:
    """While entered, SIGTERM and SIGINT ask the run to write a checkpoint and end; a third one ends the process at once."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        self._count += 1
        if self._count >= 3:
            raise SystemExit(1)
        self._board.ask_to_stop.remote()
