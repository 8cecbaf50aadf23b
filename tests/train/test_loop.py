"""The training loop through its public entry, in plain processes: phases, checkpoints, resume, ZeRO stages, world sizes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cola_dist.data.stream import open_reader
from cola_dist.errors import UserError
from cola_dist.methods import build_method
from cola_dist.train.checkpoint import Checkpoint
from cola_dist.train.observer import to_clips
from cola_dist.train.shelf import committed, latest
from cola_dist.train.trace import read_trace
from tests.train.harness import run_in_turn, run_local, toy_config


def losses(run: Path) -> list[float]:
    return [line.loss for line in read_trace(str(run))]


def ids(run: Path) -> list[int]:
    return [line.ids for line in read_trace(str(run))]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toys")


@pytest.fixture(scope="module")
def plain(toys: Path) -> Path:
    """An undisturbed run of one worker."""
    run = toys / "runs" / "plain"
    assert run_local(toy_config(toys, "--train.workers", "1"), run)["status"] == "finished"
    return run


@pytest.fixture(scope="module")
def stages(toys: Path) -> dict[int, Path]:
    """The same run on two workers at each ZeRO stage."""
    runs = {stage: toys / "runs" / f"stage{stage}" for stage in (0, 1, 2, 3)}
    options = ("--train.workers", "2", "--optim.ema-decay", "0.5")
    run_in_turn({run: toy_config(toys, *options, "--train.zero-stage", str(stage)) for stage, run in runs.items()})
    return runs


def test_warmup_leaves_the_generator_and_the_boundary_leaves_the_lam(plain: Path) -> None:
    hashes = json.loads((plain / "result.json").read_text())["record"]["hashes"]
    assert (
        hashes["warmup_start"]["world"] == hashes["warmup_end"]["world"] == hashes["joint_start"]["world"] != hashes["joint_end"]["world"]
    )
    assert hashes["warmup_start"]["lam"] != hashes["warmup_end"]["lam"] == hashes["joint_start"]["lam"] != hashes["joint_end"]["lam"]


def test_adam_state_crosses_the_phase_boundary(toys: Path) -> None:
    run = toys / "runs" / "boundary"
    run_local(toy_config(toys, "--train.workers", "1", "--train.keep-checkpoints", "10"), run)
    found = {Checkpoint(uri).position.step: Checkpoint(uri) for uri in committed(str(run / "checkpoints"))}
    assert dict(found[4].position.adam_steps) == {"lam": 4, "conditioning": 4}
    assert dict(found[6].position.adam_steps) == {"lam": 6, "conditioning": 6, "world": 2}
    assert not list(found[4].weights("world")), "a frozen generator is saved by reference"
    assert found[4].position.frozen["world"]["uri"] == "seed 0"
    assert float(found[4].read("exp_avg_sq", "lam.bottleneck.weight").sum()) > 0


def test_stopping_and_resuming_gives_the_same_curve(toys: Path, plain: Path) -> None:
    config = toy_config(toys, "--train.workers", "1")
    for stop in (3, 5):
        run = toys / "runs" / f"stopped{stop}"
        assert run_local(config, run, stop_at=stop)["status"] == "interrupted"
        assert Checkpoint(latest(str(run)) or "").position.step < 8
        assert run_local(config, run)["status"] == "finished"
        assert losses(run) == losses(plain)
        assert ids(run) == ids(plain)


def test_zero_stages_give_one_loss_curve(stages: dict[int, Path]) -> None:
    reference = losses(stages[0])
    assert len(reference) == 8
    for stage in (1, 2, 3):
        assert losses(stages[stage]) == pytest.approx(reference, rel=1e-5)


def test_world_sizes_see_the_same_global_batches(plain: Path, stages: dict[int, Path]) -> None:
    assert ids(plain) == ids(stages[2])
    assert losses(plain) == pytest.approx(losses(stages[2]), rel=1e-4)


def test_a_checkpoint_is_one_model_state_whatever_the_stage(stages: dict[int, Path]) -> None:
    for run in stages.values():
        uri = latest(str(run))
        assert uri is not None
        checkpoint = Checkpoint(uri)
        numbers = sum(math.prod(shape) for shape in checkpoint.shapes.values())
        world = sum(math.prod(shape) for name, shape in checkpoint.shapes.items() if name.startswith("world."))
        stored = 0
        for path in Path(uri).glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                stored += sum(file.get_tensor(key).numel() for key in file.keys() if not key.startswith("buffer:"))  # noqa: SIM118
        assert stored == 3 * numbers + world, "weight and two moments of each parameter, and the generator's average, once"


def test_a_checkpoint_of_one_stage_and_size_resumes_at_another(toys: Path, plain: Path) -> None:
    run = toys / "runs" / "reshaped"
    run_local(toy_config(toys, "--train.workers", "2", "--train.zero-stage", "2"), run, stop_at=5)
    run_local(toy_config(toys, "--train.workers", "1", "--train.zero-stage", "1"), run)
    assert ids(run) == ids(plain)
    assert losses(run) == pytest.approx(losses(plain), rel=1e-4)


def test_averaged_generator_is_exported(stages: dict[int, Path]) -> None:
    exported = {}
    for name in ("world", "world_ema"):
        with safe_open(stages[2] / "export" / name / "model.safetensors", framework="pt") as file:
            exported[name] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert exported["world"].keys() == exported["world_ema"].keys()
    assert any(not torch.equal(exported["world"][key], exported["world_ema"][key]) for key in exported["world"])


def test_what_is_exported_gives_the_codes_and_losses_of_the_last_look(toys: Path, plain: Path) -> None:
    config = toy_config(toys, "--train.workers", "1")
    method = build_method(config, bf16=False).eval()
    for role in ("lam", "conditioning", "world"):
        method.get_submodule(role).load_state_dict(load_file(plain / "export" / role / "model.safetensors"))
    reader = open_reader(config.data, config.train.seed, "heldout")
    parts = [method.evaluate(to_clips(reader.read_many(range(start, start + 4)))) for start in (0, 4)]
    look = json.loads((plain / "looks" / "step-00000008.json").read_text())
    assert sum(part["code_counts"] for part in parts).tolist() == look["code_counts"]
    sums = {name: sum(part[name] for part in parts) for name in ("flow_own", "flow_count")}
    assert float((sums["flow_own"] / sums["flow_count"]).mean()) == pytest.approx(look["indicators"]["flow_loss"], rel=1e-6)


def test_gradient_accumulation_keeps_the_curve(toys: Path) -> None:
    # Codes placed on data would be placed on the first micro-batch: with the faithful codebook nothing depends on how the batch is cut.
    options = ("--train.workers", "1", "--lam.bottleneck.init", "uniform", "--lam.bottleneck.reset-every", "0")
    whole, cut = toys / "runs" / "whole-batch", toys / "runs" / "accumulated"
    run_local(toy_config(toys, *options), whole)
    run_local(toy_config(toys, *options, "--optim.micro-batch", "2"), cut)
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.parametrize(("keeps", "stage"), [("inputs", "2"), ("products", "2"), ("inputs", "3"), ("products", "3")])
def test_activation_checkpointing_keeps_the_curve(toys: Path, plain: Path, keeps: str, stage: str) -> None:
    """At stage 3 backward has to gather the weights that it computes again with, and linear layers are DeepSpeed's own."""
    run = toys / "runs" / f"recomputed-{keeps}-{stage}"
    options = ("--train.workers", "1", "--train.zero-stage", stage, "--train.activation-checkpointing", "True")
    run_local(toy_config(toys, *options, "--train.checkpointing-keeps", keeps), run)
    assert losses(run) == pytest.approx(losses(plain), rel=1e-6)


def test_non_finite_steps_end_the_run_with_an_error_and_a_checkpoint(toys: Path) -> None:
    run = toys / "runs" / "exploded"
    options = ("--train.workers", "1", "--warmup.lr-lam", "1e30", "--train.max-nonfinite", "2", "--optim.lr-warmup-steps", "0")
    result = run_local(toy_config(toys, *options), run)
    assert result["status"] == "failed"
    assert "not finite for 2 steps in a row" in result["error"]
    checkpoint = Checkpoint(result["checkpoint"])
    trace = read_trace(str(run))
    assert len(trace) == checkpoint.position.step
    applied = sum(math.isfinite(line.loss) for line in trace)
    assert checkpoint.position.adam_steps["lam"] <= applied < len(trace), "the optimizer did not move on non-finite steps"


def test_another_mixture_refuses_the_checkpoint(toys: Path) -> None:
    run = toys / "runs" / "remixed"
    run_local(toy_config(toys, "--train.workers", "1"), run, stop_at=3)
    other = toy_config(toys, "--train.workers", "1", "--data.mixture", str(toys / "robot"), "0.25", str(toys / "hand"), "0.75")
    with pytest.raises(UserError, match="another sequence of clips"):
        run_local(other, run)


def test_a_damaged_checkpoint_is_named(toys: Path) -> None:
    run = toys / "runs" / "damaged"
    run_local(toy_config(toys, "--train.workers", "1"), run, stop_at=3)
    uri = latest(str(run))
    assert uri is not None
    path = Path(uri) / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"rank-00000\.safetensors is damaged"):
        Checkpoint(uri)


def test_a_write_without_manifest_does_not_count(toys: Path, plain: Path) -> None:
    folder = plain / "checkpoints" / "step-00000099-deadbeef"
    folder.mkdir(parents=True)
    (folder / "rank-00000.safetensors").write_bytes(b"half")
    assert latest(str(plain)) is not None
    assert "step-00000008" in str(latest(str(plain)))


def test_pretraining_exports_a_generator_that_cotraining_loads(toys: Path) -> None:
    pretrain = toys / "runs" / "pretrain"
    result = run_local(toy_config(toys, "--train.workers", "1", recipe="tiny-pretrain"), pretrain)
    assert result["status"] == "finished"
    run = toys / "runs" / "from-pretrained"
    outcome = run_local(toy_config(toys, "--train.workers", "1", "--world.pretrained", str(pretrain / "export" / "world")), run)
    hashes = outcome["record"]["hashes"]
    assert hashes["warmup_start"]["world"] == result["record"]["hashes"]["pretrain_end"]["world"]
