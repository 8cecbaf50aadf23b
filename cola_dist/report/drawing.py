"""Figures as inline SVG that follows the page's colours and width, and as small PNGs."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

Dashes = Literal["-", ""] | tuple[float, tuple[float, ...]]
_INK, _RULE = "#1b1c20", "#d9dbe1"
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7d7f88")
"""Okabe and Ito's colours (2008) without yellow, which is lost on white, and with grey for black."""
_DASHES: tuple[Dashes, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)))
_SIGNS = {"o": "M9 5a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", "D": "M13 0l5 5l-5 5l-5 -5z"}
# As wide as a phone, so that text keeps its size there; desktops put several side by side.
WIDTH, HEIGHT = 3.9, 2.7
_PNG_DPI, _COLUMNS = 110, 3
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    # Names come from files: a $ in one starts no formula.
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Panel:
    """One pair of axes: what is drawn there, and in words for who cannot see it."""

    draw: Callable[[Axes], None]
    alt: str


@dataclass(frozen=True)
class Plate:
    """Panels that belong together. On the page each is a picture of its own; as PNG they are one sheet."""

    name: str
    """Of the PNG, without suffix."""
    title: str
    panels: Sequence[Panel]
    legend: Sequence[Key] = ()
    height: float = HEIGHT

    def svgs(self) -> list[Markup]:
        """The pictures of the page. Their text and axes take the colour of the page's text."""
        return [self._svg(panel, f"{self.name}-{number}") for number, panel in enumerate(self.panels)]

    def png(self) -> bytes:
        """All panels on one sheet on white, with title and legend."""
        with mpl.rc_context(_STYLE):
            figure = self._sheet(self.panels, min(_COLUMNS, len(self.panels)))
            figure.suptitle(self.title, fontsize=10.5)
            if self.legend:
                handles = [key.handle() for key in self.legend]
                figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
            image = io.BytesIO()
            figure.savefig(image, format="png", dpi=_PNG_DPI)
        return image.getvalue()

    def _svg(self, panel: Panel, salt: str) -> Markup:
        # Ids are drawn from the salt: pictures of one page must not share them, and the same study gives the same page.
        with mpl.rc_context(_STYLE | {"svg.hashsalt": salt}):
            text = io.StringIO()
            figure = self._sheet([panel], 1)
            figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        return _inline(text.getvalue(), panel.alt)

    def _sheet(self, panels: Sequence[Panel], columns: int) -> Figure:
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(WIDTH * columns, self.height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, panel in zip(axes, panels, strict=False):
            panel.draw(axis)
        for axis in axes[len(panels) :]:
            axis.remove()
        return figure


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a line of a colour."""

    label: str
    colour: str
    dashes: Dashes = "-"
    marker: Literal["", "o", "D"] = ""

    def handle(self) -> Line2D:
        """For a legend of matplotlib."""
        return Line2D([], [], color=self.colour, linestyle=self.dashes, marker=self.marker, label=self.label)

    def swatch(self) -> Markup:
        """For the page."""
        dashes = "" if isinstance(self.dashes, str) else " ".join(f"{1.6 * part:g}" for part in self.dashes[1])
        line = f'<path d="M0 5h26" stroke="{self.colour}" stroke-width="2.5" stroke-dasharray="{dashes or "none"}"/>' if self.dashes else ""
        dot = f'<path d="{_SIGNS[self.marker]}" fill="{self.colour}"/>' if self.marker else ""
        return Markup(f'<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true">{line}{dot}</svg>')


def key_of(arms: Sequence[str], arm: str) -> Key:
    """The colour and dashes that an arm has in all figures of a page."""
    place = arms.index(arm)
    return Key(arm, _PALETTE[place % len(_PALETTE)], _DASHES[place // len(_PALETTE) % len(_DASHES)])


def slug(*words: str) -> str:
    """A file name of words that may hold anything."""
    return "-".join(re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-") or "x" for word in words)


def _inline(svg: str, alt: str) -> Markup:
    body = svg[svg.index("<svg") :]
    head, _, rest = body.partition(">")
    view = re.search(r'viewBox="[^"]*"', head)
    assert view is not None, "matplotlib writes a viewBox"
    # Matplotlib's own style rule would hold for the whole page.
    rest = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", rest, count=1, flags=re.DOTALL)
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, count=1, flags=re.DOTALL)
    used = set(re.findall(r"#(\w+)", rest))
    rest = re.sub(r' id="([^"]*)"', lambda found: found.group() if found.group(1) in used else "", rest)
    rest = re.sub(r" font-family: [^;]*;", "", rest)
    rest = rest.replace(_INK, "currentColor").replace(_RULE, "var(--rule)")
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return Markup(f'<svg {namespaces} {view.group()} role="img" aria-label="') + escape(alt) + Markup(f'">{rest}')
