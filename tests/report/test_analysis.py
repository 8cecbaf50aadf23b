"""Arms out of trials, and reading of sweep folders."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from cola_dist.errors import UserError
from cola_dist.evaluation.shares import wilson
from cola_dist.evaluation.statistics import Interval
from cola_dist.report.analysis import Analysis
from cola_dist.report.metrics import FLOW_LOSS, PROBE
from cola_dist.report.sections.ranges import ranges
from cola_dist.report.sections.response import response
from cola_dist.report.study import read_study
from cola_dist.report.words import count, interval, listing, number, runs_of
from tests.report.studies import Made, study_trials, write_sweep


def analysis_of(folder: Path, trials: list[Made], every: int = 500) -> Analysis:
    return Analysis(read_study([str(write_sweep(folder, trials, every, video=False))]), "cola")


def test_wilsons_interval_by_hand() -> None:
    z = 1.959963984540054
    middle, reach = 0.6 + z**2 / 10, z * math.sqrt(0.6 * 0.4 / 5 + z**2 / 100)
    share = wilson(3, 5)
    assert (share.low, share.high) == pytest.approx(((middle - reach) / (1 + z**2 / 5), (middle + reach) / (1 + z**2 / 5)))
    assert (share.low, share.high) == pytest.approx((0.2307, 0.8824), abs=1e-4)
    assert str(share) == "3 of 5 (23–88 %)"
    assert wilson(0, 5).low == 0
    assert wilson(0, 5).high == pytest.approx(z**2 / (5 + z**2))
    assert wilson(5, 5).high == 1
    assert math.isnan(wilson(0, 0).low)


def test_the_median_seed_is_that_of_the_final_flow_loss(tmp_path: Path) -> None:
    losses = [0.05, 0.03, math.nan, 0.04, 0.06]
    analysis = analysis_of(tmp_path / "s", [Made("cola", seed, loss=loss) for seed, loss in enumerate(losses)])
    median = analysis.median("robot", "cola")
    assert median is not None
    assert median.seed == 3, "of the four that are finite the better middle one"


def test_a_run_that_diverged_is_left_out_of_tests_and_named(tmp_path: Path) -> None:
    trials = study_trials({"cola": 0.05, "vq": 0.06}, 4, 0.001)
    trials[5] = Made("vq", 1, loss=math.inf)
    comparison = analysis_of(tmp_path / "s", trials).comparison("robot", FLOW_LOSS)
    assert comparison.diverged == ("vq seed 1",)
    assert comparison.table is not None
    assert comparison.table.seeds == (0, 2, 3)


def test_an_arm_of_few_seeds_takes_no_power_from_the_others(tmp_path: Path) -> None:
    trials = [
        *study_trials({"cola": 0.05, "vq": 0.06}, 6, 0.001),
        *study_trials({"fsq": 0.05}, 2, 0.001),
        *study_trials({"motion": 0.05}, 3, 0.001),
    ]
    comparison = analysis_of(tmp_path / "s", trials).comparison("robot", FLOW_LOSS)
    assert comparison.table is not None
    assert comparison.table.seeds == (0, 1, 2), "half of all is enough"
    assert list(comparison.outside) == ["fsq"]


def test_an_arm_of_one_seed_stands_outside_the_tests(tmp_path: Path) -> None:
    comparison = analysis_of(tmp_path / "s", [*study_trials({"cola": 0.05, "vq": 0.06}, 3, 0.001), Made("fsq", 0)]).comparison(
        "robot", PROBE
    )
    assert comparison.table is not None
    assert [arm.name for arm in comparison.table.arms] == ["cola", "vq"]
    assert list(comparison.outside) == ["fsq"]


def test_without_two_arms_to_test_the_reason_is_given(tmp_path: Path) -> None:
    alone = analysis_of(tmp_path / "a", [*study_trials({"cola": 0.05}, 3, 0.001), Made("vq", 0)]).comparison("robot", FLOW_LOSS)
    assert (alone.table, alone.winner, alone.verdict) == (
        None,
        None,
        "not tested: no arm has two finished seeds, and half of all, in common with cola",
    )
    assert set(alone.outside) == {"cola", "vq"}
    few = analysis_of(tmp_path / "b", [*study_trials({"vq": 0.05}, 3, 0.001), Made("cola", 0)]).comparison("robot", FLOW_LOSS)
    assert few.verdict == "not tested: cola has fewer than two finished seeds"
    apart = [Made("cola", seed) for seed in (0, 1)] + [Made("vq", seed) for seed in (2, 3)]
    assert "no arm has two finished seeds" in analysis_of(tmp_path / "c", apart).comparison("robot", FLOW_LOSS).verdict
    crossed = apart + [Made("cola", seed) for seed in (2, 3)] + [Made("fsq", seed) for seed in (0, 1)]
    assert "need two seeds in common" in analysis_of(tmp_path / "d", crossed).comparison("robot", FLOW_LOSS).verdict


def test_an_unknown_reference_is_answered_with_the_nearest(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", [Made("cola", 0), Made("two-stage", 0)], every=500, video=False)
    study = read_study([str(folder)])
    with pytest.raises(UserError, match="no arm 'two-stag' in this study: did you mean 'two-stage'"):
        Analysis(study, "two-stag")
    with pytest.raises(UserError, match="give --reference one of cola, two-stage"):
        Analysis(study, "xyz")


def test_the_newest_trial_of_an_arm_domain_and_seed_counts(tmp_path: Path) -> None:
    old = [Made("cola", 0, loss=0.09), Made("cola", 1, loss=0.05), Made("cola", 2, loss=0.05)]
    new = [Made("cola", 0, loss=0.03), Made("cola", 1, status="running"), Made("cola", 2, status="failed", why="x"), Made("cola", 3)]
    late = write_sweep(tmp_path / "new", new, every=500, video=False, started="2026-02-01T00:00:00Z")
    early = write_sweep(tmp_path / "old", old, every=500, video=False, started="2026-01-01T00:00:00Z")
    study = read_study([str(late), str(early)])
    analysis = Analysis(study, "cola")
    assert analysis.values("robot", "cola", "flow_loss") == {0: 0.03, 1: 0.05, 3: 0.05}, "what still runs replaces nothing, a failure does"
    assert sorted((t.seed, t.status) for t in study.superseded) == [(0, "finished"), (1, "running"), (2, "finished")]


def test_trials_of_other_settings_are_no_seeds_of_their_arm(tmp_path: Path) -> None:
    trials = [Made("cola", seed, params={"train.seed": seed, "data.mixture": {"a": 1}}) for seed in range(3)]
    trials += [Made("cola", seed, params={"warmup.steps": 100}, warmup=100) for seed in range(4)]
    trials += [Made("vq", seed, params={"joint.lr_lam": 1e-3}) for seed in range(3)]
    trials += [Made("vq", 0, params={"joint.lr_lam": 2e-3})]
    analysis = analysis_of(tmp_path / "s", trials)
    assert set(analysis.values("robot", "cola", "flow_loss")) == {0, 1, 2}, "those without settings of their own"
    assert analysis.groups["vq"].settings == (("joint.lr_lam", "0.001"),), "of several the most frequent"
    assert len(analysis.variants) == 5


def test_the_points_of_a_swept_arm_are_compared_as_arms(tmp_path: Path) -> None:
    trials = [
        Made("cola", seed, loss=loss + 0.0001 * (seed * steps % 7), warmup=steps, params={"warmup_length": length})
        for length, steps, loss in ((0, 0, 0.07), (400, 400, 0.05), ("adaptive", 300, 0.06))
        for seed in range(4)
    ]
    analysis = analysis_of(tmp_path / "s", trials)
    assert analysis.arms == ["cola warmup_length=0", "cola warmup_length=400", "cola warmup_length=adaptive"]
    assert analysis.reference == "cola warmup_length=0", "an arm's own name means its first point"
    assert analysis.comparison("robot", FLOW_LOSS).winner == "cola warmup_length=400"
    assert not analysis.variants
    assert "lowest after 400 steps of warm-up (0.05015), against 0.07 without; the adaptive rule chose 300" in response(analysis).conclusion
    assert Analysis(analysis.study, "cola warmup_length=400").arms[0] == "cola warmup_length=400"


def test_runs_that_two_sweeps_made_alike_count_once_in_the_response(tmp_path: Path) -> None:
    trials = [
        Made(arm, seed, warmup=0, params=params) for arm, params in (("cola", {"warmup_length": 0}), ("no-warmup", {})) for seed in (0, 1)
    ]
    section = response(analysis_of(tmp_path / "s", [*trials, Made("cola", 0), Made("cola", 1)]))
    table = next(block for block in section.blocks if block.kind == "table")
    assert [row[:3] for row in table.rows] == [["0", "no-warmup", "2"], ["400", "cola", "2"]]  # type: ignore[union-attr]


def test_a_run_that_was_stopped_as_collapsed_counts_as_collapsed(tmp_path: Path) -> None:
    trials = [Made("cola", 0), Made("cola", 1, status="stopped", verdict="collapsed"), Made("cola", 2, status="stopped"), Made("cola", 3)]
    trials.append(Made("cola", 4, status="failed"))
    assert analysis_of(tmp_path / "early", trials).collapsed("robot", "cola").of == 2, "before training a verdict says nothing"
    analysis = analysis_of(tmp_path / "s", trials, every=100)
    share = analysis.collapsed("robot", "cola")
    assert (share.hits, share.of) == (1, 4)
    assert set(analysis.values("robot", "cola", "flow_loss")) == {0, 3}, "what was stopped has no final value"
    table = next(block for block in ranges(analysis).blocks if block.kind == "table")
    assert table.caption == "Domain robot: 2 healthy, 0 at risk, 1 collapsed"  # type: ignore[union-attr]


def test_the_response_curve_counts_what_warmup_really_took(tmp_path: Path) -> None:
    trials = [Made("cola", seed, loss=0.05, warmup=400) for seed in range(2)]
    trials += [Made("cola", seed, loss=0.04, warmup=200, params={"warmup.steps": 200, "optim.beta2": 0.9}) for seed in range(2)]
    trials += [Made("no-warmup", 0, loss=0.07, warmup=0), Made("warmup-only", 0, loss=0.06, warmup=1000)]
    trials += [Made("two-stage", 0, loss=0.01, warmup=0), Made("adaptive", 0, warmup=250), Made("adaptive", 1, warmup=350)]
    section = response(analysis_of(tmp_path / "s", trials))
    assert section.conclusion == (
        "In robot the mean flow loss is lowest after 200 steps of warm-up (0.04), against 0.07 without; the adaptive rule chose 250 to 350 steps."
    )
    table = next(block for block in section.blocks if block.kind == "table")
    assert [row[0] for row in table.rows] == ["0", "200", "400", "1000", "chosen: 250, 350"]  # type: ignore[union-attr]
    assert any("differ in other fields too, which the figure mixes: optim.beta2" in str(block) for block in section.blocks)


def test_reference_ranges_are_percentiles_by_verdict(tmp_path: Path) -> None:
    trials = [Made("cola", s, indicators={"perplexity": 12.0 + s, "action_perplexity": 6.0, "probe_r2": 0.1 + s}) for s in range(21)]
    dead = {"perplexity": 1.5, "action_perplexity": 6.0, "probe_r2": 0.0}
    trials += [Made("no-warmup", s, verdict="collapsed", warmup=0, indicators=dead) for s in range(2)]
    section = ranges(analysis_of(tmp_path / "s", trials))
    table = next(block for block in section.blocks if block.kind == "table")
    rows = {row[0]: tuple(row[1:]) for row in table.rows}  # type: ignore[union-attr]
    assert rows["perplexity *"] == ("13 to 31 (21)", "1.5 to 1.5 (2)")
    assert rows["perplexity by action perplexity *"] == ("2.17 to 5.17 (21)", "0.25 to 0.25 (2)")
    assert "21 healthy and 2 collapsed runs are told apart" in section.conclusion
    assert "probe R2" in section.conclusion
    assert "perplexity by action" not in section.conclusion, "the verdict is made of it"


def test_bad_folders_are_answered_in_one_line(tmp_path: Path) -> None:
    for folders, message in (
        ([], "no sweep given"),
        ([str(tmp_path / "none")], "no sweep there"),
    ):
        with pytest.raises(UserError, match=message):
            read_study(folders)
    folder = write_sweep(tmp_path / "s", [Made("cola", 0, status="failed", why="x"), Made("cola", 1, status="running")], every=500)
    with pytest.raises(UserError, match=r"no trial to report on \(trials: 1 failed, 1 running\)"):
        read_study([str(folder)])
    (folder / "trials.json").write_text('[{"id": 1}]')
    with pytest.raises(UserError, match="not a list of trials"):
        read_study([str(folder)])
    (folder / "trials.json").unlink()
    with pytest.raises(UserError, match="no trials there"):
        read_study([str(folder)])
    (folder / "sweep.json").write_text("[]")
    with pytest.raises(UserError, match="holds no object"):
        read_study([str(folder)])
    (folder / "sweep.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_study([str(folder)])


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("looks/step-00000500.json", '{"step": 1}', "step-00000500.json is damaged (KeyError"),
        ("looks/step-00000500.json", '{"step": 1, "indicators": {"a": "x"}}', "is damaged (ValueError"),
        ("result.json", '{"record": []}', "result.json is damaged (TypeError"),
        ("looks/step-00001000.json", None, "has no look at a phase's end"),
    ],
)
def test_damage_of_each_kind_is_named(tmp_path: Path, path: str, text: str | None, words: str) -> None:
    folder = write_sweep(tmp_path / "s", [Made("cola", 0, warmup=0), Made("cola", 1)], every=500, video=False)
    file = folder / "runs" / "cola-robot-0" / path
    file.unlink() if text is None else file.write_text(text)
    study = read_study([str(folder)])
    ((trial, reason),) = study.damaged
    assert trial.seed == 0
    assert words in reason


def test_a_sweep_that_was_moved_is_found_where_it_is(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "before", [Made("cola", 0)], every=500, video=False)
    shutil.move(folder, tmp_path / "after")
    assert len(read_study([str(tmp_path / "after")]).finished) == 1


def test_phases_are_known_without_a_result(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", [Made("cola", 0, warmup=400)], every=500, video=False)
    (folder / "runs" / "cola-robot-0" / "result.json").unlink()
    (trial,) = read_study([str(folder)]).finished
    assert [(span.phase, span.first, span.end) for span in trial.spans] == [("warmup", 0, 400), ("joint", 400, 1000)]
    assert trial.warmup_steps == 400


def test_null_in_place_of_figures_is_borne(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", [Made("cola", 0), Made("cola", 1, status="failed")], every=500, video=False)
    entries = json.loads((folder / "trials.json").read_text())
    entries[1] |= {"spent_seconds": None, "steps": None, "why": None, "run": None}
    (folder / "trials.json").write_text(json.dumps(entries))
    assert [trial.steps for trial in read_study([str(folder)]).trials] == [1000, 0]


def test_numbers_as_people_read_them() -> None:
    assert [number(value) for value in (0.04567, 12345.6, -0.0, math.nan, -math.inf)] == ["0.0457", "12346", "0", "–", "-∞"]
    assert interval(Interval(1.0, math.nan, math.nan, 1)) == "1"
    assert interval(Interval(1.0, 0.5, 2.0, 3)) == "1 [0.5, 2]"
    assert [listing(list(words)) for words in ("", "a", "ab", "abc")] == ["", "a", "a and b", "a, b and c"]
    assert runs_of([3, 0, 1, 2, 7]) == "0–3, 7"
    assert (count(1, "run"), count(2, "run")) == ("1 run", "2 runs")
