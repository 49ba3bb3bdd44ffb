"""A report before it is a page: headings, paragraphs, tables, pictures, code, things to unfold.

A report says what it has to say once, in these blocks; `document_html` and `document_markdown`
render them. Every `str` in here is data that shows as it is: names, reasons and samples come from
anywhere, and no block takes markup.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Code:
    """Words to be copied, or a setting's name, inside a line."""

    text: str


@dataclass(frozen=True)
class Strong:
    text: str


@dataclass(frozen=True)
class Link:
    """Shown as its address; one that is no plain web address is shown and leads nowhere."""

    address: str


Inline = str | Code | Strong | Link
Text = Inline | tuple[Inline, ...]


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: Text


@dataclass(frozen=True)
class Table:
    """All rows are as long as the header; a header of empty names is left out where it can be."""

    header: Sequence[Text]
    rows: Sequence[Sequence[Text]]

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.header) for row in self.rows)


@dataclass(frozen=True)
class Picture:
    """A PNG for a light page and one for a dark page, of the same size.

    `name` is that of its file, without a suffix; `alt` says what is to be seen. `wide` asks for
    more room than half a page. `markdown` is what a page without pictures has in its stead.
    """

    name: str
    alt: str
    light: bytes
    dark: bytes
    wide: bool = False
    markdown: str = ""


@dataclass(frozen=True)
class Listing:
    """Lines to be read or copied as they are, such as a command or a config."""

    text: str
    language: str = "text"


@dataclass(frozen=True)
class Details:
    """What most readers skip: folded until asked for."""

    summary: str
    blocks: Sequence["Block"]


Block = Heading | Paragraph | Table | Picture | Listing | Details


@dataclass(frozen=True)
class Document:
    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)


def facts(rows: Sequence[tuple[str, Text]]) -> Table:
    """A table of names and values; what has no value is left out."""
    return Table(("", ""), [row for row in rows if row[1] not in ("", ())])


def pictures(blocks: Sequence[Block]) -> list[Picture]:
    """All of them, the folded ones too, in their order."""
    found: list[Picture] = []
    for block in blocks:
        match block:
            case Picture():
                found.append(block)
            case Details(blocks=inner):
                found += pictures(inner)
    return found
