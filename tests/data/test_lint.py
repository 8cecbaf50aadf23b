"""Lint names every damaged file and every disagreement, and says nothing about a sound folder."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cola_dist.command import run_command
from cola_dist.data.lint import left_out, lint
from cola_dist.data.packing import Packing
from cola_dist.data.part_writer import PartWriter
from cola_dist.data.shards import INDEX, PACKING, PARTS, open_folder, write_index
from cola_dist.data.sources import Item, Skipped, SourceEpisode
from jobs import data
from tests.data.clips import FRAMES, PICTURES, VIDEOS, flip, spot
from tests.data.videos import moving_square


def reindex(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write the index again with changed rows, so that only what it says is wrong."""
    table = pq.read_table(path / INDEX)
    rows = [change(row) for row in table.to_pylist()]
    write_index(str(path), "toy", "robot", type(table).from_pylist(rows, schema=table.schema))


def rebuild(shard: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]) -> None:
    """Write a tar again with changed members, and the index such that sizes agree."""
    with tarfile.open(shard) as tar:
        members = [(entry, tar.extractfile(entry).read()) for entry in tar]  # type: ignore[union-attr]
    change(members)
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for entry, content in members:
            tar.addfile(entry, io.BytesIO(content))
    reindex(shard.parent, lambda row: row | ({"shard_bytes": shard.stat().st_size} if row["shard"] == shard.name else {}))


def test_a_flipped_byte(folder: Path) -> None:
    shard, offset = spot(folder, "clip-2", "mp4")
    flip(shard, offset + 200)
    assert lint(str(folder)) == [f"{shard.name}: clip-2.mp4: checksum differs"]


def test_a_changed_header(folder: Path) -> None:
    shard, offset = spot(folder, "clip-0", "mp4")
    flip(shard, offset - 512)  # the header block before the bytes begins with the name
    found = lint(str(folder))
    assert len(found) == 1, "one line, however many members follow"
    assert "clip-0.mp4" in found[0]
    assert "in the tar" in found[0]


def test_a_truncated_shard(folder: Path) -> None:
    shard, offset = spot(folder, "clip-3", "mp4")
    shard.write_bytes(shard.read_bytes()[: offset + 100])
    found = lint(str(folder))
    assert any(line.startswith(f"{shard.name}: {offset + 100} bytes") for line in found)
    assert f"{shard.name}: clip-3.mp4: checksum differs" in found


def test_missing_and_extra_shards(folder: Path) -> None:
    (folder / "toy-part-00000.tar").rename(folder / "toy-part-00007.tar")
    assert set(lint(str(folder))) == {"toy-part-00007.tar: not in the index", "toy-part-00000.tar: missing"}


def test_wrong_figures_in_the_index(folder: Path) -> None:
    reindex(folder, lambda row: row | ({"frames": FRAMES + 1, "width": 66, "fps": 6.0} if row["key"] == "clip-1" else {}))
    found = "\n".join(lint(str(folder)))
    assert "clip-1.mp4: 12 frames at 5/s where the index says 13 at 6/s" in found
    assert "clip-1.mp4: 64 x 48 pixels where the index says 66 x 48" in found
    assert "clip-1.actions.npy: 11 rows" in found
    assert "clip-1.state.npy: 12 rows" in found
    for name, value in (("frames", "12"), ("width", "64"), ("fps", "5.0")):
        assert f"clip-1.json: {name} {value} where" in found
    assert "clip-2" not in found


def test_a_wrong_offset_and_a_wrong_split(folder: Path) -> None:
    reindex(folder, lambda row: row | ({"offset": 512} if row["key"] == "clip-4" and row["ext"] == "mp4" else {}))
    assert any("clip-4.mp4" in line for line in lint(str(folder)))
    reindex(folder, lambda row: row | {"split": "test" if row["key"] == "clip-1" else row["split"]})
    assert any("clip-1: split test" in line for line in lint(str(folder)))


def replace_bytes(path: Path, key: str, ext: str, change: Callable[[bytes], bytes]) -> None:
    """Give a member other bytes of the same length, and the index their checksum: what a careless writer would have left."""
    shard, offset = spot(path, key, ext)
    size = next(episode for episode in open_folder(str(path)).episodes if episode.key == key).members[ext].size
    whole = shard.read_bytes()
    content = change(whole[offset : offset + size])
    assert len(content) == size
    shard.write_bytes(whole[:offset] + content + whole[offset + size :])
    checksum = hashlib.sha256(content).hexdigest()
    reindex(path, lambda row: row | ({"sha256": checksum} if (row["key"], row["ext"]) == (key, ext) else {}))


@pytest.mark.parametrize("video", [b"no video", VIDEOS["clip-0"][:900]])
def test_what_is_no_video(tmp_path: Path, video: bytes) -> None:
    with PartWriter(str(tmp_path), "toy", "human", "part", 2**20) as writer:
        writer.add(SourceEpisode("one", PICTURES["clip-0"], 5.0, {}, "one", "one", "train"), video)
        write_index(str(tmp_path), "toy", "human", writer.close())
    (found,) = lint(str(tmp_path))
    assert "one.mp4: no video" in found


def test_a_video_that_does_not_decode_to_its_end(folder: Path) -> None:
    replace_bytes(folder, "clip-0", "mp4", lambda mp4: mp4[: len(mp4) - 1000] + bytes(1000))
    found = lint(str(folder))
    assert found
    assert all("clip-0.mp4: " in line for line in found)


def test_values_that_are_not_finite_and_no_values(folder: Path) -> None:
    bad = np.array([np.nan, 0, np.inf], np.float32).tobytes()
    replace_bytes(folder, "clip-1", "actions.npy", lambda data: data[: -len(bad)] + bad)
    replace_bytes(folder, "clip-3", "state.npy", lambda data: b"PK" + data[2:])
    first, second = lint(str(folder))
    assert first.endswith("clip-1.actions.npy: 2 rows with values that are not finite")
    assert second.endswith("clip-3.state.npy: no table of 32-bit floats")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda meta: b"{" + meta[:-1], "not readable as JSON"),
        (lambda meta: b"7" + b" " * (len(meta) - 1), "no JSON object"),
        (lambda meta: meta.replace(b'"robot"', b'"human"'), "domain human where the index says robot"),
        (lambda meta: meta.replace(b'"frames": 12', b'"frames": 11'), "frames 11 where the index says 12"),
    ],
)
def test_json_that_disagrees(folder: Path, change: Callable[[bytes], bytes], complaint: str) -> None:
    replace_bytes(folder, "clip-2", "json", change)
    (found,) = lint(str(folder))
    assert found.endswith(f"clip-2.json: {complaint}")


def renamed(name: str, kind: bytes = tarfile.REGTYPE) -> tuple[tarfile.TarInfo, bytes]:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, "clip-0.mp4" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    return entry, b""


@pytest.mark.parametrize(
    ("member", "complaint"),
    [
        (renamed("clip-9.mp4", tarfile.SYMTYPE), "clip-9.mp4: a link"),
        (renamed("clip-9.mp4", tarfile.LNKTYPE), "clip-9.mp4: a link"),
        (renamed("clip-9", tarfile.DIRTYPE), "clip-9: a link, device or folder"),
        (renamed("clip-9.mp4", tarfile.CHRTYPE), "clip-9.mp4: a link, device"),
        (renamed("/tmp/clip-9.mp4"), "/tmp/clip-9.mp4: would be unpacked outside its folder"),
        (renamed("../clip-9.mp4"), "../clip-9.mp4: would be unpacked outside its folder"),
        (renamed("clip-0.mp4"), "clip-0.mp4: twice in the tar"),
        (renamed("clip-0.txt"), "clip-0.txt: unsorted tar keys"),
        (renamed("clip-9.mp4"), "clip-9.mp4: (offset, size) ("),
    ],
)
def test_what_would_mislead_a_plain_reader(folder: Path, member: tuple[tarfile.TarInfo, bytes], complaint: str) -> None:
    shard, _ = spot(folder, "clip-1", "mp4")
    assert shard == spot(folder, "clip-0", "mp4")[0]
    rebuild(shard, lambda members: members.append(member))
    found = lint(str(folder))
    assert any(line.startswith(f"{shard.name}: {complaint}") for line in found), found
    assert all(member[0].name in line for line in found), "nothing is said of what is sound"


class Squares:
    """Squares and a file that is none."""

    source = "squares"
    domain = "human"

    def items(self) -> list[Item]:
        return [Item(f"file-{number}", 100) for number in range(4)]

    def episodes(self, item: Item) -> Iterator[SourceEpisode | Skipped]:
        number = int(item.name[-1])
        if number == 3:
            yield Skipped("deep/notes.txt", "not a video")
            return
        yield SourceEpisode(f"square-{number}", moving_square(4, 16, 16, seed=number), 5.0, {}, item.name, item.name)
        yield Skipped(f"{item.name} 0.4 s", "shorter than 2 s", "segment")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "packed"
    packing = Packing(Squares(), str(path), {"fps": 5.0}, heldout_share=0.3)
    items = packing.remaining()
    packing.pack(items[:2])
    packing.pack(items[2:])
    packing.finish()
    return path


def test_what_packing_left_out_is_named_and_no_fault(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lint(str(packed)) == []
    expected = {"left out when packed: deep/notes.txt: not a video"}
    expected |= {f"left out when packed: file-{number} 0.4 s: shorter than 2 s" for number in range(3)}
    assert set(left_out(str(packed))) == expected
    assert run_command(data.main, ["lint", str(packed)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.removeprefix(f"{packed}: ") for line in lines[:-1]} == expected
    assert json.loads(lines[-1]) == {"status": "clean", "folders": [str(packed)], "left_out": 4}


def test_damaged_and_missing_records_of_packing(packed: Path) -> None:
    part = sorted((packed / PARTS).iterdir())[0]
    whole, record = part.read_bytes(), (packed / PACKING).read_bytes()
    flip(part, len(whole) // 2)
    (found,) = lint(str(packed))
    assert found.startswith(f"{PARTS}/{part.name}: ")
    part.unlink()
    found = "\n".join(lint(str(packed)))
    assert f"{INDEX}: square-" in found
    assert "in no part record" in found
    assert f"{PACKING}: its recordings are not those of the part records" in found
    part.write_bytes(whole)
    (packed / PACKING).write_bytes(record.replace(b"deep/notes.txt", b"deep/notes.tyt"))
    assert lint(str(packed)) == [f"{PACKING}: its skipped are not those of the part records"]
    for junk in (b"", b"[]", b"{}", record[: len(record) // 2]):
        (packed / PACKING).write_bytes(junk)
        (line,) = lint(str(packed))
        assert line.startswith(f"{PACKING}: damaged")
        assert left_out(str(packed)) == []
    (packed / PACKING).unlink()
    shutil.rmtree(packed / PARTS)
    assert lint(str(packed)) == [], "a folder that was copied without the records is whole"


def test_a_pack_that_did_not_finish(packed: Path) -> None:
    shutil.rmtree(packed)
    packing = Packing(Squares(), str(packed), {"fps": 5.0}, heldout_share=0.3)
    packing.pack(packing.remaining()[:2])
    packing.finish()
    packing.pack(packing.remaining())
    found = "\n".join(lint(str(packed)))
    assert "not as in the index; the last pack did not finish" in found
    assert ".tar: not in the index" in found
    packing.finish()
    assert lint(str(packed)) == []


def test_the_job_prints_each_problem_and_exits_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard, offset = spot(folder, "clip-2", "mp4")
    flip(shard, offset + 200)
    assert run_command(data.main, ["lint", "embedded:hand", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"{folder}: {shard.name}: clip-2.mp4: checksum differs"]
    assert "error: 1 problem(s) in 2 folder(s)" in err.splitlines()[-1]
    assert run_command(data.main, ["lint", str(folder / "none")]) == 2
    assert "none/index.parquet: not found" in capsys.readouterr().err.splitlines()[-1]
    assert run_command(data.main, ["lint"]) == 2


def test_progress_comes_to_the_end(sound: Path) -> None:
    heard: list[tuple[int, int]] = []
    lint(str(sound), lambda done, total: heard.append((done, total)))
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert heard[-1] == (sum(open_folder(str(sound)).shards.values()),) * 2
    assert len(heard) >= len(VIDEOS)
