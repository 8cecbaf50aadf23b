"""The training of one worker: phases, steps, looks at the held-out set, checkpoints. The same code under Ray Train and in a plain process."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cola_dist.config import RunConfig
from cola_dist.data.stream import Batch, ClipReader, StreamPlan, open_reader
from cola_dist.methods import Clips, Phase, phases
from cola_dist.tracking import RunTracker
from cola_dist.train import hardware
from cola_dist.train.checkpoint import Checkpoint, CheckpointWriter, latest
from cola_dist.train.engine import Engine, StepResult
from cola_dist.train.observer import Evaluation, Observer, code_histogram, to_clips
from cola_dist.train.rates import learning_rates
from cola_dist.train.stage import Stage
from cola_dist.train.tally import Tally
from cola_dist.train.trace import DIGEST_MODULUS, Trace, TraceLine, digest
from cola_dist.train.worker import Worker


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


def plan_stream(config: RunConfig, run_uri: str) -> StreamPlan:
    """What is still to be streamed: from the newest checkpoint's position to the end of the last phase."""
    uri = latest(run_uri)
    first = Checkpoint(uri).position.step if uri else 0
    return StreamPlan(first, sum(phase.steps for phase in phases(config)), config.optim.global_batch, config.train.workers)


class Loop:
    """One worker's run. Every rank builds it with the same arguments and calls ``run``."""

    def __init__(self, config: RunConfig, run_uri: str, worker: Worker, tracker: RunTracker, attempt: str) -> None:
        """Opens data and the newest checkpoint. Raises ``UserError`` for what does not fit together."""
        hardware.prepare(config.train, worker.device)
        self.config, self.run_uri, self.worker, self.tracker = config, run_uri, worker, tracker
        self.phases = phases(config)
        self.reader: ClipReader = open_reader(config.data, config.train.seed)
        self.observer = Observer(config, worker.rank, worker.world, worker.device)
        self.stage = Stage(config, worker.device, self.reader.order.hash)
        self.writer = CheckpointWriter(run_uri, worker.rank, worker.world, attempt, config.train.keep_checkpoints)
        self.trace = Trace(run_uri)
        self.tally = Tally(self.reader, config.data.max_bad_share)
        self._control = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else dist.group.WORLD
        self._durations: deque[float] = deque(maxlen=2000)
        self._nonfinite = 0
        self._asked_to_stop = False
        self._stop = False
        self._shown: dict[str, Any] = {}
        self.step = 0
        self.record: dict[str, Any] = {"hashes": {}, "evaluations": {}, "step_seconds": {}, "peak_memory": {}}
        self.checkpoint_uri = latest(run_uri) or ""

    def run(self) -> Outcome:
        """Train to the end of the last phase, or until interrupted or broken; always leaves a checkpoint."""
        plan = StreamPlan(self._resume_step(), sum(p.steps for p in self.phases), self.config.optim.global_batch, self.worker.world)
        batches = self.worker.batches(self.reader, plan)
        end, error = 0, ""
        began, first_step = time.perf_counter(), self.step
        for phase in self.phases:
            end += phase.steps
            if self.step >= end:
                continue
            error = self._run_phase(phase, end, batches)
            if error or self._stop:
                break
        status = "failed" if error else "finished" if self.step == end and self.step == plan.last_step else "interrupted"
        clips = (self.step - first_step) * self.config.optim.global_batch
        return Outcome(status, self.step, self.checkpoint_uri, self.record, clips / (time.perf_counter() - began), error)

    def _resume_step(self) -> int:
        if self.checkpoint_uri:
            position = Checkpoint(self.checkpoint_uri).position
            self.step, self.record = position.step, dict(position.record)
        return self.step

    def _run_phase(self, phase: Phase, end: int, batches: Iterator[Batch]) -> str:
        """Returns an error that ends the run, or nothing. On return the phase's last checkpoint is committed."""
        engine = self.stage.open(phase, self.checkpoint_uri)
        self._durations.clear()
        hardware.reset_peak_memory(self.worker.device)
        # A phase that is resumed has begun before: what it began with stands in the checkpoint's record.
        self.record["hashes"].setdefault(f"{phase.name}_start", self.stage.hashes())
        if self.step == 0:
            self._evaluate(name="start")
        error = ""
        while self.step < end and not error and not self._stop:
            error = self._one_step(engine, phase, batches)
            last = self.step == end
            if self.step % self.config.diagnostics.every == 0 or last:
                self._evaluate(name=f"{phase.name}_end" if last else "")
            if last:
                self._close_record(phase)
            if last or error or self._stop or self.step % self.config.train.checkpoint_every == 0:
                self._save(phase)
        self._commit()
        self.stage.close()
        return error

    def _one_step(self, engine: Engine, phase: Phase, batches: Iterator[Batch]) -> str:
        began = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - began
        clips = to_clips(batch)
        rates = learning_rates(self.step, self.phases, self.config.optim)
        result = engine.step(_micro_batches(clips, engine.micro_batch), self.step, rates)
        loss, ids = self._agree(result, batch)
        self.stage.after_step(result.applied)
        self.tally.add(batch, waited, result.metrics)
        if self.worker.rank == 0:
            self.trace.add(TraceLine(self.step, loss, ids))
        self._nonfinite = 0 if result.applied else self._nonfinite + 1
        self.step += 1
        self._durations.append(time.perf_counter() - began)
        self._show(phase, loss)
        if self.step % self.config.tracking.log_every == 0:
            self._log(result, rates)
        if self._nonfinite >= self.config.train.max_nonfinite:
            return (
                f"the loss or its gradient was not finite for {self._nonfinite} steps in a row, last at step {self.step - 1}: "
                "lower the learning rate or look at the clips of these steps"
            )
        return ""

    def _agree(self, result: StepResult, batch: Batch) -> tuple[float, int]:
        """Mean loss and sample digest of the global batch, and whether any rank was asked to stop: one small sum over ranks."""
        word = torch.tensor([float(result.metrics["loss"]), float(digest(batch.sample)), float(self._asked_to_stop)], dtype=torch.float64)
        dist.all_reduce(word, group=self._control)
        self._stop = bool(word[2] > 0)
        return float(word[0]) / self.worker.world, int(word[1]) % DIGEST_MODULUS

    def _show(self, phase: Phase, loss: float) -> None:
        """Rank 0 shows progress and learns of an interrupt; the next step's sum tells the others."""
        if self.worker.rank == 0:
            seconds = statistics.median(itertools.islice(reversed(self._durations), 20))
            progress = {"step": self.step, "phase": phase.name, "loss": loss, "clips_per_s": self.config.optim.global_batch / seconds}
            self._asked_to_stop = self.worker.report(progress | self._shown) or self._asked_to_stop

    def _log(self, result: StepResult, rates: Mapping[str, float]) -> None:
        metrics = self.tally.reduce()
        if self.worker.rank == 0:
            metrics |= {f"lr/{role}": rate for role, rate in rates.items()}
            metrics |= {
                "grad_norm": result.grad_norm,
                "step_seconds": statistics.median(self._durations),
                "step_applied": float(result.applied),
            }
            self.tracker.log_metrics({f"train/{k}": v for k, v in metrics.items()}, self.step)
        self.tally.check()

    def _evaluate(self, name: str) -> None:
        """Look at the held-out set; a named look is kept for the final report and comes with a probe. Collective."""
        method = self.stage.plain_method()
        evaluation = self.observer.evaluate(method)
        if name:
            probed = self.observer.probe(method) if self.worker.rank == 0 else {}
            evaluation.indicators.update(probed)
            self.record["evaluations"][name] = evaluation.indicators | {"verdict": evaluation.verdict}
        video_due = name.endswith("_end") or self.step % self.config.diagnostics.video_every == 0
        if self.worker.rank == 0:
            self._track(evaluation, self.observer.video(method) if video_due else None)
        shown = {k: evaluation.indicators[k] for k in ("perplexity", "sensitivity_gap") if k in evaluation.indicators}
        self._shown = shown | {"verdict": evaluation.verdict, "verdict_at": self.step}
        dist.barrier(group=self._control)

    def _track(self, evaluation: Evaluation, video: bytes | None) -> None:
        verdicts = {"healthy": 0.0, "at risk": 1.0, "collapsed": 2.0}
        metrics = {f"heldout/{k}": v for k, v in evaluation.indicators.items()}
        if evaluation.verdict:
            metrics["heldout/verdict"] = verdicts[evaluation.verdict]
            self.tracker.set_tags({"verdict": evaluation.verdict})
        self.tracker.log_metrics(metrics, self.step)
        figure = code_histogram(evaluation.sums, self.step)
        if figure is not None:
            self.tracker.log_figure(figure, f"codes/step-{self.step:08d}.png")
        if video is not None:
            self.tracker.log_file(video, f"rollouts/step-{self.step:08d}.mp4")

    def _close_record(self, phase: Phase) -> None:
        self.record["hashes"][f"{phase.name}_end"] = self.stage.hashes()
        if self._durations:
            self.record["step_seconds"][phase.name] = statistics.median(self._durations)
        self.record["peak_memory"][phase.name] = hardware.peak_memory_bytes(self.worker.device)

    def _save(self, phase: Phase) -> None:
        if self.worker.rank == 0:
            self.trace.flush()
        self.checkpoint_uri = self.stage.save(self.writer, self.step, phase, self.record)

    def _commit(self) -> None:
        """Wait until the checkpoint being written is whole, on every rank."""
        self.writer.wait()
        dist.barrier(group=self._control)


def _micro_batches(clips: Clips, size: int) -> list[Clips]:
    parts: list[tuple[Tensor, ...]] = list(zip(clips.video.split(size), clips.position.split(size), clips.source.split(size), strict=True))
    return [Clips(*part) for part in parts]
