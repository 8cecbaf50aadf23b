"""Ten thousand damaged files, a fifth of them in ``make test``: each is noticed, replaced or makes no difference.

None ends the process, hangs it or is taken for something else. Each kind of file is damaged in a process of its own, so that a crash or an endless
loop in a decoder is seen as what it is.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from cola_dist.config import DataConfig
from cola_dist.data.decode import CorruptClip, decode_clip, decode_episode, encode_mp4, probe_video, to_clip
from cola_dist.data.packing import Packing
from cola_dist.data.shards import INDEX, PACKING, PARTS, CorruptMember, open_folder, read_member
from cola_dist.data.sources import Item, Skipped, SourceEpisode
from cola_dist.errors import UserError
from tests.data.videos import moving_square
from tests.toy import write_folder

ROOT = Path(__file__).parents[2]
FLIPS = {"index": 2800, "shards": 2700, "clips": 500, "videos": 3000, "parts": 1000}
SEED = 0
TRUNCATED = 0.05
"""Share of the damages that cut the file off instead of changing one byte."""
LIMIT_S = 300
"""What only a hang exceeds."""


def flips(kind: str, share: float) -> int:
    """How many damages of a kind a share of all is."""
    return round(FLIPS[kind] * share)


def damaged(raw: bytes, rng: random.Random) -> tuple[bytes, range]:
    """The bytes with one changed, or without their end, and which bytes are no longer what they were."""
    at = rng.randrange(len(raw))
    if rng.random() < TRUNCATED:
        return raw[:at], range(at, len(raw))
    return raw[:at] + bytes([raw[at] ^ rng.randrange(1, 256)]) + raw[at + 1 :], range(at, at + 1)


def damages(kind: str, share: float, files: Sequence[Path]) -> Iterator[tuple[Path, bytes, range]]:
    """Each damage in turn, written to one of the files; afterwards the file is whole again. The last line printed is the one in work."""
    rng = random.Random(f"{SEED} {kind}")
    whole = {file: file.read_bytes() for file in files}
    for number in range(flips(kind, share)):
        file = rng.choice(files)
        data, hit = damaged(whole[file], rng)
        print(f"{kind} {number}: {file.name} bytes {hit.start} to {hit.stop - 1}", flush=True)
        file.write_bytes(data)
        yield file, data, hit
        file.write_bytes(whole[file])


def fuzz_index(path: Path, share: float) -> Counter[str]:
    sound = write_folder(path, "toy", episodes=4, frames=8)
    counts: Counter[str] = Counter()
    for _ in damages("index", share, [path / INDEX]):
        try:
            opened = open_folder(str(path))
        except UserError:
            counts["refused"] += 1
        else:
            assert opened == sound
            counts["harmless"] += 1
    return counts


def fuzz_shards(path: Path, share: float) -> Counter[str]:
    folder = write_folder(path, "toy", episodes=4, frames=8)
    members = [(episode, ext, read_member(folder, episode, ext)) for episode in folder.episodes for ext in episode.members]
    counts: Counter[str] = Counter()
    for shard, data, hit in damages("shards", share, [path / name for name in folder.shards]):
        if len(data) != folder.shards[shard.name]:
            with pytest.raises(UserError, match=shard.name):
                open_folder(str(path))
        refused = 0
        for episode, ext, content in members:
            member = episode.members[ext]
            inside = max(hit.start, member.offset) < min(hit.stop, member.offset + member.size)
            try:
                assert read_member(folder, episode, ext) == content
                assert not inside
            except CorruptMember:
                assert inside
                refused += 1
        counts["refused" if refused or len(data) != folder.shards[shard.name] else "harmless"] += 1
    return counts


def fuzz_clips(path: Path, share: float) -> Counter[str]:
    from cola_dist.data.stream import open_reader

    folder = write_folder(path, "toy", episodes=4, frames=12)
    config = DataConfig(mixture={folder.uri: 1.0}, frames=5, resolution=16, mixture_block=8)
    positions = range(6)
    sound = open_reader(config, seed=0).read_many(positions)
    videos = {f"toy/{episode.key}": episode.members["mp4"] for episode in folder.episodes}
    counts: Counter[str] = Counter()
    for shard, data, hit in damages("clips", share, [path / name for name in folder.shards]):
        try:
            batch = open_reader(config, seed=0).read_many(positions)
        except UserError:
            assert len(data) != folder.shards[shard.name]
            counts["refused"] += 1
            continue
        replaced = 0
        for at, sample in enumerate(sound.sample):
            name = sample.split("@")[0]
            if hit.start in range(videos[name].offset, videos[name].offset + videos[name].size):
                assert all(f"{name.removeprefix('toy/')}.mp4" in line for line in batch.skipped[at].splitlines())
                assert batch.skipped[at]
                assert not batch.sample[at].startswith(f"{name}@")
                replaced += 1
            else:
                assert (batch.sample[at], batch.skipped[at]) == (sample, "")
                np.testing.assert_array_equal(batch.video[at], sound.video[at])
        assert len(batch.sample) == len(positions)
        counts["replaced" if replaced else "harmless"] += 1
    return counts


def fuzz_videos(path: Path, share: float) -> Counter[str]:
    file = path / "clip.mp4"
    file.write_bytes(encode_mp4(moving_square(20, 32, 32), 5.0))

    def clip(mp4: bytes) -> bytes:
        found = decode_clip(mp4, 3, 4, 2, 16, None)
        assert found.shape == (4, 3, 16, 16)
        return found.tobytes()

    def episode(mp4: bytes) -> bytes:
        return to_clip(decode_episode(mp4), 16, None).tobytes()

    def attempt(read: Callable[[bytes], object], mp4: bytes) -> object:
        try:
            return read(mp4)
        except CorruptClip:
            return None

    readers = (clip, episode, probe_video)
    sound = [read(file.read_bytes()) for read in readers]
    counts: Counter[str] = Counter()
    for _, data, _ in damages("videos", share, [file]):
        found = [attempt(read, data) for read in readers]
        # Pixels may change unnoticed by a codec: that is what the checksums of members are for.
        counts["refused" if None in found else "harmless" if found == sound else "other pictures"] += 1
    return counts


class Squares:
    """Three small recordings, and one file that is none."""

    source = "squares"
    domain = "human"

    def items(self) -> list[Item]:
        return [Item(f"file-{number}", 100 + number) for number in range(4)]

    def episodes(self, item: Item) -> Iterator[SourceEpisode | Skipped]:
        number = int(item.name[-1])
        if number == 3:
            yield Skipped(item.name, "not a video")
            return
        meta = {"provenance": {"dataset": "squares", "file": item.name}, "licence": "none"}
        yield SourceEpisode(f"square-{number}", moving_square(4, 16, 16, seed=number), 5.0, meta, item.name, item.name)


def fuzz_parts(path: Path, share: float) -> Counter[str]:
    packing = Packing(Squares(), str(path), {"fps": 5.0}, heldout_share=0.3)
    items = packing.remaining()
    packing.pack(items[:2])
    packing.pack(items[2:])
    sound, report = packing.finish(), (path / PACKING).read_bytes()
    counts: Counter[str] = Counter()
    for _ in damages("parts", share, sorted((path / PARTS).iterdir())):
        try:
            assert packing.remaining() == []
        except UserError:
            with pytest.raises(UserError):
                packing.finish()
            counts["refused"] += 1
        else:
            assert packing.finish() == sound
            assert (path / PACKING).read_bytes() == report
            counts["harmless"] += 1
        assert {file.name for file in path.glob("*.tar")} == set(sound.shards), "no damage may delete what is packed"
    return counts


@pytest.mark.parametrize("share", [0.2, pytest.param(1.0, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", FLIPS)
def test_every_damage_is_accounted_for(kind: str, share: float, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.data.test_fuzz", kind, str(share), str(tmp_path)]
    count = flips(kind, share)
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as hung:
        pytest.fail(f"hangs at {(hung.stdout or b'').decode().splitlines()[-1:]}")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"exit code {done.returncode} at {lines[-1:]}\n{done.stderr[-3000:]}"
    counts = json.loads(lines[-1])
    growth = counts.pop("growth")
    assert sum(counts.values()) == count
    assert counts["harmless"] > 0, "some bytes pad"
    assert counts["refused"] >= TRUNCATED / 2 * count
    noticed = counts["refused"] + counts.get("replaced", 0)
    assert noticed >= {"index": 0.6, "shards": 0.25, "clips": 0.2, "videos": 0.15, "parts": 0.6}[kind] * count, counts
    assert growth < 4, "memory must not follow what damaged headers claim"


if __name__ == "__main__":
    fuzz = {"index": fuzz_index, "shards": fuzz_shards, "clips": fuzz_clips, "videos": fuzz_videos, "parts": fuzz_parts}[sys.argv[1]]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = dict(fuzz(Path(sys.argv[3]), float(sys.argv[2])))
    print(json.dumps(result | {"growth": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / before}))
