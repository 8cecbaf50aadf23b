"""Section 2: what the arms are, how many seeds each has, and how many of them collapsed."""

from __future__ import annotations

from cola_dist.arms import ARMS
from cola_dist.report.analysis import Analysis
from cola_dist.report.blocks import Block, Section, Table, Text
from cola_dist.report.words import NOTHING, count, listing, runs_of

_READING = (
    "Verdicts are those at the end of a run, also of one that was stopped early, by the thresholds of its configuration on perplexity, most used "
    "code, effective rank and sensitivity gap. In brackets Wilson's 95 % interval of the share; with a handful of seeds it is wide."
)


def arms(analysis: Analysis) -> Section:
    """Each arm's own words about itself, its seeds and its verdicts by domain."""
    about = [[arm, _about(analysis.groups[arm].arm), _settings(analysis, arm)] for arm in analysis.arms]
    blocks: list[Block] = [Table(["arm", "what it is", "other settings"], about)]
    rows = [_row(analysis, domain, arm) for domain in analysis.domains for arm in analysis.arms]
    columns = ["arm", "domain", "seeds finished", "not finished", "healthy", "at risk", "collapsed"]
    blocks += [Table(columns, [row for row in rows if row]), Text(_READING, small=True)]
    if analysis.variants:
        blocks.append(Text(f"{_extra(analysis)} They count in the response curve and the reference ranges, not in the comparison of arms."))
    return Section("arms", "The arms", _conclusion(analysis), blocks)


def _about(arm: str) -> str:
    words = (ARMS[arm].__doc__ or "").strip().splitlines() if arm in ARMS else []
    return words[0].replace("`", "") if words else "not described in cola_dist.arms"


def _settings(analysis: Analysis, arm: str) -> str:
    return ", ".join(f"{name} = {value}" for name, value in analysis.groups[arm].settings) or NOTHING


def _row(analysis: Analysis, domain: str, arm: str) -> list[str]:
    every = analysis.all_trials(domain, arm)
    if not every:
        return []
    finished = analysis.trials(domain, arm)
    verdicts = [trial.verdict for trial in analysis.ended(domain, arm)]
    rest: dict[str, list[int]] = {}
    for trial in every:
        if trial.status != "finished":
            rest.setdefault(trial.status, []).append(trial.seed)
    others = "; ".join(f"{status}: seed {runs_of(seeds)}" for status, seeds in rest.items()) or NOTHING
    shares = [str(verdicts.count(word)) for word in ("healthy", "at risk")]
    return [
        arm,
        domain,
        f"{len(finished)} ({runs_of([trial.seed for trial in finished])})",
        others,
        *shares,
        str(analysis.collapsed(domain, arm)),
    ]


def _extra(analysis: Analysis) -> str:
    fields = sorted({name for trial in analysis.variants for name, _ in trial.settings})
    verb = "has" if len(analysis.variants) == 1 else "have"
    return f"{count(len(analysis.variants), 'further trial')} {verb} other settings of {listing(fields) or 'nothing'}."


def _conclusion(analysis: Analysis) -> str:
    verdicts = {arm: [trial.verdict for domain in analysis.domains for trial in analysis.ended(domain, arm)] for arm in analysis.arms}
    dead = {arm: found.count("collapsed") for arm, found in verdicts.items()}
    whole = sum(len(found) for found in verdicts.values())
    if not sum(dead.values()):
        return f"None of {count(whole, 'run')} was collapsed when it ended."
    named = listing([f"{number} of {len(verdicts[arm])} of {arm}" for arm, number in dead.items() if number])
    spared = [arm for arm, found in verdicts.items() if found and not dead[arm]]
    tail = f"; none of {listing(spared, 'or')}" if spared else ""
    return f"{sum(dead.values())} of {count(whole, 'run')} were collapsed when they ended: {named}{tail}."
