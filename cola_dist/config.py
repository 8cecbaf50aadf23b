"""The whole run as one tree of frozen dataclasses: fields, their meaning and their units. No logic lives here, but for one derived value.

``cola_dist.recipes`` fills the tree in, ``cola_dist.settings`` loads it from YAML and the command line and checks it.
"Paper" is CoLA-World (arXiv 2510.26433); "open" marks what the paper leaves open, where the value is our default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Which clips are seen, in what proportion, and how they are read."""

    mixture: Mapping[str, float]
    """Shard folder (path, ``s3://…`` or ``embedded:NAME``) to its weight; weights need not sum to 1."""
    stages: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """Step to the mixture that holds from that step on until the next one; a folder that it does not name is not drawn. In a file
    ``stages: {4000: {a: 0.3, b: 0.7}}``, as an option ``--data.stages '{4000: {a: 0.3, b: 0.7}}'``: either replaces all stages given before.
    A resumed run may add and change stages from its newest checkpoint's step on. Held-out clips keep to ``mixture``."""
    temperature: float = 0.0
    """0 = shares as the weights say; T > 0 = shares in proportion to weight * (clips in one epoch of the source) ** (1 / T), in every stage:
    1 follows the sources' sizes, large T the weights alone. Only the sources that a mixture names count."""
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
    disk_cache: str = ""
    """Folder on each node's own disk in which fetched videos are kept for later epochs and runs; empty = none."""
    disk_cache_bytes: int = 64 * 1024**3
    """Largest size of that folder."""
    reader_cpus: float = 1.0
    """CPUs that Ray reserves for one read task."""
    latents: bool = False
    """Encode video latents in a stage of the stream, on actors of its own, instead of in the training step."""
    latents_cache: str = ""
    """Folder (path or ``s3://…``) in which the latents of clips are kept for later epochs and runs; empty = none. It finds a clip by its pixels,
    so it helps with ``random_crop`` off: every random crop is another clip. Nothing in it is ever deleted."""
    latent_workers: int = 1
    """Actors that encode; with ``train.gpus`` each has a GPU of its own beside the workers'."""


@dataclass(frozen=True)
class BottleneckConfig:
    """The bottleneck of latent actions (paper: vq, one codebook shared by all slots, straight-through, fp32, no EMA, no reset)."""

    kind: Literal["vq", "cosine", "simvq", "rotation", "fsq", "continuous"] = "vq"
    """vq: nearest trained code (paper). cosine: the same on the unit sphere (2110.04627). simvq: fixed random codes through a trained linear map
    (2411.02038). rotation: vq with the rotation trick's gradient (2410.06424). fsq: a grid of rounded scalars (2309.15505). continuous: a
    beta-VAE's latents, without codes (AdaWorld)."""
    codes: int = 32
    """K, entries of the codebook, shared by all slots; with fsq a product of levels, see `fsq_levels`."""
    dim: int = 32
    """D, dimensions of one token."""
    init: Literal["uniform", "normal", "data"] = "uniform"
    """vq, cosine, rotation: codebook start, U(-1/K, 1/K), N(0, 1), or entries drawn from the first batch's z (open)."""
    codebook_weight: float = 1.0
    """Kinds with a codebook: weight of ||sg[z] - e||^2."""
    commitment_weight: float = 0.25
    """Kinds with a codebook: weight of ||z - sg[e]||^2."""
    entropy_weight: float = 0.0
    """Kinds with a codebook: weight of E[H(p(c|z))] - H(E[p(c|z)]), which asks for sure tokens and for all codes (2310.05737)."""
    reset_every: int = 0
    """vq, cosine, rotation: every so many steps, move codes unused since the last time onto z of the batch; 0 = never (the faithful baseline)."""
    beta: float = 2e-4
    """continuous: weight of the divergence from N(0, 1), a mean over elements (AdaWorld's value; its code sums over the dimensions)."""


def fsq_levels(codes: int) -> tuple[int, ...]:
    """How many values each scalar of a grid of ``codes`` points takes, largest first: the fewest factors from 3 to 8, and of those the most even.

    32 -> (8, 4), 240 -> (8, 6, 5), 1000 -> (8, 5, 5, 5). Empty where there is no such product.
    """

    def factorings(rest: int, largest: int) -> Iterator[tuple[int, ...]]:
        if rest == 1:
            yield ()
        for level in range(largest, 2, -1):
            if rest % level == 0:
                yield from ((level, *others) for others in factorings(rest // level, level))

    return min(factorings(codes, 8), key=lambda levels: (len(levels), -min(levels, default=0)), default=())


@dataclass(frozen=True)
class LamConfig:
    """The inverse dynamics model: an ST-transformer over pixels, pooled to N tokens per transition."""

    resolution: int = 0
    """Side in pixels to which the inverse dynamics' frames are resized (paper: 224, of 256); 0 = as they are."""
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
    forward_depth: int = 2
    """Blocks of the LAM's own forward model, which is there only where something trains on it (paper, two-stage baseline: 12)."""
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
class LatentShape:
    """How an autoencoder's latents lie to the video."""

    channels: int
    stride: int
    """r, video frames per latent frame; ``L = 1 + (T-1) / r``."""
    shrinks: int
    """Pixels of a side per place of a latent frame."""
    most_frames: int = 0
    """Longest clip; 0 = any."""


AUTOENCODERS: Mapping[str, LatentShape] = {
    "pixels": LatentShape(3, 1, 1),
    "opensora": LatentShape(4, 4, 8, most_frames=17),
    "wan": LatentShape(16, 4, 8),
    "svd": LatentShape(4, 1, 8),
}


@dataclass(frozen=True)
class AutoencoderConfig:
    """From video to the latents that the generator models. Always frozen."""

    kind: Literal["pixels", "opensora", "wan", "svd"] = "pixels"
    """pixels: the video itself, scaled to [-1, 1]. opensora: Open-Sora v1.2's, 17 frames to 5 latent frames of an eighth of the sides. wan: Wan
    2.1's and Cosmos-Predict2's, 1 + 4n frames to 1 + n. svd: Stable Video Diffusion's, a latent frame per frame."""
    pretrained: str | None = None
    """All but pixels: folder in the published layout (path or ``s3://…``)."""
    images_at_once: int = 16
    """opensora, svd: frames that pass together; wan: clips. Fewer take less memory."""


@dataclass(frozen=True)
class WorldConfig:
    """The video generator. With ``pretrained`` set, the shape fields must agree with the checkpoint's."""

    kind: Literal["space_time_dit", "stdit3", "wan", "cosmos", "svd"] = "space_time_dit"
    """space_time_dit: written for this project, from 0.3 M parameters on. stdit3: Open-Sora v1.2's, without text and causal in time. wan: Wan
    2.1's, text to video. cosmos: Cosmos-Predict2 2B's, video to world, without text; its autoencoder is Wan's.
    svd: Stable Video Diffusion's UNet (patch 8; width and heads are those of its outermost level)."""
    pretrained: str | None = None
    """Folder with ``config.json`` and ``model.safetensors``, of this project or as published (path, ``s3://…`` or ``embedded:NAME``); none =
    random weights."""
    fps: int = 5
    """stdit3, cosmos, svd: frames per second of the clips, as the generator is told them."""
    mlp_width: int = 8960
    """wan: width of the MLP's middle."""
    text_width: int = 4096
    """wan: features of a prompt's embedding. The prompt is always empty; 0 removes cross-attention."""
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
class ObjectiveConfig:
    """What the loss holds besides the flow loss and the bottleneck's own terms. All off in the faithful baseline."""

    generator_teaches_lam: bool = True
    """Let the generator's gradient reach the latent action model. False cuts it at the actions (Genie, 2402.15391): then ``forward_weight`` alone
    teaches the LAM."""
    forward_weight: float = 0.0
    """Weight of the LAM's own forward model: mean squared error of the next frame's pixels in [-1, 1], predicted from a frame and its action."""
    ranking_weight: float = 0.0
    """Weight of max(0, margin - (L_fm with another clip's actions - L_fm with the clip's own) / L_fm) (after PreLAR, ECCV 2024); costs a second
    pass of the generator. The other clip is one of the same micro-batch."""
    ranking_margin: float = 0.1
    """By which share of the flow loss another clip's actions should be worse."""
    motion_weight: float = 0.0
    """M > 0 weighs each place of a latent frame by 1 + M * (its change from the frame before / the clip's mean change), mean 1 (after DWS)."""


@dataclass(frozen=True)
class PhaseConfig:
    """One phase: how long, and the peak learning rate of each role. A role whose rate is 0 is frozen."""

    steps: int
    lr_lam: float = 1e-3
    """Peak learning rate of inverse dynamics model, codebook and, where there is one, forward model (paper: 7.5e-5)."""
    lr_conditioning: float = 1e-3
    """Peak learning rate of the action conditioning, which starts from scratch (paper: 7.5e-5)."""
    lr_world: float = 0.0
    """Peak learning rate of the generator (paper: 7.5e-5)."""


@dataclass(frozen=True)
class WarmupConfig(PhaseConfig):
    """Warm-up, and the rule that ends it."""

    exit: Literal["steps", "adaptive"] = "steps"
    """``steps``: after ``steps``. ``adaptive``: at the first evaluation from ``min_steps`` on at which the verdict is healthy and perplexity,
    sensitivity gap and alignment have settled; after ``steps`` at the latest."""
    min_steps: int = 0
    """Adaptive: never before this step of the phase. Codes take off late and suddenly, so a quiet start is no sign of an end."""
    window: int = 3
    """Adaptive: evaluations over which a slope is taken."""
    settled: float = 0.1
    """Adaptive: an indicator has settled when its fitted line over the window rises by less than this share of its mean."""


@dataclass(frozen=True)
class JointConfig(PhaseConfig):
    """Joint training, and what guards it."""

    guard: Literal["log", "warmup", "stop"] = "log"
    """What to do when the verdict has been worse than healthy at ``guard_after`` evaluations in a row: only say so; freeze the generator for another
    ``guard_steps`` steps of warm-up, taken from this phase's; or write a checkpoint and end the run."""
    guard_after: int = 3
    guard_steps: int = 100
    guard_returns: int = 1
    """How often ``warmup`` is returned to; after that the guard only logs."""


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
    budget_seconds: float = 0.0
    """Accelerator time of all workers together after which the last phase ends, whatever its steps: seconds inside training steps (on CPU: of
    processor time). Looks at held-out clips and checkpoints do not count. 0 = no limit."""
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
    alignment_clips: int = 128
    """Held-out clips on which latent actions and the pretrained generator's features are compared; 0 = not at all."""
    gradients: bool = True
    """Measure at each evaluation how the LAM's gradients from the flow loss and from the bottleneck's terms agree (one more backward pass)."""
    grace_steps: int = 0
    """Steps of training before which the verdict is at worst `at risk`: conditioning starts at zero and codes take off late."""
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
    autoencoder: AutoencoderConfig
    world: WorldConfig
    flow: FlowConfig
    objective: ObjectiveConfig
    lam_phase: PhaseConfig
    """Before all else: the LAM alone learns from its own forward model (the first stage of a two-stage run); 0 steps in co-training."""
    warmup: WarmupConfig
    """Generator frozen, its gradients teach the LAM."""
    joint: JointConfig
    """Both train."""
    optim: OptimConfig
    train: TrainConfig
    diagnostics: DiagnosticsConfig
    tracking: TrackingConfig
