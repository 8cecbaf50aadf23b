"""Pack episodes into a shard folder, from a simulator or from the files of a data set.

    python jobs/pack.py simulate --output FOLDER --domain robot
    python jobs/pack.py video FOLDER --output s3://BUCKET/FOLDER --domain human
    python jobs/pack.py rlds FOLDER --output FOLDER --source bridge
    python jobs/pack.py lerobot FOLDER --output FOLDER --source droid
Exit codes: 0 done (the last line of stdout is one JSON object), 1 failure, 2 something given is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cola_dist.command import run_command
from cola_dist.data.shards import ShardWriter
from cola_dist.data.sources import write_source
from cola_dist.data.sources.families import FAMILIES, Family


def main(argv: Sequence[str]) -> dict[str, object]:
    args: Family = tyro.cli(FAMILIES, args=argv, description=__doc__)
    console = Console(stderr=True)
    opened = args.open()
    with ShardWriter(args.output, opened.source, opened.domain, args.shard_mb * 1024**2) as writer:
        write_source(writer, track(opened.episodes, total=opened.expected, description="packing", console=console), args.crf)
        folder = writer.close()
    counts = {"episodes": len(folder.episodes), "heldout": len(folder.split("heldout"))}
    counts |= {"frames": sum(episode.frames for episode in folder.episodes), "bytes": sum(folder.shards.values())}
    # What became of each input: of files (video) or of episodes (rlds, lerobot).
    outcomes = dict(sorted(opened.outcomes.items()))
    table = Table(title=args.output, show_header=False)
    for name, count in (counts | {f"input: {outcome}": count for outcome, count in outcomes.items()}).items():
        table.add_row(name, f"{count:,}")
    console.print(table)
    about = {"output": args.output, "source": opened.source, "domain": opened.domain, "content_hash": folder.content_hash}
    return {**about, **counts, "inputs": outcomes}


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
