"""Raw results of a study as a few small files: what a page is made of but for videos. They can be shared, kept and read again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from cola_dist import storage
from cola_dist.errors import UserError
from cola_dist.evaluation.tables import parquet, rows_of
from cola_dist.redact import everywhere, redact
from cola_dist.report.trials import Look, Ruling, Span, Study, Sweep, Trial, spans_of

TRIALS, CURVES, SWEEPS = "trials.parquet", "curves.parquet", "sweeps.json"
_WHO = ("trial", "arm", "domain", "seed", "sweep")
_LOOK = ("step", "phase", "name", "spent_seconds", "verdict", "code_counts")


def write_raw(folder: str, study: Study) -> list[str]:
    """A row per trial with its final indicators, a row per look, and what is known of the sweeps. Returns the names of the files.

    Trials that were damaged or replaced are in it too, by ``use``. An indicator that was not measured is null.
    """
    uses = [*((t, "used") for t in study.trials), *((t, "damaged") for t, _ in study.damaged), *((t, "replaced") for t in study.superseded)]
    curves = [_who(trial) | _look_row(look) for trial in study.trials for look in trial.looks]
    sweeps = [everywhere({**sweep.about, "name": storage.name(sweep.uri)}, redact) for sweep in study.sweeps]
    storage.write_bytes(storage.join(folder, TRIALS), parquet([_trial_row(trial, use) for trial, use in uses]))
    storage.write_bytes(storage.join(folder, CURVES), parquet(curves))
    storage.write_bytes(storage.join(folder, SWEEPS), json.dumps(sweeps, indent=1).encode())
    return [TRIALS, CURVES, SWEEPS]


def is_raw(folder: str) -> bool:
    """Whether a folder holds raw results."""
    return storage.exists(storage.join(folder, TRIALS))


def read_raw(folder: str) -> tuple[list[Sweep], list[Trial]]:
    """What ``write_raw`` wrote: sweeps, and the trials that were in use. Raises ``UserError`` for files that it did not write."""
    looks: dict[tuple[str, str], list[Look]] = {}
    try:
        for row in _rows(folder, CURVES):
            looks.setdefault((row["sweep"], row["trial"]), []).append(_look(row))
        trials = [_trial(row, looks.get((row["sweep"], row["trial"]), [])) for row in _rows(folder, TRIALS) if row["use"] == "used"]
        uri = storage.join(folder, SWEEPS)
        abouts = storage.read_json(uri) if storage.exists(uri) else [{"name": trial.sweep} for trial in trials]
        known = {str(about["name"]): about for about in abouts}
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{folder}: damaged raw results ({type(error).__name__}: {error}): write them again, or leave them out") from error
    return [Sweep(name, about) for name, about in known.items()], trials


def _who(trial: Trial) -> dict[str, Any]:
    return dict(zip(_WHO, (trial.id, trial.arm, trial.domain, trial.seed, storage.name(trial.sweep)), strict=True))


def _trial_row(trial: Trial, use: str) -> dict[str, Any]:
    about = {
        "params": json.dumps(dict(trial.params), default=str),
        "status": trial.status,
        "why": redact(trial.why),
        "use": use,
        "run": storage.name(trial.run),
        "total_seconds": trial.spent_seconds,
        "total_steps": trial.steps,
        "warmup_steps": trial.warmup_steps if trial.looks else None,
        "course": json.dumps([asdict(span) for span in trial.spans]),
        "rulings": json.dumps([asdict(ruling) for ruling in trial.rulings]),
        "verdict": trial.final.verdict if trial.final else None,
    }
    return _who(trial) | about | (dict(trial.final.indicators) if trial.final else {})


def _look_row(look: Look) -> dict[str, Any]:
    return {name: getattr(look, name) for name in _LOOK} | dict(look.indicators)


def _trial(row: Mapping[str, Any], looks: Sequence[Look]) -> Trial:
    kept = tuple(sorted(looks, key=lambda look: look.step))
    return Trial(
        **{"id" if name == "trial" else name: row[name] for name in _WHO},
        params=storage.json_of(row["params"]),
        status=row["status"],
        why=row["why"],
        run=row["run"],
        spent_seconds=row["total_seconds"],
        steps=row["total_steps"],
        looks=kept,
        # Files of before these columns were written have their phases from looks.
        spans=tuple(Span(**span) for span in storage.json_of(row.get("course") or "[]")) or spans_of(kept),
        rulings=tuple(Ruling(**ruling) for ruling in storage.json_of(row.get("rulings") or "[]")),
    )


def _look(row: Mapping[str, Any]) -> Look:
    indicators = {name: value for name, value in row.items() if name not in (*_WHO, *_LOOK) and value is not None}
    place = {name: row[name] for name in _LOOK if name != "code_counts"}
    return Look(**place, indicators=indicators, code_counts=row.get("code_counts") or [])


def _rows(folder: str, name: str) -> list[dict[str, Any]]:
    uri = storage.join(folder, name)
    return rows_of(storage.read_bytes(uri), uri)
