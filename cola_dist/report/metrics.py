"""What is compared: indicators by their names in looks, how people call them, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One indicator of a look."""

    name: str
    label: str
    short: str
    """In sentences."""
    better: Literal["higher", "lower"]
    control: str = ""
    """The indicator that shows what this one reads where there is nothing to be found."""


FLOW_LOSS = Metric("flow_loss", "flow loss, own actions", "flow loss", "lower")
PERPLEXITY = Metric("perplexity", "perplexity of codes", "perplexity", "higher")
GAP = Metric("sensitivity_gap", "sensitivity gap", "sensitivity gap", "higher")
RANK = Metric("effective_rank", "effective rank of z", "effective rank", "higher")
COSINE = Metric("alignment/cosine", "alignment, ridge cosine", "ridge cosine", "higher", "alignment/cosine/permuted")
CKA = Metric("alignment/cka", "alignment, CKA", "CKA", "higher", "alignment/cka/permuted")
PROBE = Metric("probe_r2", "probe R2, signed action", "probe R2", "higher", "probe_r2_permuted")
DELTA_PSNR = Metric("delta_psnr", "delta-PSNR (dB)", "delta-PSNR", "higher")

HEADLINE = (FLOW_LOSS, GAP, PROBE, DELTA_PSNR)
"""What the question is answered by."""
CURVES = (FLOW_LOSS, PERPLEXITY, GAP, RANK, COSINE)
"""What is drawn against accelerator time and through the phases."""
ALIGNMENT = (
    CKA,
    COSINE,
    Metric("alignment/r2", "alignment, ridge R2", "ridge R2", "higher", "alignment/r2/permuted"),
    Metric("alignment/infonce", "alignment, InfoNCE bound (nats)", "InfoNCE bound (nats)", "higher", "alignment/infonce/permuted"),
)
TABLE = (
    *HEADLINE,
    Metric("rollout_psnr", "PSNR of rollouts (dB)", "PSNR of rollouts", "higher"),
    PERPLEXITY,
    RANK,
    CKA,
    COSINE,
    Metric("probe_r2_size", "probe R2, size of action", "probe R2 of sizes", "higher", "probe_r2_size_permuted"),
    Metric("action_information_share", "information on actions, share", "information on actions", "higher"),
)
"""What arms are tested under."""
RANGES = {
    "perplexity": "perplexity",
    "perplexity/joint": "perplexity of slots together",
    "utilisation": "utilisation",
    "max_usage": "share of the most used code",
    "effective_rank": "effective rank",
    "z_std": "std of z",
    "sensitivity_gap": "sensitivity gap",
    "flow_loss": "flow loss",
    "modulation_share": "action's share of modulation",
    "gradient_cosine": "cosine of gradients",
    "alignment/cka": "CKA",
    "alignment/cosine": "ridge cosine",
    "probe_r2": "probe R2",
    "delta_psnr": "delta-PSNR (dB)",
}
"""Indicators that reference ranges are given for."""
