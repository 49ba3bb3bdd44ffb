"""A document as one HTML file that needs nothing else: styles and pictures are inside it.

It is built as a tree of elements and written by the standard library, so nothing can be forgotten
to be escaped or closed. It reads on a phone (tables and wide pictures scroll inside the page), in
the dark (the reader's setting chooses colours and pictures) and on paper. It runs no script, and
says so to the browser: what a name or a sample smuggled in would still not run.
"""

import base64
import itertools
import re
import struct
import urllib.parse
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from typing import assert_never

from mainrun.analysis.document import (
    Block,
    Code,
    Details,
    Document,
    Heading,
    Inline,
    Link,
    Listing,
    Paragraph,
    Picture,
    Strong,
    Table,
    Text,
)
from mainrun.console import printable

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #59636e; --paper: #ffffff;
  --pale: #f3f5f7; --line: #d1d9e0; --link: #0550ae; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --faint: #9198a1;
  --paper: #0d1117; --pale: #161b22; --line: #3d444d; --link: #6cb2ff; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; overflow-wrap: anywhere;
  font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .75rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { margin: .75rem 0; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .9rem; }
nav a { padding: .25rem 0; }
code, pre { font: .875em/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { background: var(--pale); padding: .1em .3em; border-radius: .25em; }
.scroll { overflow-x: auto; margin: .75rem 0; -webkit-overflow-scrolling: touch; }
pre { overflow-x: auto; max-height: 32rem; margin: .75rem 0; padding: .75rem;
  background: var(--pale); border-radius: .4rem; overflow-wrap: normal; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: break-word; max-width: 26rem; }
thead th { color: var(--faint); vertical-align: bottom; }
tbody th { font-weight: 600; min-width: 8rem; }
td.number { white-space: nowrap; }
.pictures { display: grid; gap: 1rem; margin: .75rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; }
figure.wide img { min-width: min(100%, 40rem); width: 100%; }
@media (max-width: 40rem) { figure.wide img { min-width: 40rem; } }
summary { cursor: pointer; padding: .4rem 0; color: var(--link); }
@media print { body { max-width: none; } figure, tr { break-inside: avoid; } }
"""
_DOTS_PER_CSS_PIXEL = 1.5  # sharp on a phone; a picture is drawn at 150 dots an inch
_PARTS = re.compile(r"(?<=[./=_ ])(?=.)")
_NUMBER = re.compile(r"[-+−]?[\d,.]+(e[-+]?\d+)?( ?(±|·|%|×|s|ms|min|h|MiB|GiB|B)[\d,.e+ -]*)*")


def html(document: Document) -> str:
    """The whole file."""
    page = ET.Element("html", lang="en")
    head = ET.SubElement(page, "head")
    ET.SubElement(head, "meta", charset="utf-8")
    ET.SubElement(head, "meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY})
    ET.SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    ET.SubElement(head, "meta", name="color-scheme", content="light dark")
    ET.SubElement(head, "title").text = printable(document.title)
    ET.SubElement(head, "style").text = _STYLE
    main = ET.SubElement(ET.SubElement(page, "body"), "main")
    ET.SubElement(main, "h1").text = printable(document.title)
    _contents(main, document.blocks)
    _blocks(main, document.blocks, itertools.count(1))
    return f"<!DOCTYPE html>\n{ET.tostring(page, encoding='unicode', method='html')}\n"


def _contents(main: ET.Element, blocks: Sequence[Block]) -> None:
    """Links to the sections of the page, where there are enough of them to look for one."""
    headings = [b for b in blocks if isinstance(b, Heading) and b.level == 2]
    if len(headings) < 4:
        return
    nav = ET.SubElement(main, "nav", {"aria-label": "Sections"})
    for number, heading in enumerate(headings, start=1):
        ET.SubElement(nav, "a", href=f"#section-{number}").text = printable(heading.text)


def _blocks(parent: ET.Element, blocks: Sequence[Block], sections: Iterator[int]) -> None:
    for drawn, group in itertools.groupby(blocks, key=lambda block: isinstance(block, Picture)):
        if drawn:
            grid = ET.SubElement(parent, "div", {"class": "pictures"})
            for block in group:
                assert isinstance(block, Picture)
                _picture(grid, block)
            continue
        for block in group:
            _block(parent, block, sections)


def _block(parent: ET.Element, block: Block, sections: Iterator[int]) -> None:
    match block:
        case Heading(text=text, level=level):
            heading = ET.SubElement(parent, f"h{level}")
            heading.text = printable(text)
            if level == 2:
                heading.set("id", f"section-{next(sections)}")
        case Paragraph(text=text):
            _text(ET.SubElement(parent, "p"), text)
        case Table():
            _table(parent, block)
        case Picture():
            _picture(parent, block)
        case Listing(text=text):
            listing = ET.SubElement(parent, "pre", tabindex="0")
            lines = re.split(r"\r\n|\r|\n", text)
            # A line end that follows <pre> is none to a browser: one is given it to take.
            listing.text = "\n" + "\n".join(map(_printable_line, lines))
        case Details(summary=summary, blocks=inner):
            details = ET.SubElement(parent, "details")
            ET.SubElement(details, "summary").text = printable(summary)
            _blocks(details, inner, sections)
        case _:
            assert_never(block)


def _text(parent: ET.Element, text: Text) -> None:
    """The words as children of an element that is empty so far."""
    last: ET.Element | None = None
    for part in text if isinstance(text, tuple) else (text,):
        if isinstance(part, str):
            words = printable(part)
            if last is None:
                parent.text = (parent.text or "") + words
            else:
                last.tail = (last.tail or "") + words
        else:
            last = _inline(parent, part)


def _inline(parent: ET.Element, part: Code | Strong | Link) -> ET.Element:
    match part:
        case Code(text=text):
            return _code(parent, text)
        case Strong(text=text):
            made = ET.SubElement(parent, "strong")
        case Link(address=text):
            made = ET.SubElement(parent, "a")
            if _is_web_address(text):
                made.set("href", text)
    made.text = printable(text)
    return made


def _code(parent: ET.Element, text: str) -> ET.Element:
    """Of a long path or command, lines may end behind its parts; copied it is as it was."""
    made = ET.SubElement(parent, "code")
    made.text, *others = _PARTS.split(printable(text))
    for part in others:
        ET.SubElement(made, "wbr").tail = part
    return made


def _table(parent: ET.Element, block: Table) -> None:
    # A region that scrolls must be reachable by keyboard, and then needs a role and a name.
    attributes = {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": "table"}
    table = ET.SubElement(ET.SubElement(parent, "div", attributes), "table")
    if any(block.header):
        row = ET.SubElement(ET.SubElement(table, "thead"), "tr")
        for cell in block.header:
            _text(ET.SubElement(row, "th", scope="col"), cell)
    body = ET.SubElement(table, "tbody")
    for cells in block.rows:
        row = ET.SubElement(body, "tr")
        for place, cell in enumerate(cells):
            if place == 0:
                made = ET.SubElement(row, "th", scope="row")
            else:
                made = ET.SubElement(row, "td")
                if _NUMBER.fullmatch(_plain(cell)):
                    made.set("class", "number")
            _text(made, cell)


def _picture(parent: ET.Element, block: Picture) -> None:
    figure = ET.SubElement(parent, "figure", {"class": "wide"} if block.wide else {})
    picture = ET.SubElement(figure, "picture")
    ET.SubElement(
        picture, "source", media="(prefers-color-scheme: dark)", srcset=_address(block.dark)
    )
    width, height = struct.unpack(">II", block.light[16:24])  # of the PNG's header
    ET.SubElement(
        picture, "img", src=_address(block.light), alt=printable(block.alt),
        width=str(round(width / _DOTS_PER_CSS_PIXEL)),
        height=str(round(height / _DOTS_PER_CSS_PIXEL)),
    )  # fmt: skip


def _address(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _is_web_address(text: str) -> bool:
    try:
        return urllib.parse.urlsplit(text).scheme in ("http", "https")
    except ValueError:
        return False


def _plain(text: Text) -> str:
    parts: tuple[Inline, ...] = text if isinstance(text, tuple) else (text,)
    return "".join(
        part if isinstance(part, str) else part.address if isinstance(part, Link) else part.text
        for part in parts
    )


def _printable_line(line: str) -> str:
    return "\t".join(map(printable, line.split("\t")))
