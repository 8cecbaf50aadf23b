"""The plan of a run against a count by hand, and against what training really counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cola_dist.data.stream import open_reader
from cola_dist.methods import build_method, phases
from cola_dist.recipes import build_recipe
from cola_dist.train.estimate import ACCELERATORS, estimate
from cola_dist.train.observer import to_clips
from cola_dist.train.progress import plan_tables


def opensora_by_hand() -> dict[str, float]:
    """Multiply-adds count two. 5 latent frames of 16 x 16 patches through 56 blocks of width 1152; 17 frames of 14 x 14 patches through the LAM."""
    w, frames, places, clips = 1152, 5, 256, 128
    tokens = frames * places
    linear = 2 * tokens * 56 * 12 * w**2 + frames * 2 * (2 * (256 * w + w**2) + 6 * w**2) + 2 * tokens * (16 + 32) * w
    spatial, temporal = 28 * frames * 4 * places**2 * w, 28 * places * 4 * frames**2 * w
    lam_tokens, lw = 17 * 196, 768
    lam = 2 * lam_tokens * 12 * 16 * lw**2 + 12 * 17 * 4 * 196**2 * lw + 12 * 196 * 4 * 17**2 * lw + 2 * lam_tokens * 768 * lw
    pool = 16 * (2 * 2 * 196 * 2 * lw**2 + 4 * 2 * 2 * 196 * lw + 2 * 2 * lw**2)
    conditioning = frames * 2 * (6 * 12 * 960**2 + 4 * 64 * 960 + 960**2 + 960 * 6912)
    return {"world": clips * (linear + spatial + temporal), "phi": clips * (lam + pool + conditioning)}


def test_opensora_agrees_with_a_count_by_hand() -> None:
    plan, hand = estimate(build_recipe("opensora")), opensora_by_hand()
    warmup, joint = plan.phases
    assert (warmup.name, joint.name) == ("warmup", "joint")
    assert joint.flops["forward"] == pytest.approx(hand["world"] + hand["phi"], rel=0.02)
    # Backward: twice forward for what trains, once for what only passes gradients on; the generator's forward once more for checkpointing.
    assert joint.flops["backward"] == pytest.approx(3 * hand["world"] + 2 * hand["phi"], rel=0.02)
    assert warmup.flops["backward"] == pytest.approx(2 * hand["world"] + 2 * hand["phi"], rel=0.02)
    trained = sum(plan.parameters.values())
    assert trained == pytest.approx(0.904e9 + 0.116e9 + 0.074e9, rel=0.01)
    assert joint.states[0] == 16 * trained
    assert joint.states[2] == pytest.approx(4 * trained + 12 * trained / 8, rel=1e-6)
    assert joint.states[3] == pytest.approx(2 * trained, rel=1e-6)
    still = plan.parameters["world"]
    assert warmup.states[0] == 16 * (trained - still) + 4 * still
    assert joint.traffic[0] == pytest.approx(2 * 4 * trained * 7 / 8, rel=1e-6)
    assert plan.checkpoint_bytes == 12 * trained
    # Per token and block, in bf16: queries, keys, values, attention, its output, the MLP's middle and output; and a sum per head in fp32.
    products = 4 * 5 * 256 * 56 * (2 * 10 * 1152 + 4 * 16)
    assert joint.checkpointing["products"].kept - joint.checkpointing["inputs"].kept == pytest.approx(products, rel=0.02)


def test_what_is_planned_is_what_a_step_computes() -> None:
    """The demo's two phases: operations of the plan and of a method's real step, but for the few that the plan leaves out."""
    config = build_recipe("tiny")
    clips = to_clips(open_reader(config.data, 0).read_many(range(config.optim.global_batch)))
    plan = estimate(replace(config, train=replace(config.train, workers=1)))
    for phase, planned in zip(phases(config), plan.phases, strict=True):
        method = build_method(config, bf16=False)
        method.set_phase(phase)
        with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            method(clips, 0).loss.backward()
        assert sum(planned.flops.values()) == pytest.approx(counter.get_total_flops(), rel=0.02), phase.name


SMALL_UNET = {"width": 32, "depth": 1, "heads": 1}


@pytest.mark.parametrize(
    ("recipe", "world"), [("small-pretrain", {}), ("wan", {}), ("cosmos", {}), pytest.param("svd", SMALL_UNET, marks=pytest.mark.long)]
)
def test_a_run_can_be_planned_without_its_weights(recipe: str, world: dict[str, int]) -> None:
    config = build_recipe(recipe)
    config = replace(config, world=replace(config.world, **world))
    if recipe == "svd":  # at full size this takes another minute
        config = replace(config, data=replace(config.data, resolution=64))
    plan = estimate(config)
    for phase in plan.phases:
        assert list(phase.states) == sorted(phase.states, reverse=True)
        assert phase.activations > 0
        for stage in range(4):
            assert phase.seconds(ACCELERATORS["a100"], config.train.workers, stage) > phase.seconds(
                ACCELERATORS["h100"], config.train.workers, stage
            )
    if config.method == "cotrain":
        warmup, joint = plan.phases
        assert warmup.flops["backward"] < joint.flops["backward"]
        assert warmup.states[2] < joint.states[2]
    assert len(plan_tables(config, plan)) == 3


def test_checkpointing_keeps_less_and_computes_more() -> None:
    config = build_recipe("small")
    off = config.train
    inputs = replace(off, activation_checkpointing=True)
    ways = {"off": off, "inputs": inputs, "products": replace(inputs, checkpointing_keeps="products")}
    plans = {name: estimate(replace(config, train=train)).phases for name, train in ways.items()}
    for plain, saving, middle in zip(*plans.values(), strict=True):
        assert saving.activations < 0.85 * middle.activations < 0.7 * plain.activations
        assert saving.flops["forward"] == middle.flops["forward"] == plain.flops["forward"]
        assert saving.flops["backward"] > middle.flops["backward"] == plain.flops["backward"]
        # Each plan tells of all choices, so that one dry run shows what there is to choose from.
        assert saving.checkpointing == middle.checkpointing == plain.checkpointing
        for name, phase in zip(plans, (plain, saving, middle), strict=True):
            way = plain.checkpointing[name]
            assert (phase.activations, phase.flops["backward"]) == (way.kept, plain.flops["backward"] + way.again)
