"""A disk that is full in mid-training: one error says where, and with room again the run goes on to the same losses."""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from cola_dist import storage
from cola_dist.errors import UserError
from cola_dist.train.checkpoint import Checkpoint, CheckpointWriter
from cola_dist.train.engine import Fragment
from cola_dist.train.shelf import Position, latest
from cola_dist.train.trace import read_trace
from tests.conftest import Undisturbed
from tests.outcomes import ONE_ERROR, Outcomes
from tests.train.jobs import errors_of, job, newest_step, run_job, wait_for_run, write_config
from tests.train.test_faults import SETTINGS, SETTLED, hashes


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_does_not_fit_is_an_error_that_says_where(tmp_path: Path) -> None:
    target = tmp_path / "file"
    storage.write_bytes(str(target), b"old")
    with files_of_at_most(1000), pytest.raises(UserError, match=rf"^{target}: cannot be written \(File too large\): make room there"):
        storage.write_bytes(str(target), bytes(2000))
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target], "no part of it is left"


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path: Path) -> None:
    writer = CheckpointWriter(str(tmp_path), rank=0, world=1, attempt="a", keep=2)

    def save(step: int) -> None:
        fragment = Fragment("lam", "lam.weight", 0, (4000,), True, torch.zeros(4000), torch.zeros(4000), torch.zeros(4000))
        writer.save(Position(step, "warmup", "tiny", "", {"lam": step}), [fragment], {}, {}, {"lam.weight": (4000,)})
        writer.wait()

    save(2)
    with files_of_at_most(10_000), pytest.raises(UserError, match=r"rank-00000\.safetensors: cannot be written \(File too large\)"):
        save(4)
    assert Checkpoint(latest(str(tmp_path)) or "").position.step == 2
    save(4)
    assert Checkpoint(latest(str(tmp_path)) or "").position.step == 4


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"this user may not mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Take all that is free there, and what becomes free for a while."""
    ballast, began = disk / "ballast", time.monotonic()
    with ballast.open("ab", buffering=0) as file:
        while time.monotonic() - began < 2:
            with suppress(OSError):
                file.write(bytes(4096))
    return ballast


@pytest.mark.ray
@pytest.mark.fault
@pytest.mark.long
def test_a_full_disk_is_one_error_and_the_run_goes_on_with_room(undisturbed: Undisturbed, disk: Path, outcomes: Outcomes) -> None:
    config = write_config(undisturbed.folder, *SETTINGS, "--output", str(disk))
    with job("--config", config) as running:
        run = wait_for_run(running, disk)
        running.wait_until(lambda: newest_step(run) >= SETTLED)
        began, ballast = time.monotonic(), fill(disk)
        ended = running.wait()
    seconds = time.monotonic() - began
    assert ended.code == 2
    (error,) = errors_of(ended)
    assert error.startswith(f"error: {run}/")
    assert "cannot be written (No space left on device): make room there" in error
    assert "--resume" in error
    assert Checkpoint(latest(str(run)) or "").position.step == newest_step(run) >= SETTLED

    ballast.unlink()
    assert run_job("--resume", run).result["status"] == "finished"
    assert read_trace(str(run)) == read_trace(str(undisturbed.run))
    assert hashes(run) == hashes(undisturbed.run)
    outcomes.add("the disk of the run is full", "while a checkpoint is written", ONE_ERROR, None, seconds)
