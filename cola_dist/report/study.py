"""Sweep folders and raw results, on disk or in object storage, read into one study, with what could not be read."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from cola_dist import storage
from cola_dist.errors import UserError
from cola_dist.report.raw import is_raw, read_raw
from cola_dist.report.trials import Look, Ruling, Span, Study, Sweep, Trial, spans_of

_READERS = 8


def read_study(folders: Sequence[str]) -> Study:
    """Read sweep folders, oldest first, after raw results. Raises ``UserError`` for a folder that is neither, or where no trial has finished.

    What is damaged is left out, named on stderr and kept by name.
    """
    if not folders:
        raise UserError("no sweep given: name one or more folders that jobs/sweep.py wrote")
    raw = [read_raw(folder) for folder in folders if is_raw(folder)]
    sweeps = [_read_sweep(folder) for folder in folders if not is_raw(folder)]
    sweeps.sort(key=lambda sweep: str(sweep.about.get("started", "")))
    shared = [trial for _, trials in raw for trial in trials]
    kept, superseded = _newest([*shared, *(trial for sweep in sweeps for trial in _read_trials(sweep))])
    whole = {id(trial) for trial in shared}
    with ThreadPoolExecutor(_READERS) as pool:
        read = list(pool.map(lambda trial: (trial, "") if id(trial) in whole else _read_run(trial), kept))
    damaged = tuple((trial, reason) for trial, reason in read if reason)
    for trial, reason in damaged:
        print(f"left out: trial {trial.id}: {reason}", file=sys.stderr)
    study = Study(
        (*(s for old, _ in raw for s in old), *sweeps), tuple(trial for trial, reason in read if not reason), damaged, tuple(superseded)
    )
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
        about = storage.read_json(uri)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no sweep there (no sweep.json), and no raw results: give a folder that jobs/sweep.py wrote") from error
    except ValueError as error:
        raise UserError(f"{uri}: not JSON ({error}): restore it, or leave this sweep out") from error
    if not isinstance(about, dict):
        raise UserError(f"{uri}: holds no object: restore it, or leave this sweep out")
    return Sweep(folder, about)


def _read_trials(sweep: Sweep) -> list[Trial]:
    uri = storage.join(sweep.uri, "trials.json")
    try:
        return [_trial(entry, sweep.uri) for entry in storage.read_json(uri)]
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
    read = replace(trial, run=run, looks=looks, videos=videos, spans=spans or spans_of(looks), rulings=rulings)
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
        entry = storage.read_json(uri)
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
        steering = storage.read_json(uri)["record"]["steering"]
        spans = tuple(Span(s["phase"]["name"], int(s["first"]), int(s["end"]), str(s["why"])) for s in steering["course"])
        rulings = tuple(Ruling(int(r["step"]), str(r["rule"]), str(r["act"]), str(r["why"])) for r in steering["rulings"] if r["act"])
    except FileNotFoundError:
        return (), ()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _Damage(f"{uri} is damaged ({type(error).__name__}: {error})") from error
    return spans, rulings
