"""Sweep folders, on disk or in object storage, read into one study: its trials with what was looked at, and what could not be read."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from cola_dist import storage
from cola_dist.errors import UserError

_READERS = 8
_OWN_FIELDS = frozenset({"train.seed", "data.mixture", "train.budget_seconds", "output"})
"""Parameters that say which seed, domain, budget or place a trial has, and so do not make it another setting of its arm."""


@dataclass(frozen=True)
class Look:
    """One evaluation on held-out clips, as ``RUN/looks`` has it."""

    step: int
    phase: str
    name: str
    """``start``, ``PHASE_end``, or empty."""
    spent_seconds: float
    verdict: str
    indicators: Mapping[str, float]
    code_counts: Sequence[Sequence[float]]
    """``[slots][codes]``; empty where there are no codes."""


@dataclass(frozen=True)
class Span:
    """A phase as it was run: steps ``[first, end)``, and what ended it where that was not its plan."""

    phase: str
    first: int
    end: int
    why: str = ""


@dataclass(frozen=True)
class Ruling:
    """What a rule did at a step of a run."""

    step: int
    rule: str
    act: str
    why: str


@dataclass(frozen=True)
class Trial:
    """One run of a study. Looks stand in order of their steps."""

    id: str
    arm: str
    domain: str
    seed: int
    params: Mapping[str, Any]
    status: str
    why: str
    run: str
    spent_seconds: float
    steps: int
    sweep: str
    looks: tuple[Look, ...] = ()
    spans: tuple[Span, ...] = ()
    rulings: tuple[Ruling, ...] = ()
    videos: tuple[str, ...] = ()
    """URIs of the rollout videos, oldest first."""

    @property
    def settings(self) -> tuple[tuple[str, str], ...]:
        """What sets this trial apart from others of its arm, seed and domain: parameters with their values as JSON, sorted."""
        return tuple(sorted((name, json.dumps(value, default=str)) for name, value in self.params.items() if name not in _OWN_FIELDS))

    @property
    def final(self) -> Look | None:
        """The newest look at a phase's end."""
        return next((look for look in reversed(self.looks) if look.name.endswith("_end")), None)

    def moment(self, name: str) -> Look | None:
        """The look at the ``start``, after ``warm-up`` (or the LAM's own first stage), or at the ``end``; none where the run had no such moment."""
        if name == "end":
            return self.final
        names = {"start": ("start",), "warm-up": ("warmup_end", "lam_end")}[name]
        return next((look for look in self.looks if look.name in names), None)

    def value(self, indicator: str) -> float:
        """An indicator of the final look; NaN where there is none."""
        return self.final.indicators.get(indicator, math.nan) if self.final else math.nan

    @property
    def verdict(self) -> str:
        """The last one of a run that finished or was stopped; empty where there is none."""
        return self.looks[-1].verdict if self.looks else ""

    @property
    def warmup_steps(self) -> int:
        """Steps that the first warm-up really took; 0 for a run without one."""
        return next((span.end - span.first for span in self.spans if span.phase == "warmup"), 0)


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder and its ``sweep.json``."""

    uri: str
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """All that was read. A trial stands in one of ``trials``, ``damaged`` and ``superseded``."""

    sweeps: tuple[Sweep, ...]
    trials: tuple[Trial, ...]
    damaged: tuple[tuple[Trial, str], ...] = field(default=())
    """Trials whose runs cannot be read, each with the reason."""
    superseded: tuple[Trial, ...] = field(default=())
    """Trials that a newer one of the same arm, domain, seed and settings replaces."""

    @property
    def finished(self) -> list[Trial]:
        """Trials that came to their end and were read; the others say nothing about quality at the whole budget."""
        return [trial for trial in self.trials if trial.status == "finished"]


def read_study(folders: Sequence[str]) -> Study:
    """Read sweep folders, oldest first. Raises ``UserError`` for a folder that is no sweep, or where no trial has finished.

    What is damaged is left out, named on stderr and kept by name.
    """
    if not folders:
        raise UserError("no sweep given: name one or more folders that jobs/sweep.py wrote")
    sweeps = sorted((_read_sweep(folder) for folder in folders), key=lambda sweep: str(sweep.about.get("started", "")))
    listed = [trial for sweep in sweeps for trial in _read_trials(sweep)]
    kept, superseded = _newest(listed)
    with ThreadPoolExecutor(_READERS) as pool:
        read = list(pool.map(_read_run, kept))
    damaged = tuple((trial, reason) for trial, reason in read if reason)
    for trial, reason in damaged:
        print(f"left out: trial {trial.id}: {reason}", file=sys.stderr)
    study = Study(tuple(sweeps), tuple(trial for trial, reason in read if not reason), damaged, tuple(superseded))
    if not study.finished:
        states = ", ".join(f"{sum(t.status == s for t in kept)} {s}" for s in dict.fromkeys(t.status for t in kept)) or "none at all"
        unread = f", {len(damaged)} of them not readable" if damaged else ""
        raise UserError(
            f"{', '.join(folders)}: no trial to report on (trials: {states}{unread}): let one finish, or mend what is named above"
        )
    return study


def _read_sweep(folder: str) -> Sweep:
    uri = storage.join(folder, "sweep.json")
    try:
        about = json.loads(storage.read_bytes(uri))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no sweep there (no sweep.json): give a folder that jobs/sweep.py wrote") from error
    except ValueError as error:
        raise UserError(f"{uri}: not JSON ({error}): restore it, or leave this sweep out") from error
    if not isinstance(about, dict):
        raise UserError(f"{uri}: holds no object: restore it, or leave this sweep out")
    return Sweep(folder, about)


def _read_trials(sweep: Sweep) -> list[Trial]:
    uri = storage.join(sweep.uri, "trials.json")
    try:
        return [_trial(entry, sweep.uri) for entry in json.loads(storage.read_bytes(uri))]
    except FileNotFoundError as error:
        raise UserError(f"{sweep.uri}: no trials there (no trials.json): has the sweep begun?") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{uri}: not a list of trials ({type(error).__name__}: {error}): restore it, or leave this sweep out") from error


def _trial(entry: Mapping[str, Any], sweep: str) -> Trial:
    return Trial(
        id=str(entry["id"]),
        arm=str(entry["arm"]),
        domain=str(entry["domain"]),
        seed=int(entry["seed"]),
        params=dict(entry["params"]),
        status=str(entry["status"]),
        why=str(entry["why"] or ""),
        run=str(entry["run"] or ""),
        spent_seconds=float(entry["spent_seconds"] or 0.0),
        steps=int(entry["steps"] or 0),
        sweep=sweep,
    )


def _newest(listed: Sequence[Trial]) -> tuple[list[Trial], list[Trial]]:
    """The newest trial of each arm, domain, seed and settings, and those it replaces; one that still runs replaces nothing."""
    newest: dict[tuple[object, ...], Trial] = {}
    superseded = []
    for trial in listed:
        key = (trial.arm, trial.domain, trial.seed, trial.settings)
        other = newest.get(key)
        if other is not None and trial.status == "running":
            superseded.append(trial)
            continue
        if other is not None:
            superseded.append(other)
        newest[key] = trial
    return list(newest.values()), superseded


def _read_run(trial: Trial) -> tuple[Trial, str]:
    """The trial with what its run left behind, and why it cannot be used. That is asked for where a run finished or was stopped."""
    if trial.status not in ("finished", "stopped"):
        return trial, ""
    try:
        run = _place(trial)
        names = storage.list_files(storage.join(run, "looks"))
        looks = tuple(_read_look(storage.join(run, "looks", name)) for name in names if name.endswith(".json"))
        videos = tuple(storage.join(run, "looks", name) for name in names if name.endswith(".mp4"))
        spans, rulings = _read_course(storage.join(run, "result.json"))
    except _Damage as error:
        return trial, str(error)
    except (OSError, UserError) as error:
        return trial, f"{trial.run} cannot be read: {error}"
    read = replace(trial, run=run, looks=looks, videos=videos, spans=spans or _spans(looks), rulings=rulings)
    return read, "" if read.final or read.status == "stopped" else f"{run} has no look at a phase's end"


def _place(trial: Trial) -> str:
    """The run's folder; where the sweep has been moved since, the folder of that name inside it."""
    inside = (storage.join(trial.sweep, *parts, storage.name(trial.run)) for parts in ((), ("runs",), ("trials",)))
    relative = [storage.join(trial.sweep, trial.run)] if "://" not in trial.run and not trial.run.startswith("/") else []
    places = [trial.run, *relative, *inside]
    return next((place for place in places if storage.exists(storage.join(place, "looks"))), trial.run)


class _Damage(Exception):
    """A file that is there and does not hold what it should."""


def _read_look(uri: str) -> Look:
    try:
        entry = json.loads(storage.read_bytes(uri))
        indicators = {str(name): float(value) for name, value in entry["indicators"].items()}
        counts = [[float(count) for count in slot] for slot in entry["code_counts"]]
        place = (int(entry["step"]), str(entry["phase"]), str(entry["name"]), float(entry["spent_seconds"]))
        return Look(*place, str(entry["verdict"]), indicators, counts)
    except FileNotFoundError as error:
        raise _Damage(f"{uri} is missing") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _Damage(f"{uri} is damaged ({type(error).__name__}: {error})") from error


def _read_course(uri: str) -> tuple[tuple[Span, ...], tuple[Ruling, ...]]:
    """Phases and what rules did, from ``result.json``; both empty where a run has none."""
    try:
        steering = json.loads(storage.read_bytes(uri))["record"]["steering"]
        spans = tuple(Span(s["phase"]["name"], int(s["first"]), int(s["end"]), str(s["why"])) for s in steering["course"])
        rulings = tuple(Ruling(int(r["step"]), str(r["rule"]), str(r["act"]), str(r["why"])) for r in steering["rulings"] if r["act"])
    except FileNotFoundError:
        return (), ()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _Damage(f"{uri} is damaged ({type(error).__name__}: {error})") from error
    return spans, rulings


def _spans(looks: Sequence[Look]) -> tuple[Span, ...]:
    """Phases as far as looks tell of them."""
    ends = [look for look in looks if look.name.endswith("_end")]
    firsts = [0, *(look.step for look in ends)]
    return tuple(Span(look.phase, first, look.step) for look, first in zip(ends, firsts, strict=False))
