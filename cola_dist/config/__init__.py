"""The whole run as one tree of frozen dataclasses: fields, their meaning and their units. No logic lives here, but what fields alone imply.

``cola_dist.recipes`` fills the tree in, ``cola_dist.settings`` loads it from YAML and the command line and checks it.
"Paper" is CoLA-World (arXiv 2510.26433); "open" marks what the paper leaves open, where the value is our default.
"""

from cola_dist.config.data import DataConfig
from cola_dist.config.models import (
    AUTOENCODERS,
    AutoencoderConfig,
    BottleneckConfig,
    ConditioningConfig,
    FlowConfig,
    LamConfig,
    LatentShape,
    WorldConfig,
    fsq_levels,
)
from cola_dist.config.run import (
    AdaptConfig,
    DiagnosticsConfig,
    JointConfig,
    ObjectiveConfig,
    OptimConfig,
    PhaseConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
    WarmupConfig,
    group_sizes,
)

__all__ = [
    "AUTOENCODERS",
    "AdaptConfig",
    "AutoencoderConfig",
    "BottleneckConfig",
    "ConditioningConfig",
    "DataConfig",
    "DiagnosticsConfig",
    "FlowConfig",
    "JointConfig",
    "LamConfig",
    "LatentShape",
    "ObjectiveConfig",
    "OptimConfig",
    "PhaseConfig",
    "RunConfig",
    "TrackingConfig",
    "TrainConfig",
    "WarmupConfig",
    "WorldConfig",
    "fsq_levels",
    "group_sizes",
]
