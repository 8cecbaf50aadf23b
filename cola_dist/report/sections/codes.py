"""Section 5: how evenly codes are used at the start, after warm-up and at the end."""

from __future__ import annotations

from functools import partial

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from cola_dist.report.analysis import Analysis
from cola_dist.report.blocks import Block, Figures, Section, Text
from cola_dist.report.drawing import Key, Panel, Plate, slug
from cola_dist.report.trials import Trial
from cola_dist.report.words import listing, number

MOMENTS = ("start", "warm-up", "end")
_KEYS = {
    "start": Key("start", "#7d7f88", (0, (2, 1.5))),
    "warm-up": Key("after warm-up", "#e69f00", (0, (6, 2))),
    "end": Key("end", "#0072b2"),
}
_READING = (
    "Share of transitions per code, codes sorted by use, mean over seeds and slots; the thin line is even use. After warm-up: of a two-stage run, "
    "after its first stage; of a run without either there is no such line."
)


def codes(analysis: Analysis) -> Section:
    """Sorted histograms, a panel for each arm."""
    blocks: list[Block] = [Figures(plate) for domain in analysis.domains if (plate := _plate(analysis, domain))]
    without = [arm for arm in analysis.arms if not any(sorted_use(analysis.trials(d, arm), "end") is not None for d in analysis.domains)]
    if without:
        blocks.append(Text(f"Without codes, or without counts of them: {listing(without)}."))
    if len(blocks) <= bool(without):
        return Section("codes", "How codes are used", "No finished run has counts of codes.", blocks)
    return Section("codes", "How codes are used", _conclusion(analysis), [*blocks, Text(_READING, small=True)])


def sorted_use(trials: list[Trial], moment: str) -> NDArray[np.float64] | None:
    """Share of the most used code, of the second and so on, mean over seeds and slots; none where no trial counted codes then."""
    shares = []
    for trial in trials:
        look = trial.moment(moment)
        for slot in look.code_counts if look else ():
            counts = np.sort(np.asarray(slot))[::-1]
            shares.append(counts / max(counts.sum(), 1.0))
    size = max((len(share) for share in shares), default=0)
    # Codebooks of several sizes: the smaller one has no further codes to use.
    return np.mean([np.pad(share, (0, size - len(share))) for share in shares], axis=0) if size else None


def _plate(analysis: Analysis, domain: str) -> Plate | None:
    found = {
        arm: {name: use for name in MOMENTS if (use := sorted_use(analysis.trials(domain, arm), name)) is not None}
        for arm in analysis.arms_in(domain)
    }
    top = max((float(use[0]) for uses in found.values() for use in uses.values()), default=0.0)
    panels = []
    for arm, uses in found.items():
        if "end" in uses:
            tops = ", ".join(f"{_KEYS[name].label} {number(use[0])}" for name, use in uses.items())
            panels.append(
                Panel(partial(_draw, arm=arm, uses=uses, top=top), f"Sorted use of codes by {arm} in {domain}; most used code: {tops}.")
            )
    if not panels:
        return None
    return Plate(slug("codes", domain), f"Domain {domain}: use of codes", panels, list(_KEYS.values()), height=2.1)


def _draw(axis: Axes, arm: str, uses: dict[str, NDArray[np.float64]], top: float) -> None:
    for name, use in uses.items():
        axis.step(range(1, len(use) + 1), use, where="mid", color=_KEYS[name].colour, linestyle=_KEYS[name].dashes)
    axis.axhline(1 / len(uses["end"]), color="#7d7f88", linewidth=0.7)
    axis.set_title(arm)
    axis.set_xlabel("codes by use")
    axis.set_ylabel("share")
    axis.set_ylim(0, 1.05 * top)


def _conclusion(analysis: Analysis) -> str:
    said = []
    for domain in analysis.domains:
        found = {}
        for arm in analysis.arms_in(domain):
            values = list(analysis.values(domain, arm, "perplexity").values())
            use = sorted_use(analysis.trials(domain, arm), "end")
            if values and use is not None:
                found[arm] = (float(np.mean(values)), len(use))
        if len(found) == 1:
            arm, (value, size) = next(iter(found.items()))
            said.append(f"In {domain} {arm} ends with a mean perplexity of {number(value)} of {size} codes.")
        elif found:
            best, worst = max(found, key=lambda arm: found[arm][0]), min(found, key=lambda arm: found[arm][0])
            ends = [f"{number(found[arm][0])} of {found[arm][1]}" for arm in (best, worst)]
            said.append(f"In {domain} {best} ends with the highest mean perplexity ({ends[0]}) and {worst} with the lowest ({ends[1]}).")
    return " ".join(said) or "No perplexity was measured."
