"""The page: sections in their order, as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cola_dist.redact import redact
from cola_dist.report.analysis import Analysis
from cola_dist.report.blocks import Section, plates
from cola_dist.report.drawing import Plate
from cola_dist.report.film import JUDGED_BYTES, Shelf
from cola_dist.report.judged import Judgement, Kind, of_kind
from cola_dist.report.origin import Origin
from cola_dist.report.sections.adaptations import adaptations
from cola_dist.report.sections.alignment import alignment
from cola_dist.report.sections.arms import arms
from cola_dist.report.sections.budget import budget
from cola_dist.report.sections.codes import codes
from cola_dist.report.sections.evaluations import evaluations
from cola_dist.report.sections.plans import plans
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
_JUDGED: Mapping[Kind, Callable[[Sequence[Judgement], Shelf], Section]] = {
    "evaluation": evaluations,
    "adaptation": adaptations,
    "plans": plans,
}


def build(analysis: Analysis | None, made_by: Origin, judged: Sequence[Judgement] = ()) -> list[Section]:
    """All sections, in the order of the page: those of the study, where there is one, then what single runs were judged by."""
    shelf = Shelf(JUDGED_BYTES)
    study = [section(analysis) for section in _SECTIONS] if analysis else []
    found = [section(of_kind(judged, kind), shelf) for kind, section in _JUDGED.items() if of_kind(judged, kind)]
    return [*study, *found, provenance(analysis, judged, made_by)]


def render(analysis: Analysis | None, sections: Sequence[Section]) -> str:
    """The page as HTML: no scripts, no other files; what comes from files is escaped."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_told,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup((_TEMPLATES / "style.css").read_text())
    page = environment.get_template("report.html.j2").render(title=_title(analysis), style=style, sections=sections)
    return page.lstrip()


def _told(value: Any) -> Any:
    """What is shown of a value: texts without secrets, as a page is there to be passed on. Pictures and videos are as they are."""
    return redact(value) if type(value) is str and not value.startswith("data:") else value


def sheets(sections: Sequence[Section]) -> list[Plate]:
    """The figures of the page, and those that are of use as PNG alone."""
    return [plate for section in sections for plate in (*plates(section.blocks), *section.sheets)]


def _title(analysis: Analysis | None) -> str:
    if analysis is None:
        return "What single runs were judged by"
    recipes = list(dict.fromkeys(str(sweep.about.get("recipe") or "unknown recipe") for sweep in analysis.study.sweeps))
    return f"Co-training study: {listing(recipes)} on {listing(analysis.domains)}"
