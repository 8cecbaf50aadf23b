"""jobs/checkpoints.py as a user runs it: list, verify, export and gc, on disk and in object storage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cola_dist import storage
from cola_dist.command import run_command
from cola_dist.evaluation.exported import load_export
from cola_dist.train.job import write_config
from cola_dist.train.shelf import committed
from jobs import checkpoints
from tests.s3 import serve
from tests.train.harness import run_local, toy_config
from tests.train.test_keeping import RANK0, flip, lose, shelf_of


def run(capsys: pytest.CaptureFixture[str], *args: str | Path, code: int = 0) -> tuple[dict[str, Any], str, str]:
    """The job's last line, what it printed before, and what it said on stderr."""
    capsys.readouterr()
    assert run_command(checkpoints.main, [str(arg) for arg in args]) == code
    said = capsys.readouterr()
    lines = said.out.splitlines()
    return (json.loads(lines[-1]) if lines else {}), "\n".join(lines[:-1]), said.err


def test_list_shows_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = shelf_of(tmp_path, 2, 4, 6)
    lose(paths[2])
    (tmp_path / "checkpoints" / "step-00000008-x").mkdir()
    (tmp_path / "checkpoints" / "step-00000008-x" / RANK0).write_bytes(b"half")
    line, table, _ = run(capsys, "list", tmp_path)
    rows = line["checkpoints"]
    assert [(row["step"], row["phase"], row["state"]) for row in rows] == [
        (2, "warmup", "unverified"),
        (4, "warmup", "unverified"),
        (6, "warmup", "damaged"),
        (8, None, "no manifest"),
    ]
    assert rows[0]["files"] == 3
    assert rows[0]["bytes"] == sum(path.stat().st_size for path in paths[0].iterdir())
    assert rows[0]["written"].startswith("20")
    assert rows[2]["why"] == f"{RANK0} is missing"
    for part in ("step", "phase", "unverified", "no manifest"):
        assert part in table


def test_verify_finds_planted_damage_and_names_the_newest_whole_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = shelf_of(tmp_path, 2, 4, 6)
    line, said, _ = run(capsys, "verify", tmp_path)
    assert (line["status"], line["newest_whole"], line["damaged"]) == ("whole", paths[2].name, {})
    assert said.count(f"{RANK0}: whole") == 3
    flip(paths[2])
    line, said, error = run(capsys, "verify", tmp_path, code=1)
    assert line["status"] == "failed"
    assert list(line["damaged"]) == [paths[2].name]
    assert line["newest_whole"] == paths[1].name
    assert error == f"error: 1 of 3 checkpoints are damaged; the newest whole one is {paths[1].name}\n"
    assert f"{paths[2].name}/{RANK0}: {RANK0} is damaged: its sha256 differs" in said
    line, _, _ = run(capsys, "list", tmp_path)
    assert [row["state"] for row in line["checkpoints"]] == ["whole", "whole", "damaged"]


def test_gc_removes_only_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = shelf_of(tmp_path, 2, 4, 6, 8)
    flip(paths[3])
    line, table, _ = run(capsys, "gc", tmp_path, "--keep", "1")
    assert (line["status"], line["gone"]) == ("dry run", [paths[0].name, paths[1].name])
    assert "would go" in table
    assert committed(str(tmp_path / "checkpoints")) == [str(path) for path in paths]
    line, _, _ = run(capsys, "gc", tmp_path, "--keep", "1", "--damaged", "--yes")
    assert (line["status"], line["gone"]) == ("removed", [paths[0].name, paths[1].name, paths[3].name])
    assert line["bytes"] > 0
    assert list((tmp_path / "checkpoints").iterdir()) == [paths[2]]


def test_what_is_wrong_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, part in (
        (("list", tmp_path), "has no checkpoints: give the folder of a run"),
        (("export", tmp_path), "config.yaml is missing: give the folder of a run"),
    ):
        _, out, error = run(capsys, *args, code=2)
        assert (out, error.count("\n")) == ("", 1)
        assert part in error
    shelf_of(tmp_path, 2)
    assert "--keep is 0" in run(capsys, "gc", tmp_path, "--keep", "0", code=2)[2]


def test_export_of_an_unfinished_run_is_what_a_finished_one_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_config(tmp_path, "--train.workers", "1", "--train.keep-checkpoints", "10")
    finished = tmp_path / "runs" / "finished"
    write_config(config, str(finished))
    run_local(config, finished)
    unfinished = tmp_path / "runs" / "unfinished"
    shutil.copytree(finished, unfinished)
    shutil.rmtree(unfinished / "export")
    line, _, _ = run(capsys, "export", unfinished)
    assert (line["step"], line["export"]) == (8, str(unfinished / "export"))
    files = {path.relative_to(finished / "export") for path in (finished / "export").rglob("*") if path.is_file()}
    assert files == {path.relative_to(unfinished / "export") for path in (unfinished / "export").rglob("*") if path.is_file()}
    assert all((finished / "export" / file).read_bytes() == (unfinished / "export" / file).read_bytes() for file in files)
    assert "is there already" in run(capsys, "export", unfinished, code=2)[2]
    flip(Path(committed(str(unfinished / "checkpoints"))[-1]))
    line, _, _ = run(capsys, "export", unfinished, "--output", tmp_path / "newest")
    assert line["step"] == 6
    line, _, _ = run(capsys, "export", unfinished, "4", "--output", tmp_path / "fourth")
    assert line["step"] == 4
    load_export(str(tmp_path / "fourth"), torch.device("cpu"))
    sixth, fourth = (load_file(tmp_path / name / "lam" / "model.safetensors") for name in ("newest", "fourth"))
    assert any(not sixth[name].equal(fourth[name]) for name in sixth)


def test_in_object_storage(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    paths = shelf_of(tmp_path / "bucket" / "run", 2, 4, 6)
    flip(paths[2])
    with serve(tmp_path, "bucket") as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        line, _, _ = run(capsys, "list", "s3://bucket/run")
        assert [row["state"] for row in line["checkpoints"]] == ["unverified"] * 3
        assert line["checkpoints"][0]["written"].startswith("20")
        line, _, _ = run(capsys, "verify", "s3://bucket/run", code=1)
        assert (line["newest_whole"], list(line["damaged"])) == (paths[1].name, [paths[2].name])
        assert storage.exists(f"s3://bucket/run/checkpoints/{paths[2].name}/damaged.json")
        line, _, _ = run(capsys, "gc", "s3://bucket/run", "--keep", "1", "--damaged", "--yes")
        assert line["gone"] == [paths[0].name, paths[2].name]
        assert [row["step"] for row in run(capsys, "list", "s3://bucket/run")[0]["checkpoints"]] == [4]
