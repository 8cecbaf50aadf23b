"""An adaptation through the training loop: start, resume, ZeRO stages, export, and what is refused before it begins."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cola_dist.checks import check
from cola_dist.config import RunConfig
from cola_dist.data.labels import labels_of
from cola_dist.data.stream import open_reader
from cola_dist.errors import UserError
from cola_dist.evaluation import adapted
from cola_dist.evaluation.rollout import generate
from cola_dist.methods.adapt import Adapt
from cola_dist.models.adapter import ActionAdapter
from cola_dist.planning.adapter import load_adapted
from cola_dist.train.adaptation import measured, parse_adapt, sized, started
from cola_dist.train.checkpoint import Checkpoint
from cola_dist.train.job import preflight
from cola_dist.train.observer import to_clips
from cola_dist.train.series import curve, series_table
from cola_dist.train.shelf import latest
from cola_dist.train.trace import read_trace
from tests.toy import write_folder
from tests.train.harness import run_local, toy_config

OPTIONS = (
    *("--adapt.steps=8", "--adapt.width=8", "--train.workers=1", "--optim.global-batch=8", "--optim.lr-warmup-steps=2"),
    *(
        "--diagnostics.every=4",
        "--diagnostics.clips=8",
        "--diagnostics.batch=4",
        "--diagnostics.video-clips=2",
        "--diagnostics.video-every=4",
    ),
    *("--tracking.log-every=1", "--train.checkpoint-every=2", "--data.mixture-block=8"),
)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished co-training run ``runs/start`` of toy models, and toy sources."""
    folder = tmp_path_factory.mktemp("toys")
    run_local(toy_config(folder, "--train.workers=1"), folder / "runs" / "start")
    return folder


def job_config(toys: Path, *options: str, source: str = "robot") -> RunConfig:
    argv = (str(toys / "runs" / "start"), "--output", str(toys / "runs"), *OPTIONS, "--data.mixture", str(toys / source), "1", *options)
    job, _ = parse_adapt(argv, "jobs/adapt.py")
    return sized(started(job).config)


@pytest.fixture(scope="module")
def config(toys: Path) -> RunConfig:
    return job_config(toys)


@pytest.fixture(scope="module")
def plain(toys: Path, config: RunConfig) -> Path:
    """An undisturbed adaptation."""
    run = toys / "runs" / "plain"
    assert run_local(config, run)["status"] == "finished"
    return run


def losses(run: Path) -> list[float]:
    return [line.loss for line in read_trace(str(run))]


def test_models_and_their_settings_come_from_the_start(toys: Path, config: RunConfig) -> None:
    check(config)
    trained = toy_config(toys)
    assert config.adapt.start == str(toys / "runs" / "start" / "export")
    assert config.world.pretrained == f"{config.adapt.start}/world"
    assert (config.lam, config.conditioning, config.flow) == (trained.lam, trained.conditioning, trained.flow)
    assert (config.adapt.action_dim, config.adapt.state_dim) == (2, 0)
    assert preflight(config, str(toys / "runs" / "none"))["parameters"]["adapter"] == 2 * 8 + 8 + 8 * 8 + 8


def test_an_adaptation_looks_at_real_actions_and_leaves_the_lam(toys: Path, config: RunConfig, plain: Path) -> None:
    result = json.loads((plain / "result.json").read_text())
    hashes, end = result["record"]["hashes"], result["record"]["evaluations"]["adapt_end"]
    assert hashes["adapt_start"]["lam"] == hashes["adapt_end"]["lam"]
    for role in ("adapter", "conditioning", "world"):
        assert hashes["adapt_start"][role] != hashes["adapt_end"][role]
    for name in ("rollout_psnr", "rollout_psnr_other", "rollout_psnr_null", "rollout_psnr_lam", "delta_psnr", "delta_psnr_lam"):
        assert end[name] == end[name]
    assert end["delta_psnr"] == pytest.approx(end["rollout_psnr"] - end["rollout_psnr_other"])
    assert {"utilisation", "perplexity", "sensitivity_gap", "match_error", "flow_loss"} <= end.keys()
    assert (plain / "looks" / "step-00000008.mp4").exists()
    checkpoint = Checkpoint(latest(str(plain)) or "")
    assert checkpoint.position.frozen["lam"]["uri"] == config.adapt.start
    assert not list(checkpoint.weights("lam"))
    scale = measured(open_reader(config.data, 0, labels=labels_of(config)))
    assert torch.equal(checkpoint.buffers["adapter.action_mean"], scale["adapter.action_mean"])
    assert checkpoint.buffers["adapter.action_std"].tolist() != [1, 1]


def test_stopping_and_resuming_gives_the_same_curve(toys: Path, config: RunConfig, plain: Path) -> None:
    for stop in (3, 6):
        run = toys / "runs" / f"stopped{stop}"
        assert run_local(config, run, stop_at=stop)["status"] == "interrupted"
        assert run_local(config, run)["status"] == "finished"
        assert losses(run) == losses(plain)


@pytest.mark.parametrize("stage", [3, pytest.param(2, marks=pytest.mark.long)])
def test_workers_and_zero_stages_give_one_curve(toys: Path, config: RunConfig, plain: Path, stage: int) -> None:
    run = toys / "runs" / f"stage{stage}"
    run_local(replace(config, train=replace(config.train, workers=2, zero_stage=stage)), run)
    assert losses(run) == pytest.approx(losses(plain), rel=1e-4)


@pytest.mark.parametrize("quantise", [False, True])
def test_a_planner_gets_what_the_last_look_measured(toys: Path, config: RunConfig, quantise: bool) -> None:
    run = toys / "runs" / f"export-{quantise}"
    run_local(replace(config, adapt=replace(config.adapt, quantise=quantise)), run)
    method, adapter = load_adapted(str(run), torch.device("cpu"))
    assert isinstance(method, Adapt)
    reader = open_reader(config.data, config.train.seed, "heldout", labels=labels_of(config))
    parts = [to_clips(reader.read_many(range(first, first + 4))) for first in (0, 4)]
    sums = [adapted.psnr_sums(method, part) for part in parts]
    figures = adapted.figures({name: sums[0][name] + sums[1][name] for name in sums[0]})
    end = json.loads((run / "result.json").read_text())["record"]["evaluations"]["adapt_end"]
    assert figures == pytest.approx({name: end[name] for name in figures}, abs=1e-3)
    actions = parts[0].actions
    assert actions is not None
    latent = adapter(actions)
    assert torch.equal(latent, method.latent_actions(parts[0])[1].actions)
    noise = torch.randn(4, 5, 3, 32, 32)
    video = generate(method, method.latents(parts[0])[:, :1], latent, noise)
    assert video.shape == parts[0].video.shape
    stored = json.loads((run / "export" / "adapter" / "config.json").read_text())
    assert (stored["action_dim"], stored["state_dim"]) == (2, 0)
    assert stored["action_std"] == pytest.approx(adapter.action_std.tolist())
    if not quantise:
        assert torch.equal(ActionAdapter.load(str(run / "export" / "adapter"))(actions), latent)


def test_an_adapted_run_may_be_adapted_again(toys: Path, plain: Path) -> None:
    argv = (str(plain), "--output", str(toys / "runs"), *OPTIONS, "--data.mixture", str(toys / "robot"), "1", "--adapt.kind", "linear")
    config = sized(started(parse_adapt(argv, "jobs/adapt.py")[0]).config)
    assert preflight(config, str(toys / "runs" / "none"))["parameters"]["adapter"] == 2 * 8 + 8


def test_what_does_not_fit_is_refused_before_anything_starts(toys: Path, config: RunConfig) -> None:
    start, out = str(toys / "runs" / "start"), ("--output", str(toys / "runs"))
    with pytest.raises(UserError, match=r"holds no export .*give the folder of a finished run of jobs/cotrain.py"):
        started(parse_adapt([str(toys / "robot"), *out], "jobs/adapt.py")[0])
    with pytest.raises(UserError, match=r"nothing to start from: give the folder of a finished run"):
        parse_adapt(out, "jobs/adapt.py")
    assert started(parse_adapt(["start", *out], "jobs/adapt.py")[0]).config.adapt.start == config.adapt.start, "a run id is enough"
    with pytest.raises(UserError, match=r"has no actions in its train split: leave it out of data.mixture"):
        job_config(toys, source="hand")
    with pytest.raises(UserError, match=r"have 2 numbers, the adapter takes 5 \(adapt.action_dim\)"):
        job_config(toys, "--adapt.action-dim", "5")
    with pytest.raises(UserError, match=r"lam.width is 32, but .*export was trained with 16: leave this option out"):
        job_config(toys, "--lam.width", "32")
    with pytest.raises(UserError, match=r"data\.mixture is empty"):
        check(started(parse_adapt([start, *out, "--data.mixture"], "jobs/adapt.py")[0]).config)
    with pytest.raises(UserError, match=r"unknown option '--adapt.quantize' \(did you mean 'adapt.quantise'\?\)"):
        parse_adapt([start, "--adapt.quantize", "True"], "jobs/adapt.py")
    with pytest.raises(UserError, match=r"--shares is '0.1 2': each must be above 0 and at most 1"):
        parse_adapt([start, "--shares", "0.1", "2"], "jobs/adapt.py")
    with pytest.raises(UserError, match=r"--shares is 'few'"):
        parse_adapt([start, "--shares", "few"], "jobs/adapt.py")
    with pytest.raises(UserError, match=r"a resumed run keeps its start and its share"):
        parse_adapt([start, "--resume", "x"], "jobs/adapt.py")
    with pytest.raises(UserError, match=r"has no adapter: make one with `python jobs/adapt.py"):
        load_adapted(start, torch.device("cpu"))
    write_folder(toys / "fast", "fast", fps=10.0)
    with pytest.raises(UserError, match=r"pack it again with --cut.fps 5, or set --data.rate-hz 10"):
        job_config(toys, source="fast")


@pytest.mark.parametrize(
    ("complaint", "changes"),
    [
        ("adapt.steps must be at least 1", {"steps": 0}),
        ("adapt.lr_adapter positive", {"lr_adapter": 0.0}),
        ("learning rates must not be negative", {"lr_world": -1.0}),
        ("adapt.share_of_episodes is 0", {"share_of_episodes": 0.0}),
        ("match_weight", {"match_weight": -1.0}),
        ("adapt.state_dim is 3", {"state_dim": 3}),
    ],
)
def test_each_problem_is_found_alone(config: RunConfig, complaint: str, changes: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"^1 problem") as refusal:
        check(replace(config, adapt=replace(config.adapt, **changes)))  # type: ignore[arg-type]
    assert complaint in str(refusal.value)


def test_shares_are_taken_from_anywhere_among_the_options() -> None:
    for argv in (("run/", "--shares", "1", "0.05", "--train.seed", "3"), ("run/", "--train.seed", "3", "--shares=0.05", "1.0")):
        job, shares = parse_adapt(argv, "jobs/adapt.py")
        assert shares == (0.05, 1.0)
        assert (job.config.train.seed, job.config.adapt.start) == (3, "run/")
    assert parse_adapt(("run/",), "jobs/adapt.py")[1] == ()


def test_a_curve_shows_what_it_has() -> None:
    points = [{"share": share, "episodes": 3, "verdict": "healthy", "rollout_psnr": 20.0, "delta_psnr": 1.0} for share in (0.01, 1.0)]
    assert len(curve(points).axes) == 3
    assert series_table(points).row_count == 2
