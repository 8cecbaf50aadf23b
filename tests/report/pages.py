"""A page as a test reads it: tags with their attributes, and the text of each section."""

from __future__ import annotations

from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

from cola_dist.report.analysis import Analysis
from cola_dist.report.origin import origin
from cola_dist.report.page import build, render
from cola_dist.report.study import read_study

_VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Everything in order of appearance. Raises ``AssertionError`` for a tag that is closed out of turn."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.sections: dict[str, list[str]] = {}
        self.conclusions: dict[str, str] = {}
        self.strong: dict[str, list[str]] = {}
        self._open: list[tuple[str, dict[str, str]]] = []
        self.feed(html)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = {name: value or "" for name, value in attrs}
        self.tags.append((tag, known))
        if tag not in _VOID:
            self._open.append((tag, known))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1][0] == tag, (tag, self._open)
        self._open.pop()

    def handle_data(self, data: str) -> None:
        section = next((attrs.get("id", "") for tag, attrs in self._open if tag == "section"), "")
        if not section or not data.strip():
            return
        self.sections.setdefault(section, []).append(data.strip())
        if any(tag == "strong" for tag, _ in self._open):
            self.strong.setdefault(section, []).append(data.strip())
        if any(attrs.get("class") == "conclusion" for _, attrs in self._open):
            self.conclusions[section] = data.strip()

    def text(self, section: str) -> str:
        return " ".join(self.sections[section])

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]


def page_of(*sweeps: Path | str, reference: str = "cola") -> Page:
    """The page of sweep folders."""
    return Page(html_of([str(sweep) for sweep in sweeps], reference))


def html_of(sweeps: Sequence[str], reference: str = "cola") -> str:
    analysis = Analysis(read_study(sweeps), reference)
    return render(analysis, build(analysis, origin(["python", "jobs/report.py", *sweeps])))
