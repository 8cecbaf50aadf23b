"""How a run is trained and watched, and the whole of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cola_dist.config.data import DataConfig
from cola_dist.config.models import AutoencoderConfig, ConditioningConfig, FlowConfig, LamConfig, WorldConfig


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
class AdaptConfig(PhaseConfig):
    """Adaptation to a robot's real actions, a run of its own after co-training: an adapter from actions to latent actions, and the generator with it
    (paper: a 2-layer MLP, 3,000 steps)."""

    lr_lam: float = 0.0
    """Peak learning rate of the LAM; 0 = it stays as it is. Above 0 it goes on learning by the co-training loss, which costs a second pass of the
    generator."""
    lr_adapter: float = 1e-3
    """Peak learning rate of the adapter (open)."""
    start: str = ""
    """Folder of a finished run of jobs/cotrain.py, or of its export. Weights and settings of LAM, conditioning and generator come from there."""
    kind: Literal["mlp", "linear"] = "mlp"
    """mlp: two layers (paper). linear: one."""
    width: int = 256
    """mlp: units of the hidden layer (open)."""
    quantise: bool = False
    """Give the generator the LAM's code next to each token of the adapter, instead of the token itself (open). Without codes it changes nothing."""
    match_weight: float = 0.1
    """Weight of the mean squared distance between the adapter's tokens and the latent actions that the LAM infers from the same clip, in units of the
    deviation of its codes (open)."""
    use_state: bool = False
    """Give the adapter the robot's state beside the action that it precedes."""
    share_of_episodes: float = 1.0
    """Share of each source's training episodes that may be used; chosen by ``train.seed``, a smaller share being part of every larger one."""
    action_dim: int = 0
    """A, numbers of an action; 0 = as many as the sources' actions have, filled in when the run begins."""
    state_dim: int = 0
    """S, numbers of a state, likewise; 0 without ``use_state``."""


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
    min_workers: int = 0
    """Go on with fewer workers, down to so many, while nodes are missing; 0 = always ``workers``."""
    resize_every_s: float = 60.0
    """Seconds between two looks at whether another number of workers could train."""
    gpus: bool = False
    """One GPU per worker; otherwise the workers run on CPU."""
    cpus_per_worker: float = 1.0
    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast type; weights, optimizer and quantiser stay fp32. auto = bf16 where the hardware computes in it."""
    activation_checkpointing: bool = False
    """Keep less of what the generator's blocks make for backward, which computes the rest again."""
    checkpointing_keeps: Literal["inputs", "products"] = "inputs"
    """With activation checkpointing, what is kept of a block. inputs: what it is given; its forward runs twice. products: also what attention and
    products with weights give, so that only what is cheap is computed again; ``--dry-run`` says what each takes."""
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
    collective_timeout_s: float = 1800.0
    """Seconds that workers wait for one of them before the group counts as hung and is started anew. Longer than anything takes that one worker does
    alone: a rollout, an export, a checkpoint's commit. One that gives no sign of life counts as hung after 600 s, or sooner if this is less."""
    budget_seconds: float = 0.0
    """Accelerator time of all workers together after which the last phase ends, whatever its steps: seconds inside training steps (on CPU: of
    processor time). Looks at held-out clips and checkpoints do not count. 0 = no limit."""
    max_nonfinite: int = 3
    """Steps in a row with a non-finite loss or gradient norm after which the run ends. None of them changes weights, moments or codebook."""

    @property
    def least_workers(self) -> int:
        """Workers without which the run does not get on."""
        return self.min_workers or self.workers


def group_sizes(train: TrainConfig, optim: OptimConfig) -> list[int]:
    """Numbers of workers that may train, ascending: those up to ``train.workers`` that share a global batch equally, in whole micro-batches."""
    micro = optim.micro_batch or 1
    return [size for size in range(max(1, train.least_workers), train.workers + 1) if optim.global_batch % (size * micro) == 0]


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
    method: Literal["cotrain", "pretrain", "adapt"]
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
    adapt: AdaptConfig
    """Of method adapt the only phase; 0 steps elsewhere."""
    optim: OptimConfig
    train: TrainConfig
    diagnostics: DiagnosticsConfig
    tracking: TrackingConfig
