"""What the terminal shows: a bar while the run goes, a table of indicators at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from cola_dist.config import RunConfig
from cola_dist.methods.schedule import phases
from cola_dist.train.estimate import ACCELERATORS, UTILISATION, Plan, estimate

_LINE_EVERY_S = 15.0
_ROWS = (
    ("perplexity", "perplexity"),
    ("perplexity/joint", "perplexity, slots together"),
    ("utilisation", "utilisation"),
    ("max_usage", "max usage"),
    ("entropy", "entropy (nats)"),
    ("effective_rank", "effective rank of z"),
    ("z_std", "std of z"),
    ("flow_loss", "flow loss"),
    ("sensitivity_gap", "sensitivity gap (shuffled)"),
    ("sensitivity_gap_null", "sensitivity gap (null)"),
    ("modulation_share", "share of modulation from actions"),
    ("alignment/cka", "alignment with the pretrained generator (CKA)"),
    ("alignment/cka/permuted", "  control: other episodes"),
    ("alignment/cosine", "alignment, cosine after a ridge map"),
    ("alignment/cosine/permuted", "  control: other episodes"),
    ("gradient_cosine", "cosine of LAM's gradients, flow and bottleneck"),
    ("match_error", "squared distance of the adapter's tokens to the LAM's actions"),
    ("rollout_psnr", "PSNR of rollouts (dB)"),
    ("rollout_psnr_other", "  with another clip's actions"),
    ("rollout_psnr_null", "  with null actions"),
    ("rollout_psnr_lam", "  reference: with the LAM's own"),
    ("delta_psnr", "controllability, delta-PSNR (dB)"),
    ("delta_psnr_lam", "  reference: with the LAM's own"),
    ("verdict", "verdict"),
    ("probe_r2", "probe R2, signed action"),
    ("probe_r2_permuted", "  control: permuted labels"),
    ("probe_r2_random_idm", "  control: random IDM"),
    ("probe_r2_frame_difference", "  reference: frame differences"),
    ("probe_r2_size", "probe R2, size of action"),
    ("probe_r2_size_permuted", "  control: permuted labels"),
    ("probe_r2_size_random_idm", "  control: random IDM"),
    ("probe_r2_size_frame_difference", "  reference: frame differences"),
)
_KINDS = {"lam": "LAM alone", "warmup": "warm-up", "joint": "joint", "pretrain": "pretraining", "adapt": "adaptation"}


class ProgressView:
    """A progress bar on a terminal; elsewhere a line every few seconds. Writes to stderr: stdout is for results."""

    def __init__(self, config: RunConfig) -> None:
        self._console = Console(stderr=True)
        self._total = sum(phase.steps for phase in phases(config))
        self._last_line = 0.0
        self._noted = 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("starting workers", total=self._total)

    def __enter__(self) -> ProgressView:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def update(self, progress: Mapping[str, Any]) -> None:
        """Show the newest progress; an empty one means that no step is done yet."""
        if not progress:
            return
        text = f"{progress['phase']} loss {progress['loss']:.4f}"
        if "perplexity" in progress:
            text += f" perplexity {progress['perplexity']:.1f} gap {progress['sensitivity_gap']:.4f}"
            text += f" {progress['verdict']}" if progress["verdict"] else ""
        text += f" {progress['clips_per_s']:.0f} clips/s"
        self._bar.update(self._task, completed=progress["step"], description=text)
        if not self._console.is_terminal and time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._last_line = time.monotonic()
            print(f"step {progress['step']}/{self._total} {text}", file=sys.stderr, flush=True)

    def note(self, notes: Sequence[str]) -> None:
        """Show those of all notes so far that were not shown yet, a line each."""
        for line in notes[self._noted :]:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._noted = len(notes)


def indicator_table(record: Mapping[str, Any]) -> Table:
    """The indicators at the phases' boundaries, a column each."""
    evaluations = record["evaluations"]
    shown = [(key, _title(key)) for key in evaluations]
    table = Table(title="held-out indicators")
    table.add_column("")
    for _, title in shown:
        table.add_column(title, justify="right")
    for name, label in _ROWS:
        values = [evaluations[key].get(name) for key, _ in shown]
        if any(value is not None and value != "" for value in values):
            table.add_row(label, *(f"{value:.4g}" if isinstance(value, float) else str(value or "") for value in values))
    return table


def show_plan(config: RunConfig) -> dict[str, Any]:
    """Print what a run of ``config`` will need, before anything of it is opened. Returns it as plain values."""
    plan = estimate(config)
    for table in plan_tables(config, plan):
        Console(width=150).print(table)
    return asdict(plan)


def plan_tables(config: RunConfig, plan: Plan) -> list[Table]:
    """What each role is and when it trains; what each phase needs per worker and step."""
    roles = Table(title="roles")
    for column in ("role", "parameters", "begins as", *(phase.name for phase in plan.phases)):
        roles.add_column(column, justify="right" if column == "parameters" else "left")
    world = f"pretrained: {config.world.pretrained}" if config.world.pretrained else "random weights"
    origin = {"lam": "new", "conditioning": "new, its last layer at zero", "adapter": "new"}
    if config.method == "adapt":
        origin |= dict.fromkeys(("lam", "conditioning"), f"co-trained: {config.adapt.start}")
    origin["world"] = world
    for role, count in plan.parameters.items():
        roles.add_row(
            role, f"{count / 1e6:,.1f} M", origin[role], *("trains" if role in phase.trains else "frozen" for phase in plan.phases)
        )
    needs = Table(title=f"per step of {config.optim.global_batch} clips on {config.train.workers} workers")
    for column in ("phase", "ZeRO", "PFLOP", "memory of a worker", "of it kept for backward", "sent by a worker"):
        needs.add_column(column, justify="right")
    for name in ACCELERATORS:
        needs.add_column(f"s on {name}", justify="right")
    for phase in plan.phases:
        for stage in range(4):
            times = (
                f"{phase.seconds(accelerator, config.train.workers, stage):.2f}"
                if phase.memory(stage) < accelerator.memory
                else "too small"
                for accelerator in ACCELERATORS.values()
            )
            mark = " *" if stage == config.train.zero_stage else ""
            sizes = (f"{size / 1e9:.1f} GB" for size in (phase.memory(stage), phase.activations, phase.traffic[stage]))
            needs.add_row(phase.name, f"{stage}{mark}", f"{sum(phase.flops.values()) / 1e15:.2f}", *sizes, *times)
    needs.caption = (
        f"* as configured. Seconds at {UTILISATION:.0%} of the peak (an assumption, not a measurement), traffic not overlapped. Memory without "
        f"what libraries and fragmentation take. A checkpoint: {plan.checkpoint_bytes / 1e9:.1f} GB."
    )
    return [roles, needs, _checkpointing_table(config, plan)]


def _checkpointing_table(config: RunConfig, plan: Plan) -> Table:
    """What activation checkpointing would save and cost, whichever is configured."""
    chosen = config.train.checkpointing_keeps if config.train.activation_checkpointing else "off"
    table = Table(title="activation checkpointing of the generator's blocks")
    for column in ("phase", "keeps", "kept for backward", "computed again"):
        table.add_column(column, justify="right")
    for phase in plan.phases:
        once = sum(phase.flops.values()) - phase.checkpointing[chosen].again
        for name, way in phase.checkpointing.items():
            mark = " *" if name == chosen else ""
            table.add_row(phase.name, f"{name}{mark}", f"{way.kept / 1e9:.1f} GB", f"{way.again / once:.0%} of a step's operations")
    table.caption = "* as configured. off: --train.activation-checkpointing False. inputs, products: --train.checkpointing-keeps."
    return table


def files_table(files: Mapping[str, Mapping[str, Any]]) -> Table:
    """What a run takes of published files, what it leaves there, and which files they are."""
    table = Table(title="pretrained files")
    for column in ("model", "tensors taken", "left out on purpose", "sha256"):
        table.add_column(column)
    for name, loaded in files.items():
        table.add_row(name, str(loaded["tensors"]), ", ".join(loaded["dropped"]) or "nothing", loaded["sha256"][:16])
    return table


def _title(look: str) -> str:
    """``joint-2_end`` as "after joint 2"."""
    kind, _, number = look.removesuffix("_end").partition("-")
    return f"after {_KINDS[kind]} {number}".strip() if look.endswith("_end") else look
