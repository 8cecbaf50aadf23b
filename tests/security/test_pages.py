"""What is shown of others' results cannot become markup, a formula or a file elsewhere. The page of a study: tests/report/test_page.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cola_dist.data.decode import encode_mp4
from cola_dist.data.part_writer import PartWriter
from cola_dist.data.preview import preview
from cola_dist.data.shards import open_folder, write_index
from cola_dist.data.sources import SourceEpisode
from cola_dist.errors import UserError
from cola_dist.report.judged import read_judgement
from cola_dist.report.origin import origin
from cola_dist.report.page import build, render
from cola_dist.tracking import Tracker, attach
from tests.data.videos import moving_square
from tests.report.pages import Page
from tests.report.test_judged import adaptation, evaluation, plans

HOSTILE = '"></pre></table><script>alert(1)</script><img src=x onerror=alert(1)>'
SAFE = {"img", "script", "iframe", "object", "link", "base"}


def hostile(value: Any) -> Any:
    """Every text replaced by markup, except names of files."""
    if isinstance(value, dict):
        return {name: hostile(item) for name, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return value + HOSTILE if isinstance(value, str) and not value.endswith((".mp4", ".json", ".parquet")) else value


@pytest.mark.parametrize(("make", "file"), [(evaluation, "results.json"), (adaptation, "curve.json")])
def test_results_of_single_runs_cannot_become_markup(tmp_path: Path, make: Callable[[Path], Path], file: str) -> None:
    folder = make(tmp_path / f"results{HOSTILE.replace('/', '-')}")
    content = json.loads((folder / file).read_text())
    if "notes" in content:
        content["notes"] = content["notes"] * 3
    (folder / file).write_text(json.dumps(hostile(content)))
    judged = read_judgement(str(folder))
    assert judged is not None
    page = Page(render(None, build(None, origin(["python", "jobs/report.py", HOSTILE]), [judged])))
    assert not SAFE & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "<script>alert(1)" in page.text("provenance"), "as text it is shown"


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plans(tmp_path_factory.mktemp("planned") / "plans")


@pytest.mark.parametrize("name", ["../private.mp4", "videos/../../private.mp4", "/private.mp4", ""])
def test_a_page_takes_no_film_from_elsewhere(planned: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(planned, tmp_path / "plans"))
    (tmp_path / "private.mp4").write_bytes(encode_mp4(moving_square(4), 5.0))
    found = json.loads((folder / "results.json").read_text())
    first = next(iter(found["models"].values()))
    first["videos"] = dict.fromkeys(first["videos"], name)
    (folder / "results.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="names films that are not below this folder"):
        read_judgement(str(folder))


def test_a_contact_sheet_shows_names_as_they_are(tmp_path: Path) -> None:
    """Keys and sources are letters and digits; what a recording is called stands in its JSON alone, and in no picture, path or formula."""
    with PartWriter(str(tmp_path / "shards"), "toy", "human", "part", 2**20) as writer:
        pixels = moving_square(12)
        meta = {"licence": HOSTILE, "provenance": {"dataset": r"$\frac{", "file": "../../../etc/passwd"}}
        writer.add(SourceEpisode("one", pixels, 5.0, meta, HOSTILE, HOSTILE, "train"), encode_mp4(pixels, 5.0))
        with pytest.raises(ValueError, match="letters, digits"):
            writer.add(SourceEpisode(r"$\frac{", pixels, 5.0, meta, "a", "a", "train"), b"")
        write_index(str(tmp_path / "shards"), "toy", "human", writer.close())
    shown = preview(open_folder(str(tmp_path / "shards")), str(tmp_path / "out"))
    assert {path.parent for path in map(Path, (shown.sheet, shown.video))} == {tmp_path / "out"}
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".mp4", ".png"]


@pytest.mark.parametrize("name", ["../../marker", "/marker", "a/../../../marker", "a//marker", "./marker", ""])
def test_artifact_names_stay_in_their_run(tmp_path: Path, name: str) -> None:
    tracker = Tracker(tmp_path / "run" / "spool", "http://127.0.0.1:9", "names", "names")
    with pytest.raises(ValueError, match="relative path"):
        tracker.log_file(b"", name)
    tracker.finish("KILLED", wait=0.0)
    reason = attach("http://127.0.0.1:9", "0" * 32, {name: b"planted"})
    assert "must be a relative path" in reason
    assert not list(tmp_path.rglob("*marker*"))
