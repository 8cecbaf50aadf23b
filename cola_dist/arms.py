"""Arms of a study: each changes a few fields of a recipe, so that arms of one recipe differ in one thing. ``recipe+arm+arm`` names a run.

Lengths are arranged so that all arms of a recipe make equally many steps; ``train.budget_seconds`` gives them equal compute instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cola_dist.config import BottleneckConfig, RunConfig


def cola(base: RunConfig) -> RunConfig:
    """Warm-up through the frozen generator, then joint: the recipe as it is."""
    return base


def no_warmup(base: RunConfig) -> RunConfig:
    """Random LAM and pretrained generator, joint from step 0."""
    return replace(base, warmup=replace(base.warmup, steps=0), joint=replace(base.joint, steps=base.warmup.steps + base.joint.steps))


def scratch(base: RunConfig) -> RunConfig:
    """Both random, joint from step 0."""
    return replace(no_warmup(base), world=replace(base.world, pretrained=None))


def two_stage(base: RunConfig) -> RunConfig:
    """The LAM learns from its own forward model for the length of the warm-up, is frozen, and the generator learns to follow its actions."""
    return replace(
        base,
        objective=replace(base.objective, forward_weight=1.0),
        lam_phase=replace(base.lam_phase, steps=base.warmup.steps, lr_lam=base.warmup.lr_lam),
        warmup=replace(base.warmup, steps=0),
        joint=replace(base.joint, lr_lam=0.0),
    )


def warmup_only(base: RunConfig) -> RunConfig:
    """The generator stays frozen throughout."""
    return replace(base, warmup=replace(base.warmup, steps=base.warmup.steps + base.joint.steps), joint=replace(base.joint, steps=0))


def freeze_lam_after_warmup(base: RunConfig) -> RunConfig:
    """The generator learns to follow the actions that warm-up made."""
    return replace(base, joint=replace(base.joint, lr_lam=0.0))


def stop_grad(base: RunConfig) -> RunConfig:
    """The LAM learns from its own forward model alone; the generator follows its actions and sends no gradient (Genie, 2402.15391)."""
    return replace(base, objective=replace(base.objective, generator_teaches_lam=False, forward_weight=1.0))


def adaptive(base: RunConfig) -> RunConfig:
    """Warm-up ends by its indicators: between a quarter of the recipe's length and twice it."""
    rule = replace(base.warmup, exit="adaptive", min_steps=base.warmup.steps // 4, steps=2 * base.warmup.steps)
    return replace(base, warmup=rule)


def _bottleneck(base: RunConfig, bottleneck: BottleneckConfig) -> RunConfig:
    return replace(base, lam=replace(base.lam, bottleneck=bottleneck))


def _plain(base: RunConfig) -> BottleneckConfig:
    """The paper's bottleneck in the recipe's size."""
    own = base.lam.bottleneck
    return BottleneckConfig(codes=own.codes, dim=own.dim)


def continuous(base: RunConfig) -> RunConfig:
    """beta-VAE latents, no codes (AdaWorld)."""
    return _bottleneck(base, replace(_plain(base), kind="continuous", codes=BottleneckConfig.codes))


def vq_faithful(base: RunConfig) -> RunConfig:
    """The paper's quantiser: codes from a uniform start, commitment 0.25, no reset."""
    return _bottleneck(base, _plain(base))


def vq(base: RunConfig) -> RunConfig:
    """The recipe's quantiser without dead-code reset."""
    return _bottleneck(base, replace(base.lam.bottleneck, kind="vq", reset_every=0))


def vq_reset(base: RunConfig) -> RunConfig:
    """The recipe's quantiser with dead-code reset that never stops."""
    return _bottleneck(base, replace(base.lam.bottleneck, kind="vq", reset_every=base.lam.bottleneck.reset_every or 25))


def vq_cosine(base: RunConfig) -> RunConfig:
    """`vq` on the unit sphere."""
    return _bottleneck(base, replace(base.lam.bottleneck, kind="cosine", reset_every=0))


def rotation_trick(base: RunConfig) -> RunConfig:
    """`vq` with the gradient rotated from code to z."""
    return _bottleneck(base, replace(base.lam.bottleneck, kind="rotation", reset_every=0))


def simvq(base: RunConfig) -> RunConfig:
    """Codes as a linear map of a fixed basis, with the recipe's commitment."""
    return _bottleneck(base, replace(_plain(base), kind="simvq", commitment_weight=base.lam.bottleneck.commitment_weight))


def fsq(base: RunConfig) -> RunConfig:
    """Rounded scalars, as many joint values as the recipe has codes."""
    return _bottleneck(base, replace(_plain(base), kind="fsq"))


def entropy_bonus(base: RunConfig) -> RunConfig:
    """Confident and evenly used codes are rewarded."""
    return _bottleneck(base, replace(base.lam.bottleneck, entropy_weight=0.1))


def ranking(base: RunConfig) -> RunConfig:
    """Another clip's actions should predict worse (PreLAR)."""
    return replace(base, objective=replace(base.objective, ranking_weight=0.1))


def motion(base: RunConfig) -> RunConfig:
    """What moves weighs more (DWS)."""
    return replace(base, objective=replace(base.objective, motion_weight=1.0))


ARMS: dict[str, Callable[[RunConfig], RunConfig]] = {
    arm.__name__.replace("_", "-"): arm
    for arm in (
        cola,
        no_warmup,
        scratch,
        two_stage,
        warmup_only,
        freeze_lam_after_warmup,
        stop_grad,
        adaptive,
        continuous,
        vq_faithful,
        vq,
        vq_reset,
        vq_cosine,
        rotation_trick,
        simvq,
        fsq,
        entropy_bonus,
        ranking,
        motion,
    )
}
