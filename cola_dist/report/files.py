"""What a report leaves beside its page: figures as PNG, and raw results as Parquet."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cola_dist import storage
from cola_dist.report.drawing import Plate
from cola_dist.report.study import Study, Trial


def write_figures(folder: str, plates: Sequence[Plate]) -> list[str]:
    """Each plate as ``NAME.png`` below ``folder`` (path or URI). Returns the names."""
    names: list[str] = []
    for plate in plates:
        # Names of arms that differ in signs alone come out alike.
        same = sum(name.startswith(f"{plate.name}.") or name.startswith(f"{plate.name}~") for name in names)
        names.append(f"{plate.name}~{same + 1}.png" if same else f"{plate.name}.png")
        storage.write_bytes(storage.join(folder, names[-1]), plate.png())
    return names


def write_data(folder: str, study: Study) -> list[str]:
    """``trials.parquet``, a row per trial with its final indicators, and ``curves.parquet``, a row per look. Returns the names.

    Trials that were damaged or replaced are in it too, by ``use``. An indicator that was not measured is null.
    """
    uses = [*((t, "used") for t in study.trials), *((t, "damaged") for t, _ in study.damaged), *((t, "replaced") for t in study.superseded)]
    trials = [_trial_row(trial, use) for trial, use in uses]
    curves = [
        _who(trial)
        | {"step": look.step, "phase": look.phase, "name": look.name, "spent_seconds": look.spent_seconds, "verdict": look.verdict}
        | dict(look.indicators)
        for trial in study.trials
        for look in trial.looks
    ]
    for name, rows in (("trials.parquet", trials), ("curves.parquet", curves)):
        storage.write_bytes(storage.join(folder, name), _parquet(rows))
    return ["trials.parquet", "curves.parquet"]


def _who(trial: Trial) -> dict[str, Any]:
    return {"trial": trial.id, "arm": trial.arm, "domain": trial.domain, "seed": trial.seed, "sweep": storage.name(trial.sweep)}


def _trial_row(trial: Trial, use: str) -> dict[str, Any]:
    about = {
        "params": json.dumps(dict(trial.params), default=str),
        "status": trial.status,
        "why": trial.why,
        "use": use,
        "run": storage.name(trial.run),
        "total_seconds": trial.spent_seconds,
        "total_steps": trial.steps,
        "warmup_steps": trial.warmup_steps if trial.looks else None,
        "verdict": trial.final.verdict if trial.final else None,
    }
    return _who(trial) | about | (dict(trial.final.indicators) if trial.final else {})


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: [row.get(name) for row in rows] for name in columns})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
