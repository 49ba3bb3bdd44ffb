"""Data in Markdown that shows as it is: in a line, in code, in a block, in a table.

Run names, error messages, samples and log lines come from anywhere, and GitHub shows the result as
a page. Nothing in them may become a heading, a link, a picture, HTML, or the end of the block that
they stand in; and none of them is so long that it hides the rest.
"""

import re
import string
from collections.abc import Iterable, Sequence

from mainrun.console import printable

_MARKUP = set(string.punctuation) - set(",-./")
_MOST_CHARACTERS = 2000  # of one line of data
_PLAIN_ADDRESS = re.compile(r"https?://[A-Za-z0-9.-]+(:\d+)?(/[A-Za-z0-9._~%/-]*)?")
_WORD_JOINER = "\N{WORD JOINER}"
_HEADING = re.compile(r" {0,3}(#{1,6})(?=[ \t]|$)")
_CODE = re.compile(r"`([^`\s](?:[^`]*[^`\s])?)`")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")


def escaped(text: str | None) -> str:
    """Data as one line of Markdown that shows as it is: no markup, no link, no HTML."""
    return _escaped(_one_line(text or ""))


def message(text: str) -> str:
    """What a program says, in one line: escaped, but for `code` where it has put backticks."""
    parts = _CODE.split(_one_line(text))
    return "".join(code(part) if i % 2 else _escaped(part) for i, part in enumerate(parts))


def code(text: str) -> str:
    """Data as code in a line, to be copied; in a table a bar in it would end the cell."""
    line = _one_line(text)
    if not line:
        return ""
    fence = "`" * (_backticks(line) + 1)
    room = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{room}{line}{room}{fence}"


def link(address: str, text: str | None = None) -> str:
    """A link to a plain web address; anything else that came as one is only shown."""
    if not _PLAIN_ADDRESS.fullmatch(address) or len(address) > _MOST_CHARACTERS:
        return escaped(text or address)
    return f"[{escaped(text)}]({address})" if text else f"<{address}>"


def fenced(text: str, language: str = "text") -> str:
    """A code block whose fence is longer than any inside: what is in it is never read as markup."""
    fence = "`" * max(3, _backticks(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already; data goes through `escaped` first."""
    lines = [header, [":---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def embedded(text: str) -> str:
    """Markdown of ours as a part of a larger page: headings one order lower, no block left open.

    Links and HTML in it stay what they are; what somebody else has written is `escaped` instead.
    """
    lines, fence = [], ""
    for line in re.split(r"\r\n|\r|\n", text.rstrip()):
        found = _FENCE.match(line)
        if fence:
            if found and found[1].startswith(fence) and not found[2].strip():
                fence = ""
        elif found and not (found[1][0] == "`" and "`" in found[2]):
            fence = found[1]
        elif (heading := _HEADING.match(line)) and len(heading[1]) < 6:
            line = f"#{line.lstrip(' ')}"
        lines.append(line)
    return "\n".join([*lines, fence] if fence else lines)


def shortened(text: str, characters: int) -> str:
    """At most so many characters, an ellipsis among them where some are missing."""
    return text if len(text) <= characters else text[: characters - 1] + "…"


def _escaped(line: str) -> str:
    shown = "".join(f"\\{c}" if c in _MARKUP else c for c in line)
    # GitHub makes links of these after it has taken the backslashes away: of www. as of a bare
    # address, and of an @ between words, which may be a mail address or someone's name.
    shown = shown.replace("www.", "www\\.")
    return re.sub(r"@(?=\w)", f"@{_WORD_JOINER}", shown)


def _one_line(text: str) -> str:
    line = printable(shortened(" ".join(text.split()), _MOST_CHARACTERS))
    return shortened(line, _MOST_CHARACTERS)  # a character that is spelt out is up to ten


def _backticks(text: str) -> int:
    """How many of them stand together at most."""
    return max(map(len, re.findall("`+", text)), default=0)
