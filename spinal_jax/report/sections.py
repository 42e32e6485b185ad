"""The model of all pages: elements in sections, below a first screen."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from spinal_jax.jsontypes import ReadJson

Words = str | Markup  # plain text is escaped; Markup is trusted


@dataclass(frozen=True)
class Cell:
    """A table cell: text, half-width of its interval, and sort key ("" sorts last)."""

    text: str
    key: str = ""
    half: str = ""


@dataclass(frozen=True)
class Table:
    """A table with a head of (title, unit) and a key for each row in the first column.

    Attributes:
      label: name for screen readers.
      marked: keys of shaded rows.
      links: an address for each row, "" for none; empty for no links.
      in_order: whether the rows are sorted by key.
      filtered: whether the page has a field to filter the rows.
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
    """A row of tiles."""

    kind: ClassVar[str] = "tiles"
    items: Sequence[Tile]


@dataclass(frozen=True)
class Picture:
    """A drawn figure with its caption. `hover` is the initial text of the readout line."""

    kind: ClassVar[str] = "picture"
    name: str
    svg: Markup
    caption: Words
    hover: str = ""
    tall: bool = False


@dataclass(frozen=True)
class Pictures:
    """Figures in columns."""

    kind: ClassVar[str] = "pictures"
    items: Sequence[Picture]


@dataclass(frozen=True)
class Chart:
    """An interactive chart of `charts.py`, with a static picture for print and for pages without scripts."""

    kind: ClassVar[str] = "chart"
    name: str
    data: ReadJson
    still: Markup
    caption: Words

    @property
    def json(self) -> Markup:
        """The data as JSON, escaped for HTML."""
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
    """Terms and values in two columns."""

    kind: ClassVar[str] = "facts"
    items: Sequence[tuple[Words, Words]]


@dataclass(frozen=True)
class Definitions:
    """Terms and definitions."""

    kind: ClassVar[str] = "definitions"
    items: Sequence[tuple[Words, Words]]


Element = Table | Tiles | Pictures | Chart | Text | Points | Facts | Definitions


@dataclass(frozen=True)
class Section:
    """Elements under a title, folded unless `unfolded`."""

    title: str
    blocks: Sequence[Element]
    unfolded: bool = False

    @property
    def anchor(self) -> str:
        """The id of the section for the table of contents."""
        return "section-" + re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """A page: a first screen with the answer, then sections.

    Attributes:
      title: of the browser tab.
      kicker: kind and subject of the page.
      heading: the answer in a few words.
      answer: elements of the first screen, next to `glance`, its picture.
      footer: location of the numbers, and the command that redraws the page.
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
    """The page as a self-contained HTML file, with scripts and styles allowed by hash."""
    style = _asset("uplot.min.css") + _asset("report.css")
    scripts = [_asset(name) for name in page.scripts]
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, scripts))}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return _template().render(page=page, style=Markup(style), scripts=[Markup(s) for s in scripts], policy=policy)


def number_key(value: float) -> str:
    """The sort key of a number."""
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
    """The text of a style or script."""
    return resources.files("spinal_jax.report").joinpath("assets", name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
