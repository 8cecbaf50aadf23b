"""The door to Prometheus: the newest figures of a run, through Ray's own metrics. Where there is no Ray, `NullMeters` takes the same calls.

Prometheus sees a gauge ``NAME`` as ``ray_cola_NAME`` and the counter as ``ray_cola_clips_skipped_total``, with the labels ``run`` and ``phase``.

Ray forgets a gauge that has not been set for two of its report intervals (20 s), so a thread sets all of them again every few seconds. A look that
takes minutes leaves no gap then, and a run whose step stands still can be told from one that is gone. For the training loop a call is a change of
a dictionary.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Protocol

from ray.util.metrics import Counter, Gauge

_SET_AGAIN_EVERY_S = 5.0
_log = logging.getLogger("cola_dist.train")

GAUGES: Mapping[str, str] = {
    "step": "Steps done.",
    "steps_planned": "Steps at the end of the plan, as far as is known.",
    "step_seconds": "Seconds per step, median of the last 20.",
    "clips_per_second": "Clips trained on per second, from the same median.",
    "data_stall_ratio": "Share of the time in which a worker waited for its clips, mean over workers since the last logged step.",
    "loss": "Loss of the newest step, mean over the global batch.",
    "perplexity": "Perplexity of the codes at the newest look at the held-out clips.",
    "sensitivity_gap": "By how much another clip's actions make the flow loss worse, at the newest look.",
    "verdict": "Verdict of the newest look: 0 healthy, 1 at risk, 2 collapsed.",
    "checkpoint_seconds": "Seconds from the beginning of the newest checkpoint to its commit.",
    "checkpoint_timestamp_seconds": "Unix time of the newest checkpoint's commit; before the first, of this worker group's start.",
    "checkpoint_every_steps": "Steps between checkpoints, as configured.",
    "restarts": "Worker groups of this job that were lost and replaced.",
    "tracking_backlog_bytes": "Bytes of the run's records that MLflow has not confirmed yet.",
}
SKIPPED = "clips_skipped"
"""The counter: unreadable clips that were replaced, also by ``source`` and ``reason``."""


class Meters(Protocol):
    """What the loop may say about a run while it goes on. Nothing of it waits for an accelerator, another rank or a server."""

    def enter(self, phase: str) -> None:
        """What is said from now on belongs to this phase."""

    def show(self, figures: Mapping[str, float]) -> None:
        """The newest values of some of `GAUGES`; the others keep theirs."""

    def skipped(self, totals: Mapping[tuple[str, str], float]) -> None:
        """Clips skipped since the start of this worker group, by (source, reason)."""

    def close(self) -> None:
        """Nothing more will be said."""


class NullMeters:
    """Of every rank but 0, and of a process without Ray."""

    def enter(self, phase: str) -> None:
        """Do nothing."""

    def show(self, figures: Mapping[str, float]) -> None:
        """Do nothing."""

    def skipped(self, totals: Mapping[tuple[str, str], float]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class RayMeters:
    """Says it to the Ray node that this process runs on, whose agent Prometheus scrapes."""

    def __init__(self, run: str) -> None:
        """``run`` is the run's identity: its id, or ``SWEEP/TRIAL``."""
        self._run, self._phase = run, ""
        self._gauges = {name: Gauge(f"cola_{name}", text, ("run", "phase")) for name, text in GAUGES.items()}
        text = "Unreadable clips that were replaced by others of their source."
        self._skipped = Counter(f"cola_{SKIPPED}", text, ("run", "phase", "source", "reason"))
        self._figures: dict[str, float] = {}
        self._counted: dict[tuple[str, str], float] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep_setting, name="meters", daemon=True)
        self._thread.start()

    def enter(self, phase: str) -> None:
        """See ``Meters``."""
        self._phase = phase

    def show(self, figures: Mapping[str, float]) -> None:
        """See ``Meters``."""
        assert figures.keys() <= GAUGES.keys(), f"no such gauges: {figures.keys() - GAUGES.keys()}"
        # A new dictionary, so that the thread may walk through the one that it holds.
        self._figures = {**self._figures, **figures}

    def skipped(self, totals: Mapping[tuple[str, str], float]) -> None:
        """See ``Meters``."""
        for (source, reason), total in totals.items():
            more = total - self._counted.get((source, reason), 0.0)
            if more > 0:
                self._skipped.inc(more, {"run": self._run, "phase": self._phase, "source": source, "reason": reason})
                self._counted[source, reason] = total

    def close(self) -> None:
        """Set all gauges a last time and end the thread."""
        self._closing.set()
        self._thread.join(_SET_AGAIN_EVERY_S)

    def _keep_setting(self) -> None:
        closing = False
        while not closing:
            closing = self._closing.wait(_SET_AGAIN_EVERY_S)
            try:
                tags = {"run": self._run, "phase": self._phase}
                for name, value in self._figures.items():
                    self._gauges[name].set(float(value), tags)
            except Exception as error:  # whatever Ray has to say, training does not depend on it
                _log.warning("metrics are no longer sent to Prometheus: %s", error)
                return
