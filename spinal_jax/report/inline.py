"""Converts a figure to an inline SVG element: colours of the page, unique ids, no inline styles (for the content
security policy), and hover targets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from spinal_jax.report import figures
from spinal_jax.report.training_figures import dark_changes

Target = tuple[str, Sequence[float]]  # words, (x, y, width, height) in SVG units
# Colours of figures by role, so that the page can replace them in dark mode.
THEMED = {
    figures.SURFACE: "surface",
    figures.INK: "ink",
    figures.MUTED: "muted",
    figures.GRID: "line",
    figures.SHADE: "shade",
    figures.BLUE: "blue",
    figures.VERMILLION: "vermillion",
    figures.GREEN: "green",
    figures.PURPLE: "purple",
}


def inline(figure: figures.Figure, name: str, targets: Iterable[Target] = ()) -> Markup:
    """The figure as an SVG element. `name` is the prefix of its ids; the page shows the text of hover targets."""
    text = figures.svg_text(figure, name)
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::xlink)?|version)="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", text)
    text = re.sub(r' style="([^"]*)"', lambda found: _attributes(found[1]), text)
    for colour, role in THEMED.items():
        text = text.replace(f'"{colour}"', f'"var(--{role})"')
    for colour, dark in dark_changes().items():
        text = text.replace(f'"{colour}"', f'"color-mix(in srgb, {dark} var(--dark), {colour})"')
    # The remaining colours encode depth and are lightened in dark mode.
    text = re.sub(r'(fill|stroke)="(#[0-9a-f]{6})"', r'\1="color-mix(in srgb, #fff var(--lift), \2)"', text)
    text = text.replace("<svg", '<svg role="img" aria-labelledby="caption-' + name + '"', 1)
    strip = Markup('<rect class="hit" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>\n')
    drawn = "".join(strip.format(*(f"{v:.2f}" for v in box), words) for words, box in targets)
    return Markup(text.replace("</svg>", f"{drawn}</svg>"))


def _attributes(style: str) -> str:
    """The declarations of a style as presentation attributes, which a content security policy allows.

    The font family is left to the page.
    """
    found: dict[str, str] = {}
    for declaration in filter(None, map(str.strip, style.split(";"))):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font":
            weight, size = re.fullmatch(r"(?:(bold|\d+) )?([\d.]+px) .*", value).groups()  # type: ignore[union-attr]
            found |= {"font-size": size} | ({"font-weight": weight} if weight else {})
        elif name != "font-family":
            found[name] = value
    return "".join(f' {name}="{value}"' for name, value in found.items())
