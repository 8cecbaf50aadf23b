"""What several test files share: one undisturbed job, which is dear to start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from tests.outcomes import Outcomes

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores.
    torch.set_num_threads(1)

# A busy machine is no failure.
hypothesis.settings.register_profile("any-machine", deadline=None)
hypothesis.settings.load_profile("any-machine")


@pytest.fixture(autouse=True)
def no_test_takes_priority() -> Iterator[None]:
    """A library that makes the test process real-time makes all later jobs so, and they keep the machine from working (an AV1 encoder did)."""
    policy = getattr(os, "sched_getscheduler", lambda _: 0)
    before = policy(0)
    yield
    assert policy(0) == before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start Ray come first, or the last of several processes would be left with a long one."""
    slow = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in slow)


OUTCOMES = pytest.StashKey[Outcomes]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[OUTCOMES] = Outcomes()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash[OUTCOMES]
    if found.rows:
        terminalreporter.write_sep("=", "faults and outcomes")
        terminalreporter.write_line(found.table())


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    """Where a test says what came of a fault."""
    return request.config.stash[OUTCOMES]


@dataclass(frozen=True)
class Undisturbed:
    """A finished job: its sources, configuration file, run folder and result."""

    folder: Path
    config: Path
    run: Path
    result: dict[str, Any]
    stderr: str


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """A co-training job of 40 + 40 steps on two workers that nothing disturbs, on sources with a few damaged videos."""
    from tests.train.jobs import run_job, runs_in, write_config, write_damaged_sources

    folder = tmp_path_factory.mktemp("jobs")
    write_damaged_sources(folder)
    config = write_config(folder, "--data.max-bad-share", "0.9", "--diagnostics.probe-clips", "16")
    ended = run_job("--config", config)
    result = ended.result
    (run,) = runs_in(folder / "runs-0")
    return Undisturbed(folder, config, run, result, ended.stderr)
