"""What must hold between the fields of a configuration, before any data is opened and any accelerator is touched."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from cola_dist.config import AUTOENCODERS, AdaptConfig, BottleneckConfig, RunConfig, fsq_levels, group_sizes
from cola_dist.errors import UserError
from cola_dist.redact import HIDDEN, without_credentials

_PLACING = ("init", "reset_every")
_CODEBOOK = (*_PLACING, "codebook_weight", "commitment_weight", "entropy_weight")
_UNUSED_BY_KIND = {
    **dict.fromkeys(("vq", "cosine", "rotation"), ("beta",)),
    "simvq": (*_PLACING, "beta"),
    "fsq": (*_CODEBOOK, "beta"),
    "continuous": ("codes", *_CODEBOOK),
}


def check(config: RunConfig) -> None:
    """Cross-field checks that need no data and no accelerator. Raises one ``UserError`` that lists every problem, a line each."""
    problems = list(_problems(config))
    if problems:
        raise UserError(f"{len(problems)} problem(s) in the configuration:\n" + "\n".join(f"  - {p}" for p in problems))


def _problems(c: RunConfig) -> Iterator[str]:
    yield from _secrets(dataclasses.asdict(c))
    yield from _data_problems(c)
    yield from _model_problems(c)
    yield from _training_problems(c)
    yield from _observation_problems(c)


def _secrets(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Fields that hold credentials, without showing them: a configuration is written into the run's folder, and to MLflow."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _secrets(value, f"{prefix}{without_credentials(str(key))}.")
        named = [text for text in (key, value) if isinstance(text, str)]
        if f"{prefix}{key}" == "tracking.uri" and _holds_secret(value):
            yield (
                "tracking.uri holds a user or password, which would be written into the run's folder: leave them out, also where a run is resumed, "
                "and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead (for a database what its driver reads, such as PGPASSWORD)"
            )
        elif any(map(_holds_secret, named)):
            name = f"{prefix}{without_credentials(str(key))}"
            yield f"{name} holds a password or key: leave it out; credentials come from the environment, as SECURITY.md says"


def _holds_secret(text: str) -> bool:
    """Whether it does, or did before it was written down without."""
    return HIDDEN in text or without_credentials(text) != text


def _data_problems(c: RunConfig) -> Iterator[str]:
    for name, mixture in (("data.mixture", c.data.mixture), *((f"data.stages[{step}]", stage) for step, stage in c.data.stages.items())):
        if not mixture:
            yield f"{name} is empty: name at least one shard folder and its weight"
        for uri, weight in mixture.items():
            if not 0 < weight < math.inf:
                yield f"{name} weight of {uri} is {weight}: it must be positive"
    last = c.lam_phase.steps + c.warmup.steps + c.joint.steps + c.adapt.steps
    for step in c.data.stages:
        if not 0 < step < last:
            yield f"data.stages[{step}] must begin after step 0 and before the run's last step {last}"
    if c.data.temperature and not 0.1 <= c.data.temperature < math.inf:
        yield f"data.temperature is {c.data.temperature}: it must be 0 (off) or at least 0.1"
    if c.data.frames < 2:
        yield f"data.frames is {c.data.frames}: a transition needs at least 2 frames"
    for name, value in (("rate_hz", c.data.rate_hz), ("reader_cpus", c.data.reader_cpus)):
        if not value > 0:
            yield f"data.{name} is {value}: it must be positive"
    for name, value in (
        ("resolution", c.data.resolution),
        ("mixture_block", c.data.mixture_block),
        ("steps_per_read", c.data.steps_per_read),
        ("prefetch_reads", c.data.prefetch_reads),
        ("latent_workers", c.data.latent_workers),
    ):
        if value < 1:
            yield f"data.{name} is {value}: it must be at least 1"
    if c.data.decoded_cache_bytes < 0:
        yield f"data.decoded_cache_bytes is {c.data.decoded_cache_bytes}: it must not be negative"
    if c.data.latents_cache and not c.data.latents:
        yield f"data.latents_cache is {c.data.latents_cache}: nothing is kept there without --data.latents True"
    if not 0 < c.data.crop_scale <= 1:
        yield f"data.crop_scale is {c.data.crop_scale}: it must be in (0, 1]"
    if not 0 <= c.data.max_bad_share <= 1:
        yield f"data.max_bad_share is {c.data.max_bad_share}: it must be in [0, 1]"


def _model_problems(c: RunConfig) -> Iterator[str]:
    for section, part in (("lam", c.lam), ("conditioning", c.conditioning), ("world", c.world)):
        if part.width < 1 or part.heads < 1 or part.depth < 1:
            yield f"{section}: width, heads and depth must be at least 1"
        elif part.width % part.heads:
            yield f"{section}.width {part.width} is not divisible by {section}.heads {part.heads}"
    for name, side in (("data", c.data.resolution), ("lam", c.lam.resolution)):
        if side < 0 or c.lam.patch < 1 or side % c.lam.patch:
            yield f"{name}.resolution {side} is not divisible by lam.patch {c.lam.patch}"
    yield from _latent_problems(c)
    if c.lam.tokens < 1 or c.lam.bottleneck.codes < 2 or c.lam.bottleneck.dim < 1:
        yield "lam: needs at least 1 token, 2 codes and 1 dimension"
    yield from _bottleneck_problems(c.lam.bottleneck)
    if not 0 <= c.conditioning.dropout < 1:
        yield f"conditioning.dropout is {c.conditioning.dropout}: it must be in [0, 1)"
    if not 0 <= c.flow.tau_min < 1 or c.flow.tau_shift <= 0:
        yield f"flow.tau_min {c.flow.tau_min} must be in [0, 1) and flow.tau_shift {c.flow.tau_shift} positive"
    latent_frames = 1 + (c.data.frames - 1) // AUTOENCODERS[c.autoencoder.kind].stride
    if not 0 <= c.flow.context_max < latent_frames:
        yield f"flow.context_max is {c.flow.context_max}: at least one of the {latent_frames} latent frames must be generated"
    if c.flow.sampler_steps < 1 or c.flow.guidance < 0:
        yield "flow: sampler_steps must be at least 1, guidance not negative"


def _latent_problems(c: RunConfig) -> Iterator[str]:
    """Whether clips divide into latent frames, and these into patches."""
    latents = AUTOENCODERS[c.autoencoder.kind]
    if c.autoencoder.pretrained is not None and c.autoencoder.kind == "pixels":
        yield f"autoencoder.pretrained is {c.autoencoder.pretrained}, but autoencoder.kind pixels has no weights: set the kind as well"
    if c.autoencoder.images_at_once < 1:
        yield f"autoencoder.images_at_once is {c.autoencoder.images_at_once}: it must be at least 1"
    tile, step = c.autoencoder.tile, 4 * latents.shrinks
    if tile and not latents.tiles:
        yield f"autoencoder.tile is {tile}: kind {c.autoencoder.kind} has no tiles, set it to 0 (fewer images_at_once take less memory too)"
    elif tile < 0 or tile % step:
        yield f"autoencoder.tile is {tile}: it must be 0 or a multiple of {step}: nearest is {max(step, round(tile / step) * step)}"
    lengths = range(1 + latents.stride, (latents.most_frames or c.data.frames + latents.stride) + 1, latents.stride)
    if c.data.frames >= 2 and c.data.frames not in lengths:
        nearest = min(lengths, key=lambda length: abs(length - c.data.frames))
        yield f"data.frames is {c.data.frames}: autoencoder {c.autoencoder.kind} takes 1 + a multiple of {latents.stride}: nearest is {nearest}"
    unit = latents.shrinks * c.world.patch
    if c.world.patch < 1 or c.data.resolution % unit:
        near = f": nearest is {max(unit, round(c.data.resolution / unit) * unit)}" if unit > 0 else ""
        yield f"data.resolution {c.data.resolution} is not divisible by world.patch {c.world.patch} x {latents.shrinks} pixels a place{near}"
    if c.world.fps < 1:
        yield f"world.fps is {c.world.fps}: it must be at least 1"
    if c.world.kind != "space_time_dit" and c.world.heads > 0 and (c.world.width % 4 or c.world.width % (2 * c.world.heads)):
        yield f"world.width {c.world.width} is not a multiple of 4 and of twice world.heads {c.world.heads}"
    if c.world.kind == "svd" and c.world.patch != 8:
        yield f"world.patch is {c.world.patch}: kind svd halves its places three times, set it to 8"
    if c.world.kind == "wan" and (c.world.mlp_width < 1 or c.world.text_width < 0):
        yield "world.mlp_width must be at least 1, world.text_width not negative"
    if c.world.null_prompt is not None and not (c.world.kind == "wan" and c.world.text_width > 0):
        yield f"world.null_prompt is {c.world.null_prompt}: only kind wan with world.text_width above 0 takes a prompt, leave it out"


def _bottleneck_problems(b: BottleneckConfig) -> Iterator[str]:
    if b.codebook_weight <= 0 or min(b.commitment_weight, b.entropy_weight, b.reset_every, b.beta) < 0:
        yield "lam.bottleneck: codebook_weight must be positive, commitment_weight, entropy_weight, reset_every and beta not negative"
    usual = dataclasses.asdict(BottleneckConfig())
    for name, value in dataclasses.asdict(b).items():
        if name in _UNUSED_BY_KIND[b.kind] and value not in (usual[name], 0):
            yield f"lam.bottleneck.{name} is {value}: kind {b.kind} does not use it, set it to {usual[name]}"
    if b.kind == "fsq" and b.codes > 1 and not fsq_levels(b.codes):
        yield f"lam.bottleneck.codes is {b.codes}: for kind fsq it must be a product of levels from 3 to 8, such as 32 = 8 x 4, 64 or 1000"


def _training_problems(c: RunConfig) -> Iterator[str]:
    yield from _phase_problems(c)
    if c.train.workers < 1:
        yield f"train.workers is {c.train.workers}: it must be at least 1"
    elif c.optim.global_batch < 1 or c.optim.global_batch % c.train.workers:
        yield f"optim.global_batch {c.optim.global_batch} is not divisible by train.workers {c.train.workers}"
    elif c.optim.micro_batch < 0 or (c.optim.micro_batch and c.optim.global_batch // c.train.workers % c.optim.micro_batch):
        yield f"optim.micro_batch {c.optim.micro_batch} does not divide a worker's share of {c.optim.global_batch // c.train.workers} clips"
    elif c.train.min_workers and c.train.min_workers not in group_sizes(c.train, c.optim):
        yield (
            f"train.min_workers is {c.train.min_workers}: give a number up to train.workers ({c.train.workers}) that divides optim.global_batch "
            f"({c.optim.global_batch}) into whole micro-batches, or 0 for always as many"
        )
    if c.train.checkpointing_keeps != "inputs" and not c.train.activation_checkpointing:
        yield f"train.checkpointing_keeps is {c.train.checkpointing_keeps}: nothing is checkpointed without --train.activation-checkpointing True"
    if not (0 <= c.optim.beta1 < 1 and 0 <= c.optim.beta2 < 1 and 0 <= c.optim.ema_decay < 1):
        yield "optim: beta1, beta2 and ema_decay must be in [0, 1)"
    if c.optim.weight_decay < 0 or c.optim.clip_norm <= 0 or c.optim.lr_warmup_steps < 0:
        yield "optim: weight_decay and lr_warmup_steps must not be negative, clip_norm must be positive"
    if min(c.train.cpus_per_worker, c.train.resize_every_s, c.train.collective_timeout_s) <= 0 or c.train.max_restarts < 0:
        yield "train: cpus_per_worker, resize_every_s and collective_timeout_s must be positive, max_restarts not negative"
    for name in ("checkpoint_every", "keep_checkpoints", "max_nonfinite"):
        if dataclasses.asdict(c.train)[name] < 1:
            yield f"train.{name} must be at least 1"


def _phase_problems(c: RunConfig) -> Iterator[str]:
    planned = {"lam_phase": c.lam_phase, "warmup": c.warmup, "joint": c.joint}
    if c.method == "adapt":
        yield from _adapt_problems(c.adapt)
        if any(phase.steps for phase in planned.values()):
            yield "adaptation has one phase, adapt: set lam_phase.steps, warmup.steps and joint.steps to 0"
        return
    if c.adapt.steps:
        yield f"adapt.steps is {c.adapt.steps}: method {c.method} has no such phase, set it to 0 or use jobs/adapt.py"
    if min(phase.steps for phase in planned.values()) < 0 or not any(phase.steps for phase in planned.values()):
        yield "lam_phase.steps, warmup.steps and joint.steps: none may be negative, and at least one phase must have steps"
    for name, phase in planned.items():
        if min(phase.lr_lam, phase.lr_conditioning, phase.lr_world) < 0:
            yield f"{name}: learning rates must not be negative; 0 freezes a role"
    if c.warmup.lr_world:
        yield f"warmup.lr_world is {c.warmup.lr_world}: the generator is frozen in warm-up, set it to 0"
    if c.method == "pretrain":
        if c.warmup.steps or c.lam_phase.steps or not c.joint.lr_world > 0:
            yield "pretraining has one phase on the generator: set lam_phase.steps and warmup.steps to 0 and joint.lr_world above 0"
        return
    if c.lam_phase.steps and not (c.lam_phase.lr_lam > 0 and c.objective.forward_weight > 0):
        yield "lam_phase trains the LAM with its own forward model: set lam_phase.lr_lam and objective.forward_weight above 0"
    if c.warmup.steps and not (c.warmup.lr_lam > 0 and c.warmup.lr_conditioning > 0):
        yield "warmup.lr_lam and warmup.lr_conditioning must be positive: warm-up trains both (for the LAM alone there is lam_phase)"
    if c.joint.steps and not (c.joint.lr_world > 0 and c.joint.lr_conditioning > 0):
        yield "joint.lr_world and joint.lr_conditioning must be positive (to leave the generator frozen, set joint.steps to 0)"
    if c.joint.steps and not (c.joint.lr_lam or c.warmup.steps or c.lam_phase.steps):
        yield "joint.lr_lam is 0 and no phase before trains the LAM: its actions would mean nothing"
    if not c.objective.generator_teaches_lam and not c.objective.forward_weight > 0:
        yield "objective.generator_teaches_lam is false: set objective.forward_weight above 0, or nothing teaches the LAM"
    yield from _rule_problems(c)


def _adapt_problems(a: AdaptConfig) -> Iterator[str]:
    if a.steps < 1 or not a.lr_adapter > 0:
        yield "adapt.steps must be at least 1, adapt.lr_adapter positive: the adapter starts from random weights"
    if min(a.lr_lam, a.lr_conditioning, a.lr_world) < 0:
        yield "adapt: learning rates must not be negative; 0 freezes a role"
    if not 0 < a.share_of_episodes <= 1:
        yield f"adapt.share_of_episodes is {a.share_of_episodes}: it must be above 0 and at most 1, which is all of them"
    if a.width < 1 or a.match_weight < 0 or min(a.action_dim, a.state_dim) < 0:
        yield "adapt: width must be at least 1, match_weight, action_dim and state_dim not negative"
    if a.state_dim and not a.use_state:
        yield f"adapt.state_dim is {a.state_dim}: the adapter is given no state without --adapt.use-state True"


def _rule_problems(c: RunConfig) -> Iterator[str]:
    objective = (c.objective.forward_weight, c.objective.ranking_weight, c.objective.ranking_margin, c.objective.motion_weight)
    if min(objective) < 0:
        yield "objective: weights and ranking_margin must not be negative"
    if c.lam.forward_depth < 1:
        yield f"lam.forward_depth is {c.lam.forward_depth}: it must be at least 1"
    if c.warmup.exit == "adaptive":
        if not 0 <= c.warmup.min_steps <= c.warmup.steps:
            yield f"warmup.min_steps is {c.warmup.min_steps}: it must be between 0 and warmup.steps, which is {c.warmup.steps}"
        if c.warmup.window < 2 or c.warmup.settled <= 0:
            yield "warmup.window must be at least 2, warmup.settled positive"
        if c.warmup.steps < c.warmup.window * c.diagnostics.every:
            yield (
                f"warmup.steps is {c.warmup.steps}: too few for {c.warmup.window} evaluations {c.diagnostics.every} steps apart; "
                "raise it or lower diagnostics.every"
            )
    if c.joint.guard_after < 1 or c.joint.guard_steps < 1 or c.joint.guard_returns < 0:
        yield "joint: guard_after and guard_steps must be at least 1, guard_returns not negative"
    if c.train.budget_seconds < 0:
        yield f"train.budget_seconds is {c.train.budget_seconds}: it must be positive, or 0 for no limit"


def _observation_problems(c: RunConfig) -> Iterator[str]:
    d = c.diagnostics
    if d.every < 1 or d.video_every < 1 or c.tracking.log_every < 1:
        yield "diagnostics.every, diagnostics.video_every and tracking.log_every must be at least 1"
    if d.batch < 2 or d.clips < d.batch or d.clips % d.batch:
        yield f"diagnostics.clips {d.clips} must be a multiple of diagnostics.batch {d.batch}, which must be at least 2 to shuffle actions"
    if not 0 <= d.video_clips <= d.batch or d.video_clips == 1:
        yield f"diagnostics.video_clips is {d.video_clips}: it must be 0, or between 2 (to exchange actions) and diagnostics.batch {d.batch}"
    if d.probe_clips < 0:
        yield f"diagnostics.probe_clips is {d.probe_clips}: it must not be negative"
    if d.grace_steps < 0:
        yield f"diagnostics.grace_steps is {d.grace_steps}: it must not be negative"
    if not (0 <= d.min_perplexity_share <= 1 and 0 < d.max_usage <= 1 and d.min_gap >= 0 and d.min_rank >= 0):
        yield "diagnostics: min_perplexity_share and max_usage must be shares in [0, 1], min_gap and min_rank not negative"
    if not c.tracking.uri and "://" in c.output and not c.output.startswith("file://"):
        yield f"tracking.uri is empty but output {c.output} is object storage, which holds no database: give --tracking.uri"
