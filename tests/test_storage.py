"""The door to files: local folders and a real S3 server behave alike, and what a user can mend is said in one line."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cola_dist import storage
from cola_dist.errors import UserError
from tests.faulty import Faulty, before
from tests.s3 import KEY, S3, SECRET, free_port, serve


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
    monkeypatch.setenv("COLA_STORAGE_PATIENCE_S", "1")
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


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://bucket/x?endpont=http://h:1", "did you mean endpoint?"),
        ("s3://bucket/x?secret=testsecret", "unknown option secret; known: endpoint, region, profile, anonymous"),
        ("s3://bucket/x?endpoint=localhost:9000", "option endpoint must be http://HOST:PORT"),
        ("s3://bucket/x?endpoint=http://user:testsecret@host:1", "option endpoint must be http://HOST:PORT"),
        ("s3://bucket/x?endpoint=http://host:99999", "option endpoint must be http://HOST:PORT"),
        ("s3://bucket/x?region=-", "option region must be"),
        ("s3://bucket/x?profile=", "option profile must be"),
        ("s3://bucket/x?anonymous=yes", "option anonymous must be true or false"),
        ("s3://bucket/x?region=a&region=b", "once"),
        ("s3://bucket/x?anonymous=true&profile=me", "exclude each other"),
        ("s3://bucket/what?.mp4", "NAME=VALUE"),
        ("s3://?region=a", "no bucket"),
        ("s3://key:testsecret@bucket/x", "keys do not belong"),
        ("https://user:testsecret@host/x?sign=testsecret", "https://host/x: unknown scheme"),
        ("file://data/x", "names the machine data"),
        ("s3://bucket/x?profile=nobody", "(nobody) could not be found"),
    ],
)
def test_wrong_options(s3: S3, uri: str, words: str) -> None:
    for call in (storage.read_bytes, storage.size, storage.exists, storage.list_files, storage.delete):
        assert words in _message(call, uri)
    assert words in _message(storage.write_bytes, uri, b"1")


ANY_NAME = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..")
)


@example(folder="embedded:", file="embedded:x", options="")
@given(folder=ANY_NAME, file=ANY_NAME, options=st.sampled_from(["", "?region=here", "?endpoint=http://host:1/p&profile=a%3Fb"]))
def test_joined_names_stay_what_they_are(folder: str, file: str, options: str) -> None:
    path = Path("/", folder, file)
    assert storage.local_path(storage.join("file:///", folder, file)) == path
    assert storage.local_path(storage.join("file://localhost/", f"{folder}/{file}")) == path
    for root in ("/root", "s3://bucket", f"s3://bucket/root{options}", "file:///root", "embedded:shards"):
        uri = storage.join(storage.join(root, folder), file)
        assert uri == storage.join(root, folder, file)
        assert storage.name(uri) == file
        assert storage.name(storage.join(root, folder)) == folder
    assert storage.join(f"s3://bucket{options}", "a") == f"s3://bucket/a{options}"


def test_names() -> None:
    uris = {"runs/": "runs", "/a/b": "b", "embedded:demo": "demo", "file:///a%20b/": "a b"}
    uris |= {"s3://b/": "b", "s3://b/k/?region=x": "k", "s3://b/a?b?": "a?b"}
    assert {uri: storage.name(uri) for uri in uris} == uris


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text("ab ?&=%+#é", min_size=1, max_size=6).filter(lambda name: name.strip() == name))
def test_odd_names_in_object_storage(s3: S3, name: str) -> None:
    for root in ("s3://bucket/odd", f"s3://bucket/odd?endpoint={s3.endpoint}"):
        storage.delete(root)
        uri = storage.join(root, name)
        storage.write_bytes(uri, name.encode())
        assert storage.list_files(root) == {name: len(name.encode())}
        assert storage.read_bytes(uri) == name.encode()


def test_percent_encoded_file_uris(tmp_path: Path) -> None:
    (tmp_path / "a b%.txt").write_bytes(b"1")
    assert storage.read_bytes(f"file://{tmp_path}/a%20b%25.txt") == b"1"
    assert storage.read_bytes(storage.join(f"file://{tmp_path}", "a b%.txt")) == b"1"


@pytest.fixture
def proxy(server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """A second endpoint, which notes what arrives; the environment knows nothing of it and has no keys."""
    for name in server.environment:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with before(server) as faulty:
        yield faulty


def _profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "config").write_text(text)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))


def test_profiles_bring_their_keys(proxy: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = f"[profile right]\nregion = far-1\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n"
    wrong = f"[profile wrong]\naws_access_key_id = {KEY}\naws_secret_access_key = other{SECRET}\n"
    _profiles(tmp_path, monkeypatch, f"{right}{wrong}[profile empty]\nregion = x\n")
    uri = f"s3://bucket/mine?endpoint={proxy.endpoint}"
    assert "no credentials; set AWS_ACCESS_KEY_ID" in _message(storage.read_bytes, uri)
    assert "no credentials; set the keys of profile empty" in _message(storage.read_bytes, f"{uri}&profile=empty")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-another")  # keys of the environment do not stand before those of a named profile
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "server")
    assert "check the keys of profile wrong" in _message(storage.read_bytes, f"{uri}&profile=wrong")
    storage.write_bytes(f"{uri}&profile=right", b"mine")
    assert f"{KEY}/" in proxy.seen[-1][2]["authorization"]
    assert "/far-1/s3/" in proxy.seen[-1][2]["authorization"]
    assert storage.read_bytes(f"{uri}&profile=right&region=near-2") == b"mine"
    assert "/near-2/s3/" in proxy.seen[-1][2]["authorization"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "right")
    monkeypatch.setenv("AWS_REGION", "sea-3")
    assert storage.read_bytes(uri) == b"mine"
    assert "/sea-3/s3/" in proxy.seen[-1][2]["authorization"]


def test_a_public_bucket_beside_the_teams_own(s3: S3, tmp_path: Path) -> None:
    with serve(tmp_path, "public", open_to_all=True) as open_server, before(open_server) as proxy:
        (tmp_path / "public" / "shared.bin").write_bytes(b"shared")
        uri = f"s3://public/shared.bin?endpoint={proxy.endpoint}&anonymous=true"
        storage.write_bytes("s3://bucket/own", b"own")
        assert (storage.read_bytes(uri), storage.read_bytes("s3://bucket/own")) == (b"shared", b"own")
        assert storage.list_files(f"s3://public?endpoint={proxy.endpoint}&anonymous=true") == {"shared.bin": 6}
        assert proxy.seen
        assert not any("authorization" in headers for _, _, headers in proxy.seen)


def test_a_bucket_that_is_not_public(proxy: Faulty) -> None:
    text = _message(storage.read_bytes, f"s3://bucket/x?endpoint={proxy.endpoint}&anonymous=true")
    assert "remove anonymous=true" in text


class _Metadata(BaseHTTPRequestHandler):
    """What a cloud machine learns of its own role."""

    def do_PUT(self) -> None:
        self._answer("token")

    def do_GET(self) -> None:
        keys = {"AccessKeyId": KEY, "SecretAccessKey": SECRET, "Token": "session", "Expiration": "2099-01-01T00:00:00Z", "Code": "Success"}
        self._answer(json.dumps(keys) if self.path.endswith("/trainer") else "trainer")

    def _answer(self, text: str) -> None:
        self.send_response_only(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_the_role_of_the_machine(proxy: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = ThreadingHTTPServer(("127.0.0.1", 0), _Metadata)
    threading.Thread(target=machine.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{machine.server_address[1]}")
    try:
        uri = f"s3://bucket/role?endpoint={proxy.endpoint}"
        storage.write_bytes(uri, b"role")
        assert storage.read_bytes(uri) == b"role"
        assert proxy.seen[-1][2]["x-amz-security-token"] == "session"
    finally:
        machine.shutdown()
        machine.server_close()
