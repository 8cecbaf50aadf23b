"""Damaged checkpoints: what a run goes on from, what it keeps, what looking at them says, and what clearing up takes away."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cola_dist import storage
from cola_dist.errors import UserError
from cola_dist.settings import parse_job
from cola_dist.train import checkpoint
from cola_dist.train.checkpoint import Checkpoint, CheckpointWriter
from cola_dist.train.engine import Fragment
from cola_dist.train.job import resolve, write_config
from cola_dist.train.keeping import newest_whole, open_together
from cola_dist.train.loop import plan_stream
from cola_dist.train.shelf import Position, committed, latest, prune, survey
from cola_dist.train.trace import read_trace
from cola_dist.train.upkeep import clearing, export_run, verify
from tests.train.harness import run_local, toy_config

RANK0 = "rank-00000.safetensors"


def truncate(folder: Path) -> None:
    path = folder / RANK0
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder: Path) -> None:
    path = folder / RANK0
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def lose(folder: Path) -> None:
    (folder / RANK0).unlink()


def garble_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 2, "posi')


def garble_tensors(folder: Path) -> None:
    """Bytes that are what the manifest says, and no safetensors."""
    import hashlib

    (folder / RANK0).write_bytes(b"no tensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][RANK0] = hashlib.sha256(b"no tensors").hexdigest()
    manifest["bytes"][RANK0] = len(b"no tensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "has": truncate,
    "sha256 differs": flip,
    "is missing": lose,
    "manifest.json cannot be read": garble_manifest,
    "cannot be read: ": garble_tensors,
}


def shelf_of(run: Path, *steps: int, keep: int = 100, frozen: str = "seed 0") -> list[Path]:
    """Checkpoints of a run that never was, a few numbers each."""
    for step in steps:
        writer = CheckpointWriter(str(run), rank=0, world=1, attempt=f"a{step}", keep=keep)
        fragment = Fragment("lam", "lam.weight", 0, (40,), True, torch.arange(40.0) + step, torch.zeros(40), torch.zeros(40))
        position = Position(step, "warmup", "tiny", "", {"lam": step}, {"world": {"uri": frozen, "sha256": ""}})
        writer.save(position, [fragment], {}, {}, {"lam.weight": (40,)})
        writer.wait()
    return [Path(uri) for uri in committed(str(run / "checkpoints"))]


def step_of(uri: str) -> int:
    return int(Path(uri).name.split("-")[1])


def steps_in(run: Path) -> list[int]:
    return [step_of(uri) for uri in committed(str(run / "checkpoints"))]


# What a run goes on from.


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toys")


@pytest.fixture(scope="module")
def plain(toys: Path) -> Path:
    """An undisturbed run of two workers."""
    run = toys / "runs" / "plain"
    assert run_local(toy_config(toys), run)["status"] == "finished"
    return run


@pytest.fixture(scope="module")
def stopped(toys: Path) -> Path:
    """The same, stopped at step 7 with checkpoints at steps 6 and 7; to be copied."""
    run = toys / "runs" / "stopped"
    write_config(toy_config(toys), str(run))
    assert run_local(toy_config(toys), run, stop_at=6)["status"] == "interrupted"
    assert steps_in(run) == [6, 7]
    return run


def test_a_truncated_newest_checkpoint_changes_no_loss(toys: Path, plain: Path, stopped: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = toys / "runs" / "truncated"
    shutil.copytree(stopped, run)
    sixth, seventh = (Path(uri) for uri in committed(str(run / "checkpoints")))
    truncate(seventh)
    capfd.readouterr()
    assert run_local(toy_config(toys), run)["status"] == "finished"
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "damaged" in line]
    assert line == (
        f"damaged checkpoint passed over: {seventh.name} ({RANK0} is damaged: its sha256 differs from the manifest's); "
        f"going on from {sixth.name} instead"
    )
    assert read_trace(str(run)) == read_trace(str(plain))
    assert (seventh / RANK0).exists(), "nobody but a person removes it"
    assert (seventh / "damaged.json").exists()
    sevenths = [uri for uri in committed(str(run / "checkpoints")) if "step-00000007" in uri]
    assert sevenths == [str(seventh)]
    assert steps_in(run) == [6, 7, 8], "the damaged one takes nobody's place"
    assert json.loads((run / "result.json").read_text())["checkpoint"] == latest(str(run))


def open_as_rank(rank: int, run: str, rendezvous: str) -> None:
    """Opens with another process; rank 1 finds that the file of step 6 is not what it should be."""
    honest = checkpoint.file_fault
    if rank == 1:
        checkpoint.file_fault = lambda path, sha256: "seen by one alone" if "step-00000006" in str(path) else honest(path, sha256)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    told: list[str] = []
    opened = open_together(run, rank, 2, dist.group.WORLD, told.append)
    assert opened is not None
    Path(f"{rendezvous}-{rank}").write_text(json.dumps([opened.position.step, told]))
    dist.destroy_process_group()


def test_what_one_rank_alone_cannot_read_is_passed_over_by_all(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _, fourth, sixth = shelf_of(run, 2, 4, 6)
    mp.spawn(open_as_rank, args=(str(run), str(tmp_path / "meet")), nprocs=2)
    line = f"damaged checkpoint passed over: {sixth.name} (seen by one alone); going on from {fourth.name} instead"
    assert [json.loads((tmp_path / f"meet-{rank}").read_text()) for rank in (0, 1)] == [[4, [line]], [4, []]]
    assert latest(str(run)) == str(fourth)


def test_a_job_says_which_is_damaged_why_and_what_is_taken_instead(
    toys: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "mine"
    shutil.copytree(stopped, run)
    sixth, seventh = (Path(uri) for uri in committed(str(run / "checkpoints")))
    lose(seventh)
    job = parse_job(("--resume", str(run)), default_recipe="tiny", prog="jobs/cotrain.py", method="cotrain")
    line = f"damaged checkpoint passed over: {seventh.name} ({RANK0} is missing); going on from {sixth.name} instead\n"
    for _ in range(2):
        config, _ = resolve(job, "fresh")
        assert capsys.readouterr().err == line
        told: list[str] = []
        assert plan_stream(config, str(run), config.train.workers, told.append).first_step == 6
        assert told == [], "the user has heard it"
    truncate(sixth)
    with pytest.raises(UserError, match=r"no checkpoint of run .* is whole") as refusal:
        resolve(job, "fresh")
    assert capsys.readouterr().err == ""
    said = str(refusal.value)
    assert "\n" not in said
    for part in (seventh.name, sixth.name, "bring back the files", "jobs/checkpoints.py verify", "start a new run"):
        assert part in said
    with pytest.raises(UserError, match=r"no checkpoint of run .* is whole"):
        run_local(toy_config(toys, "--train.workers", "1"), run)


@pytest.mark.parametrize("sign", DAMAGE)
def test_every_kind_of_damage_is_passed_over(tmp_path: Path, sign: str) -> None:
    first, second = shelf_of(tmp_path, 2, 4)
    DAMAGE[sign](second)
    told: list[str] = []
    assert newest_whole(str(tmp_path), told.append) == str(first)
    (line,) = told
    assert sign in line
    assert f"passed over: {second.name} (" in line
    assert line.endswith(f"; going on from {first.name} instead")
    assert latest(str(tmp_path)) == str(first), "all others hear of it without reading it"


def test_a_new_checkpoint_at_the_step_of_a_damaged_one_is_the_newest(tmp_path: Path) -> None:
    first, second = shelf_of(tmp_path, 2, 4)
    flip(second)
    assert newest_whole(str(tmp_path), str) == str(first)
    (tmp_path / "checkpoints" / "step-00000004-a4").rename(tmp_path / "checkpoints" / "step-00000004-zz")
    shelf_of(tmp_path, 4, keep=2)
    assert latest(str(tmp_path)) == str(tmp_path / "checkpoints" / "step-00000004-a4")
    assert newest_whole(str(tmp_path), str) == latest(str(tmp_path))
    assert Checkpoint(latest(str(tmp_path)) or "").read("weight", "lam.weight")[0] == 4


def test_a_run_without_checkpoints_begins(tmp_path: Path) -> None:
    assert newest_whole(str(tmp_path), pytest.fail) is None
    (tmp_path / "checkpoints" / "step-00000002-a").mkdir(parents=True)
    assert newest_whole(str(tmp_path), pytest.fail) is None


# What a run keeps.


@pytest.mark.parametrize("damage", [truncate, lose, garble_manifest])
def test_retention_counts_no_damaged_one(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    _, _, newest = shelf_of(tmp_path, 2, 4, 6)
    damage(newest)
    prune(str(tmp_path / "checkpoints"), 1)
    assert steps_in(tmp_path) == [4, 6], "the newest whole one stays, and so does the damaged one"


def test_retention_counts_no_marked_one(tmp_path: Path) -> None:
    _, _, newest = shelf_of(tmp_path, 2, 4, 6)
    flip(newest)
    newest_whole(str(tmp_path), str)
    prune(str(tmp_path / "checkpoints"), 1)
    assert steps_in(tmp_path) == [4, 6]


def test_a_part_that_storage_cut_short_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(path: str, uri: str) -> None:
        storage.write_bytes(uri, Path(path).read_bytes()[:-1])

    shelf_of(tmp_path, 2)
    monkeypatch.setattr(storage, "upload_file", cut)
    with pytest.raises(OSError, match=r"was not stored whole \(rank-00000.safetensors has"):
        shelf_of(tmp_path, 4, keep=1)
    assert steps_in(tmp_path) == [2]


# What looking at them says.


def test_verify_names_every_damaged_file_and_hears_of_mended_ones(tmp_path: Path) -> None:
    paths = shelf_of(tmp_path, 2, 4, 6, 8)
    whole = (paths[2] / RANK0).read_bytes()
    for path, damage in zip(paths[1:], (lose, flip, garble_manifest), strict=True):
        damage(path)
    found = {step_of(examined.uri): examined.faults for examined in verify(str(tmp_path))}
    assert found[2] == {RANK0: ""}
    assert found[4] == {RANK0: f"{RANK0} is missing"}
    assert "sha256 differs" in found[6][RANK0]
    assert found[8] == {"manifest.json": "manifest.json cannot be read"}
    assert [entry.state for entry in survey(str(tmp_path / "checkpoints"))] == ["whole", "damaged", "damaged", "damaged"]
    assert latest(str(tmp_path)) == str(paths[0])
    (paths[2] / RANK0).write_bytes(whole)
    assert latest(str(tmp_path)) == str(paths[0]), "nobody has looked yet"
    assert not {step_of(examined.uri): examined for examined in verify(str(tmp_path))}[6].fault
    assert latest(str(tmp_path)) == str(paths[2])


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    write_config(toy_config(tmp_path), str(tmp_path))
    flip(shelf_of(tmp_path, 2, 4)[1])
    with pytest.raises(UserError, match=r"at step 4 is damaged .* give another step; there are: 2, 4"):
        export_run(str(tmp_path), 4, str(tmp_path / "export"))
    with pytest.raises(UserError, match=r"no checkpoint at step 3; there are: 2, 4"):
        export_run(str(tmp_path), 3, str(tmp_path / "export"))
    assert step_of(latest(str(tmp_path)) or "") == 4, "asking changes nothing"


# What clearing up takes away.


def going(run: Path, keep: int = 1, damaged: bool = False) -> list[int]:
    return [entry.step for entry, goes, _ in clearing(str(run), keep, damaged) if goes]


@pytest.mark.parametrize("damage", DAMAGE.values())
def test_clearing_never_takes_the_newest_whole_one(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    paths = shelf_of(tmp_path, 2, 4, 6, 8)
    assert going(tmp_path) == [2, 4, 6]
    assert going(tmp_path, keep=3) == [2]
    for path in paths[2:]:
        damage(path)
    assert going(tmp_path) == [2]
    assert going(tmp_path, damaged=True) == [2, 6, 8]
    assert going(tmp_path, keep=2, damaged=True) == [6, 8]
    for path in paths[:2]:
        damage(path)
    assert going(tmp_path, damaged=True) == [], "somebody may want to mend one"


def test_clearing_takes_writes_that_were_interrupted_and_not_one_that_goes_on(tmp_path: Path) -> None:
    shelf_of(tmp_path, 4)
    for step in (2, 6, 8):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}-x"
        folder.mkdir()
        (folder / RANK0).write_bytes(b"half")
    yesterday = time.time() - 24 * 3600
    os.utime(tmp_path / "checkpoints" / "step-00000006-x" / RANK0, (yesterday, yesterday))
    plan = {entry.step: (goes, why) for entry, goes, why in clearing(str(tmp_path), 1, False)}
    assert plan == {
        2: (True, "interrupted write"),
        4: (False, "whole"),
        6: (True, "interrupted write"),
        8: (False, "no manifest: may still be being written"),
    }


def test_clearing_leaves_what_a_later_checkpoint_refers_to(tmp_path: Path) -> None:
    first, _ = shelf_of(tmp_path, 2, 4)
    shelf_of(tmp_path, 6, frozen=f"{first}/world")
    plan = {entry.step: (goes, why) for entry, goes, why in clearing(str(tmp_path), 1, False)}
    assert plan == {2: (False, "step 6 refers to it for its frozen world"), 4: (True, "older than the newest 1 whole"), 6: (False, "whole")}
