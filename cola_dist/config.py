"""The whole run as one tree of frozen dataclasses: fields, their meaning and their units. No logic lives here.

``cola_dist.recipes`` fills the tree in, ``cola_dist.settings`` loads it from YAML and the command line and checks it.
"Paper" is CoLA-World (arXiv 2510.26433); "open" marks what the paper leaves open, where the value is our default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Which clips are seen, in what proportion, and how they are read."""

    mixture: Mapping[str, float]
    """Shard folder (path, ``s3://…`` or ``embedded:NAME``) to its weight; weights need not sum to 1."""
    frames: int = 5
    """T, frames per clip; T-1 transitions (open)."""
    rate_hz: float = 5.0
    """Frames per second after resampling, so that one latent action means the same time span in every source (open)."""
    resolution: int = 32
    """Height and width of a clip in pixels, after resizing the short side and cropping."""
    random_crop: bool = True
    """Random-resized crop, one per clip, drawn from the clip's own key (paper)."""
    crop_scale: float = 0.8
    """Smallest side of the random crop as a share of the short side."""
    mixture_block: int = 64
    """Positions per mixture block; each block holds an exact count of clips per source."""
    max_bad_share: float = 0.05
    """Share of unreadable clips of one source above which the run ends (judged once 64 clips of it were asked for)."""
    steps_per_read: int = 4
    """Optimizer steps whose clips one Ray Data task reads and decodes together."""
    prefetch_reads: int = 2
    """Reads kept decoded ahead of each worker."""
    decoded_cache_bytes: int = 256 * 1024**2
    """Memory in which each reader process keeps episodes that it has decoded; 0 = none."""
    reader_cpus: float = 1.0
    """CPUs that Ray reserves for one read task."""


@dataclass(frozen=True)
class BottleneckConfig:
    """Vector quantisation of latent actions (paper: shared codebook, straight-through, fp32, no EMA, no reset)."""

    codes: int = 32
    """K, entries of the codebook, shared by all slots."""
    dim: int = 32
    """D, dimensions of one token."""
    init: Literal["uniform", "normal", "data"] = "uniform"
    """Codebook start: U(-1/K, 1/K), N(0, 1), or entries drawn from the first batch's z (open)."""
    codebook_weight: float = 1.0
    """Weight of ||sg[z] - e||^2."""
    commitment_weight: float = 0.25
    """Weight of ||z - sg[e]||^2."""
    reset_every: int = 0
    """Every so many steps, move codes unused since the last time onto z of the batch; 0 = never (the faithful baseline)."""


@dataclass(frozen=True)
class LamConfig:
    """The inverse dynamics model: an ST-transformer over pixels, pooled to N tokens per transition."""

    patch: int = 8
    width: int = 64
    depth: int = 3
    heads: int = 4
    pool: Literal["pair", "difference"] = "pair"
    """What is pooled into a transition's tokens: the patches of both frames (paper), or the difference of their features (open), in which all that
    stays the same cancels."""
    tokens: int = 2
    """N, tokens per transition."""
    input: Literal["frames", "frames+change", "change"] = "frames"
    """What the patch embedding sees: each frame (paper), its change from the frame before as well, or the change alone (open)."""
    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)


@dataclass(frozen=True)
class ConditioningConfig:
    """From latent actions to shift / scale / gate of every block, per frame."""

    depth: int = 2
    """Self-attention blocks over the latent-action sequence (paper: 6)."""
    width: int = 64
    heads: int = 4
    dropout: float = 0.1
    """Probability that one transition's action becomes the null action, for classifier-free guidance (paper)."""


@dataclass(frozen=True)
class WorldConfig:
    """The video generator. With ``pretrained`` set, the shape fields must agree with the checkpoint's."""

    pretrained: str | None = None
    """Folder with ``config.json`` and ``model.safetensors`` (path, ``s3://…`` or ``embedded:NAME``); none = random weights."""
    patch: int = 8
    width: int = 64
    depth: int = 4
    heads: int = 4


@dataclass(frozen=True)
class FlowConfig:
    """Rectified flow: how noise levels and context are drawn, and how rollouts are sampled."""

    tau_min: float = 0.0
    """Lowest flow time of generated frames (1 = pure noise)."""
    tau_shift: float = 3.0
    """Bias of tau towards noise: tau <- s * u / (1 + (s - 1) * u), u uniform."""
    context_max: int = 0
    """Clean context frames are drawn from 1 … context_max; 0 = up to L - 1 (open)."""
    sampler_steps: int = 10
    """Euler steps per rollout (paper: 10)."""
    guidance: float = 1.0
    """Classifier-free guidance on the action; 1 = none (paper: 4.0)."""


@dataclass(frozen=True)
class PhaseConfig:
    """One phase: how long, and the peak learning rate of each role."""

    steps: int
    lr_lam: float = 1e-3
    """Peak learning rate of inverse dynamics model, codebook and action conditioning (paper: 7.5e-5)."""
    lr_world: float = 0.0
    """Peak learning rate of the generator; must be 0 where it is frozen (paper: 7.5e-5)."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, common to all phases."""

    global_batch: int = 32
    """Clips per optimizer step over all workers."""
    micro_batch: int = 0
    """Clips per forward on one worker; 0 = the worker's whole share. Smaller means gradient accumulation."""
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    lr_warmup_steps: int = 20
    """Linear rise of each role's learning rate from the step at which it first trains."""
    decay: Literal["constant", "cosine"] = "constant"
    """Course after the rise; cosine falls to a tenth at the end of the last phase."""
    ema_decay: float = 0.0
    """Exponential moving average of the generator's weights in the joint phase; 0 = off."""


@dataclass(frozen=True)
class TrainConfig:
    """How the run is spread, repeated and kept."""

    seed: int = 0
    workers: int = 2
    gpus: bool = False
    """One GPU per worker; otherwise the workers run on CPU."""
    cpus_per_worker: float = 1.0
    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast type; weights, optimizer and quantiser stay fp32. auto = bf16 where the hardware computes in it."""
    activation_checkpointing: bool = False
    compile: bool = False
    """``torch.compile`` on each transformer block."""
    deterministic: bool = True
    """Deterministic kernels: the same run twice gives the same bits on the same machine."""
    checkpoint_every: int = 100
    """Steps between checkpoints; one is always written at a phase's end and on interrupt."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    max_restarts: int = 3
    """How often a lost worker is replaced before the run ends."""
    max_nonfinite: int = 3
    """Steps in a row with a non-finite loss or gradient norm after which the run ends."""


@dataclass(frozen=True)
class DiagnosticsConfig:
    """The held-out evaluation and the thresholds of its verdict."""

    every: int = 50
    """Steps between evaluations."""
    clips: int = 128
    """Held-out clips, taken from the sources in the mixture's proportion."""
    batch: int = 32
    """Clips per evaluation batch; actions are shuffled inside a batch."""
    video_clips: int = 4
    """Clips in the rollout video of each evaluation; 0 = no video."""
    video_every: int = 200
    """Steps between rollout videos; one is always made at a phase's end."""
    probe_clips: int = 0
    """Clips of each source with known actions for the ridge probe at a phase's end; 0 = no probe."""
    min_perplexity_share: float = 0.10
    """Collapsed below this perplexity as a share of K; at risk below twice it."""
    max_usage: float = 0.90
    """Collapsed above this share of the most used code; at risk above three quarters of it."""
    min_gap: float = 0.005
    """Collapsed below this sensitivity gap relative to the flow loss; at risk below twice it."""
    min_rank: float = 1.5
    """Collapsed below this effective rank of z; at risk below twice it."""


@dataclass(frozen=True)
class TrackingConfig:
    """Where MLflow is."""

    uri: str = ""
    """Tracking URI; empty = ``sqlite`` database and artifact folder inside ``output``."""
    experiment: str = "cola-dist"
    log_every: int = 10
    """Steps between logged training metrics."""


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    recipe: str
    """Name of the recipe that this configuration was copied from."""
    output: str
    """Folder for runs, local or ``s3://…``; each run gets a folder of its own inside."""
    method: Literal["cotrain", "pretrain"]
    data: DataConfig
    lam: LamConfig
    conditioning: ConditioningConfig
    world: WorldConfig
    flow: FlowConfig
    warmup: PhaseConfig
    """Generator frozen, its gradients teach the LAM."""
    joint: PhaseConfig
    """Both train."""
    optim: OptimConfig
    train: TrainConfig
    diagnostics: DiagnosticsConfig
    tracking: TrackingConfig
