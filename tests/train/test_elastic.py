"""Worker groups that shrink with a lost node, grow with a new one, and save when a node is told to go."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from cola_dist.checks import check
from cola_dist.config import group_sizes
from cola_dist.errors import UserError
from cola_dist.train.shelf import committed
from cola_dist.train.trace import read_trace
from tests.outcomes import Outcomes
from tests.train.harness import run_local, toy_config
from tests.train.jobs import job, newest_step, steps_again, wait_for_run, write_config

STEPS, EVERY = 600, 50
ROUNDED = "recovered: same clips, losses within the rounding of sums"
OPTIONS = ("--warmup.steps", "50", "--joint.steps", str(STEPS - 50), "--train.checkpoint-every", str(EVERY), "--diagnostics.every", "300")
ELASTIC = ("--train.min-workers", "1", "--train.resize-every-s", "2", "--train.cpus-per-worker", "0.75")


@contextmanager
def nodes() -> Iterator[Cluster]:
    """A cluster whose head has room for a worker and a reader, and each further node for one worker."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def checkpoints(run: Path) -> dict[int, int]:
    """Step of each checkpoint, and how many workers wrote it: each writes a file."""
    found = {}
    for uri in committed(str(run / "checkpoints")):
        found[int(Path(uri).name.split("-")[1])] = len(list(Path(uri).glob("*.safetensors")))
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), [2]),
        (("--train.min-workers", "1"), [1, 2]),
        (("--train.workers", "8", "--train.min-workers", "2"), [2, 4, 8]),
        (("--train.workers", "4", "--train.min-workers", "1", "--optim.micro-batch", "2"), [1, 2, 4]),
        (("--train.workers", "8", "--train.min-workers", "1", "--optim.global-batch", "24", "--optim.micro-batch", "3"), [1, 2, 4, 8]),
    ],
)
def test_only_sizes_that_share_a_batch_equally_may_train(tmp_path: Path, options: tuple[str, ...], expected: list[int]) -> None:
    config = toy_config(tmp_path, *options)
    assert group_sizes(config.train, config.optim) == expected


@pytest.mark.parametrize(
    ("least", "options"),
    [
        ("3", ()),
        ("-1", ()),
        ("4", ()),
        # it divides the batch, and its share is no whole number of micro-batches
        ("3", ("--train.workers", "8", "--optim.global-batch", "24", "--optim.micro-batch", "3")),
    ],
)
def test_a_least_size_that_cannot_train_is_refused(tmp_path: Path, least: str, options: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"train\.min_workers is .*: give a number up to train\.workers \(\d\) that divides"):
        check(toy_config(tmp_path, "--train.min-workers", least, *options))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    run_local(toy_config(folder, *OPTIONS, "--train.workers", "1"), folder / "undisturbed")
    return folder


@pytest.mark.ray
@pytest.mark.fault
@pytest.mark.long
def test_losing_and_gaining_a_node_goes_on_with_the_same_clips_and_losses(undisturbed: Path, outcomes: Outcomes) -> None:
    config = write_config(undisturbed, *OPTIONS, *ELASTIC)
    with nodes() as cluster:
        lost = cluster.add_node(num_cpus=1)
        with job("--config", config, environment={"RAY_ADDRESS": cluster.address}) as running:
            run = wait_for_run(running, undisturbed / config.stem.replace("config", "runs"))
            running.wait_until(lambda: newest_step(run) >= 2 * EVERY)
            cluster.remove_node(lost, allow_graceful=False)
            seconds = running.wait_until(lambda: list(checkpoints(run).values())[-1] == 1)
            cluster.add_node(num_cpus=1)
            running.wait_until(lambda: list(checkpoints(run).values())[-1] == 2)
            result = running.wait().result
    assert (result["status"], result["steps"]) == ("finished", STEPS)
    written = checkpoints(run)
    groups = [workers for step, workers in sorted(written.items())]
    changes = [workers for place, workers in enumerate(groups) if place == 0 or workers != groups[place - 1]]
    assert changes == [2, 1, 2]
    assert [step for step in written if step % EVERY], "what was trained before the group grew was saved first"
    agree(run, undisturbed / "undisturbed")
    outcomes.add("a node is lost (raylet), later another comes", "elastic, 2 to 1 to 2 workers", ROUNDED, steps_again(run), seconds)


@pytest.mark.ray
@pytest.mark.fault
@pytest.mark.long
def test_a_node_that_is_told_to_go_has_its_run_saved_first(undisturbed: Path, outcomes: Outcomes) -> None:
    config = write_config(undisturbed, *OPTIONS, *ELASTIC, "--train.checkpoint-every", str(STEPS))
    with nodes() as cluster:
        leaving = cluster.add_node(num_cpus=1)
        with job("--config", config, environment={"RAY_ADDRESS": cluster.address}) as running:
            run = wait_for_run(running, undisturbed / config.stem.replace("config", "runs"))
            running.wait_until(lambda: newest_step(run) >= 50)
            notice(cluster, leaving.node_id)
            running.wait_until(lambda: newest_step(run) > 50)
            saved = newest_step(run)
            cluster.remove_node(leaving, allow_graceful=False)
            result = running.wait().result
    assert (result["status"], result["steps"]) == ("finished", STEPS)
    assert saved < STEPS
    assert checkpoints(run)[STEPS] == 1
    agree(run, undisturbed / "undisturbed")
    outcomes.add("a node is told to go, and goes", "elastic, 2 to 1 workers", ROUNDED, steps_again(run), None)


def notice(cluster: Any, node: str) -> None:
    """What a cloud's agent tells Ray when it takes a machine back."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address, "--node-id", node]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "60"]
    subprocess.run([*command, *reason], check=True, capture_output=True, timeout=60)


def agree(run: Path, other: Path) -> None:
    """The same clips at each step, and losses that differ by the rounding of sums over workers."""
    one, two = read_trace(str(run)), read_trace(str(other))
    assert [(line.step, line.ids) for line in one] == [(line.step, line.ids) for line in two]
    assert [line.loss for line in one] == pytest.approx([line.loss for line in two], rel=2e-2)
