"""jobs/doctor.py on this machine, and what its checks make of nodes that are not as they should be."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cola_dist.doctor import judge
from cola_dist.doctor.collective import About, Measured
from cola_dist.doctor.probe import Facts, Probe
from cola_dist.doctor.rows import Row, together
from tests.toy import write_folder
from tests.train.jobs import job

FACTS = Facts("3.11.2", {"torch": "2.13.0+cpu", "ray": "2.60.0"}, "abc", (), "", "token", {"/tmp": 10**12}, 10**11, 65536)
NEEDED = [Requirement("torch==2.13.0"), Requirement("ray[data]>=2.60,<2.61")]
PYTHON = SpecifierSet(">=3.11")


def run(*args: str | Path, environment: dict[str, str] | None = None) -> tuple[int, dict[str, Any], dict[str, dict[str, Any]], str]:
    """Exit code, last line, the row of each check, stderr."""
    with job(*args, environment=environment, script="doctor.py") as running:
        ended = running.wait()
    line = json.loads(ended.stdout.splitlines()[-1])
    return ended.code, line, {row["check"]: row for row in line["checks"]}, ended.stderr


@pytest.mark.ray
def test_a_laptop_is_checked_without_a_cluster(tmp_path: Path) -> None:
    write_folder(tmp_path / "robot", "robot")
    output, missing = tmp_path / "runs", tmp_path / "missing"
    tracking = f"sqlite:///{tmp_path}/mlflow.db"
    code, line, rows, error = run("--output", output, "--data", tmp_path / "robot", missing, "--tracking.uri", tracking)
    assert (code, line["status"], line["fail"]) == (1, "failed", [f"data {missing}"])
    assert error.splitlines()[-1].startswith("error: 1 of ")
    assert f"jobs/data.py lint {missing}" in rows[f"data {missing}"]["remedy"]
    assert f"{missing}/index.parquet: not found" in rows[f"data {missing}"]["found"]
    assert "6 episodes" in rows[f"data {tmp_path}/robot"]["found"]
    for check, parts in {
        "Ray": ("1 node, ", " CPUs, "),
        "Python": ("Python 3.",),
        "packages": ("torch 2.", "ray 2.", "deepspeed 0.", "as pyproject.toml asks"),
        "clock": (" ms to this job's, known to within ",),
        "/dev/shm": ("object store",),
        "open files": ("at most ",),
        "workers": ("CPU, bf16: ",),
        "all-reduce": ("gloo, 16 MiB in ", "algorithm ", "GB/s, bus "),
        f"output {output}": ("write ", "read ", "list ", "delete "),
        "MLflow": ("answers",),
    }.items():
        assert rows[check]["verdict"] in ("ok", "warn"), rows[check]
        assert all(part in rows[check]["found"] for part in parts), rows[check]
    assert "Ray's token" in rows
    assert any(check.startswith("free disk") for check in rows)
    assert not output.exists(), "nothing is left behind"
    assert not (tmp_path / "mlflow.db").exists(), "MLflow would make an empty one"


@pytest.mark.ray
def test_what_cannot_be_had_is_said_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    args = ("--gpus", "--workers", "2", "--output", tmp_path / "file" / "runs", "--tracking.uri", "http://127.0.0.1:9")
    code, line, rows, _ = run(*args, environment={"RAY_AUTH_MODE": "disabled"})
    assert code == 1
    assert {"all-reduce", f"output {tmp_path}/file/runs", "MLflow"} <= set(line["fail"])
    assert rows["all-reduce"]["found"] == "the cluster has 0 GPUs"
    assert "shared file system or s3://" in rows[f"output {tmp_path}/file/runs"]["remedy"]
    assert "correct --tracking.uri" in rows["MLflow"]["remedy"]
    assert rows["Ray's token"]["verdict"] == "warn"
    assert "SECURITY.md" in rows["Ray's token"]["remedy"]


# What is made of facts that this machine does not have.


def verdicts(rows: list[Row]) -> dict[str, str]:
    return {f"{row.where} {row.found}": row.verdict for row in rows}


def test_nodes_that_agree_are_one_row() -> None:
    rows = judge.versions({f"node-{i}": FACTS for i in range(5)}, PYTHON, NEEDED)
    merged = together(rows, 5)
    assert [(row.check, row.where, row.verdict) for row in merged] == [
        ("Python", "all 5 nodes", "ok"),
        ("code", "all 5 nodes", "ok"),
        ("packages", "all 5 nodes", "ok"),
    ]
    disks = [Row("free disk /tmp", f"node-{i}", f"{i} GB", "warn", "make room", i) for i in (7, 3, 5, 9)]
    (row,) = together(disks, 5)
    assert (row.where, row.found) == ("node-7, node-3, node-5 and 1 more", "3 GB at worst")


def test_versions_that_differ_lack_or_do_not_fit_are_failures() -> None:
    other = replace(FACTS, versions={"torch": "2.12.1", "ray": "2.60.1"}, code="xyz", python="3.10.1")
    lacking = replace(FACTS, versions={"torch": "2.13.0+cu130"})
    found = {row.found: row for row in judge.versions({"a": FACTS, "b": other, "c": lacking}, PYTHON, NEEDED) if row.verdict == "fail"}
    assert found["torch 2.12.1, needs ==2.13.0"].where == "b"
    assert found["torch 2.12.1, needs ==2.13.0"].remedy == "pip install 'torch==2.13.0' there"
    assert found["ray is not installed, needs <2.61,>=2.60"].where == "c"
    assert found["ray 2.60.1, others have another"].where == "b"
    assert found["Python 3.10.1, needs >=3.11"].where == "b"
    assert found["code xyz, others have another"].where == "b"
    same = judge.versions({"a": FACTS, "c": replace(FACTS, versions=FACTS.versions | {"torch": "2.13.0+cu130"})}, PYTHON, NEEDED)
    assert {row.verdict for row in same} == {"ok"}, "CPU nodes may have torch without CUDA"


def test_the_pins_are_those_of_pyproject() -> None:
    python, needed = judge.requirements()
    assert python.contains("3.11.4")
    assert {"torch", "ray", "deepspeed"} <= {one.name for one in needed}
    facts = Probe().facts([one.name for one in needed], [])
    assert {row.verdict for row in judge.versions({"here": facts}, python, needed)} == {"ok"}


def test_gpus_are_those_that_ray_offers() -> None:
    eight = replace(FACTS, gpus=("NVIDIA H100",) * 8, driver="550.1")
    assert (judge.gpus("a", eight, 8, True).verdict, judge.gpus("a", eight, 8, True).found) == ("ok", "8 x NVIDIA H100, driver 550.1")
    assert judge.gpus("a", eight, 4, True).verdict == "warn"
    assert judge.gpus("a", FACTS, 4, True).verdict == "fail"
    assert judge.gpus("a", FACTS, 4, False).verdict == "warn", "a run on CPU does not need them"
    assert judge.computes(About("a", "Tesla V100", False, "CUDA 12, NCCL 2")).verdict == "warn"


@pytest.mark.parametrize(("ahead", "uncertain", "verdict"), [(0.2, 0.001, "ok"), (-5, 4.5, "ok"), (-5, 0.1, "warn"), (1000, 1, "fail")])
def test_clocks_are_judged_beyond_what_the_round_trip_leaves_open(ahead: float, uncertain: float, verdict: str) -> None:
    assert judge.clock("a", ahead, uncertain).verdict == verdict


def test_limits_and_speeds_have_a_remedy_when_they_are_low() -> None:
    poor = replace(FACTS, free={"/tmp": 10**9, "/ray": 10**10}, shm=64 * 2**20, open_files=256)
    found = {row.check: (row.verdict, bool(row.remedy)) for row in judge.limits("a", poor, 1e10)}
    assert found == {
        "free disk /tmp": ("fail", True),
        "free disk /ray": ("warn", True),
        "/dev/shm": ("fail", True),
        "open files": ("fail", True),
    }
    assert {row.verdict for row in judge.limits("a", FACTS, 1e10)} == {"ok"}
    assert judge.limits("a", replace(FACTS, shm=None), 1e10)[1].verdict == "ok"
    slow, fast = Measured(2, "NCCL", 2**28, 1.0), Measured(8, "NCCL", 2**28, 0.002)
    assert (judge.collective(slow).verdict, judge.collective(fast).verdict) == ("warn", "ok")
    assert fast.bus == pytest.approx(fast.algorithm * 1.75)
    assert judge.authentication("a", "token", alone=False).verdict == "ok"
    assert judge.authentication("a", "", alone=False).verdict == "fail"


def test_a_folder_that_is_not_the_drivers_is_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Probe().store(str(tmp_path), "0", "driver", "")
    (tmp_path / "driver").write_bytes(b"something else")
    with pytest.raises(OSError, match="is not what was written there"):
        Probe().store(str(tmp_path), "0", "driver", "")


def test_a_probe_tells_its_clock() -> None:
    assert abs(Probe().now() - time.time()) < 60
