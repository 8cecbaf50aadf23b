"""The sweeps that have a name. Each is what a YAML file may hold; see `cola_dist.train.sweep.space`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cola_dist.arms import ARMS

_SEEDS = 5
# What a trial may be ended for early, where the best point is looked for. A study of arms ends none: it asks how each turns out.
_EARLY = {"asha": {"reduction": 3}, "collapse": {"after_looks": 3}}

SPACES: Mapping[str, Mapping[str, Any]] = {
    "warmup": {"fields": {"warmup_length": [0, 100, 200, 400, 800, "adaptive"]}, "seeds": _SEEDS},
    "arms": {"arms": list(ARMS), "seeds": _SEEDS},
    "bottlenecks": {
        "arms": ["vq-faithful", "vq", "vq-reset", "vq-cosine", "rotation-trick", "simvq", "fsq", "continuous"],
        "seeds": _SEEDS,
    },
    "weights": {
        "fields": {
            "lam.bottleneck.codebook_weight": {"log_uniform": [0.1, 10.0]},
            "lam.bottleneck.commitment_weight": {"log_uniform": [1e-4, 1.0]},
            "lam.bottleneck.entropy_weight": [0.0, 0.01, 0.03, 0.1, 0.3],
            "objective.ranking_weight": [0.0, 0.03, 0.1, 0.3],
            "objective.motion_weight": [0.0, 0.5, 1.0, 2.0],
        },
        "search": "random",
        "samples": 32,
        **_EARLY,
    },
    "lr": {"fields": {"lr_ratio": [0.5, 1, 2, 4, 8, 16], "joint.lr_lam": [1e-3, 2e-3, 4e-3]}, **_EARLY},
    "tiny-smoke": {
        "fields": {"warmup_length": [8, 16], "lr_ratio": [2]},
        "fixed": {
            "train": {"workers": 1, "checkpoint_every": 4},
            "warmup": {"steps": 8},
            "joint": {"steps": 16},
            "diagnostics": {"every": 8, "clips": 32, "video_clips": 0, "probe_clips": 0, "alignment_clips": 0},
        },
    },
}
