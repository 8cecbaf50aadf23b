"""Which clips are seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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
