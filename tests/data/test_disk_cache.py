"""The disk cache: the right bytes whatever happens to the files, never more than the limit, nothing that a run still uses goes."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_dist.data.disk_cache import DiskCache

BLOBS = [bytes([number]) * 1000 for number in range(20)]


class Store:
    """Object storage that counts what is fetched."""

    def __init__(self) -> None:
        self.fetched: list[int] = []

    def read(self, cache: DiskCache, number: int) -> None:
        def load() -> bytes:
            self.fetched.append(number)
            return BLOBS[number]

        assert cache.get(hashlib.sha256(BLOBS[number]).hexdigest(), load) == BLOBS[number]


def kept(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("??/*"))


def test_what_was_fetched_is_not_fetched_again_by_anyone(tmp_path: Path) -> None:
    store = Store()
    for _ in range(2):
        cache = DiskCache(str(tmp_path / "deep" / "cache"), 10**6)
        for number in (1, 2, 1):
            store.read(cache, number)
    assert store.fetched == [1, 2]


def test_the_limit_holds_and_what_is_in_use_stays(tmp_path: Path) -> None:
    store, cache = Store(), DiskCache(str(tmp_path), 5_500)
    for _ in range(2):
        for number in range(10):
            store.read(cache, number)
    assert kept(tmp_path) == 5_000
    assert store.fetched == [*range(10), *range(5, 10)], "the first five stay, the others are fetched each time"


def test_what_no_run_uses_any_more_makes_room(tmp_path: Path) -> None:
    store, old = Store(), DiskCache(str(tmp_path), 5_500)
    for number in range(5):
        store.read(old, number)
    for age, path in enumerate(tmp_path.glob("??/*")):
        os.utime(path, (age, age))
    cache = DiskCache(str(tmp_path), 5_500)
    for number in range(10, 15):
        store.read(cache, number)
    assert kept(tmp_path) <= 5_500
    store.fetched.clear()
    for number in range(10, 15):
        store.read(cache, number)
    assert store.fetched == []


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"x" + data[1:], lambda data: b""])
def test_a_damaged_file_is_fetched_anew(tmp_path: Path, damage: object) -> None:
    store, cache = Store(), DiskCache(str(tmp_path), 10**6)
    store.read(cache, 3)
    (path,) = tmp_path.glob("??/*")
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    store.read(cache, 3)
    store.read(cache, 3)
    assert store.fetched == [3, 3]


def test_a_disk_that_fails_is_told_once_and_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    store, cache = Store(), DiskCache(str(tmp_path / "file" / "cache"), 10**6)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            store.read(cache, 0)
    assert store.fetched == [0, 0, 0]
    assert len(caplog.records) == 1
    assert "data.disk_cache" in caplog.text


def _fill(folder: str, numbers: Sequence[int]) -> None:
    store, cache = Store(), DiskCache(folder, 7_500)
    for number in numbers:
        store.read(cache, number)


def test_processes_share_one_limit(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_fill, args=(str(tmp_path), list(range(start, 20)))) for start in (0, 5, 10)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert kept(tmp_path) == 7_000
    assert int((tmp_path / "usage").read_bytes()) == 7_000


@settings(max_examples=30, deadline=None)
@given(reads=st.lists(st.integers(0, 19), max_size=60), limit=st.integers(0, 12_000))
def test_threads_and_any_limit(tmp_path_factory: pytest.TempPathFactory, reads: list[int], limit: int) -> None:
    folder = tmp_path_factory.mktemp("cache")
    store, cache = Store(), DiskCache(str(folder), limit)
    threads = [threading.Thread(target=store.read, args=(cache, number)) for number in reads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept(folder) <= limit
