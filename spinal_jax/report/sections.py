"""What a page is made of: blocks in sections, the first screen above them. The four pages share this model."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

Words = str | Markup  # plain text is escaped; Markup is the package's own


@dataclass(frozen=True)
class Cell:
    """A table's cell: what it shows, half of its interval, and what it sorts by ("" sorts last)."""

    text: str
    key: str = ""
    half: str = ""


@dataclass(frozen=True)
class Table:
    """A table with a head of (title, unit), whose rows have a key each in the first column.

    Attributes:
      label: the name that a screen reader says.
      marked: keys of the rows that are shaded.
      links: one address a row, "" for none; empty: no links.
      in_order: whether the rows stand in the order of their keys.
      filtered: whether the page offers a field that filters the rows.
    """

    kind: ClassVar[str] = "table"
    label: str
    corner: str
    head: Sequence[tuple[str, str]]
    keys: Sequence[str | int]
    rows: Sequence[Sequence[Cell]]
    marked: Sequence[str | int] = ()
    links: Sequence[str] = ()
    in_order: bool = True
    filtered: bool = False


@dataclass(frozen=True)
class Tile:
    """One number of the first screen."""

    label: str
    value: str
    half: str = ""
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Tiles:
    """Numbers side by side."""

    kind: ClassVar[str] = "tiles"
    items: Sequence[Tile]


@dataclass(frozen=True)
class Picture:
    """A drawn figure with its caption. `hover` is the hint in the line that reads out what is pointed at."""

    kind: ClassVar[str] = "picture"
    name: str
    svg: Markup
    caption: Words
    hover: str = ""
    tall: bool = False


@dataclass(frozen=True)
class Pictures:
    """Figures in as many columns as fit."""

    kind: ClassVar[str] = "pictures"
    items: Sequence[Picture]


@dataclass(frozen=True)
class Chart:
    """An interactive chart of `charts.py`, over the picture that stands for it on paper and without scripts."""

    kind: ClassVar[str] = "chart"
    name: str
    data: Mapping[str, Any]
    still: Markup
    caption: Words

    @property
    def json(self) -> Markup:
        """The data as JSON that no HTML parser reads as a tag."""
        text = json.dumps(self.data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
        return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


@dataclass(frozen=True)
class Text:
    """A paragraph; `style` is "lead", "note" or "" for plain."""

    kind: ClassVar[str] = "text"
    words: Words
    style: str = ""


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    kind: ClassVar[str] = "points"
    items: Sequence[Words]
    style: str = ""


@dataclass(frozen=True)
class Facts:
    """Terms with what they are here, in two columns."""

    kind: ClassVar[str] = "facts"
    items: Sequence[tuple[Words, Words]]


@dataclass(frozen=True)
class Definitions:
    """Terms with what they mean."""

    kind: ClassVar[str] = "definitions"
    items: Sequence[tuple[Words, Words]]


Element = Table | Tiles | Pictures | Chart | Text | Points | Facts | Definitions


@dataclass(frozen=True)
class Section:
    """Blocks under a title. A section is folded unless `unfolded`."""

    title: str
    blocks: Sequence[Element]
    unfolded: bool = False

    @property
    def anchor(self) -> str:
        """The id by which the table of contents refers to the section."""
        return "section-" + re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """A page: the first screen, which answers, then sections.

    Attributes:
      title: of the browser's tab. kicker: what kind of page this is, of what. heading: the answer in a few words.
      answer: blocks of the first screen, beside `glance`, its picture.
      footer: where the same numbers are, and the command that draws the page again.
    """

    title: str
    kicker: str
    heading: str
    answer: Sequence[Element]
    glance: Sequence[Element]
    sections: Sequence[Section]
    footer: Words
    scripts: Sequence[str] = field(default=("uplot.min.js", "charts.js", "report.js"))


def render(page: Page) -> str:
    """The page as one HTML file that loads nothing: its scripts and its style are allowed by their hashes."""
    style = _asset("uplot.min.css") + _asset("report.css")
    scripts = [_asset(name) for name in page.scripts]
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, scripts))}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return _template().render(page=page, style=Markup(style), scripts=[Markup(s) for s in scripts], policy=policy)


def number_key(value: float) -> str:
    """What a cell with this number sorts by."""
    return repr(float(value)) if math.isfinite(value) else ""


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("spinal_jax.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


@cache
def _asset(name: str) -> str:
    """The text of a style or script, as it stands between its tags."""
    return resources.files("spinal_jax.report").joinpath("assets", name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
