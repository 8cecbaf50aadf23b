"""What the data plane costs over decoding alone, against other loaders, on the same files. Prints one JSON line last.

    python tests/bench/bench_data.py [--seconds 20] [--rounds 3] [--frames 9] [--resolution 64] [--side 128] [--input FOLDER] [--minutes 0]
        [--lerobot PYTHON] [--patience 0]

``--input`` is a folder of videos to pack, with a short side of ``--side`` pixels (default: drawn ones). Every loader gives random clips of
``--frames`` frames at 5 Hz and ``--resolution`` pixels, without a cache of decoded frames, with the same decoder, from the same shards, with as many
processes that decode as there are cores. In alternation, of

- ``limit``: processes that do nothing but read a member, check it and decode the clip that the order names;
- ``ours``: this loader, order to batches, as the trainer gets them;
- ``webdataset``: plain webdataset, a shuffle buffer and torch's DataLoader;
- ``ray``: ``ray.data.read_webdataset`` and ``map``, as Ray documents;
- ``lerobot``: LeRobot's dataset class and its own decoder over the same frames, under an interpreter that has the package (``--lerobot``; it asks
  for another torch),

clips/s and the processor time that a clip takes in all processes of the loader. The second is the steadier figure: other work on the machine takes
cores away, but costs a clip little. ``--patience`` waits for an idle machine, and measures again where other work came in between. The ratios are
medians over rounds, each of two figures of one round.

They do not do the same. ``limit`` and ``ours`` check each member against its checksum, webdataset and Ray check nothing. webdataset gives no order
that could be told in advance: it shuffles 100 samples at a time and shows as many clips of a long episode as of a short one. Starts are drawn by one
rule, so that all loaders decode as many frames.

``--minutes`` runs ``ours`` for that long and fits a line through the memory of all its processes after the first minute.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import av
import numpy as np
import psutil
import ray
import ray.data
import torch
import webdataset
from loader_speed import Speed, machine_seconds, measure

from cola_dist import runtime
from cola_dist.config import DataConfig
from cola_dist.data.decode import decode_clip, encode_mp4
from cola_dist.data.packing import Packing
from cola_dist.data.shards import ShardFolder, open_folder, read_member
from cola_dist.data.sources.cut import CutRules
from cola_dist.data.sources.video import VideoOrigin
from cola_dist.data.stream import StreamPlan, batches, dataset, open_reader
from cola_dist.train.board import create_board

RATE, BATCH = 5.0, 32
CORES = os.cpu_count() or 1
MOST_ELSEWHERE = 0.1
"""Cores that other work may take without a measurement being called disturbed."""


@dataclass(frozen=True)
class Setting:
    """What every loader gives, and from where."""

    uri: str
    frames: int
    resolution: int
    seconds: float
    """Of each measurement."""
    lerobot: str = ""
    """An interpreter that has LeRobot's package."""

    def stride(self, fps: float) -> int:
        return max(1, round(fps / RATE))

    def any_clip(self, mp4: bytes, frames: int, fps: float, draw: random.Random) -> np.ndarray | None:
        """A random clip of an episode, none of one that is too short. Starts are spread as this repository's order spreads them."""
        stride = self.stride(fps)
        span = (self.frames - 1) * stride + 1
        if frames < span:
            return None
        start = min(draw.randrange(frames // span) * span + draw.randrange(span), frames - span)
        return decode_clip(mp4, start, self.frames, stride, self.resolution, None)

    def config(self) -> DataConfig:
        return DataConfig(
            mixture={self.uri: 1.0},
            frames=self.frames,
            rate_hz=RATE,
            resolution=self.resolution,
            random_crop=False,
            decoded_cache_bytes=0,
            steps_per_read=4,
            prefetch_reads=2,
        )


def draw_videos(folder: Path, side: int, count: int = 24) -> None:
    """Windows that wander over smooth textures, with a sensor's noise, 10 s each: about as many bytes a frame as recorded video, and no network."""
    draw = np.random.default_rng(0)
    height, width = side, side * 4 // 3 // 2 * 2
    room = np.array([2 * height, 2 * width])
    for number in range(count):
        small = av.VideoFrame.from_ndarray(draw.integers(0, 256, (60, 80, 3), np.uint8), format="rgb24")
        texture = small.reformat(width=3 * width, height=3 * height, interpolation="BICUBIC").to_ndarray().astype(np.int16)
        velocity = np.repeat(draw.normal(0, 0.015 * side, (10, 2)), 10, axis=0)
        # Reflected at the edges: a window that comes to rest there would be cut out as standstill.
        places = np.abs((draw.random(2) * room + velocity.cumsum(0)) % (2 * room) - room).astype(int)
        frames = np.stack([texture[top : top + height, left : left + width] for top, left in places])
        frames = (frames + draw.normal(0, 2, frames.shape)).clip(0, 255).astype(np.uint8)
        (folder / f"video-{number:03d}.mp4").write_bytes(encode_mp4(frames, 10.0, gop=250, preset="fast"))


def pack(source: str, output: str, side: int) -> ShardFolder:
    """Pack a folder of videos in this process."""
    packing = Packing(VideoOrigin(source, "bench", "human", side, CutRules()), output, {}, shard_bytes=1024**2)
    packing.pack(packing.remaining())
    return packing.finish()


def wait_for_idle(seconds: float) -> None:
    """Until the machine has had nothing else to do for some seconds, at most so long."""
    deadline, since = time.monotonic() + seconds, time.monotonic()
    while time.monotonic() < deadline and time.monotonic() - since < 5:
        before = machine_seconds()
        time.sleep(1)
        if machine_seconds() - before > MOST_ELSEWHERE:
            since = time.monotonic()


def alone(name: str, setting: Setting) -> Speed:
    """The loader's speed in a process of its own: what one leaves behind, Ray above all, would meet the next one."""
    command = [sys.executable, __file__, "--measure", name, "--setting", json.dumps(asdict(setting))]
    if name == "lerobot":
        command = [setting.lerobot, str(Path(__file__).with_name("lerobot_loader.py")), _episodes(setting), *_clip_options(setting)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Speed(**json.loads(done.stdout.splitlines()[-1]))


def undisturbed(name: str, setting: Setting, patience: float) -> Speed:
    """The loader's speed, measured again where other work disturbed it, as long as the patience lasts."""
    deadline, found = time.monotonic() + patience, []
    while not found or (found[-1].elsewhere > MOST_ELSEWHERE and time.monotonic() < deadline):
        wait_for_idle(deadline - time.monotonic())
        found.append(alone(name, setting))
    return min(found, key=lambda speed: speed.elsewhere)


def _decode_forever(setting: Setting, number: int, count: Any) -> None:
    reader = open_reader(setting.config(), seed=0)
    refs = [reader.order.clip(position) for position in range(number, 20_000, CORES)]
    for done, ref in enumerate(itertools.cycle(refs), 1):
        folder, episode = reader.folders[0], reader.episodes[0][ref.episode]
        decode_clip(read_member(folder, episode, "mp4"), ref.start, setting.frames, ref.stride, setting.resolution, None)
        if done % 8 == 0:
            with count.get_lock():
                count.value += 8


def limit(setting: Setting) -> Speed:
    context = multiprocessing.get_context("spawn")
    count = context.Value("q", 0)
    workers = [context.Process(target=_decode_forever, args=(setting, number, count), daemon=True) for number in range(CORES)]
    for worker in workers:
        worker.start()

    def counted() -> Iterator[int]:
        seen = count.value
        while True:
            time.sleep(0.2)
            before, seen = seen, count.value
            yield seen - before

    found = measure(counted(), setting.seconds)
    for worker in workers:
        worker.terminate()
        worker.join()
    return found


def our_batches(setting: Setting, steps: int) -> Iterator[int]:
    """Batches as one trainer gets them, with readers on all cores."""
    reader = open_reader(setting.config(), seed=0)
    plan = StreamPlan(0, steps, BATCH * CORES, 1)
    board = create_board(1)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.memory_usage_poll_interval_s = None
    stream = dataset(reader, plan, lambda step: ray.get(board.reached.remote(step)), readers=CORES)
    (iterator,) = stream.streaming_split(1, equal=True)
    for step, batch in enumerate(batches(iterator, plan, 0, prefetch=8)):
        if step % reader.config.steps_per_read == 0:  # as the trainer reports
            board.advance.remote(step)
        yield len(batch.position)


def ours(setting: Setting) -> Speed:
    runtime.connect(CORES, debug=False)
    try:
        return measure(our_batches(setting, 4000), setting.seconds)
    finally:
        ray.shutdown()


def _of_sample(setting: Setting, sample: dict[str, Any]) -> np.ndarray | None:
    about = sample["json"] if isinstance(sample["json"], dict) else json.loads(sample["json"])
    return setting.any_clip(sample["mp4"], about["frames"], about["fps"], random.Random())


def _shards(setting: Setting) -> list[str]:
    return [f"{setting.uri}/{name}" for name in open_folder(setting.uri).shards]


def plain_webdataset(setting: Setting) -> Speed:
    shards = _shards(setting)
    samples = webdataset.WebDataset(shards, shardshuffle=len(shards), nodesplitter=None, empty_check=False, resampled=True)
    clips = samples.shuffle(100).map(lambda sample: _of_sample(setting, sample)).select(lambda clip: clip is not None)
    loader = torch.utils.data.DataLoader(clips, batch_size=BATCH, num_workers=CORES)  # type: ignore[arg-type]
    return measure((len(batch) for batch in loader), setting.seconds)


def ray_webdataset(setting: Setting) -> Speed:
    def forever() -> Iterator[int]:
        while True:
            table = ray.data.read_webdataset(_shards(setting), decoder=False)
            clips = table.map(lambda sample: {"clip": _of_sample(setting, {k: v for k, v in sample.items() if k in ("json", "mp4")})})
            for batch in clips.filter(lambda row: row["clip"] is not None).iter_batches(batch_size=BATCH, batch_format="numpy"):
                yield len(batch["clip"])

    runtime.connect(CORES, debug=False)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        return measure(forever(), setting.seconds)
    finally:
        ray.shutdown()


def _episodes(setting: Setting) -> str:
    """The shards' videos of one size and rate, as files for LeRobot."""
    folder, files = open_folder(setting.uri), Path(setting.uri, "episodes")
    files.mkdir(exist_ok=True)
    first = folder.episodes[0]
    for episode in (e for e in folder.episodes if (e.height, e.width, e.fps) == (first.height, first.width, first.fps)):
        (files / f"{episode.key}.mp4").write_bytes(read_member(folder, episode, "mp4"))
    return str(files)


def _clip_options(setting: Setting) -> list[str]:
    stride = setting.stride(open_folder(setting.uri).episodes[0].fps)
    wanted = {"frames": setting.frames, "stride": stride, "seconds": setting.seconds, "batch": BATCH, "workers": CORES}
    return [word for name, value in wanted.items() for word in (f"--{name}", str(round(value)))]


def own_memory(pid: int) -> int:
    """Kilobytes of a process that are in no file: its own, and its part of shared memory, so that the object store counts once."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))


def memory_slope(setting: Setting, minutes: float) -> dict[str, Any]:
    """Megabytes per minute by which the loader's processes grow, and what they hold at the end."""
    runtime.connect(CORES, debug=False)
    stop, seen = threading.Event(), []
    single: dict[str, list[tuple[float, float]]] = {}

    def watch() -> None:
        began = time.monotonic()
        while not stop.wait(5.0):
            family = [psutil.Process(), *psutil.Process().children(recursive=True)]
            minute, held = (time.monotonic() - began) / 60, [own_memory(process.pid) / 1024 for process in family]
            seen.append((minute, sum(held)))
            for process, size in zip(family, held, strict=True):
                with contextlib.suppress(psutil.Error):
                    single.setdefault(f"{' '.join(process.cmdline())[:60]} {process.pid}", []).append((minute, size))

    watcher = threading.Thread(target=watch)
    watcher.start()
    clips, began, count = our_batches(setting, round(1500 * minutes) + 1000), time.monotonic(), 0
    while time.monotonic() - began < 60 * minutes:
        count += next(clips)
    stop.set()
    watcher.join()
    ray.shutdown()
    late = np.array([point for point in seen if point[0] > 1.0])
    slope, _ = np.polyfit(late[:, 0], late[:, 1], 1)
    slopes = {name: np.polyfit(*np.array([p for p in points if p[0] > 1.0]).T, 1)[0] for name, points in single.items() if len(points) > 20}
    growing = sorted(slopes.items(), key=lambda item: -item[1])[:4]
    return {
        "memory_clips": count,
        "memory_mb": late[-1, 1].round(1),
        "memory_peak_mb": late[:, 1].max().round(1),
        "memory_by_minute_mb": [round(float(late[late[:, 0] >= m][0, 1])) for m in range(1, int(late[-1, 0]) + 1)],
        "memory_slope_mb_per_min": round(float(slope), 3),
        "memory_growing_mb_per_min": {name: round(float(rate), 3) for name, rate in growing},
    }


def fetched(folder: ShardFolder) -> dict[str, float]:
    """Bytes that a clip costs, beside the bytes of what it is cut from."""
    member = statistics.mean(e.members["mp4"].size for e in folder.split("train"))
    return {"bytes_per_clip": round(member), "shard_bytes": round(statistics.mean(folder.shards.values()))}


def compare(setting: Setting, loaders: Sequence[str], rounds: int, patience: float) -> dict[str, float]:
    """Medians of each loader, and of ours over each other one."""
    speeds: dict[str, list[Speed]] = {name: [] for name in loaders}
    for number in range(rounds):
        for name in random.Random(number).sample(loaders, len(loaders)):
            speed = undisturbed(name, setting, patience)
            speeds[name].append(speed)
            took = f"{speed.clips_per_s:.0f} clips/s, {speed.cpu_ms_per_clip:.2f} ms of processor time"
            print(f"round {number}: {name} {took}; {speed.elsewhere:.2f} cores were busy elsewhere", flush=True)
    line: dict[str, float] = {"most_cores_elsewhere": round(max(s.elsewhere for found in speeds.values() for s in found), 2)}
    for name, found in speeds.items():
        line[f"{name}_clips_per_s"] = round(statistics.median(s.clips_per_s for s in found), 1)
        line[f"{name}_cpu_ms_per_clip"] = round(statistics.median(s.cpu_ms_per_clip for s in found), 3)
    for name in (name for name in loaders if name != "ours"):
        pairs = list(zip(speeds["ours"], speeds[name], strict=True))
        line[f"ours_over_{name}"] = round(statistics.median(a.clips_per_s / b.clips_per_s for a, b in pairs), 3)
        line[f"ours_over_{name}_by_cpu"] = round(statistics.median(b.cpu_ms_per_clip / a.cpu_ms_per_clip for a, b in pairs), 3)
    return line


LOADERS: dict[str, Callable[[Setting], Speed]] = {
    "limit": limit,
    "ours": ours,
    "webdataset": plain_webdataset,
    "ray": ray_webdataset,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", default="")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for an idle machine, for each measurement")
    parser.add_argument("--lerobot", default="", metavar="PYTHON")
    parser.add_argument("--measure", choices=LOADERS, help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Ray's workers yield to all other processes by default: beside other work on the machine, that alone would decide.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if args.measure:
        print(json.dumps(asdict(LOADERS[args.measure](Setting(**json.loads(args.setting))))), flush=True)
        os._exit(0)
    loaders = [*LOADERS, *(["lerobot"] if args.lerobot else [])]
    with tempfile.TemporaryDirectory() as scratch:
        if not args.input:
            draw_videos(Path(scratch), args.side)
        folder = pack(args.input or scratch, f"{scratch}/shards", args.side)
        setting = Setting(folder.uri, args.frames, args.resolution, args.seconds, args.lerobot)
        line: dict[str, Any] = {"bench": "data", "cores": CORES, "clips": f"{args.frames} frames, {args.resolution} px"}
        line |= {"side": args.side, "episodes": len(folder.episodes), **fetched(folder)}
        line |= compare(setting, loaders, args.rounds, args.patience) if args.rounds else {}
        line |= memory_slope(setting, args.minutes) if args.minutes else {}
        print(json.dumps(line))


if __name__ == "__main__":
    main()
