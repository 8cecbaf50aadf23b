"""Section 11: what made these numbers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from cola_dist import storage
from cola_dist.report.analysis import Analysis
from cola_dist.report.blocks import Block, Code, Fold, Points, Section, Table, Text
from cola_dist.report.judged import Judgement
from cola_dist.report.origin import Origin
from cola_dist.report.trials import Study, Sweep, Trial
from cola_dist.report.words import NOTHING, count, listing, number

_LISTED = ("recipe", "commit", "started", "budget_seconds", "metric", "mode", "space", "overrides")


def provenance(analysis: Analysis | None, judged: Sequence[Judgement], origin: Origin) -> Section:
    """Commands, commits, versions, budgets, and what became of each trial."""
    made: list[Block] = [
        Text(f"This page was made at commit {origin.commit or 'unknown'} by"),
        Code(origin.command),
        Text("with " + ", ".join(f"{name} {version}" for name, version in origin.versions.items()) + ".", small=True),
    ]
    if judged:
        made.append(Table(["results", "kind"], [[one.uri, one.kind] for one in judged]))
    blocks = [*_sweeps(analysis.study), *made, *_trials(analysis.study)] if analysis else made
    said = _conclusion(analysis) if analysis else f"{count(len(judged), 'folder')} of results."
    return Section("provenance", "Where this comes from", said, blocks)


def _sweeps(study: Study) -> list[Block]:
    return [block for sweep in study.sweeps for block in _sweep(sweep)]


def _trials(study: Study) -> list[Block]:
    blocks: list[Block] = []
    if study.damaged:
        lines = [f"{_name(trial)}: {reason}" for trial, reason in study.damaged]
        blocks.append(Fold(f"Damaged, in no figure of this page: {count(len(lines), 'trial')}", [Points(lines)], opened=True))
    failed = [f"{_name(trial)}: {trial.why or 'no reason given'}" for trial in study.trials if trial.status == "failed"]
    if failed:
        blocks.append(Fold(f"Failed: {count(len(failed), 'trial')}", [Points(failed)], opened=True))
    if study.superseded:
        lines = [f"{_name(trial)} ({trial.status})" for trial in study.superseded]
        blocks.append(Fold(f"Replaced by newer trials of the same arm, domain, seed and settings: {len(lines)}", [Points(lines)]))
    columns = ["trial", "arm", "domain", "seed", "settings", "status", "why", "seconds", "steps", "run"]
    return [*blocks, Fold("All trials", [Table(columns, [_row(trial) for trial in study.trials])])]


def _sweep(sweep: Sweep) -> list[Block]:
    about = sweep.about
    rows = [[name, _text(about[name])] for name in _LISTED if about.get(name) not in (None, "", [])]
    return [
        Text(f"Sweep {storage.name(sweep.uri)}, made by"),
        Code(str(about.get("command") or "a command that sweep.json does not hold")),
        Table(["", ""], rows),
    ]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _name(trial: Trial) -> str:
    return f"{trial.id} ({trial.arm}, {trial.domain}, seed {trial.seed})"


def _row(trial: Trial) -> list[str]:
    settings = ", ".join(f"{name} = {value}" for name, value in trial.settings) or NOTHING
    words = [trial.id, trial.arm, trial.domain, str(trial.seed), settings, trial.status, trial.why or NOTHING]
    return [*words, number(trial.spent_seconds), str(trial.steps), storage.name(trial.run) or NOTHING]


def _conclusion(analysis: Analysis) -> str:
    study = analysis.study
    states = Counter(trial.status for trial in study.trials)
    told = [f"{number_} {state}" for state, number_ in states.most_common()] + ([f"{len(study.damaged)} damaged"] if study.damaged else [])
    commits = sorted({str(sweep.about.get("commit") or "unknown")[:12] for sweep in study.sweeps})
    whole = len(study.trials) + len(study.damaged)
    return f"{count(len(study.sweeps), 'sweep')} at commit {listing(commits)} made {count(whole, 'trial')}: {listing(told)}."
