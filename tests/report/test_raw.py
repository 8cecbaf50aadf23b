"""Raw results: what a page is made of, as files that can be shared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cola_dist.errors import UserError
from cola_dist.report.raw import write_raw
from cola_dist.report.study import read_study
from cola_dist.report.trials import Study, Trial
from tests.report.pages import page_of
from tests.report.studies import Made, study_trials, write_sweep

RULING = {"step": 500, "rule": "guard", "act": "log", "why": "the gap fell"}


def sweep(folder: Path, started: str = "2026-01-01T00:00:00Z", loss: float = 0.05) -> Path:
    trials = study_trials({"cola": loss, "vq": 0.06}, 3, 0.001, params={"objective.forward_weight": 1.0}, rulings=[RULING])
    return write_sweep(folder, [*trials, Made("fsq", 0, status="failed", why="s3://me:hunter2@host refused")], every=200, started=started)


def raw_of(study: Study, folder: Path) -> Path:
    assert write_raw(str(folder), study) == ["trials.parquet", "curves.parquet", "sweeps.json"]
    return folder


def bare(trial: Trial) -> Trial:
    """Without what raw results leave out: videos, and where the run lay."""
    return replace(trial, videos=(), run="", sweep="")


def test_raw_results_read_back_are_the_study(tmp_path: Path) -> None:
    study = read_study([str(sweep(tmp_path / "s"))])
    again = read_study([str(raw_of(study, tmp_path / "raw"))])
    finished = [bare(trial) for trial in study.finished]
    assert len(finished) == 6
    assert all((finished[0].rulings, finished[0].looks[0].code_counts, len(finished[0].spans) == 2))
    assert [bare(trial) for trial in again.finished] == finished
    assert [sweep.about["command"] for sweep in again.sweeps] == [sweep.about["command"] for sweep in study.sweeps]
    assert "hunter2" not in next(trial.why for trial in again.trials if trial.status == "failed")


def test_a_page_of_raw_results_says_what_the_sweeps_page_said(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "s")
    page, again = page_of(folder), page_of(raw_of(read_study([str(folder)]), tmp_path / "raw"))
    assert again.conclusions == page.conclusions
    for section in ("tests", "codes", "ranges"):
        assert again.sections.get(section) == page.sections.get(section)


def test_a_sweeps_trials_take_the_place_of_raw_ones(tmp_path: Path) -> None:
    old = raw_of(read_study([str(sweep(tmp_path / "old", loss=0.09))]), tmp_path / "raw")
    # Raw results count as oldest, whenever their sweeps began.
    new = sweep(tmp_path / "new", started="2025-01-01T00:00:00Z", loss=0.05)
    study = read_study([str(new), str(old)])
    assert len(study.finished) == 6
    assert max(trial.value("flow_loss") for trial in study.finished if trial.arm == "cola") < 0.07
    rows = pq.read_table(raw_of(study, tmp_path / "both") / "trials.parquet").to_pylist()
    assert sorted(row["use"] for row in rows if row["arm"] == "cola") == ["replaced"] * 3 + ["used"] * 3
    assert len(read_study([str(tmp_path / "both")]).finished) == 6


def test_results_of_before_courses_were_kept_have_their_phases_from_looks(tmp_path: Path) -> None:
    study = read_study([str(sweep(tmp_path / "s"))])
    folder = raw_of(study, tmp_path / "raw")
    table = pq.read_table(folder / "trials.parquet")
    pq.write_table(table.drop_columns(["course", "rulings"]), folder / "trials.parquet")
    (folder / "sweeps.json").unlink()
    (trial,) = (trial for trial in read_study([str(folder)]).finished if (trial.arm, trial.seed) == ("cola", 0))
    assert [(span.phase, span.first, span.end) for span in trial.spans] == [("warmup", 0, 400), ("joint", 400, 1000)]
    assert trial.warmup_steps == 400


@pytest.mark.parametrize("name", ["trials.parquet", "curves.parquet", "sweeps.json"])
def test_damaged_raw_results_are_one_clear_error(tmp_path: Path, name: str) -> None:
    folder = raw_of(read_study([str(sweep(tmp_path / "s"))]), tmp_path / "raw")
    (folder / name).write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="damaged raw results"):
        read_study([str(folder)])
