"""Shards: anyone's tools read them, a member is one ranged read, and what is damaged or does not fit is refused."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_dist import storage
from cola_dist.data.decode import decode_clip
from cola_dist.data.lint import lint
from cola_dist.data.packing import Packing
from cola_dist.data.part_writer import PartWriter
from cola_dist.data.shards import INDEX, CorruptMember, open_folder, read_index, read_member
from cola_dist.data.sources import Item, SourceEpisode
from cola_dist.errors import UserError
from tests.data.clips import FRAMES, PICTURES, VIDEOS, flip, spot, write_clips
from tests.s3 import S3, serve
from tests.toy import FolderWriter


def test_round_trip(sound: Path) -> None:
    opened = open_folder(str(sound))
    assert (opened.source, opened.domain) == ("toy", "robot")
    assert [episode.key for episode in opened.episodes] == sorted(VIDEOS)
    assert [episode.key for episode in opened.split("heldout")] == ["clip-3"]
    assert len(opened.shards) > 1, "the size limit must make several shards"
    for episode in opened.episodes:
        assert (episode.frames, episode.fps, episode.width, episode.height) == (FRAMES, 5.0, 64, 48)
        assert json.loads(episode.provenance) == {"dataset": "drawn", "file": f"{episode.key}.mkv", "licence": "none"}
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
    first, again = write_clips(str(tmp_path / "a")), write_clips(str(tmp_path / "b"))
    (shard,) = first.shards
    assert (tmp_path / "a" / shard).read_bytes() == (tmp_path / "b" / shard).read_bytes()
    resorted = write_clips(str(tmp_path / "c"), 16_000, lambda keys: sorted(keys, reverse=True))
    assert first.content_hash == again.content_hash == resorted.content_hash
    writer = FolderWriter(str(tmp_path / "d"), "toy", "robot")
    writer.add("clip-0", "train", VIDEOS["clip-0"], {}, FRAMES, 5.0)
    assert writer.close().content_hash != first.content_hash


def test_a_flipped_byte_is_refused_and_the_other_members_are_read(folder: Path) -> None:
    shard, offset = spot(folder, "clip-2", "mp4")
    flip(shard, offset + 200)
    opened = open_folder(str(folder))
    with pytest.raises(CorruptMember, match=r"clip-2\.mp4") as error:
        read_member(opened, opened.episodes[2], "mp4")
    assert shard.name in str(error.value)
    assert read_member(opened, opened.episodes[2], "json")


def test_truncated_and_missing_shards_are_refused(folder: Path) -> None:
    shard, offset = spot(folder, "clip-3", "mp4")
    shard.write_bytes(shard.read_bytes()[: offset + 100])
    with pytest.raises(UserError, match=rf"{shard.name}: {offset + 100} bytes where the index says"):
        open_folder(str(folder))
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name}: listed in the index but missing"):
        open_folder(str(folder))
    assert len(read_index(str(folder)).episodes) == len(VIDEOS), "the index itself is whole"


def test_index_of_another_version_and_no_index(folder: Path, tmp_path: Path) -> None:
    table = pq.read_table(folder / INDEX)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"cola_dist.version": b"99"}), folder / INDEX)
    with pytest.raises(UserError, match="shard format 99"):
        open_folder(str(folder))
    rows = [row | {"split": "train"} for row in table.to_pylist()]
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), folder / INDEX)
    with pytest.raises(UserError, match=r"damaged \(its digest differs\)"):
        open_folder(str(folder))
    (folder / INDEX).write_bytes(b"junk")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        open_folder(str(folder))
    with pytest.raises(UserError, match="no finished shard folder"):
        open_folder(str(tmp_path / "nothing"))


def test_writer_refuses_what_the_format_does_not_know(tmp_path: Path) -> None:
    writer = FolderWriter(str(tmp_path), "toy", "robot")
    writer.add("a", "train", VIDEOS["clip-0"], {}, FRAMES, 5.0)
    unknown = np.full((FRAMES - 1, 2), np.nan, np.float32)
    for key, actions in (("a", None), ("x.y", None), ("", None), ("b", np.zeros((3, 2), np.float32)), ("b", unknown)):
        with pytest.raises(ValueError, match=r"episode key|actions of shape"):
            writer.add(key, "train", VIDEOS["clip-0"], {}, FRAMES, 5.0, actions)
    assert [episode.key for episode in writer.close().episodes] == ["a"]


def test_unfinished_pack_leaves_nothing_readable_and_can_be_repeated(tmp_path: Path) -> None:
    def interrupted() -> None:
        with PartWriter(str(tmp_path), "toy", "robot", "part", max_bytes=1) as writer:
            for key, mp4 in VIDEOS.items():
                writer.add(SourceEpisode(key, PICTURES[key], 5.0, {}, key, key), mp4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    left = set(tmp_path.glob("*.tar"))
    assert left
    with pytest.raises(UserError, match="no finished shard folder"):
        open_folder(str(tmp_path))
    write_clips(str(tmp_path), max_bytes=1)
    assert lint(str(tmp_path)) == []
    assert left < set(tmp_path.glob("*.tar")), "the same names, written again"


@dataclass(frozen=True)
class Named:
    """Two dark frames for each name, which is its own group."""

    names: tuple[str, ...]
    source: str = "named"
    domain: str = "human"

    def items(self) -> list[Item]:
        return [Item(name, 1) for name in self.names]

    def episodes(self, item: Item) -> Iterator[SourceEpisode]:
        yield SourceEpisode(f"k{item.name.encode().hex()}", np.zeros((2, 16, 16, 3), np.uint8), 5.0, {}, item.name, item.name)


@settings(max_examples=15, deadline=None)
@given(names=st.sets(st.text(max_size=6), min_size=2, max_size=12), share=st.floats(0.01, 0.99))
def test_held_out_is_a_proper_part_whatever_the_order(tmp_path_factory: pytest.TempPathFactory, names: set[str], share: float) -> None:
    chosen = []
    for order in (sorted(names), sorted(names, reverse=True)):
        packing = Packing(Named(tuple(order)), str(tmp_path_factory.mktemp("named")), {}, share)
        packing.pack(packing.remaining())
        chosen.append({episode.key for episode in packing.finish().split("heldout")})
    assert chosen[0] == chosen[1]
    assert 1 <= len(chosen[0]) < len(names)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 9000), min_size=1, max_size=12), limit=st.integers(1, 50_000))
def test_any_sizes_round_trip(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int) -> None:
    path = tmp_path_factory.mktemp("sizes")
    writer = FolderWriter(str(path), "toy", "human", limit)
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
    remote = write_clips("s3://bucket/deep/toy", max_bytes=16_000)
    local = open_folder(str(sound))
    assert remote.episodes == local.episodes
    assert remote.content_hash == local.content_hash
    for episode in remote.episodes:
        assert read_member(remote, episode, "mp4") == VIDEOS[episode.key]
    assert lint("s3://bucket/deep/toy") == []
    shard = list(remote.shards)[1]
    storage.delete(f"s3://bucket/deep/toy/{shard}")
    assert lint("s3://bucket/deep/toy") == [f"{shard}: missing"]
    with pytest.raises(UserError, match=shard):
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
