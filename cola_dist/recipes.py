"""Named runs. A recipe copies a base and changes a few fields; command line and YAML change more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cola_dist.arms import ARMS
from cola_dist.config import (
    AdaptConfig,
    AutoencoderConfig,
    BottleneckConfig,
    ConditioningConfig,
    DataConfig,
    DiagnosticsConfig,
    FlowConfig,
    JointConfig,
    LamConfig,
    ObjectiveConfig,
    OptimConfig,
    PhaseConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
    WarmupConfig,
    WorldConfig,
)

EMBEDDED = {"embedded:robot": 0.5, "embedded:hand": 0.5}


def tiny() -> RunConfig:
    """The demo: embedded clips, embedded pretrained generator, two CPU workers, minutes."""
    return RunConfig(
        recipe="tiny",
        output="runs",
        method="cotrain",
        data=DataConfig(mixture=EMBEDDED, steps_per_read=8, reader_cpus=0.25),
        # Beyond the faithful baseline, because minutes have to do for days: the LAM is shown changes, codes start on z and unused ones return to it,
        # and nothing pulls z to the codes. Even at 0.002 that pull outweighs what an action's direction changes in the flow loss: codes then name
        # how much moves, without it also where to (tests/bench/RESULTS.md).
        lam=LamConfig(
            heads=2,
            input="frames+change",
            pool="difference",
            bottleneck=BottleneckConfig(init="data", reset_every=25, commitment_weight=0.0),
        ),
        conditioning=ConditioningConfig(heads=2),
        autoencoder=AutoencoderConfig(),
        world=WorldConfig(pretrained="embedded:world", heads=2),
        # In a few large patches small noise hides no motion: below 0.4 the code would be redundant.
        flow=FlowConfig(tau_min=0.4),
        objective=ObjectiveConfig(),
        lam_phase=PhaseConfig(steps=0),
        warmup=WarmupConfig(steps=400, lr_lam=2e-3, lr_conditioning=2e-3),
        joint=JointConfig(steps=700, lr_lam=2e-3, lr_conditioning=2e-3, lr_world=1e-3),
        adapt=AdaptConfig(steps=0),
        optim=OptimConfig(),
        train=TrainConfig(cpus_per_worker=0.5, precision="fp32"),
        diagnostics=DiagnosticsConfig(every=200, grace_steps=300, probe_clips=1024),
        tracking=TrackingConfig(),
    )


def tiny_pretrain() -> RunConfig:
    """How the embedded generator was made: the same clips, video alone, no actions, no LAM."""
    base = tiny()
    return replace(
        base,
        recipe="tiny-pretrain",
        method="pretrain",
        world=replace(base.world, pretrained=None),
        warmup=WarmupConfig(steps=0),
        joint=JointConfig(steps=1_200, lr_world=2e-3),
        optim=replace(base.optim, decay="cosine", lr_warmup_steps=100),
        train=replace(base.train, checkpoint_every=200),
        diagnostics=replace(base.diagnostics, every=200, probe_clips=0),
    )


def tiny_adapt() -> RunConfig:
    """From the real actions of `tiny`'s robot to its latent actions. Needs a run of `tiny`: ``jobs/adapt.py RUN``."""
    base = tiny()
    return replace(
        base,
        recipe="tiny-adapt",
        method="adapt",
        data=replace(base.data, mixture={"embedded:robot": 1.0}),
        warmup=WarmupConfig(steps=0),
        joint=JointConfig(steps=0),
        adapt=AdaptConfig(steps=200, lr_adapter=2e-3, lr_conditioning=5e-4, lr_world=2e-4),
        diagnostics=replace(base.diagnostics, every=100, grace_steps=0, probe_clips=0),
    )


def small() -> RunConfig:
    """One GPU, about 100 M parameters, 64 pixels. Pretrain first (`small-pretrain`), then pass the export as ``--world.pretrained``."""
    base = tiny()
    return replace(
        base,
        recipe="small",
        data=replace(base.data, frames=9, resolution=64, reader_cpus=1.0),
        lam=LamConfig(patch=8, width=384, depth=8, heads=6, bottleneck=BottleneckConfig()),
        conditioning=ConditioningConfig(depth=4, width=384, heads=6),
        world=WorldConfig(pretrained=None, patch=4, width=512, depth=12, heads=8),
        warmup=WarmupConfig(steps=4_000, lr_lam=3e-4, lr_conditioning=3e-4),
        joint=JointConfig(steps=16_000, lr_lam=3e-4, lr_conditioning=3e-4, lr_world=7.5e-5),
        optim=replace(base.optim, global_batch=64, lr_warmup_steps=500),
        train=replace(base.train, workers=1, gpus=True, cpus_per_worker=1.0, precision="auto", checkpoint_every=1000, deterministic=False),
        diagnostics=replace(base.diagnostics, every=500, grace_steps=1000, clips=512, video_every=2000),
    )


def small_pretrain() -> RunConfig:
    """The generator of `small` on video alone."""
    base = small()
    return replace(
        base,
        recipe="small-pretrain",
        method="pretrain",
        warmup=WarmupConfig(steps=0),
        joint=JointConfig(steps=50_000, lr_world=3e-4),
        optim=replace(base.optim, decay="cosine"),
        diagnostics=replace(base.diagnostics, probe_clips=0),
    )


def small_adapt() -> RunConfig:
    """The paper's 3,000 steps for a run of `small`, or of a larger one on as many GPUs: ``jobs/adapt.py RUN small-adapt --data.mixture … 1``."""
    base = small()
    return replace(
        base,
        recipe="small-adapt",
        method="adapt",
        data=replace(base.data, mixture={"embedded:robot": 1.0}),
        warmup=WarmupConfig(steps=0),
        joint=JointConfig(steps=0),
        adapt=AdaptConfig(steps=3_000, lr_conditioning=7.5e-5, lr_world=7.5e-5),
        diagnostics=replace(base.diagnostics, grace_steps=0, probe_clips=0),
    )


def opensora() -> RunConfig:
    """The paper's run on Open-Sora v1.2, 8 GPUs. Needs ``--data.mixture``, ``--world.pretrained`` and ``--autoencoder.pretrained``.

    The paper's: sizes, resolutions, learning rate and its rise, batch, phases, guidance, the bare quantiser. Open there, our defaults: 17 frames at
    5 Hz, context, betas and weight decay, the width of the conditioning (960 gives its 74 M), and the shift of tau, which is what Open-Sora's own
    schedule has at this size and length: sqrt(256² / 512²) * sqrt(5).
    """
    base = small()
    return replace(
        base,
        recipe="opensora",
        data=replace(base.data, frames=17, resolution=256),
        lam=LamConfig(resolution=224, patch=16, width=768, depth=12, heads=12, forward_depth=12),
        conditioning=ConditioningConfig(depth=6, width=960, heads=12),
        autoencoder=AutoencoderConfig(kind="opensora"),
        world=WorldConfig(kind="stdit3", patch=2, width=1152, depth=28, heads=16),
        flow=FlowConfig(tau_min=0.0, tau_shift=1.118, guidance=4.0),
        warmup=WarmupConfig(steps=8_000, lr_lam=7.5e-5, lr_conditioning=7.5e-5),
        joint=JointConfig(steps=30_000, lr_lam=7.5e-5, lr_conditioning=7.5e-5, lr_world=7.5e-5),
        optim=OptimConfig(global_batch=128, micro_batch=4, lr_warmup_steps=2_000),
        train=replace(base.train, workers=8, activation_checkpointing=True),
        diagnostics=replace(base.diagnostics, clips=512, batch=8, grace_steps=2_000),
    )


def wan() -> RunConfig:
    """The paper's second generator, Wan2.1-T2V-1.3B. Needs the same three options as `opensora`.

    The paper's: 5,000 steps of warm-up; all else as in `opensora`. Ours: the shift of tau, which is Wan's own for small frames.
    """
    base = opensora()
    return replace(
        base,
        recipe="wan",
        autoencoder=AutoencoderConfig(kind="wan", images_at_once=1),
        world=WorldConfig(kind="wan", patch=2, width=1536, depth=30, heads=12),
        flow=replace(base.flow, tau_shift=3.0),
        warmup=replace(base.warmup, steps=5_000),
    )


def cosmos() -> RunConfig:
    """Cosmos-Predict2 2B, as DreamDojo adapts it but for its continuous actions (``cosmos+continuous`` has them). Options as in `opensora`.

    All else as in `wan`; the shift of tau is ours.
    """
    base = wan()
    return replace(
        base,
        recipe="cosmos",
        world=WorldConfig(kind="cosmos", patch=2, width=2048, depth=28, heads=16),
        optim=replace(base.optim, micro_batch=2),
    )


def svd() -> RunConfig:
    """Stable Video Diffusion's UNet, which AdaWorld adapts (``svd+continuous`` has its latents). Options as in `opensora`. All else is ours."""
    base = opensora()
    return replace(
        base,
        recipe="svd",
        data=replace(base.data, frames=14),
        autoencoder=AutoencoderConfig(kind="svd"),
        world=WorldConfig(kind="svd", patch=8, width=320, depth=2, heads=5),
        flow=replace(base.flow, tau_shift=1.0),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe().recipe: recipe for recipe in (tiny, small, tiny_pretrain, small_pretrain, tiny_adapt, small_adapt, opensora, wan, cosmos, svd)
}


def build_recipe(name: str) -> RunConfig:
    """The run that ``recipe`` or ``recipe+arm+arm`` names, arms applied from left to right. Raises ``KeyError`` with the part that is unknown."""
    first, *arms = name.split("+")
    config = RECIPES[first]()
    for arm in arms:
        config = ARMS[arm](config)
    return replace(config, recipe=name)
