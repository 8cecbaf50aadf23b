"""Shards: anyone's tools read them, a member is one ranged read, and lint finds what is broken."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_dist import storage
from cola_dist.data.decode import decode_clip, encode_mp4
from cola_dist.data.shards import INDEX, CorruptMember, ShardFolder, ShardWriter, lint, open_folder, read_member
from cola_dist.data.sources import held_out
from cola_dist.errors import UserError
from tests.data.videos import moving_square
from tests.s3 import S3, serve

FRAMES = 12
VIDEOS = {f"clip-{i}": encode_mp4(moving_square(FRAMES, seed=i), 5.0) for i in range(5)}


def write(uri: str, max_bytes: int = 256 * 1024**2, order: Callable[[list[str]], list[str]] = sorted) -> ShardFolder:
    with ShardWriter(uri, "toy", "robot", max_bytes) as writer:
        for key in order(list(VIDEOS)):
            number = int(key[-1])
            actions = np.full((FRAMES - 1, 2), number, np.float32) if number % 2 else None
            state = np.full((FRAMES, 3), number, np.float32) if number % 2 else None
            split = "heldout" if number == 3 else "train"
            writer.add(key, split, VIDEOS[key], {"task": f"näher {key}"}, FRAMES, 5.0, actions, state)
        return writer.close()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound")
    write(str(path), max_bytes=16_000)
    return path


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def test_round_trip(sound: Path) -> None:
    opened = open_folder(str(sound))
    assert (opened.source, opened.domain) == ("toy", "robot")
    assert [episode.key for episode in opened.episodes] == sorted(VIDEOS)
    assert [episode.key for episode in opened.split("heldout")] == ["clip-3"]
    assert len(opened.shards) > 1, "the size limit must make several shards"
    for episode in opened.episodes:
        assert (episode.frames, episode.fps) == (FRAMES, 5.0)
        assert read_member(opened, episode, "mp4") == VIDEOS[episode.key]
        about = json.loads(read_member(opened, episode, "json"))
        assert about["task"] == f"näher {episode.key}"
        assert about["source"] == "toy"
        assert about["frames"] == FRAMES
    actions = np.load(io.BytesIO(read_member(opened, opened.split("heldout")[0], "actions.npy")))
    np.testing.assert_array_equal(actions, np.full((FRAMES - 1, 2), 3, np.float32))
    assert lint(str(sound)) == []


def test_plain_tar_and_plain_webdataset_read_the_same(sound: Path) -> None:
    opened = open_folder(str(sound))
    from_tar: dict[str, bytes] = {}
    for shard in opened.shards:
        with tarfile.open(sound / shard) as tar:
            from_tar |= {entry.name: tar.extractfile(entry).read() for entry in tar if entry.isfile()}  # type: ignore[union-attr]
    assert from_tar == {f"{e.key}.{ext}": read_member(opened, e, ext) for e in opened.episodes for ext in e.members}
    samples = {sample["__key__"]: sample for sample in webdataset.WebDataset([str(sound / s) for s in opened.shards], shardshuffle=False)}
    assert sorted(samples) == sorted(VIDEOS)
    assert all(samples[key]["mp4"] == mp4 for key, mp4 in VIDEOS.items())
    assert "actions.npy" in samples["clip-1"]
    assert "actions.npy" not in samples["clip-2"]


def test_same_content_same_bytes_and_hash(tmp_path: Path) -> None:
    first, again = write(str(tmp_path / "a")), write(str(tmp_path / "b"))
    assert (tmp_path / "a" / "toy-00000.tar").read_bytes() == (tmp_path / "b" / "toy-00000.tar").read_bytes()
    resorted = write(str(tmp_path / "c"), 16_000, lambda keys: sorted(keys, reverse=True))
    assert first.content_hash == again.content_hash == resorted.content_hash
    with ShardWriter(str(tmp_path / "d"), "toy", "robot") as writer:
        writer.add("clip-0", "train", VIDEOS["clip-0"], {}, FRAMES, 5.0)
        assert writer.close().content_hash != first.content_hash


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(bytes(data))


def _reindex(path: Path, change: Callable[[dict[str, object]], dict[str, object]]) -> None:
    table = pq.read_table(path / INDEX)
    rows = [change(row) for row in table.to_pylist()]
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), path / INDEX)


def _spot(path: Path, key: str, ext: str) -> tuple[Path, int]:
    episode = next(episode for episode in open_folder(str(path)).episodes if episode.key == key)
    return path / episode.shard, episode.members[ext].offset


def test_lint_finds_a_flipped_byte_and_reading_refuses_it(folder: Path) -> None:
    shard, offset = _spot(folder, "clip-2", "mp4")
    _flip(shard, offset + 200)
    found = lint(str(folder))
    assert found == [f"{shard.name}: clip-2.mp4: checksum differs"]
    opened = open_folder(str(folder))
    with pytest.raises(CorruptMember, match=r"clip-2\.mp4") as error:
        read_member(opened, opened.episodes[2], "mp4")
    assert shard.name in str(error.value)
    assert read_member(opened, opened.episodes[2], "json")


def test_lint_finds_a_changed_header(folder: Path) -> None:
    shard, offset = _spot(folder, "clip-0", "mp4")
    _flip(shard, offset - 512)  # the header block before the bytes begins with the name
    assert any("clip-0.mp4" in line and "in the tar" in line for line in lint(str(folder)))


def test_truncated_shard(folder: Path) -> None:
    shard, offset = _spot(folder, "clip-3", "mp4")
    shard.write_bytes(shard.read_bytes()[: offset + 100])
    with pytest.raises(UserError, match=rf"{shard.name}: {offset + 100} bytes where the index says"):
        open_folder(str(folder))
    found = lint(str(folder))
    assert any(line.startswith(f"{shard.name}: {offset + 100} bytes") for line in found)
    assert f"{shard.name}: clip-3.mp4: checksum differs" in found


def test_missing_and_extra_shards(folder: Path) -> None:
    (folder / "toy-00000.tar").rename(folder / "toy-00007.tar")
    with pytest.raises(UserError, match=r"toy-00000\.tar: listed in the index but missing"):
        open_folder(str(folder))
    assert set(lint(str(folder))) == {"toy-00007.tar: not in the index", "toy-00000.tar: missing"}


def test_lint_finds_wrong_figures_in_the_index(folder: Path) -> None:
    _reindex(folder, lambda row: row | ({"frames": FRAMES + 1} if row["key"] == "clip-1" else {}))
    found = "\n".join(lint(str(folder)))
    assert "clip-1.mp4: 12 frames" in found
    assert "clip-1.actions.npy: 11 rows" in found
    assert "clip-1.state.npy: 12 rows" in found
    assert "clip-2" not in found


def test_lint_finds_a_wrong_offset(folder: Path) -> None:
    _reindex(folder, lambda row: row | ({"offset": 512} if row["key"] == "clip-4" and row["ext"] == "mp4" else {}))
    assert any("clip-4.mp4" in line for line in lint(str(folder)))


def test_lint_decodes(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path), "toy", "human") as writer:
        writer.add("bad", "train", b"no video", {}, 12, 5.0)
        writer.close()
    assert len(lint(str(tmp_path))) == 1
    assert "bad.mp4: no video" in lint(str(tmp_path))[0]


def test_index_of_another_version_and_no_index(folder: Path, tmp_path: Path) -> None:
    table = pq.read_table(folder / INDEX)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"cola_dist.version": b"99"}), folder / INDEX)
    with pytest.raises(UserError, match="shard format 99"):
        open_folder(str(folder))
    (folder / INDEX).write_bytes(b"junk")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        open_folder(str(folder))
    with pytest.raises(UserError, match="no finished shard folder"):
        open_folder(str(tmp_path / "nothing"))


def test_writer_refuses_what_the_format_does_not_know(sound: Path, tmp_path: Path) -> None:
    mp4 = VIDEOS["clip-0"]
    with pytest.raises(UserError, match="holds shards already"):
        ShardWriter(str(sound), "toy", "robot")
    with pytest.raises(UserError, match="domain dog"):
        ShardWriter(str(tmp_path), "toy", "dog")
    with ShardWriter(str(tmp_path), "toy", "robot") as writer:
        writer.add("a", "train", mp4, {}, FRAMES, 5.0)
        for key, split, actions in (("a", "train", None), ("x.y", "train", None), ("b", "test", None), ("b", "train", np.zeros((3, 2)))):
            with pytest.raises(UserError):
                writer.add(key, split, mp4, {}, FRAMES, 5.0, actions)  # type: ignore[arg-type]
        assert [episode.key for episode in writer.close().episodes] == ["a"]


def test_unfinished_pack_leaves_nothing_readable_and_can_be_repeated(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardWriter(str(tmp_path), "toy", "robot", max_bytes=1) as writer:
            for key, mp4 in VIDEOS.items():
                writer.add(key, "train", mp4, {}, FRAMES, 5.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.glob("*.tar"))
    with pytest.raises(UserError, match="no finished shard folder"):
        open_folder(str(tmp_path))
    write(str(tmp_path))
    assert lint(str(tmp_path)) == []


def test_two_episodes_always_hold_one_out(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path), "toy", "robot") as writer:
        for key in ("a", "b"):
            writer.add(key, "train", VIDEOS["clip-0"], {}, FRAMES, 5.0)
        folder = writer.close()
    assert (len(folder.split("train")), len(folder.split("heldout"))) == (1, 1)


@given(names=st.sets(st.text(max_size=6), min_size=2, max_size=40), share=st.floats(0.01, 0.99))
def test_held_out_is_a_proper_part_whatever_the_order(names: set[str], share: float) -> None:
    chosen = held_out(sorted(names), share)
    assert chosen == held_out(sorted(names, reverse=True), share)
    assert 1 <= len(chosen) < len(names)
    assert chosen < names


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 9000), min_size=1, max_size=12), limit=st.integers(1, 50_000))
def test_any_sizes_round_trip(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int) -> None:
    path = tmp_path_factory.mktemp("sizes")
    with ShardWriter(str(path), "toy", "human", limit) as writer:
        for index, size in enumerate(sizes):
            writer.add(f"k{index:02d}", "train", bytes([index]) * size, {}, 2, 5.0)
        folder = writer.close()
    for index, (episode, size) in enumerate(zip(folder.episodes, sizes, strict=True)):
        assert read_member(folder, episode, "mp4") == bytes([index]) * size
    for shard in folder.shards:
        with tarfile.open(path / shard) as tar:
            held = {entry.name.partition(".")[0] for entry in tar}
            assert len(held) == 1 or folder.shards[shard] <= limit, "only a single episode may exceed the limit"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with serve(tmp_path_factory.mktemp("s3"), "bucket") as s3:
        yield s3


def test_object_storage_gives_the_same_folder(server: S3, sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    remote = write("s3://bucket/deep/toy", max_bytes=16_000)
    local = open_folder(str(sound))
    assert remote.episodes == local.episodes
    assert remote.content_hash == local.content_hash
    for episode in remote.episodes:
        assert read_member(remote, episode, "mp4") == VIDEOS[episode.key]
    assert lint("s3://bucket/deep/toy") == []
    storage.delete("s3://bucket/deep/toy/toy-00001.tar")
    with pytest.raises(UserError, match=r"toy-00001\.tar"):
        open_folder("s3://bucket/deep/toy")


@pytest.mark.parametrize(("name", "domain"), [("robot", "robot"), ("hand", "human")])
def test_embedded_data_is_sound(name: str, domain: str) -> None:
    folder = open_folder(f"embedded:{name}")
    assert folder.domain == domain
    assert lint(folder.uri) == []
    assert len(folder.split("heldout")) == round(0.1 * len(folder.episodes)) > 0
    for episode in folder.episodes[::24]:
        about = json.loads(read_member(folder, episode, "json"))
        assert "simulated" in about["embodiment"]
        assert about["licence"]
        clip = decode_clip(read_member(folder, episode, "mp4"), 0, episode.frames, 1, 64, None).astype(int)
        changed = (np.abs(np.diff(clip, axis=0)).max(1) > 20).mean((1, 2))
        assert np.median(changed) > 0.01, "motion must be visible between most frames"
        if domain == "robot":
            actions = np.load(io.BytesIO(read_member(folder, episode, "actions.npy")))
            assert actions.shape == (episode.frames - 1, 4)
            assert np.abs(actions).max() <= 1
        else:
            assert set(episode.members) == {"json", "mp4"}
