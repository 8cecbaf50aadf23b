"""What the terminal shows: a bar while the run goes, a table of indicators at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from cola_dist.config import RunConfig
from cola_dist.methods.schedule import phases

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
    ("rollout_psnr", "PSNR of rollouts (dB)"),
    ("delta_psnr", "controllability, delta-PSNR (dB)"),
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
_KINDS = {"lam": "LAM alone", "warmup": "warm-up", "joint": "joint", "pretrain": "pretraining"}


class ProgressView:
    """A progress bar on a terminal; elsewhere a line every few seconds. Writes to stderr: stdout is for results."""

    def __init__(self, config: RunConfig) -> None:
        self._console = Console(stderr=True)
        self._total = sum(phase.steps for phase in phases(config))
        self._last_line = 0.0
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


def _title(look: str) -> str:
    """``joint-2_end`` as "after joint 2"."""
    kind, _, number = look.removesuffix("_end").partition("-")
    return f"after {_KINDS[kind]} {number}".strip() if look.endswith("_end") else look
