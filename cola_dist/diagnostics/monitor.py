"""All indicators of one evaluation, and what they say together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from cola_dist.config import DiagnosticsConfig
from cola_dist.diagnostics.codebook import code_usage, latent_spread
from cola_dist.diagnostics.sensitivity import sensitivity

Verdict = Literal["healthy", "at risk", "collapsed"]


class Monitor:
    """Names the state of the latent actions by the thresholds of ``config``, for a codebook of ``codes`` entries."""

    def __init__(self, config: DiagnosticsConfig, codes: int) -> None:
        self.config = config
        self.codes = codes

    def indicators(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Every figure that the sums of ``Method.evaluate``, added up over batches and ranks, allow."""
        figures = sensitivity(sums) if "flow_count" in sums else {}
        if "code_counts" in sums:
            figures |= code_usage(sums) | latent_spread(sums)
        return figures

    def verdict(self, indicators: Mapping[str, float]) -> Verdict:
        """The worst that any of perplexity, most used code, sensitivity gap and effective rank says.

        A healthy histogram is not enough: a generator that ignores the codes is collapsed however well they spread. Where no sensitivity
        could be measured, the others decide.
        """
        config = self.config
        # Each as value over limit: below 1 collapsed, below 2 at risk.
        margins = [
            indicators["perplexity"] / self.codes / config.min_perplexity_share,
            indicators["effective_rank"] / config.min_rank,
        ]
        if "sensitivity_gap" in indicators:
            margins.append(indicators["sensitivity_gap"] / indicators["flow_loss"] / config.min_gap)
        usage = indicators["max_usage"]
        if min(margins) < 1 or usage > config.max_usage:
            return "collapsed"
        if min(margins) < 2 or usage > 0.75 * config.max_usage:
            return "at risk"
        return "healthy"
