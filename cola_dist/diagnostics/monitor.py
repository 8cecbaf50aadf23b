"""All indicators of one evaluation, and what they say together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from cola_dist.config import DiagnosticsConfig
from cola_dist.diagnostics.alignment import modulation_share
from cola_dist.diagnostics.codebook import code_usage, latent_spread
from cola_dist.diagnostics.sensitivity import sensitivity

Verdict = Literal["healthy", "at risk", "collapsed"]


class Monitor:
    """Names the state of the latent actions by the thresholds of ``config``, for ``codes`` codes if there are any."""

    def __init__(self, config: DiagnosticsConfig, codes: int) -> None:
        self.config = config
        self.codes = codes

    def indicators(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Every figure that the sums of ``Method.evaluate``, added up over batches and ranks, allow."""
        figures = sensitivity(sums) if "flow_count" in sums else {}
        if "modulation_action" in sums:
            figures |= modulation_share(sums["modulation_action"], sums["modulation_base"])
        if "forward_error" in sums:
            figures["forward_error"] = float(sums["forward_error"] / sums["forward_count"])
        if "match_error" in sums:
            figures["match_error"] = float(sums["match_error"] / sums["match_count"])
        if "code_counts" in sums:
            figures |= code_usage(sums)
        if "z_count" in sums:
            figures |= latent_spread(sums)
        return figures

    def verdict(self, indicators: Mapping[str, float], asks_generator: bool = True) -> Verdict:
        """The worst that any of perplexity, most used code, sensitivity gap and effective rank says.

        A healthy histogram is not enough: a generator that ignores the codes is collapsed however well they spread. Where there are no codes,
        or no sensitivity could be measured, the others decide; likewise without ``asks_generator``, where the generator has not been told of the
        actions yet. What is not a number counts as collapsed.
        """
        config = self.config
        # Each as value over limit: below 1 collapsed, below 2 at risk.
        margins = [indicators["effective_rank"] / config.min_rank]
        if "perplexity" in indicators:
            margins.append(indicators["perplexity"] / self.codes / config.min_perplexity_share)
        if asks_generator and "sensitivity_gap" in indicators:
            margins.append(indicators["sensitivity_gap"] / indicators["flow_loss"] / config.min_gap)
        usage = indicators.get("max_usage", 0.0)
        if not all(margin >= 1 for margin in margins) or usage > config.max_usage:
            return "collapsed"
        if min(margins) < 2 or usage > 0.75 * config.max_usage:
            return "at risk"
        return "healthy"
