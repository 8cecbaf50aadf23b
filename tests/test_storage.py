"""The door to files: local folders and a real S3 server behave alike, and what a user can mend is said in one line."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cola_dist import storage
from cola_dist.errors import UserError
from tests.s3 import S3, SECRET, free_port, serve


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with serve(tmp_path_factory.mktemp("s3"), "bucket") as s3:
        yield s3


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture(params=["path", "file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://bucket/{tmp_path.name}"
    return f"file://{tmp_path}" if request.param == "file" else str(tmp_path)


def test_listing_a_folder_in_which_others_write(tmp_path: Path) -> None:
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            storage.write_bytes(str(tmp_path / "a"), b"data")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(2000):
            assert set(storage.list_files(str(tmp_path)).values()) <= {0, 4}
    finally:
        done.set()
        writer.join()


def test_write_read_list_delete(root: str) -> None:
    data = bytes(range(256)) * 40
    one, two = storage.join(root, "a", "one.bin"), storage.join(root, "a/b/two.bin")
    storage.write_bytes(one, data)
    storage.write_bytes(two, b"two")
    assert storage.read_bytes(one) == data
    assert storage.size(one) == len(data)
    assert storage.list_files(storage.join(root, "a")) == {"b/two.bin": 3, "one.bin": len(data)}
    assert storage.exists(one)
    assert storage.exists(storage.join(root, "a"))
    assert not storage.exists(storage.join(root, "a", "on"))
    storage.write_bytes(one, b"new")
    assert storage.read_bytes(one) == b"new"
    storage.delete(one)
    assert not storage.exists(one)
    assert storage.exists(two)
    storage.delete(storage.join(root, "a"))
    assert storage.list_files(root) == {}
    storage.delete(storage.join(root, "a"))


@pytest.mark.parametrize(("start", "length"), [(0, None), (0, 10), (7, 9), (7, None), (90, 50), (200, 5), (5, 0)])
def test_ranges_are_those_of_a_slice(root: str, start: int, length: int | None) -> None:
    data = bytes(range(100))
    uri = storage.join(root, "range.bin")
    storage.write_bytes(uri, data)
    assert storage.read_bytes(uri, start, length) == data[start : None if length is None else start + length]


def test_upload_and_download_large_file(root: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source.bin", tmp_path / "deep" / "target.bin"
    source.write_bytes(bytes(range(251)) * 40_000)  # 10 MB: more than one part
    uri = storage.join(root, "far", "copy.bin")
    storage.upload_file(source, uri)
    storage.download_file(uri, target)
    assert target.read_bytes() == source.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["target.bin"]


def test_missing_file_names_its_uri(root: str, tmp_path: Path) -> None:
    uri = storage.join(root, "none.bin")
    calls: list[Callable[[str], object]] = [storage.read_bytes, storage.size, lambda uri: storage.download_file(uri, tmp_path / "x")]
    storage.write_bytes(storage.join(root, "other.bin"), b"1")
    for call in calls:
        with pytest.raises(FileNotFoundError) as error:
            call(uri)
        assert str(error.value) == uri
    assert not (tmp_path / "x").exists()
    assert storage.exists(uri) is False
    assert storage.list_files(storage.join(root, "nowhere")) == {}


def test_failed_local_write_leaves_the_old_file(tmp_path: Path) -> None:
    uri = str(tmp_path / "file.bin")
    storage.write_bytes(uri, b"old")
    with pytest.raises(TypeError):
        storage.write_bytes(uri, "text")  # type: ignore[arg-type]
    assert storage.read_bytes(uri) == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def _message(call: Callable[..., object], *args: object) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    text = str(error.value)
    assert "\n" not in text
    assert SECRET not in text
    return text


def test_missing_bucket(s3: S3) -> None:
    for call in (storage.read_bytes, storage.size, storage.exists, storage.list_files):
        assert "bucket nobucket does not exist" in _message(call, "s3://nobucket/x")
    assert "bucket nobucket" in _message(storage.write_bytes, "s3://nobucket/x", b"1")


@pytest.mark.parametrize(("name", "value"), [("AWS_SECRET_ACCESS_KEY", "wrongsecret"), ("AWS_ACCESS_KEY_ID", "nobody")])
def test_wrong_credentials(s3: S3, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    for call in (storage.read_bytes, storage.size, storage.exists, storage.list_files):
        text = _message(call, "s3://bucket/x")
        assert "AWS_ACCESS_KEY_ID" in text
        assert "bucket" in text
        assert value not in text


def test_unreachable_endpoint_hides_its_password(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{SECRET}@127.0.0.1:{port}")
    assert f"127.0.0.1:{port} does not answer" in _message(storage.read_bytes, "s3://bucket/x")


@pytest.mark.parametrize("uri", ["ftp://host/x", "s3:///x", "embedded:nothing", "embedded:"])
def test_unusable_uris(s3: S3, uri: str) -> None:
    assert uri in _message(storage.read_bytes, uri)


def test_malformed_endpoint(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not a url")
    assert "AWS_ENDPOINT_URL" in _message(storage.read_bytes, "s3://bucket/x")


NAMES = st.text("abcXYZ019-_.", min_size=1, max_size=8).filter(lambda name: set(name) != {"."} and not name.startswith("."))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.dictionaries(NAMES, st.binary(max_size=64), max_size=5), start=st.integers(0, 70), length=st.integers(0, 70))
def test_s3_and_local_agree(s3: S3, tmp_path: Path, files: dict[str, bytes], start: int, length: int) -> None:
    roots = [str(tmp_path / "same"), "s3://bucket/same"]
    for root in roots:
        storage.delete(root)
        for name, data in files.items():
            storage.write_bytes(storage.join(root, name), data)
    assert storage.list_files(roots[0]) == storage.list_files(roots[1]) == {name: len(data) for name, data in sorted(files.items())}
    for name in files:
        local, remote = (storage.read_bytes(storage.join(root, name), start, length) for root in roots)
        assert local == remote == files[name][start : start + length]
