"""Pack episodes into a shard folder: from a simulator, or from a folder of video files.

    python jobs/pack.py simulate --output FOLDER --domain robot
    python jobs/pack.py video FOLDER --output s3://BUCKET/FOLDER --domain human
Exit codes: 0 done (the last line of stdout is one JSON object), 1 failure, 2 something given is wrong.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cola_dist.command import run_command
from cola_dist.data.shards import ShardWriter
from cola_dist.data.sources import SourceEpisode, write_source
from cola_dist.data.sources.simulate import SOURCES, simulate
from cola_dist.data.sources.video import VideoFolder


@dataclass(frozen=True)
class Pack:
    output: str
    """Folder to write, local or s3://BUCKET/FOLDER; must not hold shards yet."""
    heldout_share: float = 0.1
    """Share set aside for evaluation: of the episodes (simulate) or of the files (video)."""
    shard_mb: int = 256
    """Largest size of one shard in MiB."""
    crf: int = 28
    """H.264 quality: 0 is lossless, 51 the worst; 23 is near to transparent."""
    debug: bool = False
    """Show the stack trace of an error."""


@dataclass(frozen=True)
class Simulate(Pack):
    """Record simulated episodes (needs the "sim" extra)."""

    domain: Literal["robot", "hand"] = "robot"
    episodes: int = 240
    seed: int = 0


@dataclass(frozen=True)
class Video(Pack):
    """Pack plain video files of any container."""

    folder: tyro.conf.Positional[str] = "."
    """Folder with the files, local or s3://."""
    resolution: int = 128
    """Short side of the stored video in pixels; smaller videos keep their size."""
    source: str = "video"
    domain: Literal["human", "robot"] = "human"


def episodes_of(args: Simulate | Video) -> tuple[Iterator[SourceEpisode], int, str, str, Counter[str]]:
    """Episodes, how many to expect, source, domain, and files counted by what became of them."""
    if isinstance(args, Video):
        folder = VideoFolder(args.folder, args.resolution, args.heldout_share)
        return folder.episodes(), folder.segments, args.source, args.domain, folder.outcomes
    source, domain = SOURCES[args.domain]
    return simulate(args.domain, args.episodes, args.seed, args.heldout_share), args.episodes, source, domain, Counter()


def main(argv: Sequence[str]) -> dict[str, object]:
    args = tyro.cli(Simulate | Video, args=argv, description=__doc__)
    console = Console(stderr=True)
    episodes, expected, source, domain, files = episodes_of(args)
    with ShardWriter(args.output, source, domain, args.shard_mb * 1024**2) as writer:
        write_source(writer, track(episodes, total=expected, description="packing", console=console), args.crf)
        folder = writer.close()
    counts = {"episodes": len(folder.episodes), "heldout": len(folder.split("heldout"))}
    counts |= {"frames": sum(episode.frames for episode in folder.episodes), "bytes": sum(folder.shards.values())}
    table = Table(title=args.output, show_header=False)
    for name, count in (counts | {f"files: {outcome}": files[outcome] for outcome in sorted(files)}).items():
        table.add_row(name, f"{count:,}")
    console.print(table)
    about = {"output": args.output, "source": source, "domain": domain, "content_hash": folder.content_hash}
    return {**about, **counts, "files": dict(sorted(files.items()))}


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
