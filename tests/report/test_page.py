"""The page: whole, self-contained, escaped, and never bolder than its tests."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import av
import pytest

from tests.report.pages import Page, html_of, page_of
from tests.report.studies import Made, study_trials, write_sweep

SECTIONS = ("question", "arms", "budget", "runs", "codes", "alignment", "rollouts", "tests", "response", "ranges", "provenance")
HOSTILE = '<script>alert("1")</script>'
RULING = {"step": 300, "phase": "warmup", "rule": "warmup.exit", "act": "end", "why": "healthy and settled: perplexity 19.3 (+3.1%)"}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains; arms that live, one of which dies by the seed, an adaptive one with rulings, lengths of warm-up, failures."""
    trials = []
    for draw, domain in enumerate(("robot", "hand")):
        trials += study_trials({"cola": 0.045}, 4, 0.0003, domain, draw)
        trials += study_trials({"two-stage": 0.06}, 4, 0.0003, domain, draw)
        trials += [
            Made("no-warmup", seed, domain, 0.05 + 0.01 * (seed % 2), 0, "collapsed" if seed % 2 else "healthy") for seed in range(4)
        ]
        trials += [Made("adaptive", seed, domain, 0.045, 300, rulings=[RULING]) for seed in range(2)]
        trials += [Made("cola", seed, domain, 0.047, 200, params={"warmup.steps": 200}) for seed in range(2)]
    trials.append(Made("two-stage", 9, "robot", status="failed", why="RayActorError: the node went away"))
    trials.append(Made("cola", 8, "robot", status="stopped", why="worse than half of its rung"))
    return write_sweep(tmp_path_factory.mktemp("sweep") / "study", trials, every=200)


@pytest.fixture(scope="module")
def page(sweep: Path) -> Page:
    return page_of(sweep)


def test_the_page_needs_no_other_file_and_runs_no_script(page: Page) -> None:
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "xlink:href", "poster", "srcset")]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links), [link[:60] for link in links if not link.startswith(("#", "data:"))]
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert not re.findall(r"@import|url\((?!#)", page.html)
    assert len(page.html) < 15e6


def test_the_page_is_made_for_phones_too(page: Page) -> None:
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert all(parent == "scroll" for parent in re.findall(r'<div class="(\w+)"[^>]*><table', page.html))
    assert "prefers-color-scheme: dark" in page.html


def test_ids_are_unique_so_that_no_picture_borrows_from_another(page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {link[1:] for _, attrs in page.tags if (link := attrs.get("xlink:href", attrs.get("href", ""))).startswith("#")} <= set(ids)


def test_every_section_begins_with_what_to_conclude(page: Page) -> None:
    assert tuple(page.sections) == SECTIONS
    assert tuple(page.conclusions) == SECTIONS
    assert all(page.sections[name][1] == page.conclusions[name] for name in SECTIONS), "right behind the title"
    assert all(text.endswith(".") for text in page.conclusions.values())


def test_the_generator_is_shown_beside_a_repeated_frame(page: Page) -> None:
    said = page.text("question")
    assert "In robot the generator of cola had, before any training, a flow loss of 0.0" in said
    assert "(repeating the context frame: 0.09); nearest to pure noise of 0.03" in said
    assert "(repeating the context frame: 0.06)." in said


def test_conclusions_say_what_the_data_say(page: Page) -> None:
    said = page.conclusions
    assert "cola" in said["question"]
    assert said["arms"].startswith("4 of 29 runs were collapsed when they ended: 4 of 8 of no-warmup; none of cola")
    assert "In robot the mean flow loss is lowest after 300" not in said["response"], "the adaptive rule's runs are no fixed length"
    assert "after 400 steps of warm-up" in said["response"]
    assert "the adaptive rule chose 300 steps" in said["response"]
    assert "warm-up widened its distance from the control in 4 of 4 seeds" in said["alignment"]
    assert said["provenance"] == "1 sweep at commit 0123456789ab made 34 trials: 32 finished, 1 failed and 1 stopped."


def test_unequal_compute_is_said(tmp_path: Path) -> None:
    trials = [*study_trials({"cola": 0.045}, 2, 0.001), *study_trials({"vq": 0.05}, 2, 0.001, seconds=300.0)]
    page = page_of(write_sweep(tmp_path / "s", trials, every=500, video=False))
    assert "In robot compute was not equal: runs ended before the longest, at 10 min, of vq (from 5 min)." in page.sections["budget"]


def test_collapsed_seeds_have_an_interval(page: Page) -> None:
    assert "2 of 4 (15–85 %)" in page.text("arms")


def test_arms_are_described_by_their_own_words(page: Page) -> None:
    assert "Warm-up through the frozen generator, then joint: the recipe as it is." in page.text("arms")
    assert "failed: seed 9" in page.text("arms")
    assert "4 further trials have other settings of warmup.steps." in page.text("arms")


def test_pictures_and_videos_say_what_they_show(page: Page) -> None:
    pictures = [attrs for attrs in page.all("svg") if "aria-hidden" not in attrs]
    assert len(pictures) > 30
    assert all(attrs["aria-label"] and attrs["viewbox"] for attrs in pictures)
    assert "warmup" in page.text("runs")
    videos = page.all("video")
    assert len(videos) == 8
    assert all({"controls", "loop", "muted", "playsinline"} <= attrs.keys() and attrs["aria-label"] for attrs in videos)
    with av.open(io.BytesIO(base64.b64decode(videos[0]["src"].partition(",")[2]))) as container:
        assert container.streams.video[0].codec.name == "h264"
        assert sum(1 for _ in container.decode(video=0)) == 6


def test_rulings_are_listed_by_the_numbers_of_the_figure(page: Page) -> None:
    assert "1. seed 0, step 300, warmup.exit: end: healthy and settled: perplexity 19.3 (+3.1%)" in page.sections["runs"]


def test_the_table_names_tests_and_missing_seeds(page: Page) -> None:
    text = page.text("tests")
    assert "difference to cola" in text
    assert "Tests: t." in text
    rows = re.findall(r"<tr>(.*?)</tr>", page.html[page.html.index('id="tests"') :], re.DOTALL)
    two_stage = next(row for row in rows if "two-stage" in row)
    assert two_stage.endswith("<td>9</td>"), "the seed that failed"
    assert "2–3" in next(row for row in rows if "adaptive" in row)


def test_what_made_it_is_named(page: Page) -> None:
    text = page.text("provenance")
    assert "python jobs/sweep.py tiny --budget-seconds 600" in text
    assert "0123456789abcdef0123456789abcdef01234567" in text
    assert "jobs/report.py" in text
    assert "numpy" in text
    assert "two-stage-robot-9 (two-stage, robot, seed 9): RayActorError: the node went away" in text


def test_arms_show_the_same_clips(tmp_path: Path) -> None:
    losses = {"cola": (0.05, 0.04, 0.06), "two-stage": (0.04, 0.06, 0.05)}
    trials = [Made(arm, seed, loss=loss) for arm, values in losses.items() for seed, loss in enumerate(values)]
    text = page_of(write_sweep(tmp_path / "s", trials, every=500)).text("rollouts")
    assert "cola, seed 0: " in text
    assert "two-stage, seed 0: " in text, "its own median is seed 2"


def test_the_same_study_gives_the_same_page(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", study_trials({"cola": 0.045, "two-stage": 0.05}, 2, 0.001), every=500)
    assert html_of([str(folder)]) == html_of([str(folder)])


def separated(folder: Path) -> Page:
    return page_of(write_sweep(folder, study_trials({"cola": 0.045, "two-stage": 0.055}, 5, 0.0002), every=500, video=False))


def test_a_winner_that_tests_support_is_bold(tmp_path: Path) -> None:
    page = separated(tmp_path / "apart")
    assert page.strong["question"][0].startswith("0.0451 ["), "cola's flow loss"
    assert "In robot, by flow loss, winner: cola, lower than every other arm" in page.conclusions["question"]
    assert page.strong["tests"][0] == "cola"
    assert "two-stage" not in page.strong["tests"]


def test_the_best_of_arms_that_overlap_is_not_bold(tmp_path: Path) -> None:
    trials = [
        Made(arm, s, loss=0.05 + 0.001 * ((s * k) % 5)) for arm, k in (("cola", 1), ("two-stage", 2), ("ranking", 3)) for s in range(5)
    ]
    page = page_of(write_sweep(tmp_path / "near", trials, every=500, video=False))
    assert "<strong>" not in page.html
    assert "In robot, by flow loss, no winner" in page.conclusions["question"]


def test_what_files_say_cannot_become_markup(tmp_path: Path) -> None:
    why = '"><img src=x onerror=alert(1)>'
    trials = study_trials({"cola": 0.045, HOSTILE: 0.05, r"$\frac{": 0.05}, 2, 0.001, domain="<b>rob</b>&amp;")
    trials.append(Made("cola", 7, status="failed", why=why, params={"<i>": "</td>"}))
    hostile = {"step": 400, "phase": "warmup", "rule": "<u>", "act": "end", "why": "</section><script>"}
    trials.append(Made("cola", 3, "<b>rob</b>&amp;", rulings=[hostile]))
    folder = write_sweep(tmp_path / "hostile", trials, every=500, command="</pre><script>1</script>", recipe="<title>")
    page = page_of(folder)
    assert not {"script", "img", "i", "u", "b"} & {tag for tag, _ in page.tags}
    assert tuple(page.sections) == SECTIONS
    assert HOSTILE in page.sections["arms"]
    assert why in page.text("provenance")
    assert "</section><script>" in page.text("runs")
    assert "</pre><script>1</script>" in page.sections["provenance"]


def test_credentials_in_a_command_are_not_published(tmp_path: Path) -> None:
    command = "python jobs/sweep.py --tracking.uri http://me:secret@mlflow:5000"
    page = page_of(write_sweep(tmp_path / "open", [Made("cola", 0)], every=500, video=False, command=command))
    assert "secret" not in page.html
    assert "http://***@mlflow:5000" in page.html


def test_sections_without_data_say_so(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "bare", [Made("cola", 0)], every=500, video=False)
    for path in folder.rglob("step-*.json"):
        look = json.loads(path.read_text())
        path.write_text(json.dumps(look | {"indicators": {"forward_error": 1.0}, "code_counts": [], "verdict": ""}))
    said = page_of(folder).conclusions
    assert "no arms" not in said["question"]
    assert "not measured" in said["question"]
    assert said["budget"] == "No finished run has curves to draw."
    assert said["runs"] == "No finished run has indicators to draw."
    assert said["codes"] == "No finished run has counts of codes."
    assert said["alignment"].startswith("Alignment was not measured")
    assert said["rollouts"] == "No rollout was measured."
    assert said["tests"].startswith("No arm could be tested")
    assert said["response"].startswith("The study has no two lengths")
    assert said["ranges"].startswith("No finished run has a verdict")


def test_a_damaged_look_is_named_and_its_trial_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_sweep(tmp_path / "damaged", study_trials({"cola": 0.045, "two-stage": 0.05}, 3, 0.001), every=500, video=False)
    look = folder / "runs" / "two-stage-robot-1" / "looks" / "step-00000500.json"
    look.write_text('{"step": 500, "phase": ')
    page = page_of(folder)
    assert "left out: trial two-stage-robot-1: " in (line := capsys.readouterr().err)
    assert "step-00000500.json is damaged" in line
    assert "two-stage-robot-1 (two-stage, robot, seed 1)" in page.text("provenance")
    assert "step-00000500.json is damaged" in page.text("provenance")
    assert page.conclusions["provenance"].endswith("made 6 trials: 5 finished and 1 damaged.")
    assert "2 seeds); seeds left out: two-stage lacks 1" in page.conclusions["question"]


def test_videos_that_do_not_fit_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_sweep(tmp_path / "films", study_trials({"cola": 0.045, "two-stage": 0.05}, 1, 0.001), every=500)
    (folder / "runs" / "cola-robot-0" / "looks" / "step-00001000.mp4").write_bytes(b"no video")
    monkeypatch.setattr("cola_dist.report.sections.rollouts.BUDGET_BYTES", 1000)
    page = page_of(folder)
    assert not page.all("video")
    assert "Left out: cola in robot (its video cannot be read" in page.text("rollouts")
    assert "two-stage in robot (the page would be too large)." in page.text("rollouts")
