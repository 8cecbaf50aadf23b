"""What decides about trials, without a cluster: collapse, halving at equal compute, Optuna's suggestions, the ledger, the figures."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_dist.errors import UserError
from cola_dist.train.sweep.figures import heat_maps, parallel_coordinates
from cola_dist.train.sweep.ledger import FAILED, FINISHED, RUNNING, STOPPED, Entry, Ledger, read_ledger
from cola_dist.train.sweep.plan import Plan, Trial
from cola_dist.train.sweep.rules import COLLAPSE_SHARE, Judge, collapsed
from cola_dist.train.sweep.search import Queue
from cola_dist.train.sweep.space import read_space

PNG = b"\x89PNG"


def look(step: int, verdict: str, loss: float = 1.0) -> dict[str, Any]:
    return {"id": "t", "step": step, "spent_seconds": float(step), "verdict": verdict, "flow_loss": loss}


# Collapse.


@given(st.lists(st.sampled_from(["collapsed", "at risk", "healthy"]), max_size=12), st.integers(1, 4), st.integers(0, 12))
def test_only_a_row_of_collapsed_looks_after_the_first_seconds_ends_a_trial(verdicts: list[str], after: int, from_seconds: int) -> None:
    looks = [look(step, verdict) for step, verdict in enumerate(verdicts)]
    dead = len(looks) >= after and set(verdicts[-after:]) == {"collapsed"} and len(looks) - 1 >= from_seconds
    why = collapsed(looks, after, float(from_seconds))
    assert bool(why) == dead
    assert not dead or why.startswith(f"collapsed at {after} evaluations in a row, last at step {len(looks) - 1}")


class Trials:
    """A judge under test, and what it had trials end for."""

    def __init__(self, tree: dict[str, Any], budget: float) -> None:
        self.ended: dict[str, list[str]] = {}
        self.judge = Judge(read_space(tree, "mine", "mine"), budget, lambda id, why: self.ended.setdefault(id, []).append(why))

    def hear(self, id: str, *looks: dict[str, Any]) -> None:
        trial = SimpleNamespace(trial_id=f"tune-{id}")
        self.judge.on_trial_add(None, trial)
        for one in looks:
            assert self.judge.on_trial_result(None, trial, one | {"id": id}) == "CONTINUE", "a run ends by itself, not by Tune's hand"
        self.judge.on_trial_complete(None, trial, {"id": id, "status": "finished", "spent_seconds": 9.0})


def test_a_dead_trial_is_asked_to_end_once_its_share_of_the_budget_is_spent() -> None:
    trials = Trials({"collapse": {"after_looks": 2}}, budget=10.0)
    trials.hear("dead", *(look(step, "collapsed") for step in range(6)))
    trials.hear("late", *(look(step, "collapsed") for step in range(4)), look(4, "at risk"), look(5, "collapsed"))
    assert list(trials.ended) == ["dead"]
    assert COLLAPSE_SHARE * 10.0 == 4.0
    assert trials.ended["dead"][0] == "collapsed at 2 evaluations in a row, last at step 4 after 4.0 s"


def test_halving_compares_trials_at_equal_accelerator_time() -> None:
    trials = Trials({"asha": {"grace_seconds": 2, "reduction": 2}}, budget=8.0)
    # The second is worse at the first rung although it has made more steps; the third is better than both.
    trials.hear("first", look(2, "", 1.0), look(4, "", 0.9))
    trials.hear("second", look(1, "", 5.0) | {"step": 100}, look(2, "", 2.0) | {"step": 200})
    trials.hear("third", look(2, "", 0.5), look(4, "", 0.4), look(8, "", 0.3))
    assert list(trials.ended) == ["second"]
    assert trials.ended["second"] == ["halved at step 200: flow_loss 2 after 2.0 s is not among the best at equal compute"]


def test_without_a_budget_of_its_own_halving_takes_shares_of_the_sweeps() -> None:
    trials = Trials({"asha": {"reduction": 3}, "mode": "max"}, budget=9.0)
    trials.hear("good", look(1, "", 3.0))
    trials.hear("bad", look(0, "", 0.1), look(1, "", 1.0))
    assert trials.ended["bad"][0].startswith("halved at step 1: ")


def test_evaluations_without_the_metric_and_spread_of_nan_end_nobody() -> None:
    trials = Trials({"asha": {"grace_seconds": 1, "reduction": 2}}, budget=8.0)
    bare = {name: value for name, value in look(4, "").items() if name != "flow_loss"}
    trials.hear("bare", bare)
    trials.hear("nan", look(1, "", float("nan")))
    assert trials.ended == {}


def test_a_resumed_sweep_compares_with_the_trials_of_before() -> None:
    fresh, resumed = (Trials({"asha": {"grace_seconds": 2, "reduction": 2}}, budget=8.0) for _ in range(2))
    resumed.judge.recall("old", [look(2, "", 0.5)])
    for trials in (fresh, resumed):
        trials.hear("new", look(2, "", 1.0))
    assert (list(fresh.ended), list(resumed.ended)) == ([], ["new"])


# Optuna.


def optuna_plan(samples: int = 12, **keys: Any) -> Plan:
    fields = {"joint.lr_lam": {"log_uniform": [1e-4, 1e-1]}, "optim.clip_norm": [0.5, 1.0, 2.0]}
    tree = {"fields": fields, "search": "optuna", "samples": samples, **keys}
    return Plan(read_space(tree, "mine", "mine"), "mine-abc123", "/tmp/trials", "sqlite:////tmp/mlflow.db")


def entry(trial: Trial, status: str = FINISHED, value: float | None = None) -> Entry:
    return Entry(trial.id, trial.number, trial.arm, trial.domain, trial.seed, dict(trial.params), "run", status, "", 1.0, 10, value)


def loss(trial: Trial) -> float:
    """Least at a rate of 0.01 and a norm of 1."""
    rate, norm = trial.params["joint.lr_lam"], trial.params["optim.clip_norm"]
    assert isinstance(rate, float)
    assert isinstance(norm, float)
    return abs(rate - 0.01) + abs(norm - 1.0)


def test_optuna_learns_from_trials_that_have_ended() -> None:
    plan = optuna_plan(40)
    queue = Queue(plan, [])
    losses = []
    while (trial := queue.next()) is not None:
        losses.append(loss(trial))
        queue.tell(entry(trial, value=losses[-1]))
    assert len(losses) == plan.total == 40
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_every_point_is_tried_in_all_seeds_and_each_arm_has_a_search_of_its_own() -> None:
    plan = optuna_plan(3, arms=["cola", "vq"], seeds=2)
    queue, seen = Queue(plan, []), []
    while (trial := queue.next()) is not None:
        seen.append(trial)
        queue.tell(entry(trial, *{0: (FAILED,), 1: (STOPPED, 1.0)}.get(trial.seed, ())))
    assert len(seen) == plan.total == 12
    for one, other in zip(seen[::2], seen[1::2], strict=True):
        assert (one.arm, one.params, {one.seed, other.seed}) == (other.arm, other.params, {0, 1})
    for arm in ("cola", "vq"):
        assert len({str(trial.params) for trial in seen if trial.arm == arm}) == 3


def test_a_resumed_search_keeps_its_points_and_makes_new_ones() -> None:
    plan = optuna_plan(12)
    queue = Queue(plan, [])
    before = [trial for _ in range(5) if (trial := queue.next()) is not None]
    entries = [entry(trial, RUNNING if trial.number in (2, 4) else FINISHED, loss(trial)) for trial in before]
    resumed, after = Queue(plan, [Entry(**json.loads(json.dumps(vars(one)))) for one in entries]), []
    while (trial := resumed.next()) is not None:
        after.append(trial)
        resumed.tell(entry(trial, value=loss(trial)))
    assert [trial.number for trial in after] == [2, 4, *range(5, 12)]
    assert after[:2] == [before[2], before[4]]
    assert len({str(trial.params) for trial in [*before, *after[2:]]}) == 12


def test_a_grid_goes_on_with_what_has_not_ended() -> None:
    plan = Plan(read_space({"seeds": 4}, "mine", "mine"), "mine-abc123", "/tmp/trials", "sqlite:////tmp/mlflow.db")
    ended = [entry(trial, status) for trial, status in zip(plan.trials(), (FINISHED, RUNNING, FAILED), strict=False)]
    queue = Queue(plan, ended)
    assert [queue.next(), queue.next(), queue.next()] == [plan.trials()[1], plan.trials()[3], None]


# The ledger.


def test_the_ledger_on_disk_follows_every_change(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "trials.json"))
    first, second, third = (Trial(n, f"{n:03d}", "cola", "default", n, {"lr_ratio": 2}) for n in range(3))
    for trial in (first, second, third):
        ledger.begin(trial, f"/runs/{trial.id}")
    assert [row["status"] for row in json.loads((tmp_path / "trials.json").read_text())] == ["running"] * 3
    ledger.hear("000", 8, 1.5, 0.25)
    ledger.hear("000", 9, 1.6, None)
    ledger.hear("001", 9, 1.6, float("nan"))
    ledger.end("000", FINISHED, "the budget\nis spent")
    ledger.end("001", FINISHED, "")
    rows = {row["id"]: row for row in json.loads((tmp_path / "trials.json").read_text())}
    assert rows["000"] == {
        **{"id": "000", "number": 0, "arm": "cola", "domain": "default", "seed": 0, "params": {"lr_ratio": 2}, "run": "/runs/000"},
        **{"status": "finished", "why": "the budget is spent", "spent_seconds": 1.6, "steps": 9, "value": 0.25},
    }
    assert rows["001"]["value"] is None
    again = read_ledger(str(tmp_path / "trials.json"))
    assert again == ledger
    again.begin(third, "/elsewhere")
    assert again.entries["002"].run == "/runs/002", "a trial that goes on stays where it is"
    assert again.count() == {"finished": 2, "stopped": 0, "failed": 0, "running": 1}
    assert again.best("min") == again.best("max") == again.entries["000"]


def test_a_damaged_ledger_is_refused(tmp_path: Path) -> None:
    assert read_ledger(str(tmp_path / "trials.json")).entries == {}
    (tmp_path / "trials.json").write_text('[{"id": "000", "arm"')
    with pytest.raises(UserError, match=r"trials\.json is not the trials of a sweep of this version"):
        read_ledger(str(tmp_path / "trials.json"))


# Figures.


def test_figures_are_drawn_of_what_trials_differ_in() -> None:
    plan = optuna_plan(9, arms=["cola", "vq"], seeds=2)
    queue, entries = Queue(plan, []), []
    while (trial := queue.next()) is not None:
        entries.append(entry(trial, STOPPED if trial.number % 7 == 6 else FINISHED, loss(trial)))
    for draw in (parallel_coordinates, heat_maps):
        assert (draw(plan.space, entries) or b"").startswith(PNG)
        assert draw(plan.space, entries[:1]) is None
        assert draw(plan.space, [entry(trial, FAILED) for trial in map(plan.trial, range(3), "aaa", "ddd", range(3), [{}] * 3)]) is None


def test_figures_of_arms_and_seeds_alone() -> None:
    plan = Plan(read_space({"arms": ["cola", "vq"], "seeds": 2}, "mine", "mine"), "mine-abc123", "/tmp", "sqlite:////tmp/mlflow.db")
    entries = [entry(trial, value=float(trial.number)) for trial in plan.trials()]
    assert (parallel_coordinates(plan.space, entries) or b"").startswith(PNG)
    assert (heat_maps(plan.space, entries) or b"").startswith(PNG)
    same = [entry(trial, value=1.0) for trial in plan.trials()]
    assert (parallel_coordinates(plan.space, same) or b"").startswith(PNG), "all at the same value"
