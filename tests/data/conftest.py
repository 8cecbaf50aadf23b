"""Shards that several test files hurt in their own ways."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.data.clips import write_clips


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard folder of the toy clips, in several shards."""
    path = tmp_path_factory.mktemp("sound")
    write_clips(str(path), max_bytes=16_000)
    return path


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of it, to be hurt."""
    return Path(shutil.copytree(sound, tmp_path / "copy"))
