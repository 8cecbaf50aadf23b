"""Pack episodes into a shard folder, from a simulator or from the files of a data set; a second run packs only what is missing.

    python jobs/pack.py simulate --output FOLDER --domain robot
    python jobs/pack.py video --input FOLDER --output s3://BUCKET/FOLDER --domain human
    python jobs/pack.py video --preset ego4d --input FOLDER --output FOLDER
    python jobs/pack.py rlds --input FOLDER --output FOLDER --source bridge
    python jobs/pack.py lerobot --input FOLDER --output FOLDER --source droid
    python jobs/pack.py robot-files --input FOLDER --output FOLDER --source libero
On a cluster (`ray job submit -- python jobs/pack.py …`) all its CPUs pack. Input and output must be readable from every node.
Exit codes: 0 done (the last line of stdout is one JSON object), 1 failure, 2 something given is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ray
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from cola_dist import runtime, storage
from cola_dist.command import run_command
from cola_dist.data.pack_tasks import pack_on_ray
from cola_dist.data.packing import Packing, Report, grouped
from cola_dist.data.shards import PACKING
from cola_dist.data.sources import Item
from cola_dist.data.sources.families import FAMILIES, Family


def main(argv: Sequence[str]) -> dict[str, Any]:
    args: Family = tyro.cli(FAMILIES, args=argv, description=__doc__)
    console = Console(stderr=True)
    packing = Packing(args.open(), args.output, args.content_settings(), args.heldout_share, args.crf, args.shard_mb * 1024**2)
    items = packing.remaining()
    if items:
        runtime.connect(1, args.debug)
        _pack(packing, items, console)
    folder = packing.finish()
    report = storage.read_json(storage.join(args.output, PACKING))
    counts = {"episodes": len(folder.episodes), "heldout": len(folder.split("heldout"))}
    counts |= {"frames": sum(episode.frames for episode in folder.episodes), "bytes": sum(folder.shards.values())}
    table = Table(title=args.output, show_header=False)
    for name, count in (counts | {f"{kind}: {what}": n for kind in ("recordings", "segments") for what, n in report[kind].items()}).items():
        table.add_row(name, f"{count:,}")
    console.print(table)
    about = {"output": args.output, "source": folder.source, "domain": folder.domain, "content_hash": folder.content_hash}
    return {**about, **counts, "items_packed_now": len(items), "recordings": report["recordings"], "segments": report["segments"]}


def _pack(packing: Packing, items: list[Item], console: Console) -> None:
    parts = grouped(items, int(ray.cluster_resources().get("CPU", 1)))
    columns = (
        TextColumn("packing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[found]}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("packing", total=len(items), found="")
        packed = left = 0

        def done(report: Report) -> None:
            nonlocal packed, left
            packed, left = packed + report.segments["packed"], left + len(report.skipped)
            progress.update(bar, advance=len(report.items), found=f"{packed:,} segments, {left:,} left out")

        pack_on_ray(packing, parts, done)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
