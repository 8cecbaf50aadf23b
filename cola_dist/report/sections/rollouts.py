"""Section 7: rollouts to look at."""

from __future__ import annotations

from functools import partial

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from cola_dist.report.analysis import Analysis
from cola_dist.report.blocks import Block, Section, Text, Video, Videos
from cola_dist.report.drawing import Panel, Plate, slug
from cola_dist.report.film import BUDGET_BYTES, Film, Shelf
from cola_dist.report.metrics import DELTA_PSNR
from cola_dist.report.trials import Trial
from cola_dist.report.words import listing, number

_READING = (
    "A row is a held-out clip; columns: the truth, a rollout from its first frame with the actions inferred from the clip itself, and one from "
    "the same frame and noise with another clip's actions, at the end of the run. All arms show the seed that is the first arm's median by final "
    "flow loss, so that the clips are the same; an arm without that seed shows its own median."
)


def rollouts(analysis: Analysis) -> Section:
    """A video for each arm and domain, as long as the page stays small enough."""
    blocks: list[Block] = []
    missing: list[str] = []
    sheets: list[Plate] = []
    shelf = Shelf(BUDGET_BYTES)
    for domain in analysis.domains:
        films: dict[str, tuple[Trial, Film]] = {}
        for arm in analysis.arms_in(domain):
            trial = _shown(analysis, domain, arm)
            film = shelf.take(trial.videos) if trial else "no run with a finite flow loss"
            if isinstance(film, str):
                missing.append(f"{arm} in {domain} ({film})")
            elif trial:
                films[arm] = (trial, film)
        if films:
            videos = [_video(arm, domain, trial, film) for arm, (trial, film) in films.items()]
            blocks.append(Videos(f"Domain {domain}", videos))
            sheets.append(_stills(domain, {arm: film for arm, (_, film) in films.items()}))
    if missing:
        blocks.append(Text(f"Left out: {listing(missing)}."))
    return Section("rollouts", "Rollouts", _conclusion(analysis), [Text(_READING, small=True), *blocks], sheets)


def _shown(analysis: Analysis, domain: str, arm: str) -> Trial | None:
    first = analysis.median(domain, analysis.arms_in(domain)[0])
    same = (trial for trial in analysis.trials(domain, arm) if first is not None and trial.seed == first.seed and trial.videos)
    return next(same, analysis.median(domain, arm))


def _video(arm: str, domain: str, trial: Trial, film: Film) -> Video:
    delta = trial.value(DELTA_PSNR.name)
    title = f"{arm}, seed {trial.seed}: delta-PSNR {number(delta)} dB"
    return Video(title, film.source, film.poster, f"Rollouts of {arm} in {domain}: truth, own actions, another clip's actions.")


def _stills(domain: str, films: dict[str, Film]) -> Plate:
    panels = [
        Panel(partial(_draw, arm=arm, picture=film.still), f"Last frame of the rollouts of {arm} in {domain}.")
        for arm, film in films.items()
    ]
    return Plate(slug("rollouts", domain), f"Domain {domain}, last frames: truth, own actions, another clip's actions", panels)


def _draw(axis: Axes, arm: str, picture: NDArray[np.uint8]) -> None:
    axis.imshow(picture)
    axis.set_axis_off()
    axis.set_title(arm)


def _conclusion(analysis: Analysis) -> str:
    said = []
    for domain in analysis.domains:
        means = {
            arm: sum(values) / len(values)
            for arm in analysis.arms_in(domain)
            if (values := list(analysis.values(domain, arm, DELTA_PSNR.name).values()))
        }
        if means:
            best, worst = max(means, key=lambda arm: means[arm]), min(means, key=lambda arm: means[arm])
            others = f", and in {worst} by {number(means[worst])} dB, the least" if worst != best else ""
            winner = analysis.comparison(domain, DELTA_PSNR).winner
            proof = "" if worst == best or winner == best else "; tests do not put one arm before all others"
            said.append(f"In {domain} own actions beat another clip's by {number(means[best])} dB of PSNR in {best}{others}{proof}.")
    return " ".join(said) or "No rollout was measured."
