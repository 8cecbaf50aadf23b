"""From an origin to a shard folder, in parts that can be packed anywhere, in any order, and only once.

A part is some items of the origin. The task that packs it uploads the part's shards and then, last, ``parts/PART.parquet`` with the rows, what was
left out and why. ``finish`` joins all parts into the index. A second run packs the items that no part holds, so it goes on where the first one was
stopped, and adds what has come to the origin since.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import av
import pyarrow as pa

from cola_dist import storage
from cola_dist.data.decode import encode_mp4
from cola_dist.data.part_writer import PART_SCHEMA, PartWriter
from cola_dist.data.shards import (
    DOMAINS,
    FORMAT_VERSION,
    INDEX,
    NAME,
    PACKING,
    PARTS,
    ShardFolder,
    open_folder,
    read_index,
    read_table,
    to_parquet,
    write_index,
)
from cola_dist.data.sources import Item, Origin, Skipped
from cola_dist.errors import UserError

PART_BYTES = 1024**3
"""Input of one part: what a crash can cost."""
PARTS_PER_CPU = 4
"""So that no core waits long for the last part."""
_log = logging.getLogger("cola_dist.data")


@dataclass(frozen=True)
class Report:
    """What became of a part: its items as (name, size), recordings and segments by outcome, and a (name, reason, level) of all that was left out."""

    items: list[tuple[str, int]]
    recordings: Counter[str] = field(default_factory=Counter)
    segments: Counter[str] = field(default_factory=Counter)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)

    def skip(self, what: Skipped) -> None:
        """Count and list something that is not packed."""
        (self.recordings if what.level == "recording" else self.segments)[what.reason] += 1
        self.skipped.append((what.name, what.reason, what.level))


@dataclass(frozen=True)
class Packing:
    """One origin on its way into one folder. Picklable: it travels to tasks.

    ``settings`` is all that shapes the content besides the input; a folder is packed with one set of them. Raises UserError for a source name or a
    domain that the format does not know, and for a share outside (0, 1).
    """

    origin: Origin
    output: str
    settings: Mapping[str, Any]
    heldout_share: float = 0.1
    crf: int = 28
    shard_bytes: int = 256 * 1024**2

    def __post_init__(self) -> None:
        if self.origin.domain not in DOMAINS:
            raise UserError(f"domain {self.origin.domain}: give one of {', '.join(DOMAINS)}")
        if not self.origin.source or not set(self.origin.source) <= NAME:
            raise UserError(f"source {self.origin.source!r}: use letters, digits, - and _")
        if not 0.0 < self.heldout_share < 1.0:
            raise UserError(f"held-out share {self.heldout_share:g}: give a number between 0 and 1, such as 0.1")

    def remaining(self) -> list[Item]:
        """Items that no part holds. Raises UserError if the folder was packed otherwise, or an item has changed since."""
        reports = [report for _, report in self._parts()]
        if not reports and storage.exists(storage.join(self.output, INDEX)):
            raise UserError(f"{self.output}: holds shards already, without the record of how they were packed; give another folder")
        packed = {name: size for report in reports for name, size in report.items}
        items = self.origin.items()
        for item in items:
            if packed.get(item.name, item.size) != item.size:
                raise UserError(f"{item.name}: has changed since it was packed into {self.output}; give another folder")
        return [item for item in items if item.name not in packed]

    def pack(self, items: Sequence[Item]) -> Report:
        """Pack some items as one part. Bad data is left out and reported; raises OSError or UserError where storage fails."""
        report = Report([(item.name, item.size) for item in items])
        part = hashlib.sha256("\n".join(item.name for item in items).encode()).hexdigest()[:10]
        with PartWriter(self.output, self.origin.source, self.origin.domain, part, self.shard_bytes) as writer:
            for item in items:
                self._pack_item(item, writer, report)
            self._commit(part, writer.close(), report)
        return report

    def give_up(self, item: Item, reason: str) -> Report:
        """Record an item as unusable, so that it is not tried again."""
        report = Report([(item.name, item.size)])
        report.skip(Skipped(item.name, reason))
        part = hashlib.sha256(item.name.encode()).hexdigest()[:10]
        self._commit(part, PART_SCHEMA.empty_table(), report)
        return report

    def finish(self) -> ShardFolder:
        """Write the index over all parts and return the folder as a reader sees it. Raises UserError when nothing at all was usable."""
        parts = list(self._parts())
        recordings, segments = (
            dict(sorted(sum((getattr(report, level) for _, report in parts), Counter()).items())) for level in ("recordings", "segments")
        )
        table = pa.concat_tables([table for table, _ in parts] or [PART_SCHEMA.empty_table()])
        if not table.num_rows:
            reasons = ", ".join(f"{count} {reason}" for reason, count in (recordings | segments).items()) or "it is empty"
            raise UserError(f"nothing usable for {self.output} in the input: {reasons}")
        episodes = table.group_by("key").aggregate([("ext", "count_distinct"), ("ext", "count")]).to_pylist()
        doubled = sorted(row["key"] for row in episodes if row["ext_count"] != row["ext_count_distinct"])
        if doubled:
            raise UserError(f"{self.output}: two episodes have the key {doubled[0]}; pack the data sets into folders of their own")
        splits = _splits(table, self.heldout_share, self._splits_before())
        table = table.set_column(table.schema.get_field_index("split"), PART_SCHEMA.field("split"), [splits])
        skipped = [list(entry) for _, report in parts for entry in report.skipped]
        about = {"settings": self.settings, "recordings": recordings, "segments": segments, "skipped": sorted(skipped)}
        storage.write_bytes(storage.join(self.output, PACKING), json.dumps(about, indent=1).encode())
        table = table.sort_by([("key", "ascending"), ("ext", "ascending")])
        write_index(self.output, self.origin.source, self.origin.domain, table)
        self._remove_orphans(set(table["shard"].to_pylist()))
        return open_folder(self.output)

    def _pack_item(self, item: Item, writer: PartWriter, report: Report) -> None:
        recordings: dict[str, str] = {}
        try:
            for found in self.origin.episodes(item):
                if isinstance(found, Skipped):
                    report.skip(found)
                    continue
                writer.add(found, encode_mp4(found.video, found.fps, crf=self.crf))
                recordings[found.recording] = found.note
                report.segments["packed"] += 1
        except FileNotFoundError:
            report.skip(Skipped(item.name, "file missing"))
        except (ValueError, TypeError, KeyError, IndexError, ArithmeticError, av.FFmpegError) as error:
            if isinstance(error, UserError):
                raise
            # A reader met data that it does not foresee: a week's run must not end at one file, and the trace says where to mend it.
            _log.warning("%s: left out", item.name, exc_info=error)
            report.skip(Skipped(item.name, f"unforeseen {type(error).__name__}"))
        report.recordings.update(f"packed {note}".strip() for note in recordings.values())

    def _commit(self, part: str, table: pa.Table, report: Report) -> None:
        about = {"settings": self.settings, "items": report.items, "skipped": report.skipped}
        about |= {"recordings": report.recordings, "segments": report.segments}
        metadata = {"cola_dist.version": str(FORMAT_VERSION), "packing": json.dumps(about)}
        storage.write_bytes(storage.join(self.output, PARTS, f"{part}.parquet"), to_parquet(table, metadata))

    def _parts(self) -> Iterable[tuple[pa.Table, Report]]:
        wanted = json.loads(json.dumps(self.settings))
        for name in storage.list_files(storage.join(self.output, PARTS)):
            where = storage.join(self.output, PARTS, name)
            table, metadata = read_table(storage.read_bytes(where), where)
            about = storage.json_of(metadata["packing"])
            if about["settings"] != wanted:
                given = {key for key in wanted.keys() | about["settings"].keys() if wanted.get(key) != about["settings"].get(key)}
                changed = ", ".join(f"{key} {about['settings'].get(key)}, now {wanted.get(key)}" for key in sorted(given))
                raise UserError(f"{self.output}: packed with other settings before ({changed}); give another folder")
            items = [(name, size) for name, size in about["items"]]
            skipped = [(name, reason, level) for name, reason, level in about["skipped"]]
            yield table.replace_schema_metadata(None), Report(items, Counter(about["recordings"]), Counter(about["segments"]), skipped)

    def _splits_before(self) -> dict[str, str]:
        """Key to split in the index of an earlier run; empty when there is none."""
        if not storage.exists(storage.join(self.output, INDEX)):
            return {}
        return {episode.key: episode.split for episode in read_index(self.output).episodes}

    def _remove_orphans(self, shards: set[str]) -> None:
        """Delete shards of tasks that did not come to their end."""
        for name in storage.list_files(self.output):
            if re.fullmatch(rf"{self.origin.source}-[0-9a-f]{{10}}-\d{{5,}}\.tar", name) and name not in shards:
                storage.delete(storage.join(self.output, name))


def grouped(items: Sequence[Item], cpus: int) -> list[list[Item]]:
    """Neighbouring items as parts of about equal size: at most ``PART_BYTES`` each, and enough to keep ``cpus`` busy."""
    total = sum(item.size for item in items)
    parts = min(len(items), max(-(-total // PART_BYTES), PARTS_PER_CPU * cpus))
    found: list[list[Item]] = []
    before = 0
    for place, item in enumerate(items):
        # By size; where sizes say nothing, by number.
        due = before * parts // total if total else place * parts // len(items)
        if len(found) <= due:
            found.append([])
        found[-1].append(item)
        before += item.size
    return found


def _splits(table: pa.Table, share: float, before: Mapping[str, str]) -> pa.Array:
    """The split of each row; ``before`` maps keys to the splits of an earlier index, in which nobody changes sides.

    What the data set holds out itself is held out. Otherwise ``share`` of the groups are, by hash; at least one of two or more. Of a single group
    the last segments are.
    """
    keys, groups = table["key"].to_pylist(), table["group"].to_pylist()
    own = dict(zip(groups, table["split"].to_pylist(), strict=True))
    rank = {group: int(hashlib.sha256(group.encode()).hexdigest()[:15], 16) / 16**15 for group in sorted(own)}
    if len(own) == 1:
        ordered = sorted(set(keys))
        last = set(ordered[max(1, len(ordered) - max(1, round(share * len(ordered)))) :])
        return pa.array(["heldout" if key in last else "train" for key in keys])
    if "heldout" in own.values():
        chosen = {group: split or ("heldout" if rank[group] < share else "train") for group, split in own.items()}
    else:
        chosen = {group: "heldout" if rank[group] < share else "train" for group in own}
    chosen |= {group: before[key] for key, group in zip(keys, groups, strict=True) if key in before}
    if "heldout" not in chosen.values():
        chosen[min(rank, key=rank.__getitem__)] = "heldout"
    elif "train" not in chosen.values():
        chosen[max(rank, key=rank.__getitem__)] = "train"
    return pa.array([chosen[group] for group in groups])
