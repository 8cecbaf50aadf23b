"""The page of single runs: evaluations, adaptations by share of episodes, plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cola_dist.command import run_command
from cola_dist.evaluation.results import summarise
from cola_dist.planning.results import summary, write_results
from cola_dist.planning.study import Request, Worker, prepare
from jobs import report
from tests.report.pages import Page
from tests.report.studies import Made, film, write_sweep


def evaluation(folder: Path) -> Path:
    """As jobs/evaluate.py leaves it: two sources, one of them with a probe."""
    folder.mkdir()
    rows = [
        {"source": source, "clip": f"{source}/{place}@0", "psnr": 20.0 + place, "other_psnr": 18.0, "delta_psnr": 2.0 + place}
        for source in ("robot", "hand")
        for place in range(4)
    ]
    score = {"l1": 0.7, "penalty": 1.0}
    probe = {"robot": {"codes": {"r2": 0.25} | score, "frame_difference": {"r2": 0.5} | score, "permuted": {"r2": -0.01} | score}}
    found = {
        "protocol": {"export": "0123abcd", "key": "k", "frames": 5, "clips": ["robot/0@0"]},
        "figures": summarise(rows),
        "probe": probe,
        "notes": ["no FVD: give its network with --fvd.weights"],
        "files": ["results.json", "clips.parquet", "rollouts.mp4", "atlas.mp4"],
    }
    (folder / "results.json").write_text(json.dumps(found))
    for name in ("rollouts.mp4", "atlas.mp4"):
        (folder / name).write_bytes(film(0))
    return folder


def adaptation(folder: Path) -> Path:
    """As ``jobs/adapt.py --shares`` leaves it, with the last share's run beside it."""
    folder.mkdir()
    looks = folder.parent / "share-1" / "looks"
    looks.mkdir(parents=True)
    (looks / "step-00000200.mp4").write_bytes(film(1))
    keys = ("rollout_psnr", "rollout_psnr_other", "rollout_psnr_null", "rollout_psnr_lam", "delta_psnr", "delta_psnr_lam", "utilisation")
    points = [
        {"share": share, "episodes": episodes, "run": str(looks.parent), "verdict": "healthy"} | dict.fromkeys(keys, share)
        for share, episodes in ((0.05, 11), (1.0, 216))
    ]
    (folder / "curve.json").write_text(json.dumps(points))
    return folder


def plans(folder: Path) -> Path:
    """A study of two episodes, of the references alone."""
    setup = prepare(Request("square", "reach", (), "mppi", 2, (0,), 4, 10, 0, 0, 50), with_classifier=False)
    worker = Worker(setup)
    episodes = [worker.run(model, 0, number) for model in setup.models for number in range(2)]
    write_results(str(folder), summary(episodes, setup), episodes)
    return folder


def made(capsys: pytest.CaptureFixture[str], page: Path, *folders: Path) -> tuple[dict[str, Any], Page]:
    assert run_command(report.main, [*map(str, folders), "--output", str(page)]) == 0, capsys.readouterr().err
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result, Page(page.read_text())


def test_single_runs_have_a_page_without_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = (evaluation(tmp_path / "evaluation"), adaptation(tmp_path / "series"), plans(tmp_path / "plans"))
    result, page = made(capsys, tmp_path / "page.html", *folders)
    assert result["judged"] == dict(zip(map(str, folders), ("evaluation", "adaptation", "plans"), strict=True))
    assert list(page.conclusions) == ["evaluation", "adaptation", "plans", "provenance"]
    # two films of the evaluation, one of the adaptation, best and worst episode of both references
    assert len(page.all("video")) == 2 + 1 + 4
    assert "Own actions are worth 3.5 [" in page.conclusions["evaluation"]
    assert "above nothing" in page.conclusions["evaluation"]
    assert "R2 of 0.25 in robot (frame differences 0.5)" in page.conclusions["evaluation"]
    assert "no FVD" in page.text("evaluation")
    assert "With 100 % of the episodes own real actions are worth 1 dB" in page.conclusions["adaptation"]
    assert "with 5 % (11 episodes) 0.05" in page.conclusions["adaptation"]
    assert "No learned model was judged" in page.conclusions["plans"]
    assert "simulator – random" in page.text("plans")
    assert not page.all("script")


def test_they_follow_the_sections_of_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = write_sweep(tmp_path / "sweep", [Made("cola", 0)], every=500)
    result, page = made(capsys, tmp_path / "page.html", sweep, evaluation(tmp_path / "evaluation"))
    assert (result["finished"], list(result["judged"].values())) == (1, ["evaluation"])
    assert list(page.conclusions)[-3:] == ["ranges", "evaluation", "provenance"]


def test_an_interval_that_holds_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = evaluation(tmp_path / "evaluation")
    found = json.loads((folder / "results.json").read_text())
    found["figures"]["all clips"]["delta_psnr"] |= {"low": -0.1}
    (folder / "results.json").write_text(json.dumps(found))
    _, page = made(capsys, tmp_path / "page.html", folder)
    assert "is not told from nothing" in page.conclusions["evaluation"]


def test_a_film_that_is_gone_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = evaluation(tmp_path / "evaluation")
    (folder / "atlas.mp4").unlink()
    _, page = made(capsys, tmp_path / "page.html", folder)
    assert "Left out: Atlas (" in page.text("evaluation")
    assert len(page.all("video")) == 1


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("results.json", "{", "not JSON"),
        ("results.json", "{}", "neither an evaluation nor plans"),
        ("curve.json", "[]", "holds no points"),
        ("curve.json", '[{"episodes": 3}]', "holds no points"),
    ],
)
def test_damaged_results_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    assert run_command(report.main, [str(tmp_path), "--output", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert name in error
    assert words in error
    assert not (tmp_path / "page.html").exists()
