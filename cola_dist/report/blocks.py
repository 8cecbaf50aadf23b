"""What a section of the page is made of. Text in them may hold anything: the template escapes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cola_dist.report.drawing import Plate


@dataclass(frozen=True)
class Cell:
    """A cell of a table, ``strong`` where tests support that it stands out."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Text:
    """A paragraph; ``small`` for how something is to be read."""

    text: str
    small: bool = False
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Points:
    """A list of lines."""

    lines: Sequence[str]
    kind: ClassVar[str] = "points"


@dataclass(frozen=True)
class Code:
    """A command or another text in which every character counts."""

    text: str
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Table:
    """A table that scrolls sideways on a narrow page. The first column names the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    caption: str = ""
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Figures:
    """The pictures of a plate, side by side where there is room."""

    plate: Plate
    kind: ClassVar[str] = "figures"


@dataclass(frozen=True)
class Video:
    """A video in the page itself."""

    title: str
    source: str
    """Data URI of the MP4."""
    poster: str
    """Data URI of the picture that stands there before it plays."""
    alt: str


@dataclass(frozen=True)
class Videos:
    """Videos side by side where there is room."""

    title: str
    videos: Sequence[Video]
    kind: ClassVar[str] = "videos"


@dataclass(frozen=True)
class Fold:
    """Blocks below a line that opens and closes them."""

    title: str
    blocks: Sequence[Block]
    opened: bool = False
    kind: ClassVar[str] = "fold"


Block = Text | Points | Code | Table | Figures | Videos | Fold


@dataclass(frozen=True)
class Section:
    """A part of the page: one sentence that says what to conclude, then what it rests on."""

    name: str
    """Its anchor."""
    title: str
    conclusion: str
    blocks: Sequence[Block]
    sheets: Sequence[Plate] = ()
    """Plates that are of use as PNG alone."""


def plates(blocks: Sequence[Block]) -> list[Plate]:
    """The plates among blocks, also inside folds."""
    found = []
    for block in blocks:
        if isinstance(block, Figures):
            found.append(block.plate)
        elif isinstance(block, Fold):
            found += plates(block.blocks)
    return found
