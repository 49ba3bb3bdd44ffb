"""A document as Markdown for GitHub's step summary: data shows as it is, no picture is needed.

A step summary shows neither a local file nor a `data:` address, so a picture is the chart that
stands for it, or the name of its file. It is refused whole above one MiB: what would not fit is
left out, and the last line says so.
"""

from collections.abc import Sequence
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
from mainrun.markdown import code, escaped, fenced, link, shortened, table

_MOST_BYTES = 1_000_000  # GitHub takes 1 MiB a step
_MOST_ROWS = 200
_MOST_CHARACTERS = 200  # of one cell


def markdown(document: Document, pictures: str) -> str:
    """The page; `pictures` is the folder of the PNGs, as a reader of the page would name it."""
    parts = [f"# {escaped(document.title)}"]
    size = len(parts[0].encode())
    for block in document.blocks:
        rendered = _block(block, pictures)
        size += len(rendered.encode()) + 2
        if size > _MOST_BYTES:
            parts.append("The rest is too long for this page: the HTML file has it.")
            break
        parts.append(rendered)
    return "\n\n".join(filter(None, parts)) + "\n"


def _block(block: Block, pictures: str) -> str:
    match block:
        case Heading(text=text, level=level):
            return f"{'#' * level} {escaped(text)}"
        case Paragraph(text=text):
            return _text(text)
        case Table():
            return _table(block)
        case Picture(name=name, alt=alt, markdown=chart):
            return chart or f"{escaped(alt)} ({code(f'{pictures}/{name}.png')})"
        case Listing(text=text, language=language):
            lines = (printable(line) for line in text.split("\n"))
            return fenced("\n".join(lines), language)
        case Details(summary=summary, blocks=inner):
            return _details(summary, inner, pictures)
        case _:
            assert_never(block)


def _details(summary: str, blocks: Sequence[Block], pictures: str) -> str:
    # In a line that begins with a tag GitHub reads HTML, not Markdown.
    shown = printable(summary).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    inner = "\n\n".join(_block(block, pictures) for block in blocks)
    return f"<details><summary>{shown}</summary>\n\n{inner}\n\n</details>"


def _table(block: Table) -> str:
    rows = [[_cell(cell) for cell in row] for row in block.rows[:_MOST_ROWS]]
    shown = table([_cell(cell) for cell in block.header], rows)
    more = len(block.rows) - len(rows)
    return f"{shown}\n\n{more:,} more rows stand in the HTML file." if more else shown


def _cell(text: Text) -> str:
    parts = text if isinstance(text, tuple) else (text,)
    return "".join(map(_cell_part, parts))


def _cell_part(part: Inline) -> str:
    match part:
        case str():
            return _inline(shortened(part, _MOST_CHARACTERS))
        case Code(text=text):
            # GitHub parts cells before it reads code: the backslash is gone when it does.
            return code(shortened(text, _MOST_CHARACTERS)).replace("|", "\\|")
        case _:
            return _inline(part)


def _text(text: Text) -> str:
    return "".join(map(_inline, text if isinstance(text, tuple) else (text,)))


def _inline(part: Inline) -> str:
    match part:
        case str():
            # Data is one line; the room at its ends is what parts it from its neighbours.
            before = " " if part[:1].isspace() else ""
            after = " " if part[-1:].isspace() and part.strip() else ""
            return f"{before}{escaped(part)}{after}"
        case Code(text=text):
            return code(text)
        case Strong(text=text):
            return f"**{escaped(text)}**" if text.strip() else ""
        case Link(address=address):
            return link(address)
        case _:
            assert_never(part)
