"""From a checked configuration to a finished run, on the driver: Ray, Ray Train, progress, interrupt, result."""

from __future__ import annotations

import logging
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.train
import ray.train.torch
from ray.exceptions import RayError

from cola_dist import logs, runtime, storage
from cola_dist.config import RunConfig, TrainConfig, group_sizes
from cola_dist.data import stream
from cola_dist.data.labels import labels_of
from cola_dist.data.latents import ENCODER_CPUS
from cola_dist.data.stream import Batch, ClipReader, StreamPlan
from cola_dist.errors import RunError, UserError
from cola_dist.redact import redact
from cola_dist.train.board import create_board
from cola_dist.train.elastic import ElasticTrainer, SavedResize, leaving
from cola_dist.train.encoding import EncoderFactory
from cola_dist.train.hardware import compute_clock
from cola_dist.train.job import write_config
from cola_dist.train.loop import plan_stream
from cola_dist.train.meters import Meters, NullMeters, RayMeters
from cola_dist.train.progress import ProgressView
from cola_dist.train.restarts import Restarts, kept
from cola_dist.train.session import deliver_waiting, identity, run_worker
from cola_dist.train.shelf import DamagedCheckpoint
from cola_dist.train.worker import Wish

_log = logging.getLogger("cola_dist.train")
_REPORT_EVERY_S = 0.3
_READERS_AT_LEAST = 1
_NO_SIGN_OF_LIFE_S = 600.0
"""Ray Train's own limit for a worker that does not answer."""
_ROUNDING = 1e-6
"""Shares of CPUs do not add up exactly."""


class RayWorker:
    """One Ray Train worker, seen as the loop sees it."""

    def __init__(self, board: Any, steps_per_read: int, run: str) -> None:
        """``run`` is the run's identity, under which its figures are shown."""
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.meters: Meters = NullMeters()
        if self.rank == 0:
            self.meters = RayMeters(run)
            self.meters.show({"restarts": ray.get(board.begin.remote())})
        self.device = ray.train.torch.get_device()
        self._board, self._steps_per_read = board, steps_per_read
        self._answer: Any = None
        self._asked_at = 0.0
        self._stop = False
        self._saves = -1

    def batches(self, reader: ClipReader, plan: StreamPlan) -> Iterator[Batch]:
        """This rank's shard of the dataset that Ray Train made for this worker group."""
        shard = ray.train.get_dataset_shard("clips")
        return stream.batches(shard, plan, self.rank, reader.config.steps_per_read * reader.config.prefetch_reads)

    def clock(self) -> float:
        """`hardware.compute_clock` of the device."""
        return compute_clock(self.device)

    def report(self, progress: Mapping[str, Any]) -> Wish:
        """Post progress a few times a second; the answer to an earlier post says what is asked for. Readers hear of each read's first step."""
        now, save = time.monotonic(), False
        if progress["step"] % self._steps_per_read == 0:
            self._board.advance.remote(progress["step"])
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            (self._stop, saves), self._answer = ray.get(self._answer), None
            # What was asked for before this group began has no meaning for it.
            save, self._saves = saves > self._saves >= 0, saves
        if self._answer is None and now - self._asked_at >= _REPORT_EVERY_S:
            self._answer, self._asked_at = self._board.show.remote(dict(progress)), now
        return "stop" if self._stop else "save" if save else "go on"

    def tell(self, line: str) -> None:
        """Write the line to the worker's log, and on the board for the driver to show."""
        _log.warning("%s", line)
        self._board.note.remote(redact(line))


@dataclass(frozen=True)
class Place:
    """Where a run stands among others of the same cluster."""

    cpus: float | None = None
    """CPUs that its workers and readers may take together; none = all of the cluster's, which may grow."""
    board: str = ""
    """A name under which others in the job find its board; empty = none."""
    parent: str | None = None
    """Identity of the MLflow run that it is a trial of."""


def launch(config: RunConfig, run_uri: str, debug: bool = False, parent: str | None = None) -> dict[str, Any]:
    """Train ``config`` in the folder ``run_uri`` (continuing what is there) and return the result that rank 0 wrote.

    ``parent`` is the identity of the MLflow run that this one is shown inside of.
    Raises ``UserError`` for what the user must mend, ``RunError`` where workers or cluster were lost for good, and whatever ended the run otherwise.
    SIGTERM and Ctrl-C make the run write a checkpoint and end as ``interrupted``.
    """
    logs.bind(run=identity(run_uri, parent))
    reader = prepare(config, run_uri)
    connect(config, debug)
    training = Training(config, run_uri, reader, Place(parent=parent))
    try:
        with Interrupt(training.ask_to_stop), ProgressView(config) as view:
            while training.running(0.5):
                view.update(training.progress())
                view.note(training.notes())
            view.note(training.notes())
        result = training.result()
    except RayError as error:
        raise RunError(f"the cluster broke down under the run ({type(error).__name__}): {kept(run_uri)}") from error
    deliver_waiting(config)
    return result


class Training:
    """A run under Ray Train that goes on beside the caller, in a process that has joined a cluster."""

    def __init__(self, config: RunConfig, run_uri: str, reader: ClipReader, place: Place) -> None:
        """Begin to train ``config`` in ``run_uri``, or continue what is there, on what ``reader`` reads."""
        self._run_uri = run_uri
        self._board = create_board(config.train.workers, place.board)
        self._leaving = frozenset[str]()
        self._fit = _Fit(_trainer(config, run_uri, self._board, reader, place))

    def running(self, seconds: float) -> bool:
        """Whether the run still goes on after ``seconds``; returns as soon as it has ended. A node that is about to go has it saved.

        Raises ``RunError`` where this machine's cluster broke down.
        """
        self._fit.join(seconds)
        if lost := runtime.lost_processes():
            raise RunError(f"this machine's Ray broke down under the run ({', '.join(lost)} ended): {kept(self._run_uri)}")
        if (nodes := leaving()) - self._leaving:
            self._board.ask_to_save.remote()
        self._leaving = nodes
        return self._fit.running()

    def progress(self) -> dict[str, Any]:
        """The newest progress; empty until the first step is done."""
        progress: dict[str, Any] = ray.get(self._board.progress.remote())
        return progress

    def notes(self) -> list[str]:
        """What the user should know so far, a line each."""
        notes: list[str] = ray.get(self._board.notes.remote())
        return notes

    def ask_to_stop(self) -> None:
        """Have the run write a checkpoint and end as ``interrupted``."""
        self._board.ask_to_stop.remote()

    def result(self) -> dict[str, Any]:
        """What rank 0 wrote at the end. Raises ``UserError`` for what the user must mend, and whatever ended the run otherwise."""
        refused = ray.get(self._board.user_error.remote())
        if refused:
            raise UserError(refused)
        broken = ray.get(self._board.broken.remote())
        if broken:
            raise RunError(broken)
        self._fit.raise_error()
        result: dict[str, Any] = storage.read_json(storage.join(self._run_uri, "result.json"))
        return result


def prepare(config: RunConfig, run_uri: str) -> ClipReader:
    """Write the run's configuration and open its data, before anything is started. Raises ``UserError`` for what the user must mend."""
    write_config(config, run_uri)
    if config.data.latents_cache:
        storage.exists(config.data.latents_cache)  # an address that leads nowhere is refused now; in the actors it would be a warning
    return stream.open_reader(config.data, config.train.seed, "train", config.optim.global_batch, labels_of(config))


def demand(config: RunConfig) -> tuple[float, int]:
    """CPUs and GPUs without which a run does not get on: its workers, a reader, its encoders."""
    train, workers = config.train, config.train.least_workers
    encoders = config.data.latent_workers if config.data.latents else 0
    cpus = workers * train.cpus_per_worker + _READERS_AT_LEAST * config.data.reader_cpus + encoders * ENCODER_CPUS
    return cpus, workers + encoders if train.gpus else 0


def _bundles(config: RunConfig) -> list[dict[str, float]]:
    """`demand`, as what has to lie on one node each."""
    train, gpu = config.train, {"GPU": 1.0} if config.train.gpus else {}
    encoders = config.data.latent_workers if config.data.latents else 0
    workers = [{"CPU": train.cpus_per_worker} | gpu] * train.least_workers
    return [*workers, *[{"CPU": config.data.reader_cpus}] * _READERS_AT_LEAST, *[{"CPU": ENCODER_CPUS} | gpu] * encoders]


def connect(config: RunConfig, debug: bool, times: int = 1) -> None:
    """Join a cluster, or start one, in which ``times`` runs such as ``config`` fit at once. Raises ``UserError`` where they do not.

    A cluster that has too little is waited for as `runtime.make_room` says.
    """
    train, (cpus, gpus) = config.train, demand(config)
    workers = train.least_workers
    runtime.connect(times * cpus, debug)
    have, least = ray.cluster_resources(), times * cpus - _ROUNDING
    if have.get("CPU", 0) < least or have.get("GPU", 0) < times * gpus:
        runtime.make_room(times * _bundles(config))
        have = ray.cluster_resources()
    encoders = config.data.latent_workers if config.data.latents else 0
    runs, each = (f"{times} such runs at once need", " per run") if times > 1 else ("this run needs", "")
    if have.get("CPU", 0) < least:
        raise UserError(
            f"the cluster has {have.get('CPU', 0):g} CPUs, {runs} {times * cpus:g} ({workers} workers of {train.cpus_per_worker:g}, "
            f"a reader of {config.data.reader_cpus:g} and {encoders} encoders of {ENCODER_CPUS:g} each{each}): "
            "add nodes, or lower train.workers (or train.min_workers), train.cpus_per_worker, data.reader_cpus or data.latent_workers"
        )
    if have.get("GPU", 0) < times * gpus:
        raise UserError(
            f"the cluster has {have.get('GPU', 0):g} GPUs, {runs} {times * gpus} ({workers} workers and {encoders} "
            f"encoders{each}): add nodes, lower train.workers or data.latent_workers, or set --train.gpus False"
        )


def _trainer(config: RunConfig, run_uri: str, board: Any, reader: ClipReader, place: Place) -> ray.train.torch.TorchTrainer:
    train, log_format = config.train, logs.chosen()

    def train_worker() -> None:
        if ray.get(board.user_error.remote()):
            return
        logs.set_up(log_format, alone=True)
        storage.trust_endpoints()
        worker = RayWorker(board, config.data.steps_per_read, identity(run_uri, place.parent))
        try:
            run_worker(config, run_uri, worker, place.parent)
        except DamagedCheckpoint:
            raise  # nobody need mend it: the next worker group falls back to the checkpoint before
        except UserError as error:
            # Ray writes down what a worker raises, and what that was raised from.
            told = redact(str(error))
            ray.get(board.refuse.remote(told))
            raise UserError(told) from None
        finally:
            worker.meters.close()

    elastic = bool(train.min_workers) and place.cpus is None

    def free_cpus(workers: int) -> float:
        cpus = ray.cluster_resources().get("CPU", 0) if place.cpus is None else place.cpus
        return float(cpus) - workers * train.cpus_per_worker

    def clips() -> ray.data.Dataset:
        # Ray Train calls this when it starts a worker group: after a failure the stream begins where the newest whole checkpoint stands.
        workers = ray.get(board.workers.remote()) or train.workers
        # A reader keeps a whole core busy, whatever it reserves.
        readers = max(1, int(free_cpus(workers) / max(1.0, config.data.reader_cpus)))
        plan = plan_stream(config, run_uri, workers, lambda line: ray.get(board.note.remote(line)))
        factory = EncoderFactory(config)
        return stream.dataset(reader, plan, lambda step: ray.get(board.reached.remote(step)), factory, train.gpus, readers)

    # Readers that took more than the run's share would hold what the workers of the next run wait for.
    limits = None if place.cpus is None else ray.data.ExecutionResources(cpu=free_cpus(train.workers))
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(min(_NO_SIGN_OF_LIFE_S, train.collective_timeout_s))
    trainer: Callable[..., ray.train.torch.TorchTrainer] = ray.train.torch.TorchTrainer
    if elastic:
        free_of_training = demand(config)[0] - train.least_workers * train.cpus_per_worker
        trainer = partial(ElasticTrainer, allowed=group_sizes(train, config.optim), spare_cpus=free_of_training)
    return trainer(
        train_worker,
        scaling_config=_scaling(train, elastic),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if train.gpus else "gloo", timeout_s=math.ceil(train.collective_timeout_s)),
        datasets={"clips": clips},
        dataset_config=ray.train.DataConfig(execution_options=_reading(limits)),
        run_config=ray.train.RunConfig(
            name=storage.name(run_uri),
            # Ray Train keeps only its own bookkeeping there: checkpoints and results are ours.
            storage_path=str(Path(tempfile.gettempdir()) / "cola-dist" / "ray-train"),
            failure_config=ray.train.FailureConfig(max_failures=train.max_restarts),
            callbacks=[Restarts(board, run_uri, train.max_restarts), *([SavedResize(board, run_uri)] if elastic else [])],
        ),
    )


def _reading(limits: ray.data.ExecutionResources | None) -> ray.data.ExecutionOptions:
    """How Ray Data reads; sets the context of this process too."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    # Reading a task's memory map every second costs more than reading its clips; what it finds is used for a statistic alone.
    context.memory_usage_poll_interval_s = None
    return ray.data.ExecutionOptions(preserve_order=True, resource_limits=limits)


def _scaling(train: TrainConfig, elastic: bool) -> ray.train.ScalingConfig:
    gpu = {"GPU": 1.0} if train.gpus else {}
    return ray.train.ScalingConfig(
        num_workers=(train.min_workers, train.workers) if elastic else train.workers,
        use_gpu=train.gpus,
        resources_per_worker={"CPU": train.cpus_per_worker} | gpu,
        elastic_resize_monitor_interval_s=train.resize_every_s,
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


class Interrupt:
    """While entered, SIGTERM and SIGINT call ``ask`` to bring the work to its end; a third one ends the process at once."""

    def __init__(self, ask: Callable[[], None]) -> None:
        self._ask = ask
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
        self._ask()
