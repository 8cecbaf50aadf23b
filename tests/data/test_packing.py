"""Packing in parts: only once, the same content however it is shared out, nothing lost when it is stopped, bad data counted and named."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_dist.data.packing import PART_BYTES, Packing, Report, grouped
from cola_dist.data.shards import INDEX, PACKING, open_folder, read_member
from cola_dist.data.sources import Item, Skipped, SourceEpisode
from cola_dist.errors import UserError


@dataclass(frozen=True)
class Toy:
    """Items by name; a name says what is wrong with it."""

    names: tuple[str, ...]
    source: str = "toy"
    domain: str = "robot"
    size: int = 10

    def items(self) -> Sequence[Item]:
        return [Item(name, self.size) for name in self.names]

    def episodes(self, item: Item) -> Iterator[SourceEpisode | Skipped]:
        if "missing" in item.name:
            raise FileNotFoundError(item.name)
        if "gone" in item.name:
            raise OSError("object storage failed")
        if "bad" in item.name:
            yield Skipped(item.name, "damaged")
            return
        number = sum(item.name.encode())
        video = np.full((4, 16, 16, 3), number % 251, np.uint8)
        note = "without actions (not finite)" if "mute" in item.name else ""
        split: Any = "heldout" if "theirs" in item.name else "train" if "ours" in item.name else ""
        meta = {"licence": "CC0", "provenance": {"dataset": "toy", "file": item.name}}
        for part in range(2):
            yield SourceEpisode(f"{item.name}-{part}", video, 5.0, meta, item.name, item.name, split, note=note)
        yield Skipped(f"{item.name} at 3 s", "static", "segment")
        if "strange" in item.name:
            raise KeyError("unheard of")


def packing(path: Path, *names: str, **changes: Any) -> Packing:
    return Packing(Toy(names), str(path), {"resolution": 16}, **changes)


def pack(work: Packing, parts: int = 1) -> str:
    """Pack what remains in some parts and return the content's hash."""
    remaining = work.remaining()
    for start in range(0, len(remaining), -(-len(remaining) // parts) or 1):
        pickle.loads(pickle.dumps(work)).pack(remaining[start : start + -(-len(remaining) // parts)])
    return work.finish().content_hash


NAMES = tuple(f"ep{number:02d}" for number in range(12))


def test_parts_do_not_show_in_the_content(tmp_path: Path) -> None:
    hashes = {pack(packing(tmp_path / str(parts), *NAMES), parts) for parts in (1, 3, 12)}
    assert len(hashes) == 1
    folder = open_folder(str(tmp_path / "3"))
    assert len(folder.shards) == 3
    assert len(folder.episodes) == 24
    heldout = {episode.key[:4] for episode in folder.split("heldout")}
    assert heldout
    assert not heldout & {episode.key[:4] for episode in folder.split("train")}, "a group stays together"
    first = folder.episodes[0]
    assert (first.width, first.height, first.frames) == (16, 16, 4)
    assert json.loads(first.provenance) == {"dataset": "toy", "file": "ep00", "licence": "CC0"}
    about = json.loads(read_member(folder, first, "json"))
    assert (about["source"], about["domain"], about["licence"]) == ("toy", "robot", "CC0")


def test_a_second_run_packs_only_what_is_missing(tmp_path: Path) -> None:
    stopped = packing(tmp_path, *NAMES)
    stopped.pack(stopped.remaining()[:5])
    assert not (tmp_path / INDEX).exists()
    (tmp_path / "toy-0123456789-00000.tar").write_bytes(b"left by a task that was killed")
    again = packing(tmp_path, *NAMES)
    assert [item.name for item in again.remaining()] == list(NAMES[5:])
    whole = pack(again, 2)
    assert whole == pack(packing(tmp_path / "fresh", *NAMES))
    assert not (tmp_path / "toy-0123456789-00000.tar").exists()
    assert packing(tmp_path, *NAMES).remaining() == []


def test_what_came_later_is_added_and_nobody_changes_sides(tmp_path: Path) -> None:
    pack(packing(tmp_path, *NAMES))
    before = {episode.key: episode.split for episode in open_folder(str(tmp_path)).episodes}
    more = packing(tmp_path, *NAMES, "ep90", "ep91", "ep92")
    assert [item.name for item in more.remaining()] == ["ep90", "ep91", "ep92"]
    pack(more)
    after = {episode.key: episode.split for episode in open_folder(str(tmp_path)).episodes}
    assert len(after) == 30
    assert {key: after[key] for key in before} == before


def test_bad_data_is_left_out_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pack(packing(tmp_path, "ep00", "ep01", "bad1", "bad2", "missing", "mute", "strange"))
    about = json.loads((tmp_path / PACKING).read_text())
    assert about["recordings"] == {
        "packed": 3,
        "packed without actions (not finite)": 1,
        "damaged": 2,
        "file missing": 1,
        "unforeseen KeyError": 1,
    }
    assert about["segments"] == {"packed": 8, "static": 4}
    assert ["bad1", "damaged", "recording"] in about["skipped"]
    assert ["strange", "unforeseen KeyError", "recording"] in about["skipped"]
    assert "unheard of" in caplog.text
    assert len(open_folder(str(tmp_path)).episodes) == 8


def test_storage_that_fails_stops_the_part_and_leaves_it_to_the_next_run(tmp_path: Path) -> None:
    work = packing(tmp_path, "ep00", "gone")
    with pytest.raises(OSError, match="object storage failed"):
        work.pack(work.remaining())
    assert len(work.remaining()) == 2


def test_an_item_that_was_given_up_is_not_tried_again(tmp_path: Path) -> None:
    work = packing(tmp_path, "ep00", "ep01")
    first, second = work.remaining()
    work.pack([first])
    work.give_up(second, "ends the process")
    assert work.remaining() == []
    work.finish()
    assert json.loads((tmp_path / PACKING).read_text())["skipped"] == [
        ["ep00 at 3 s", "static", "segment"],
        ["ep01", "ends the process", "recording"],
    ]


def test_nothing_usable_is_one_error_with_its_reasons(tmp_path: Path) -> None:
    work = packing(tmp_path, "bad1", "bad2", "missing")
    work.pack(work.remaining())
    with pytest.raises(UserError, match=r"nothing usable .* 2 damaged, 1 file missing"):
        work.finish()


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    pack(packing(tmp_path, *NAMES))
    with pytest.raises(UserError, match=r"packed with other settings before .resolution 16, now 32"):
        replace(packing(tmp_path, *NAMES), settings={"resolution": 32}).remaining()
    with pytest.raises(UserError, match="ep00: has changed since it was packed"):
        Packing(Toy(NAMES, size=11), str(tmp_path), {"resolution": 16}).remaining()
    for part in (tmp_path / "parts").iterdir():
        part.unlink()
    with pytest.raises(UserError, match="holds shards already"):
        packing(tmp_path, *NAMES).remaining()
    with pytest.raises(UserError, match="domain dog"):
        Packing(Toy(NAMES, domain="dog"), str(tmp_path), {})
    with pytest.raises(UserError, match="source 'a b'"):
        Packing(Toy(NAMES, source="a b"), str(tmp_path), {})
    for share in (0.0, 1.0):
        with pytest.raises(UserError, match="held-out share"):
            packing(tmp_path, *NAMES, heldout_share=share)


def splits(path: Path) -> dict[str, str]:
    return {episode.key: episode.split for episode in open_folder(str(path)).episodes}


def test_a_single_group_holds_out_its_end(tmp_path: Path) -> None:
    pack(packing(tmp_path, "only"))
    assert splits(tmp_path) == {"only-0": "train", "only-1": "heldout"}


def test_a_data_set_that_says_what_is_held_out_is_heard(tmp_path: Path) -> None:
    pack(packing(tmp_path / "said", "ours1", "ours2", "theirs1"))
    assert {key for key, split in splits(tmp_path / "said").items() if split == "heldout"} == {"theirs1-0", "theirs1-1"}
    pack(packing(tmp_path / "none", "ours1", "ours2", "ours3"))
    assert sorted(splits(tmp_path / "none").values()).count("heldout") == 2, "something is always held out"


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(0, 3 * PART_BYTES), min_size=1, max_size=60), cpus=st.integers(1, 32))
def test_groups_hold_every_item_once_and_keep_all_cores_busy(sizes: list[int], cpus: int) -> None:
    items = [Item(str(number), size) for number, size in enumerate(sizes)]
    groups = grouped(items, cpus)
    assert [item for group in groups for item in group] == items
    assert all(groups)
    largest = max(sizes)
    assert all(sum(item.size for item in group) <= PART_BYTES + 2 * largest for group in groups)
    if len(set(sizes)) == 1:
        assert len(groups) >= min(len(items), 4 * cpus)


def test_a_report_counts_what_it_lists() -> None:
    report = Report([])
    report.skip(Skipped("a", "damaged"))
    report.skip(Skipped("b", "static", "segment"))
    assert (report.recordings, report.segments) == ({"damaged": 1}, {"static": 1})
