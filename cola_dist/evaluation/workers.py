"""The measuring of an evaluation on Ray actors, resumable: what is finished lies in files and is not computed again."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.exceptions
from rich.console import Console
from rich.progress import Progress

from cola_dist import storage
from cola_dist.errors import UserError
from cola_dist.evaluation.measure import Measurer, Task
from cola_dist.evaluation.tables import parquet

T = TypeVar("T")

_RESTARTS = 2
"""How often a lost actor is replaced, and what it was at done again."""


class Crew:
    """Actors that measure. The figures of a clip do not depend on how many there are, nor on which clips stand in one batch."""

    def __init__(self, task: Task, workers: int) -> None:
        """``workers`` of them in the cluster that this process has joined. Raises ``UserError`` where it has no room for so many."""
        self._kind = "GPU" if task.protocol.device == "cuda" else "CPU"
        have = ray.cluster_resources().get(self._kind, 0)
        if have < workers:
            raise UserError(f"--workers {workers}: the cluster has {have:g} {self._kind}s: give fewer workers, or join a larger cluster")
        self._task, self._workers = ray.put(task), workers

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        """End the actors, so that what comes next in this cluster has their room."""
        for actor in self._actors if "_actors" in vars(self) else ():
            ray.kill(actor)

    @cached_property
    def _actors(self) -> list[Any]:
        """Started once there is something to do."""
        options = {"num_cpus": 1, "num_gpus": int(self._kind == "GPU"), "max_restarts": _RESTARTS, "max_task_retries": _RESTARTS}
        actor = ray.remote(**options)(_Actor)
        # In a list the reference travels as it is: Ray cannot start an actor again whose arguments it has stored itself.
        return [actor.remote([self._task]) for _ in range(self._workers)]

    def rows(self, parts: str, clips: int, batch: int) -> list[dict[str, Any]]:
        """A row for each of the first ``clips`` positions, in their order: from the folder ``parts``, or measured now and kept there."""
        done = {row["position"]: row for row in read_parts(parts)}
        missing = [position for position in range(clips) if position not in done]
        batches = [missing[start : start + batch] for start in range(0, len(missing), batch)]
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("clips", total=clips, completed=clips - len(missing))
            for rows in self._spread(batches):
                write_part(parts, rows)
                done |= {row["position"]: row for row in rows}
                progress.advance(bar, len(rows))
        return [done[position] for position in range(clips)]

    def once(self, call: str, *arguments: Any) -> Any:
        """What a method of `Measurer` gives, on the first actor."""
        return _value(getattr(self._actors[0], call).remote(*arguments))

    def _spread(self, batches: Sequence[list[int]]) -> Iterator[list[dict[str, Any]]]:
        """Rows of batches as they are finished; each actor has one batch at a time."""
        if not batches:
            return
        todo, working = iter(batches), {}
        for actor, positions in zip(self._actors, todo, strict=False):
            working[actor.rows.remote(positions)] = actor
        while working:
            (ready, *_), _ = ray.wait(list(working))
            actor = working.pop(ready)
            yield _value(ready)
            for positions in todo:
                working[actor.rows.remote(positions)] = actor
                break


def kept(uri: str, make: Callable[[], T]) -> T:
    """The JSON value in the file ``uri``; where there is none, what ``make`` gives, which is then kept there."""
    try:
        found: T = storage.read_json(uri)
        return found
    except FileNotFoundError:
        value = make()
    storage.write_bytes(uri, json.dumps(value).encode())
    return value


def read_parts(folder: str) -> list[dict[str, Any]]:
    """All rows that lie in ``folder``. Raises ``UserError`` for a file that `write_part` did not write."""
    rows = []
    for name in storage.list_files(folder):
        uri = storage.join(folder, name)
        try:
            rows += pq.read_table(io.BytesIO(storage.read_bytes(uri))).to_pylist()
        except pa.ArrowException as error:
            raise UserError(f"{uri} is damaged ({str(error).splitlines()[0]}): delete it, and its clips are measured again") from None
    return rows


def write_part(folder: str, rows: list[dict[str, Any]]) -> None:
    """Keep the rows of a batch, in a file that is named after its first clip."""
    storage.write_bytes(storage.join(folder, f"{rows[0]['position']:06d}.parquet"), parquet(rows))


class _Actor:
    """A `Measurer` in a process of its own. It loads on its first call: what is wrong then reaches the caller as that call's error."""

    def __init__(self, task: list[Any]) -> None:
        self._task = task

    @cached_property
    def _measurer(self) -> Measurer:
        return Measurer(ray.get(self._task[0]))

    def rows(self, positions: list[int]) -> list[dict[str, Any]]:
        return self._measurer.rows(positions)

    def pictures(self, positions: list[int]) -> dict[str, bytes]:
        return self._measurer.pictures(positions)

    def probe(self, source: str, clips: int) -> dict[str, dict[str, float]] | None:
        return self._measurer.probe(source, clips)


def _value(reference: Any) -> Any:
    """What a call gave. Raises the ``UserError`` that it raised, without the stack of another process."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
