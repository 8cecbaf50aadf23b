"""Object storage that is busy, breaks off, hangs or goes away: the right bytes arrive, or one line says why they do not."""

from __future__ import annotations

import itertools
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cola_dist import storage
from cola_dist.errors import UserError
from tests.faulty import Faulty, before
from tests.s3 import S3, SECRET, free_port, serve

DATA = bytes(range(256)) * 2000
LARGE = bytes(range(251)) * 80_000  # 20 MB: three parts


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with serve(tmp_path_factory.mktemp("s3"), "bucket") as s3:
        (s3.root / "bucket" / "data.bin").write_bytes(DATA)
        (s3.root / "bucket" / "large.bin").write_bytes(LARGE)
        yield s3


@pytest.fixture(scope="module")
def bad(server: S3) -> Iterator[Faulty]:
    with before(server) as faulty:
        yield faulty


@pytest.fixture
def proxy(bad: Faulty, monkeypatch: pytest.MonkeyPatch) -> Faulty:
    """A proxy that answered once already, so that this process knows the endpoint."""
    for name, value in bad.server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    monkeypatch.setenv("COLA_STORAGE_PATIENCE_S", "12")
    monkeypatch.setenv("AWS_ENDPOINT_URL", bad.endpoint)
    bad.reset()
    assert storage.size("s3://bucket/data.bin") == len(DATA)
    bad.reset()
    return bad


OPERATIONS: dict[str, Callable[[], object]] = {
    "read": lambda: storage.read_bytes("s3://bucket/data.bin") == DATA,
    "range": lambda: storage.read_bytes("s3://bucket/data.bin", 1000, 300_000) == DATA[1000:301_000],
    "size": lambda: storage.size("s3://bucket/data.bin") == len(DATA),
    "list": lambda: storage.list_files("s3://bucket")["data.bin"] == len(DATA),
    "write": lambda: storage.write_bytes("s3://bucket/new/one", DATA) or storage.read_bytes("s3://bucket/new/one") == DATA,
    "delete": lambda: storage.delete("s3://bucket/new") or not storage.exists("s3://bucket/new"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("mode", ["busy", "reset", "lost", "reset_body", "truncate", "trickle"])
def test_what_passes_is_survived(proxy: Faulty, mode: str, operation: str) -> None:
    proxy.plan.extend([mode] * 2)
    assert OPERATIONS[operation]()
    # Answers to HEAD, PUT and DELETE have no body that could break off.
    assert proxy.done[mode] == 2 or mode in ("reset_body", "truncate", "trickle")
    assert proxy.done[mode] >= 1


@pytest.mark.parametrize("mode", ["hang", "hang_body"])
def test_a_hung_server_is_given_up_and_asked_again(proxy: Faulty, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("COLA_STORAGE_PATIENCE_S", "3")
    proxy.plan.append(mode)
    assert OPERATIONS["read"]()
    assert proxy.done[mode] == 1


def test_an_absent_server_is_waited_for(proxy: Faulty) -> None:
    proxy.refuse(1.5)
    assert OPERATIONS["read"]()


def test_many_readers_and_writers_through_a_bad_network(proxy: Faulty, tmp_path: Path) -> None:
    proxy.share = {"busy": 0.1, "reset": 0.1, "truncate": 0.1, "reset_body": 0.1, "lost": 0.05}
    wrong: list[str] = []

    def work(number: int) -> None:
        uri = f"s3://bucket/many/{number}"
        for turn in range(6):
            data = DATA[number * 6 + turn :]
            storage.write_bytes(uri, data)
            if storage.read_bytes(uri) != data or storage.read_bytes(uri, 7, 5000) != data[7:5007] or storage.size(uri) != len(data):
                wrong.append(uri)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sum(proxy.done[mode] for mode in proxy.share) > 20
    assert set(storage.list_files("s3://bucket/many")) == set("0123")


def test_large_files_through_a_bad_network(proxy: Faulty, tmp_path: Path) -> None:
    proxy.share = {"busy": 0.1, "reset": 0.1, "truncate": 0.1, "reset_body": 0.1}
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(LARGE)
    storage.upload_file(source, "s3://bucket/big")
    storage.download_file("s3://bucket/big", target)
    assert target.read_bytes() == LARGE
    storage.write_bytes("s3://bucket/big", LARGE[1:])
    assert storage.read_bytes("s3://bucket/big") == LARGE[1:]
    assert sum(proxy.done[mode] for mode in proxy.share) > 2


def test_an_upload_whose_last_answer_is_lost(proxy: Faulty, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(LARGE)
    proxy.plan.extend(["", "", "", "", "lost"])  # opened, three parts, put together
    storage.upload_file(tmp_path / "source", "s3://bucket/lost.bin")
    assert proxy.done["lost"] == 1
    assert storage.read_bytes("s3://bucket/lost.bin") == LARGE


def test_a_server_that_ignores_ranges_need_not_send_all(proxy: Faulty) -> None:
    proxy.plan.append("whole")
    assert storage.read_bytes("s3://bucket/large.bin", 1000, 500) == LARGE[1000:1500]
    assert proxy.done["whole"] == 1
    assert proxy.sent < len(LARGE)
    proxy.plan.extend(["whole"] * 3)
    assert storage.read_bytes("s3://bucket/data.bin", len(DATA) - 5, 50) == DATA[-5:]
    assert storage.read_bytes("s3://bucket/data.bin", len(DATA) + 5, 50) == b""
    assert storage.read_bytes("s3://bucket/data.bin", len(DATA) - 5) == DATA[-5:]


def test_downloads_from_a_server_that_ignores_ranges(proxy: Faulty, tmp_path: Path) -> None:
    proxy.plan.extend(["", "", "whole", "whole", "whole"])  # two looks at the size, three parts
    storage.download_file("s3://bucket/large.bin", tmp_path / "large")
    assert proxy.done["whole"] == 3
    assert (tmp_path / "large").read_bytes() == LARGE


def _error(kind: type[Exception], call: Callable[..., object], *args: object) -> str:
    with pytest.raises(kind) as error:
        call(*args)
    text = str(error.value)
    assert "\n" not in text
    assert SECRET not in text
    return text


CALLS: dict[str, Callable[[str], object]] = {
    "read": storage.read_bytes,
    "size": storage.size,
    "list": storage.list_files,
    "write": lambda uri: storage.write_bytes(uri, DATA),
    "write large": lambda uri: storage.write_bytes(uri, LARGE),
    "download": lambda uri: storage.download_file(uri, "never"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_server_that_is_gone_is_told_within_the_patience(proxy: Faulty, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setenv("COLA_STORAGE_PATIENCE_S", "1")
    assert storage.exists("s3://bucket/data.bin")
    proxy.close()
    began = time.monotonic()
    text = _error(UserError, CALLS[call], "s3://bucket/data.bin")
    assert re.search(rf"127.0.0.1:{proxy.port} does not answer; check AWS_ENDPOINT_URL .*tried for [012] s", text)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(("mode", "words"), [("busy", "failed at GetObject: SlowDown"), ("truncate", "breaks off")])
def test_a_server_that_never_recovers(proxy: Faulty, monkeypatch: pytest.MonkeyPatch, mode: str, words: str) -> None:
    monkeypatch.setenv("COLA_STORAGE_PATIENCE_S", "1")
    proxy.share = {mode: 1.0}
    text = _error(OSError, storage.read_bytes, "s3://bucket/data.bin")
    assert words in text
    assert f"127.0.0.1:{proxy.port}" in text
    assert proxy.done[mode] > 3


def test_a_missing_file_is_not_reported_by_a_server_that_fails(proxy: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer without a body leaves open whether file or bucket is missing; here the second question gets no answer."""
    monkeypatch.setenv("COLA_STORAGE_PATIENCE_S", "1")
    proxy.plan.append("")
    proxy.share = {"busy": 1.0}
    assert "failed at HeadBucket" in _error(OSError, storage.size, "s3://bucket/none")
    proxy.plan.append("")
    proxy.share = {"reset": 1.0}
    assert "does not answer" in _error(UserError, storage.size, "s3://bucket/none")


def test_a_server_that_hangs_for_good(proxy: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLA_STORAGE_PATIENCE_S", "1")
    proxy.share = {"hang": 1.0}
    assert "does not answer" in _error(UserError, storage.size, "s3://bucket/data.bin")


def test_what_does_not_pass_is_not_tried_again(proxy: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("s3://bucket/none")
    _error(UserError, storage.read_bytes, "s3://nobucket/none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    _error(UserError, storage.read_bytes, "s3://bucket/none")
    assert len(proxy.seen) == 3


def test_a_first_contact_has_less_patience(monkeypatch: pytest.MonkeyPatch, server: S3) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("COLA_STORAGE_PATIENCE_S", "1000")
    # A reader that came from another process, in a test before this one, has had trust in all servers.
    monkeypatch.setattr("cola_dist.s3.client._known_by_others", False)
    assert re.search(r"tried for [5-9] s", _error(UserError, storage.read_bytes, "s3://bucket/x"))


@pytest.mark.parametrize("patience", ["soon", "-1", "inf", "nan"])
def test_a_bad_patience(proxy: Faulty, monkeypatch: pytest.MonkeyPatch, patience: str) -> None:
    monkeypatch.setenv("COLA_STORAGE_PATIENCE_S", patience)
    assert "COLA_STORAGE_PATIENCE_S" in _error(UserError, storage.read_bytes, "s3://bucket/data.bin")


def test_long_waits_are_said_once(proxy: Faulty, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The clock runs fast here: each look at it is a second later."""
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)), sleep=time.sleep)
    monkeypatch.setattr("cola_dist.s3.client.time", clock)
    monkeypatch.setattr("cola_dist.s3.client._LONGEST_PAUSE_S", 0.01)
    monkeypatch.setenv("COLA_STORAGE_PATIENCE_S", "100")
    with caplog.at_level(logging.WARNING, "cola_dist.storage"):
        assert OPERATIONS["size"]()
        assert caplog.messages == []
        proxy.plan.extend(["busy"] * 9)
        assert OPERATIONS["size"]()
    (line,) = caplog.messages
    assert "HeadObject /bucket/data.bin" in line
    assert "503" in line
