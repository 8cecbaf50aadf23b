"""All checks of a cluster in turn, each with an end to its patience."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cola_dist import runtime, storage
from cola_dist.doctor import judge
from cola_dist.doctor.collective import measure
from cola_dist.doctor.probe import Probe, write_scratch
from cola_dist.doctor.rows import Row, together
from cola_dist.errors import UserError

_LIMIT_S = 60.0
_MORE = "add nodes (a cluster that grows does with --workers N and COLA_CLUSTER_PATIENCE_S), or give a smaller --workers"
_TURNS = 5
"""The quickest of so many questions tells a node's clock best."""


@dataclass(frozen=True)
class Request:
    """What to check a cluster for."""

    output: str
    data: tuple[str, ...]
    tracking_uri: str
    gpus: bool
    workers: int
    """0 = all GPUs, or two CPUs and on larger clusters one per node."""


@dataclass(frozen=True, eq=False)
class _Node:
    name: str
    about: Mapping[str, Any]
    """As Ray describes it."""
    probe: Any


def examine(request: Request, debug: bool) -> list[Row]:
    """Join the cluster that ``RAY_ADDRESS`` names, or start one of this machine, and check it. Raises ``UserError`` for a wrong request."""
    alone = not os.environ.get("RAY_ADDRESS")
    runtime.connect(max(2, request.workers), debug)
    if request.workers:
        runtime.make_room([{"GPU": 1.0} if request.gpus else {"CPU": 1.0}] * request.workers)
    alive = [node for node in ray.nodes() if node["Alive"]]
    actor = ray.remote(num_cpus=0)(Probe)
    names = _names(alive)
    nodes = [
        _Node(name, node, actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote())
        for name, node in zip(names, alive, strict=True)
    ]
    rows = [judge.resources(alive, alone), *_of_nodes(request, nodes, alone), *_collective(request, len(alive))]
    rows += [*_output(request.output, nodes), *_data(request.data, nodes), *_tracking(request, nodes)]
    return together(rows, len(nodes))


def _names(alive: Sequence[Mapping[str, Any]]) -> list[str]:
    addresses = [node["NodeManagerAddress"] for node in alive]
    return [a if addresses.count(a) == 1 else f"{a} ({node['NodeID'][:6]})" for a, node in zip(addresses, alive, strict=True)]


def _asked(nodes: Sequence[_Node], check: str, question: Callable[[_Node], Any], remedy: str) -> Iterator[tuple[_Node, Any, Row | None]]:
    """(node, answer, none) of each, or (node, none, row) with what went wrong there. All are asked at the same time."""
    answers = [question(node) for node in nodes]
    ray.wait(answers, num_returns=len(answers), timeout=_LIMIT_S)
    for node, answer in zip(nodes, answers, strict=True):
        try:
            yield node, ray.get(answer, timeout=0.1), None
        except ray.exceptions.GetTimeoutError:
            yield node, None, Row(check, node.name, f"no answer within {_LIMIT_S:.0f} s", "fail", remedy)
        except ray.exceptions.RayError as error:
            yield node, None, Row(check, node.name, _last_line(error), "fail", remedy)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(getattr(error, "cause", None) or error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _of_nodes(request: Request, nodes: Sequence[_Node], alone: bool) -> Iterator[Row]:
    python, needed = judge.requirements()
    local = storage.local_path(request.output)
    folders = [] if local is None else [str(local.resolve())]
    remedy = "this project and what it needs must be importable there: install it, or use one image for all nodes"
    facts = {}
    for node, found, fault in _asked(nodes, "node", lambda node: node.probe.facts.remote([one.name for one in needed], folders), remedy):
        if fault:
            yield fault
        else:
            facts[node] = found
    if facts:
        yield from judge.versions({node.name: fact for node, fact in facts.items()}, python, needed)
    offered = {node.name: int(node.about["Resources"].get("GPU", 0)) for node in nodes}
    if request.gpus and not any(offered.values()):
        yield Row("GPUs", "the cluster", "Ray offers none", "fail", "add GPU nodes, or start Ray with --num-gpus there")
    for node, fact in facts.items():
        yield judge.gpus(node.name, fact, offered[node.name], request.gpus)
    if len({fact.driver for fact in facts.values() if fact.driver}) > 1:
        drivers = ", ".join(sorted({fact.driver for fact in facts.values() if fact.driver}))
        yield Row("GPUs", "the cluster", f"drivers differ: {drivers}", "warn", "install one driver on all GPU nodes")
    for node in facts:
        yield _clock(node)
    for node, fact in facts.items():
        yield from judge.limits(node.name, fact, node.about["Resources"].get("object_store_memory", 0))
        yield judge.authentication(node.name, fact.auth, alone)


def _clock(node: _Node) -> Row:
    turns = []
    for _ in range(_TURNS):
        asked = time.time()
        there = ray.get(node.probe.now.remote(), timeout=_LIMIT_S)
        heard = time.time()
        # The answer was given at some moment between: on the way there and back a clock says nothing.
        turns.append(((heard - asked) / 2, there - (asked + heard) / 2))
    uncertain, ahead = min(turns)
    return judge.clock(node.name, ahead, uncertain)


def _collective(request: Request, nodes: int) -> Iterator[Row]:
    have = ray.cluster_resources().get("GPU" if request.gpus else "CPU", 0)
    workers = request.workers or int(have if request.gpus else max(2, nodes))
    if workers > have:
        kind, where = ("GPUs" if request.gpus else "CPUs"), f"{workers} workers"
        yield Row("all-reduce", where, f"the cluster has {have:g} {kind}", "fail", _MORE)
        return
    if workers < 2:
        yield Row("all-reduce", f"{workers} workers", "nothing to add up")
        return
    try:
        about, measured = measure(workers, request.gpus)
    except Exception as error:  # torch, NCCL and gloo raise anything; that it failed is the finding
        remedy = "look whether other jobs hold the resources, firewalls let nodes speak on all ports, and NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
        yield Row("all-reduce", f"{workers} workers", _last_line(error), "fail", remedy)
        return
    yield from map(judge.computes, about)
    yield judge.collective(measured)


def _output(output: str, nodes: Sequence[_Node]) -> Iterator[Row]:
    """Write a scratch file here, have every node read it and write one of its own, and leave nothing behind."""
    check = f"output {output}"
    absolute = storage.absolute(output)
    scratch = storage.join(absolute, f".doctor-{secrets.token_hex(4)}")
    remedy = "give an --output that all nodes reach and may write: a shared file system or s3://"
    try:
        before = storage.exists(absolute)
        sha256, _ = write_scratch(storage.join(scratch, "driver"))
    except (UserError, OSError) as error:
        yield Row(check, "here", _last_line(error), "fail", remedy)
        return
    try:
        numbered = {node.name: str(number) for number, node in enumerate(nodes)}
        for node, found, fault in _asked(
            nodes, check, lambda node: node.probe.store.remote(scratch, numbered[node.name], "driver", sha256), remedy
        ):
            yield fault or judge.stored(node.name, output, found)
    finally:
        storage.delete(scratch)
        local = storage.local_path(absolute)
        if local is not None and not before:
            with contextlib.suppress(OSError):
                Path(local).rmdir()


def _data(folders: Sequence[str], nodes: Sequence[_Node]) -> Iterator[Row]:
    for folder in folders:
        check, remedy = f"data {folder}", f"make it readable on every node, or look with jobs/data.py lint {folder}"
        question = partial(_ask_for_data, storage.absolute(folder))
        for node, found, fault in _asked(nodes, check, question, remedy):
            yield fault or Row(check, node.name, f"{found[0]:,} episodes, opened and a clip read in {found[1]:.2f} s", measure=-found[1])


def _ask_for_data(folder: str, node: _Node) -> Any:
    return node.probe.data.remote(folder)


def _tracking(request: Request, nodes: Sequence[_Node]) -> Iterator[Row]:
    uri = request.tracking_uri
    if not uri:
        local = storage.local_path(request.output) is not None
        remedy = "" if local else "runs in object storage need a server: --tracking.uri http://HOST:5000"
        yield Row(
            "MLflow", "here", "a database file in the output folder" if local else "no --tracking.uri", "ok" if local else "warn", remedy
        )
        return
    remedy = "start it, or correct --tracking.uri, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    for node, reason, fault in _asked(nodes, "MLflow", lambda node: node.probe.mlflow.remote(uri), remedy):
        yield fault or (Row("MLflow", node.name, reason, "fail", remedy) if reason else Row("MLflow", node.name, "answers"))
