"""How a job waits for a cluster that grows. That one really grows for it is seen in tests/cluster/test_local.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cola_dist import runtime
from cola_dist.config import RunConfig
from cola_dist.data.latents import ENCODER_CPUS
from cola_dist.errors import UserError
from cola_dist.recipes import build_recipe
from cola_dist.train import launch

PATIENCE = "COLA_CLUSTER_PATIENCE_S"


def with_gpus() -> RunConfig:
    config = build_recipe("tiny")
    train = replace(config.train, workers=2, gpus=True, cpus_per_worker=2.0)
    return replace(config, train=train, data=replace(config.data, reader_cpus=0.5, latents=True, latent_workers=1))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A cluster that has nothing at first and, once it was asked for bundles, just these. Yields what it was asked for."""
    asked: list[Any] = []

    def resources() -> dict[str, float]:
        return {kind: sum(bundle.get(kind, 0) for bundle in asked) for kind in ("CPU", "GPU")}

    monkeypatch.setattr(launch.runtime, "connect", lambda *_: None)
    monkeypatch.setattr(launch.runtime, "make_room", asked.extend)
    monkeypatch.setattr(launch.ray, "cluster_resources", resources)
    return asked


def test_a_run_asks_for_its_workers_a_reader_and_its_encoders(asked: list[Any]) -> None:
    launch.connect(with_gpus(), debug=False)
    assert asked == [{"CPU": 2.0, "GPU": 1.0}] * 2 + [{"CPU": 0.5}, {"CPU": ENCODER_CPUS, "GPU": 1.0}]
    launch.connect(with_gpus(), debug=False)
    assert len(asked) == 4, "a cluster that has enough is asked for nothing"


def test_runs_at_once_ask_for_as_much_each(asked: list[Any]) -> None:
    launch.connect(with_gpus(), debug=False, times=3)
    assert len(asked) == 3 * 4


def test_a_cluster_that_has_not_grown_is_refused(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.runtime, "make_room", lambda bundles: None)
    with pytest.raises(UserError, match="the cluster has 0 CPUs, this run needs"):
        launch.connect(with_gpus(), debug=False)


def test_nothing_is_waited_for_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "placement_group", lambda _: pytest.fail("asked"))
    for text in (None, "", "0"):
        monkeypatch.delenv(PATIENCE, raising=False) if text is None else monkeypatch.setenv(PATIENCE, text)
        runtime.make_room([{"CPU": 1.0}])


def test_the_variable_must_be_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("soon", "nan", "-1", "inf"):
        monkeypatch.setenv(PATIENCE, text)
        with pytest.raises(UserError, match=f"{PATIENCE}: not a number of seconds"):
            runtime.make_room([{"CPU": 1.0}])


def test_waiting_ends_when_room_is_there_or_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    class Group:
        def __init__(self, answers: list[bool]) -> None:
            self.answers, self.removed = answers, False

        def wait(self, seconds: float) -> bool:
            return self.answers.pop(0)

    group = Group([False, False, True, False])
    monkeypatch.setattr(runtime, "placement_group", lambda bundles: group)
    monkeypatch.setattr(runtime, "remove_placement_group", lambda group: setattr(group, "removed", True))
    monkeypatch.setenv(PATIENCE, "60")
    runtime.make_room([{"CPU": 1.0}])
    assert (group.answers, group.removed) == ([False], True)
    group.answers, group.removed = [False] * 5, False
    clock = iter([0.0, 30.0, 61.0])
    monkeypatch.setattr(runtime.time, "monotonic", lambda: next(clock))
    runtime.make_room([{"CPU": 1.0}])
    assert (len(group.answers), group.removed) == (3, True)
