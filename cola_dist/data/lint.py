"""Finds what is wrong in a shard folder: every disagreement between index, shards and their contents, one line each."""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cola_dist import storage
from cola_dist.data.decode import GOP, CorruptClip, decode_clip, probe_video
from cola_dist.data.shards import (
    DOMAINS,
    INDEX,
    PACKING,
    PARTS,
    SPLITS,
    CorruptMember,
    Episode,
    ShardFolder,
    read_index,
    read_member,
    read_packing,
    read_table,
)
from cola_dist.errors import UserError

_RATE_TOLERANCE = 0.01
_MOST_MEMBERS = 10_000_000
"""Headers of one tar that are looked at."""
_BROKEN_TAR = (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, MemoryError)
"""What tarfile was seen to raise for headers that claim lengths below zero, petabytes, or a map of holes that is none."""


def lint(uri: str, checked: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """Every disagreement between index, shards, their contents and the records of packing, one line each; empty for a sound folder.

    Reads all bytes and decodes every video, one shard at a time; ``checked(bytes so far, bytes in all)`` hears of each episode. Raises UserError only
    when the index itself cannot be read.
    """
    folder = read_index(uri)
    present = storage.list_files(uri)
    found = [] if folder.domain in DOMAINS else [f"{INDEX}: domain {folder.domain}"]
    found += [f"{name}: not in the index" for name in present if not _belongs(name, folder)]
    found += _lint_records(folder, present)
    by_shard: dict[str, list[Episode]] = {name: [] for name in folder.shards}
    for episode in folder.episodes:
        by_shard[episode.shard].append(episode)
    done, total = 0, sum(folder.shards.values())
    for shard, promised in folder.shards.items():
        if shard not in present:
            found.append(f"{shard}: missing")
            continue
        if present[shard] != promised:
            found.append(f"{shard}: {present[shard]} bytes where the index says {promised}")
        with _on_this_machine(folder, shard) as local:
            found += _lint_tar(Path(local.uri) / shard, by_shard[shard])
            progress = done
            for episode in by_shard[shard]:
                found += _lint_episode(local, episode)
                progress += sum(member.size for member in episode.members.values())
                checked(progress, total)
        done += promised
        checked(done, total)
    return found


def left_out(uri: str) -> list[str]:
    """What packing left out and why, a line each: no fault of the folder. Empty where that is not recorded, or the record is damaged."""
    try:
        record = read_packing(uri)
    except UserError:
        return []  # which is a line of ``lint``
    return [] if record is None else [f"left out when packed: {name}: {reason}" for name, reason, _ in record["skipped"]]


def _belongs(name: str, folder: ShardFolder) -> bool:
    return name in (INDEX, PACKING) or name in folder.shards or (name.startswith(f"{PARTS}/") and name.endswith(".parquet"))


@contextmanager
def _on_this_machine(folder: ShardFolder, shard: str) -> Iterator[ShardFolder]:
    """The folder with the shard as a local file: itself, or one with a copy in a temporary folder."""
    here = storage.local_path(folder.uri)
    if here is not None:
        yield replace(folder, uri=str(here))
        return
    with tempfile.TemporaryDirectory(prefix="cola-dist-lint-") as scratch:
        storage.download_file(storage.join(folder.uri, shard), Path(scratch) / shard)
        yield replace(folder, uri=scratch)


def _lint_records(folder: ShardFolder, present: Mapping[str, int]) -> Iterator[str]:
    """The records of packing against the index and each other, where there are any."""
    indexed = {(e.key, ext): (e.shard, m.offset, m.size, m.sha256) for e in folder.episodes for ext, m in e.members.items()}
    parts = [name for name in present if name.startswith(f"{PARTS}/") and name.endswith(".parquet")]
    recorded: set[tuple[str, str]] = set()
    reports: list[Mapping[str, Any]] = []
    for name in parts:
        where = storage.join(folder.uri, name)
        try:
            table, metadata = read_table(storage.read_bytes(where), where)
            reports.append(storage.json_of(metadata["packing"]))
        except UserError as error:
            yield str(error).removeprefix(storage.join(folder.uri, ""))
            continue
        except KeyError:
            yield f"{name}: no record of a part"
            continue
        rows = {(r["key"], r["ext"]): (r["shard"], r["offset"], r["size"], r["sha256"]) for r in table.to_pylist()}
        recorded |= rows.keys()
        other = sorted(key for key, place in rows.items() if indexed.get(key) != place)
        if other:
            yield f"{name}: {'.'.join(other[0])}{_and_more(other)} not as in the index; the last pack did not finish, start it again"
    if len(reports) < len(parts):
        return  # what the damaged ones held is not known
    lost = sorted(indexed.keys() - recorded)
    if parts and lost:
        yield f"{INDEX}: {'.'.join(lost[0])}{_and_more(lost)} in no part record"
    try:
        packing = read_packing(folder.uri)
    except UserError as error:
        yield str(error).removeprefix(storage.join(folder.uri, ""))
        return
    if parts and packing is not None:
        yield from (f"{PACKING}: its {what} are not those of the part records" for what in _other_counts(packing, reports))


def _other_counts(packing: Mapping[str, Any], reports: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for level in ("recordings", "segments"):
        counts: Counter[str] = Counter()
        for report in reports:
            counts.update(report[level])
        if counts != packing[level]:
            yield level
    if sorted(entry for report in reports for entry in report["skipped"]) != packing["skipped"]:
        yield "skipped"


def _and_more(names: Sequence[object]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _lint_tar(path: Path, episodes: list[Episode]) -> Iterator[str]:
    """The tar's own headers against the index, and what in them would mislead a plain reader."""
    shard = path.name
    indexed = {f"{episode.key}.{ext}": (member.offset, member.size) for episode in episodes for ext, member in episode.members.items()}
    seen: dict[str, tuple[int, int]] = {}
    keys: set[str] = set()
    last_key = ""
    entries, end = _tar_members(path)
    for entry in entries:
        name, key = entry.name, entry.name.partition(".")[0]
        if not entry.isreg() or entry.issparse():
            yield f"{shard}: {name}: a link, device or folder in the tar, not a plain file"
        if name.startswith("/") or ".." in name.split("/"):
            yield f"{shard}: {name}: would be unpacked outside its folder"
        if name in seen:
            yield f"{shard}: {name}: twice in the tar"
        if key != last_key and key in keys:
            yield f"{shard}: {name}: unsorted tar keys: away from the other members of its sample, which webdataset would tear apart"
        seen[name], last_key = (entry.offset_data, entry.size), key
        keys.add(key)
    unseen = sorted(indexed.keys() - seen.keys(), key=indexed.__getitem__)
    hidden = [name for name in unseen if indexed[name][0] > end]
    if hidden:
        yield f"{shard}: {hidden[0]}{_and_more(hidden)}: not seen in the tar, whose headers are damaged or end before"
    for name in sorted((seen.keys() | indexed.keys()) - set(hidden)):
        if seen.get(name) != indexed.get(name):
            yield f"{shard}: {name}: (offset, size) {seen.get(name)} in the tar, {indexed.get(name)} in the index"


def _tar_members(path: Path) -> tuple[list[tarfile.TarInfo], int]:
    """What the tar's headers show up to the first broken one, and the byte at which they end."""
    found: list[tarfile.TarInfo] = []
    end = 0
    try:
        # Not decompressed: a shard never is, and a small file may unfold to any size.
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                found.append(entry)
                end = tar.offset
                if len(found) > _MOST_MEMBERS:
                    break
    except _BROKEN_TAR:
        pass  # what is missing from the answer is what the caller reports
    return found, end


def _lint_episode(local: ShardFolder, episode: Episode) -> Iterator[str]:
    where = f"{episode.shard}: {episode.key}"
    data: dict[str, bytes] = {}
    for ext in sorted(episode.members):
        try:
            data[ext] = read_member(local, episode, ext)
        except CorruptMember:
            yield f"{where}.{ext}: checksum differs"
    if episode.split not in SPLITS:
        yield f"{where}: split {episode.split} in the index"
    for ext in ("json", "mp4"):
        if ext not in episode.members:
            yield f"{where}.{ext}: missing"
    if "json" in data:
        yield from (f"{where}.json: {problem}" for problem in _lint_meta(local, episode, data["json"]))
    if "mp4" in data:
        yield from (f"{where}.mp4: {problem}" for problem in _lint_video(episode, data["mp4"]))
    for ext, promised in (("actions.npy", episode.frames - 1), ("state.npy", episode.frames)):
        if ext in data:
            yield from (f"{where}.{ext}: {problem}" for problem in _lint_rows(data[ext], promised, episode.frames))


def _lint_meta(folder: ShardFolder, episode: Episode, data: bytes) -> Iterator[str]:
    try:
        about = storage.json_of(data)
    except ValueError:
        yield "not readable as JSON"
        return
    if not isinstance(about, dict):
        yield "no JSON object"
        return
    promised = {name: getattr(episode, name) for name in ("frames", "fps", "width", "height")}
    for name, value in (promised | {"source": folder.source, "domain": folder.domain}).items():
        if about.get(name) != value:
            yield f"{name} {about.get(name)} where the index says {value}"


def _lint_video(episode: Episode, mp4: bytes) -> Iterator[str]:
    try:
        frames, fps, width, height = probe_video(mp4)
        if frames != episode.frames or abs(fps - episode.fps) > _RATE_TOLERANCE * episode.fps:
            yield f"{frames} frames at {fps:g}/s where the index says {episode.frames} at {episode.fps:g}/s"
        if (width, height) != (episode.width, episode.height):
            yield f"{width} x {height} pixels where the index says {episode.width} x {episode.height}"
        # The last frame only comes out when all before it in its group do.
        for start in range(0, episode.frames, GOP):
            decode_clip(mp4, start, min(GOP, episode.frames - start), 1, 16, None)
    except CorruptClip as error:
        yield str(error)


def _lint_rows(data: bytes, promised: int, frames: int) -> Iterator[str]:
    try:
        rows = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        rows = None
    if not isinstance(rows, np.ndarray) or rows.dtype != np.float32 or rows.ndim != 2:
        yield "no table of 32-bit floats"
        return
    if len(rows) != promised:
        yield f"{len(rows)} rows where {frames} frames need {promised}"
    if not np.isfinite(rows).all():
        yield f"{int((~np.isfinite(rows)).any(1).sum())} rows with values that are not finite"
