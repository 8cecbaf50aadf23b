"""The training of one worker: phases, steps, looks at the held-out set, checkpoints. The same code under Ray Train and in a plain process."""

from __future__ import annotations

import itertools
import json
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from cola_dist import logs
from cola_dist.config import RunConfig
from cola_dist.data.labels import labels_of
from cola_dist.data.stream import Batch, ClipReader, StreamPlan, open_reader
from cola_dist.errors import UserError
from cola_dist.methods import Clips, Phase, Span, phases
from cola_dist.tracking import RunTracker
from cola_dist.train import hardware
from cola_dist.train.adaptation import measured_by_one
from cola_dist.train.checkpoint import Checkpoint, CheckpointWriter
from cola_dist.train.engine import Engine, StepResult
from cola_dist.train.keeping import newest_whole, open_together
from cola_dist.train.left_out import LeftOut
from cola_dist.train.looks import VERDICTS, look_of, track, write_look
from cola_dist.train.observer import Observer, to_clips
from cola_dist.train.rates import learning_rates
from cola_dist.train.shelf import read_position
from cola_dist.train.stage import Stage
from cola_dist.train.steering import Steering
from cola_dist.train.tally import Tally
from cola_dist.train.trace import DIGEST_MODULUS, Trace, TraceLine, digest
from cola_dist.train.worker import Wish, Worker

_log = logging.getLogger("cola_dist.train")
_WARM_STEPS = 10
"""Steps of a phase that are left out of its data stall: readers are still starting."""


@dataclass
class Outcome:
    """How a run ended: ``finished``, ``interrupted`` or ``failed``, and what the final report needs."""

    status: str
    step: int
    checkpoint: str
    record: dict[str, Any]
    clips_per_s: float
    """Clips trained on per second since this worker group's first step, looks at the held-out set and checkpoints included."""
    error: str = ""


def plan_stream(config: RunConfig, run_uri: str, world: int, tell: Callable[[str], None]) -> StreamPlan:
    """What is still to be streamed to ``world`` workers: from the position of the newest whole checkpoint to the end of the last phase.

    ``tell`` gets a line where a newer one is found to be damaged. Damage that only reading shows is found by the workers, after which a new group
    begins with another plan.
    """
    try:
        uri = newest_whole(run_uri, tell, glance=True)
        first = read_position(uri).step if uri else 0
    except UserError:
        first = 0  # the workers find the same, and what they refuse reaches the user
    return StreamPlan(first, sum(phase.steps for phase in phases(config)), config.optim.global_batch, world)


class Loop:
    """One worker's run. Every rank builds it with the same arguments and calls ``run``."""

    def __init__(self, config: RunConfig, run_uri: str, worker: Worker, tracker: RunTracker, attempt: str) -> None:
        """Opens data and the newest whole checkpoint. Collective. Raises ``UserError`` for what does not fit together."""
        hardware.prepare(config.train, worker.device)
        self.config, self.run_uri, self.worker, self.tracker = config, run_uri, worker, tracker
        self.steering = Steering(config)
        self.reader: ClipReader = open_reader(config.data, config.train.seed, "train", config.optim.global_batch, labels_of(config))
        self._control = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else dist.group.WORLD
        self._checkpoint = open_together(run_uri, worker.rank, worker.world, self._control, _log.warning)
        self.checkpoint_uri = self._checkpoint.uri if self._checkpoint else ""
        # A checkpoint has them.
        measured = {} if self._checkpoint else measured_by_one(self.reader, worker.rank)
        self.stage = Stage(config, worker.device, self.reader.order, measured)
        self.observer = Observer(config, worker.rank, worker.world, worker.device, self.stage.autoencoder)
        self.writer = CheckpointWriter(run_uri, worker.rank, worker.world, attempt, config.train.keep_checkpoints)
        self.trace = Trace(run_uri)
        self.tally = Tally(self.reader, config.data.max_bad_share)
        self._durations: deque[float] = deque(maxlen=2000)
        self._waits: deque[float] = deque(maxlen=2000)
        self._coming: Batch | None = None
        self._waited = 0.0
        self._spent = 0.0
        self._unreadable = ""
        self._wish: Wish = "go on"
        self._stop = self._save_now = False
        self._shown: dict[str, Any] = {}
        self.step = 0
        parts = ("hashes", "evaluations", "step_seconds", "data_stall_percent", "peak_memory")
        self.record: dict[str, Any] = {part: {} for part in parts} | {"left_out": []}
        self._left_out = LeftOut(config.train.max_nonfinite, worker, self._control)

    def run(self) -> Outcome:
        """Train to the end of the last phase, or until interrupted or broken; always leaves a checkpoint."""
        self._resume()
        every = self.config.train.checkpoint_every
        self.worker.meters.show({"step": self.step, "checkpoint_every_steps": every, "checkpoint_timestamp_seconds": time.time()})
        plan = StreamPlan(self.step, self.steering.planned_steps, self.config.optim.global_batch, self.worker.world)
        batches = self.worker.batches(self.reader, plan)
        began, first_step = time.perf_counter(), self.step
        self._fetch(batches)
        error = self._data_error(self._unreadable)
        while not error and not self._stop and (span := self.steering.due(self.step)):
            error = self._run_phase(span, batches)
        status = "failed" if error else "interrupted" if self.steering.due(self.step) else "finished"
        clips = (self.step - first_step) * self.config.optim.global_batch
        return Outcome(status, self.step, self.checkpoint_uri, self.record, clips / (time.perf_counter() - began), error)

    def _resume(self) -> None:
        if self._checkpoint:
            position = self._checkpoint.position
            self.step, self.record = position.step, self.record | dict(position.record)
            self.steering.restore(self.record["steering"], self.step)

    def _run_phase(self, span: Span, batches: Iterator[Batch]) -> str:
        """Returns an error that ends the run, or nothing. On return the phase's last checkpoint is committed."""
        phase = span.phase
        self.worker.meters.enter(phase.name)
        if self._checkpoint is None and self.checkpoint_uri:
            self._checkpoint = Checkpoint(self.checkpoint_uri)
        engine = self.stage.open(phase, self._checkpoint)
        self._checkpoint = None  # a copy out of object storage fills a disk
        self._durations.clear()
        self._waits.clear()
        hardware.reset_peak_memory(self.worker.device)
        # A phase that is resumed has begun before: what it began with stands in the checkpoint's record.
        self.record["hashes"].setdefault(f"{phase.name}_start", self.stage.hashes())
        if self.step == 0:
            self.tracker.set_tags({"pretrained.world": self.record["hashes"][f"{phase.name}_start"]["world"]})
            self._look(phase, "start")
        error, over = "", False
        while not over and not error and not self._stop:
            error = self._one_step(engine, phase, batches)
            due = self.steering.due(self.step)
            over = due is None or due.phase != phase
            if over or self.step % self.config.diagnostics.every == 0:
                over = self._look(phase, f"{phase.name}_end" if over else "") or over
            if over:
                self._close_record(phase)
            if over or error or self._stop or self._save_now or self.step % self.config.train.checkpoint_every == 0:
                self._save(phase)
        self._commit()
        self.stage.close()
        return error

    def _one_step(self, engine: Engine, phase: Phase, batches: Iterator[Batch]) -> str:
        began, batch = time.perf_counter(), self._coming
        assert batch is not None, "the plan has a batch for every step"
        clips = to_clips(batch)
        rates = learning_rates(self.step, self.steering.course.spans, self.config.optim)
        spent = self.worker.clock()
        result = self._compute(engine, clips, rates)
        self._spent = self.worker.clock() - spent
        # Now rather than before the next step: if a rank finds that its clips are gone, all can still write a checkpoint together.
        self._fetch(batches)
        loss, ids, unreadable = self._agree(result, batch)
        self.stage.after_step(result.applied)
        self.tally.add(batch, self._waited, result.metrics)
        if self.worker.rank == 0:
            self.trace.add(TraceLine(self.step, loss, ids))
        error = self._left_out.see(self.step, result, batch.sample, self.record["left_out"])
        self.step += 1
        logs.bind(step=self.step)
        self._durations.append(time.perf_counter() - began)
        self._waits.append(self._waited)
        self._show(phase, loss)
        if self.step % self.config.tracking.log_every == 0:
            self._log(result, rates)
        return error or (self._data_error(self._unreadable) if unreadable else "")

    def _compute(self, engine: Engine, clips: Clips, rates: Mapping[str, float]) -> StepResult:
        try:
            return engine.step(clips.split(engine.micro_batch), self.step, rates)
        except torch.OutOfMemoryError as error:
            if self._durations:  # it has fitted before: restart from the checkpoint
                raise
            raise UserError(
                f"the first step of phase {engine.phase.name} does not fit into this worker's memory with {engine.micro_batch} clips at a time "
                f"({str(error).splitlines()[0]}): lower optim.micro_batch, set --train.activation-checkpointing True or raise train.zero_stage"
            ) from error

    def _fetch(self, batches: Iterator[Batch]) -> None:
        """Wait for the next step's clips. That they cannot be read is kept for ``_data_error``."""
        began = time.perf_counter()
        try:
            self._coming = next(batches, None)
        except (UserError, OSError) as error:
            self._unreadable = str(error)
        self._waited = time.perf_counter() - began

    def _data_error(self, own: str) -> str:
        """The first rank's reason for having no clips; empty when all have theirs. Collective."""
        reasons: list[str] = [""] * self.worker.world
        dist.all_gather_object(reasons, own, group=self._control)
        return next(filter(None, reasons), "")

    def _agree(self, result: StepResult, batch: Batch) -> tuple[float, int, bool]:
        """Of the global batch: mean loss, sample digest, and whether any rank lacks clips; and what one was asked for. One small sum."""
        signs = [float(self._wish == "stop"), float(bool(self._unreadable)), float(self._wish == "save")]
        word = torch.tensor([float(result.metrics["loss"]), float(digest(batch.sample)), *signs, self._spent], dtype=torch.float64)
        dist.all_reduce(word, group=self._control)
        self._stop, self._save_now = bool(word[2] > 0), bool(word[4] > 0)
        self.steering.spent_seconds += float(word[5])
        return float(word[0]) / self.worker.world, int(word[1]) % DIGEST_MODULUS, bool(word[3] > 0)

    def _show(self, phase: Phase, loss: float) -> None:
        """Rank 0 shows progress and learns what is asked for; the next step's sum tells the others."""
        if self.worker.rank == 0:
            seconds = statistics.median(itertools.islice(reversed(self._durations), 20))
            speed = self.config.optim.global_batch / seconds
            progress = {"step": self.step, "phase": phase.name, "loss": loss, "clips_per_s": speed}
            asked = self.worker.report(progress | self._shown)
            self._wish = "stop" if self._wish == "stop" else asked
            self.worker.meters.show(
                {
                    "step": self.step,
                    "steps_planned": self.steering.course.end,
                    "step_seconds": seconds,
                    "clips_per_second": speed,
                    "loss": loss,
                }
            )
            if commit := self.writer.newest:
                self.worker.meters.show({"checkpoint_seconds": commit.seconds, "checkpoint_timestamp_seconds": commit.at})

    def _log(self, result: StepResult, rates: Mapping[str, float]) -> None:
        metrics = self.tally.reduce()
        if self.worker.rank == 0:
            order = self.reader.order
            for index, (source, seen) in enumerate(
                zip(order.sources, order.drawn(self.step * self.config.optim.global_batch), strict=True)
            ):
                metrics |= {f"clips_seen/{source.name}": float(seen), f"epochs/{source.name}": seen / order.windows(index)}
            metrics |= {f"lr/{role}": rate for role, rate in rates.items()}
            metrics |= {
                "grad_norm": result.grad_norm,
                "step_seconds": statistics.median(self._durations),
                "step_applied": float(result.applied),
                "steps_left_out": float(len(self.record["left_out"])),
            }
            self.tracker.log_metrics({f"train/{k}": v for k, v in metrics.items()}, self.step)
            stall, backlog = metrics["data_stall_percent"] / 100, self.tracker.backlog_bytes()
            self.worker.meters.show({"data_stall_ratio": stall, "tracking_backlog_bytes": backlog})
            self.worker.meters.skipped(self.tally.skipped())
        self.tally.check()

    def _look(self, phase: Phase, name: str) -> bool:
        """Look at the held-out set and hear the rules; returns whether they ended the phase. Collective.

        A look with a name, and one at which a rule ends the phase, is kept for the final report and measures more.
        """
        method = self.stage.plain_method()
        evaluation = self.observer.evaluate(method, self.step, phase.objective == "flow", named=bool(name))
        self.steering.looks.append(look_of(self.step, phase.name, evaluation))
        over = not name and self._rule(phase)
        if over:
            name = f"{phase.name}_end"
            evaluation = self.observer.evaluate(method, self.step, phase.objective == "flow", named=True)
        if name:
            self.record["evaluations"][name] = evaluation.indicators | {"verdict": evaluation.verdict}
        if self.worker.rank == 0:
            video_due = name.endswith("_end") or self.step % self.config.diagnostics.video_every == 0
            video = self.observer.video(method) if video_due else None
            track(self.tracker, self.step, evaluation, video)
            about = {"phase": phase.name, "name": name, "spent_seconds": self.steering.spent_seconds}
            write_look(self.run_uri, self.step, about, evaluation, video)
        shown = {k: evaluation.indicators[k] for k in ("perplexity", "sensitivity_gap") if k in evaluation.indicators}
        self._shown = shown | {"verdict": evaluation.verdict, "verdict_at": self.step}
        self.worker.meters.show(shown | ({"verdict": VERDICTS[evaluation.verdict]} if evaluation.verdict else {}))
        dist.barrier(group=self._control)
        return over

    def _rule(self, phase: Phase) -> bool:
        """Rank 0's ruling on the newest look, obeyed by all; returns whether the phase is over. Collective."""
        ruled = [self.steering.decide(phase, self.step) if self.worker.rank == 0 else None]
        dist.broadcast_object_list(ruled, src=0, group=self._control)
        if ruled[0] is None:
            return False
        over = self.steering.obey(ruled[0])
        if self.worker.rank == 0:
            self.tracker.log_text(json.dumps(self.steering.state()["rulings"], indent=1), "rulings.json")
        return over

    def _close_record(self, phase: Phase) -> None:
        self.record["hashes"][f"{phase.name}_end"] = self.stage.hashes()
        if self._durations:
            self.record["step_seconds"][phase.name] = statistics.median(self._durations)
            warm = min(_WARM_STEPS, len(self._durations) - 1)
            waits, steps = (sum(itertools.islice(times, warm, None)) for times in (self._waits, self._durations))
            self.record["data_stall_percent"][phase.name] = 100 * waits / steps
        self.record["peak_memory"][phase.name] = hardware.peak_memory_bytes(self.worker.device)

    def _save(self, phase: Phase) -> None:
        self.record["steering"] = self.steering.state()
        if self.worker.rank == 0:
            self.trace.flush()
        self.checkpoint_uri = self.stage.save(self.writer, self.step, phase, self.record)

    def _commit(self) -> None:
        """Wait until the checkpoint being written is whole, on every rank."""
        self.writer.wait()
        dist.barrier(group=self._control)
