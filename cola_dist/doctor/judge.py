"""What is made of each node's facts: whether they will do, and what to mend."""

from __future__ import annotations

import importlib.metadata
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from cola_dist.doctor.collective import About, Measured
from cola_dist.doctor.probe import Facts, Stored
from cola_dist.doctor.rows import Row, Verdict

_SHOWN = ("torch", "ray", "deepspeed", "mlflow", "pyarrow")
_DISK_FAIL, _DISK_WARN = 2e9, 20e9
_SHM_FAIL = 512e6
_FILES_FAIL, _FILES_WARN = 1024, 8192
_CLOCK_WARN_S, _CLOCK_FAIL_S = 1.0, 300.0
"""Object storage refuses requests whose time is a quarter of an hour off; MLflow's curves and logs of several nodes get out of order long before."""
_WRITE_WARN_MBS = 20.0
_GPU_WARN, _CPU_WARN = 1e9, 50e6
"""Bytes per second of an all-reduce, below which something is probably set up wrong: GPUs that speak over slow sockets, a 1 Gbit network."""


def requirements() -> tuple[SpecifierSet, list[Requirement]]:
    """Python and distributions that this project needs: of pyproject.toml beside the package, or as it was installed."""
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text())["project"]
        return SpecifierSet(project["requires-python"]), [Requirement(line) for line in project["dependencies"]]
    about = importlib.metadata.metadata("cola-dist")
    needed = [Requirement(line) for line in importlib.metadata.requires("cola-dist") or ()]
    return SpecifierSet(about["Requires-Python"]), [one for one in needed if one.marker is None]


def versions(facts: Mapping[str, Facts], python: SpecifierSet, needed: Sequence[Requirement]) -> list[Row]:
    """Whether all nodes have the same, and what pyproject.toml asks for."""
    rows = _same("Python", {node: fact.python for node, fact in facts.items()}, python, "start all nodes with one Python")
    rows += _same("code", {node: fact.code for node, fact in facts.items()}, None, "bring one state of this project to all nodes")
    wrong: list[Row] = []
    for one in needed:
        found = {node: fact.versions.get(one.name, "") for node, fact in facts.items()}
        judged = _same(one.name, found, one.specifier, f"pip install '{one.name}{one.specifier}' there")
        wrong += [row for row in judged if row.verdict != "ok"]
    if not wrong:
        fact = next(iter(facts.values()))
        shown = ", ".join(f"{name} {fact.versions[name]}" for name in _SHOWN if name in fact.versions)
        more = f" and {len(needed) - len(_SHOWN)} more, as pyproject.toml asks"
        rows += [Row("packages", node, shown + more) for node in facts]
    return rows + wrong


def _same(what: str, found: Mapping[str, str], specifier: SpecifierSet | None, remedy: str) -> list[Row]:
    """A row per node: that a version is missing, not as specified, or not that of the other nodes. Builds (``+cpu``) may differ."""
    public = {node: Version(version).public if version and specifier is not None else version for node, version in found.items()}
    differ = len(set(public.values())) > 1
    rows = []
    for node, version in found.items():
        fits = bool(version) and (specifier is None or specifier.contains(version, prereleases=True))
        text = f"{what} {version or 'is not installed'}{'' if fits else f', needs {specifier}'}{', others have another' if fits and differ else ''}"
        rows.append(Row(what if fits and not differ else "versions", node, text, *_bad(not fits or differ, remedy)))
    return rows


def _bad(wrong: bool, remedy: str, verdict: Verdict = "fail") -> tuple[Verdict, str]:
    return (verdict, remedy) if wrong else ("ok", "")


def gpus(node: str, facts: Facts, offered: int, asked: bool) -> Row:
    """Whether a node has the GPUs that Ray offers there."""
    have = len(facts.gpus)
    found = f"{have} x {facts.gpus[0]}, driver {facts.driver}" if have else "none"
    if offered > have:
        remedy = "start this node's Ray without --num-gpus, or mend its driver (nvidia-smi)"
        return Row("GPUs", node, f"{found}; Ray offers {offered}", "fail" if asked else "warn", remedy)
    if have > offered:
        return Row("GPUs", node, f"{found}; Ray offers {offered}", "warn", "ray start --num-gpus on this node, if training should use them")
    return Row("GPUs", node, found)


def computes(about: About) -> Row:
    """What a worker computes on, and whether in bf16."""
    found = f"{about.device}, bf16: {'yes' if about.bf16 else 'no'}{f', {about.libraries}' if about.libraries else ''}"
    if about.bf16 or about.device == "CPU":
        return Row("workers", about.node, found)
    return Row("workers", about.node, found, "warn", "train.precision auto computes in fp32 on it, at a fraction of the speed")


def collective(measured: Measured) -> Row:
    """Whether workers add up fast enough."""
    found = (
        f"{measured.backend}, {measured.bytes / 2**20:.0f} MiB in {1000 * measured.seconds:.1f} ms: algorithm {measured.algorithm / 1e9:.2f} GB/s, "
        f"bus {measured.bus / 1e9:.2f} GB/s"
    )
    gpu = measured.backend == "NCCL"
    slow = measured.algorithm < (_GPU_WARN if gpu else _CPU_WARN)
    how = "NCCL_DEBUG=INFO says what it speaks over; NCCL_SOCKET_IFNAME chooses" if gpu else "GLOO_SOCKET_IFNAME chooses the network"
    return Row("all-reduce", f"{measured.workers} workers", found, *_bad(slow, f"slow: {how}", "warn"))


def stored(node: str, output: str, found: Stored) -> Row:
    """Whether ``--output`` can be written, read, listed and deleted from a node, and how fast."""
    text = f"write {found.write:,.0f} MB/s, read {found.read:,.0f} MB/s, list {1000 * found.list_s:,.0f} ms, delete {1000 * found.delete_s:,.0f} ms"
    slow = found.write < _WRITE_WARN_MBS
    return Row(
        f"output {output}",
        node,
        text,
        *_bad(slow, "slow for checkpoints: choose storage nearer to the nodes", "warn"),
        found.write,
    )


def clock(node: str, ahead: float, uncertain: float) -> Row:
    """Whether a node's clock goes as the driver's does: ``ahead`` seconds, known to within ``uncertain``."""
    off = max(0.0, abs(ahead) - uncertain)
    text = f"{1000 * ahead:+.0f} ms to this job's, known to within {1000 * uncertain:.0f} ms"
    verdict: Verdict = "fail" if off > _CLOCK_FAIL_S else "warn" if off > _CLOCK_WARN_S else "ok"
    return Row(
        "clock", node, text, verdict, "" if verdict == "ok" else "turn on time synchronisation there (chrony, systemd-timesyncd)", -off
    )


def limits(node: str, facts: Facts, store_bytes: float) -> list[Row]:
    """Room on disks, shared memory beside Ray's object store, and open files."""
    rows = []
    for folder, free in facts.free.items():
        verdict: Verdict = "fail" if free < _DISK_FAIL else "warn" if free < _DISK_WARN else "ok"
        remedy = "" if verdict == "ok" else "make room, or choose another disk (TMPDIR, RAY_TMPDIR, --output)"
        rows.append(Row(f"free disk {folder}", node, f"{free / 1e9:,.1f} GB", verdict, remedy, float(free)))
    if facts.shm is None:
        rows.append(Row("/dev/shm", node, "there is none on this system"))
    else:
        verdict = "fail" if facts.shm < _SHM_FAIL else "warn" if facts.shm < store_bytes else "ok"
        remedy = "" if verdict == "ok" else "Ray's object store goes to disk instead: give the container more (docker run --shm-size)"
        text = f"{facts.shm / 1e9:,.1f} GB, object store {store_bytes / 1e9:,.1f} GB"
        rows.append(Row("/dev/shm", node, text, verdict, remedy, float(facts.shm)))
    verdict = "fail" if facts.open_files < _FILES_FAIL else "warn" if facts.open_files < _FILES_WARN else "ok"
    remedy = "" if verdict == "ok" else "ulimit -n 65536 before ray start (LimitNOFILE= of a service)"
    return [*rows, Row("open files", node, f"at most {facts.open_files:,}", verdict, remedy, float(facts.open_files))]


def authentication(node: str, mode: str, alone: bool) -> Row:
    """Whether who speaks to Ray needs the token. ``alone``: this Ray was started by this job and ends with it."""
    if mode == "token":
        return Row("Ray's token", node, "asked for")
    remedy = "ray get-auth-token --generate, and RAY_AUTH_MODE=token in the environment of every node and job (SECURITY.md)"
    text = "not asked for: who reaches Ray's ports may run code"
    return Row("Ray's token", node, text, "warn" if alone else "fail", remedy)


def resources(nodes: Sequence[Mapping[str, Any]], alone: bool) -> Row:
    """What there is in all."""
    total = {kind: sum(node["Resources"].get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    text = f"{len(nodes)} {'node' if len(nodes) == 1 else 'nodes'}, {total['CPU']:g} CPUs, {total['GPU']:g} GPUs"
    return Row("Ray", "a cluster of this job alone" if alone else "the cluster", text)
