"""The page: sections in their order, as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cola_dist.report.analysis import Analysis
from cola_dist.report.blocks import Section, plates
from cola_dist.report.drawing import Plate
from cola_dist.report.origin import Origin
from cola_dist.report.sections.alignment import alignment
from cola_dist.report.sections.arms import arms
from cola_dist.report.sections.budget import budget
from cola_dist.report.sections.codes import codes
from cola_dist.report.sections.provenance import provenance
from cola_dist.report.sections.question import question
from cola_dist.report.sections.ranges import ranges
from cola_dist.report.sections.response import response
from cola_dist.report.sections.rollouts import rollouts
from cola_dist.report.sections.runs import runs
from cola_dist.report.sections.tests_table import tests_table
from cola_dist.report.words import listing

_TEMPLATES = Path(__file__).parent / "templates"
_SECTIONS = (question, arms, budget, runs, codes, alignment, rollouts, tests_table, response, ranges)


def build(analysis: Analysis, made_by: Origin) -> list[Section]:
    """All sections, in the order of the page."""
    return [*(section(analysis) for section in _SECTIONS), provenance(analysis, made_by)]


def render(analysis: Analysis, sections: Sequence[Section]) -> str:
    """The page as HTML: no scripts, no other files; what comes from files is escaped."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = Markup((_TEMPLATES / "style.css").read_text())
    page = environment.get_template("report.html.j2").render(title=_title(analysis), style=style, sections=sections)
    return page.lstrip()


def sheets(sections: Sequence[Section]) -> list[Plate]:
    """The figures of the page, and those that are of use as PNG alone."""
    return [plate for section in sections for plate in (*plates(section.blocks), *section.sheets)]


def _title(analysis: Analysis) -> str:
    recipes = list(dict.fromkeys(str(sweep.about.get("recipe") or "unknown recipe") for sweep in analysis.study.sweeps))
    return f"Co-training study: {listing(recipes)} on {listing(analysis.domains)}"
