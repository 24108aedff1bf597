"""Reports: HTML pages in one file, with their pictures inside and tables that sort."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from detr_jax.files import replacing
from detr_jax.viz.tables import Table


@dataclass(frozen=True)
class Picture:
    """An image with a caption, as bytes of a PNG or JPEG."""

    content: bytes
    caption: str
    description: str
    """For those who cannot see it."""

    @classmethod
    def of(cls, image: Image.Image, caption: str, description: str, longest: int) -> "Picture":
        """A photograph or a map over one as a JPEG, with `longest` pixels on its longer side at most."""
        image = image.convert("RGB")
        image.thumbnail((longest, longest))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=75, subsampling=0)  # thin coloured lines stay sharp
        return cls(file.getvalue(), caption, description)

    @classmethod
    def read(cls, path: Path, caption: str) -> "Picture":
        """A figure in a file, which its caption describes."""
        return cls(path.read_bytes(), caption, caption)

    @property
    def address(self) -> str:
        """The image as a data URI."""
        kind = "png" if self.content.startswith(b"\x89PNG") else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(self.content).decode()}"


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side, in as many columns of at least `width` pixels as fit."""

    pictures: Sequence[Picture]
    width: int


@dataclass(frozen=True)
class Scale:
    """Colours from low to high values, as CSS has them, with labels."""

    title: str
    colours: Sequence[str]
    low: str
    high: str


@dataclass(frozen=True)
class Folded:
    """Facts behind a title that opens them."""

    title: str
    facts: Mapping[str, object]


Part = str | Mapping[str, object] | Table | Picture | Gallery | Scale | Folded
"""A paragraph, facts by name, a table that sorts, a figure in its full width, ..."""


@dataclass(frozen=True)
class Section:
    """Parts of a page under a title."""

    title: str
    parts: Sequence[Part]


def page(title: str, sections: Sequence[Section]) -> str:
    """A page that needs no other file and no network; all texts are escaped."""
    links = "".join(f'<a href="#s{i}">{_escaped(section.title)}</a>' for i, section in enumerate(sections))
    body = "".join(
        f'<section id="s{i}"><h2>{_escaped(section.title)}</h2>\n{"".join(map(_part, section.parts))}</section>\n'
        for i, section in enumerate(sections)
    )
    return _PAGE.format(title=_escaped(title), style=_STYLE, links=links, body=body, script=_SCRIPT)


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Writes a page, whole or not at all; an OutputError if it cannot be written."""
    with replacing(path) as temporary:
        # Names of files may have bytes that are no text.
        temporary.write_text(page(title, sections), encoding="utf-8", errors="replace")


def _escaped(text: object) -> str:
    return html.escape(str(text))


def _part(part: Part) -> str:
    match part:
        case str():
            return f"<p>{_escaped(part)}</p>\n"
        case Table():
            return _table(part)
        case Picture():
            return _figure(part, '<div class="scroll" tabindex="0">{}</div>') + "\n"
        case Gallery():
            figures = "".join(map(_figure, part.pictures))
            return f'<div class="gallery" style="--width: {part.width}px">{figures}</div>\n'
        case Scale():
            ends = f"<span>{_escaped(part.low)}</span><i></i><span>{_escaped(part.high)}</span>"
            gradient = _escaped(", ".join(part.colours))
            return f'<p class="scale" style="--colours: {gradient}"><b>{_escaped(part.title)}</b>{ends}</p>\n'
        case Folded():
            return f"<details><summary>{_escaped(part.title)}</summary>{_facts(part.facts)}</details>\n"
        case _:
            return _facts(part)


def _facts(facts: Mapping[str, object]) -> str:
    lines = "".join(f"<dt>{_escaped(name)}</dt><dd>{_escaped(value)}</dd>" for name, value in facts.items())
    return f"<dl>{lines}</dl>\n"


def _figure(picture: Picture, frame: str = "{}") -> str:
    image = f'<img src="{picture.address}" alt="{_escaped(picture.description)}">'
    return f"<figure>{frame.format(image)}<figcaption>{_escaped(picture.caption)}</figcaption></figure>"


def _table(table: Table) -> str:
    classes = [' class="number"' if is_numeric else "" for is_numeric in table.numeric]

    def lines(rows: Sequence[Sequence[str]]) -> str:
        cells = ([f"<td{c}>{_escaped(cell)}</td>" for c, cell in zip(classes, row, strict=True)] for row in rows)
        return "\n".join(f"<tr>{''.join(row)}</tr>" for row in cells)

    header = "".join(
        f'<th scope="col" aria-sort="none"{c}><button type="button">{_escaped(title)}</button></th>'
        for c, title in zip(classes, table.header, strict=True)
    )
    last = len(table.rows)
    foot = f"<tfoot>{lines(table.text[last:])}</tfoot>" if table.total else ""
    body = f"<thead><tr>{header}</tr></thead>\n<tbody>{lines(table.text[:last])}</tbody>{foot}"
    return f'<div class="scroll" tabindex="0"><table>{body}</table></div>\n'


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><nav>{links}</nav></header>
<main>
{body}</main>
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --text: #1c2430; --faint: #5b6675; --ground: #fff; --panel: #f4f6f9; --line: #d9dfe7;
  --accent: #1f5fa8; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ee; --faint: #9aa5b4; --ground: #14181e; --panel: #1d232c;
  --line: #333c48; --accent: #7db4f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 0 1rem 3rem; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1.5rem 0 0.5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.75rem; padding-top: 0.5rem; border-top: 1px solid var(--line); }
p { max-width: 48rem; }
a, summary { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: 0.15rem 1.25rem; margin: 0.75rem 0; }
dt, figcaption, .scale { color: var(--faint); }
dd { margin: 0; }
summary { cursor: pointer; }
.scroll { overflow-x: auto; margin: 0.75rem 0; }
.scroll img { min-width: 44rem; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; border-radius: 4px; }
figcaption { font-size: 0.85rem; margin-top: 0.25rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(var(--width), 100%), 1fr)); gap: 1rem;
  margin: 0.75rem 0; }
.scale { display: flex; flex-wrap: wrap; max-width: none; align-items: center; gap: 0.25rem 0.5rem; margin: 1.25rem 0 0;
  font-size: 0.85rem; }
.scale b { color: var(--text); margin-right: 0.5rem; }
.scale i { width: 8rem; height: 0.6rem; border-radius: 2px; background: linear-gradient(to right, var(--colours)); }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 0.3rem 0.75rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { background: var(--panel); padding: 0; vertical-align: bottom; }
tfoot td { font-weight: 600; }
tbody tr:hover { background: var(--panel); }
th button { all: unset; box-sizing: border-box; width: 100%; padding: 0.4rem 0.75rem; font-weight: 600;
  cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
th button::after { content: " \\2195"; color: var(--faint); opacity: 0.5; }
th[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; }
.number { text-align: right; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; gap: 0; } dt { margin-top: 0.5rem; } }
"""

_SCRIPT = r"""
"use strict";
// A cell sorts by the number that it begins with; other text by its words and numbers; blank ones stay last.
const NUMBER = /^\[?([-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)\b/i;

function compareTexts(a, b) {
  const left = a.split(/(\d+(?:\.\d+)?)/), right = b.split(/(\d+(?:\.\d+)?)/);
  for (let i = 0; i < Math.min(left.length, right.length); i++) {
    const difference = i % 2 ? left[i] - right[i] : left[i].localeCompare(right[i]);
    if (difference) return difference;
  }
  return left.length - right.length;
}

function compareCells(a, b, sign) {
  const blank = text => text === "" || text === "-";
  if (blank(a) || blank(b)) return blank(a) - blank(b);
  const numbers = [a, b].map(text => NUMBER.exec(text)).map(found => found && Number(found[1].replaceAll(",", "")));
  return sign * (numbers.includes(null) ? compareTexts(a, b) : numbers[0] - numbers[1]);
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const header = button.parentElement, body = header.closest("table").tBodies[0];
    const order = header.ariaSort === "ascending" ? "descending" : "ascending";
    for (const other of header.parentElement.cells) other.ariaSort = "none";
    header.ariaSort = order;
    const text = row => row.cells[header.cellIndex].textContent.trim();
    const sign = order === "ascending" ? 1 : -1;
    body.append(...[...body.rows].sort((a, b) => compareCells(text(a), text(b), sign)));
  });
}
"""
