"""The first sentences of the standard library's docstrings: English that every machine already has.

A corpus that needs no network, read from the source files of the Python that is running; none of
them is executed. It differs between Python versions, so results compare only within one. Order and
number of the documents are decided elsewhere.
"""

import ast
import hashlib
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mainrun.data import cache
from mainrun.errors import UserError

# Tests and what is not the standard library's; `encodings` is a hundred times the same sentence.
_NOT_DOCUMENTATION = {
    *("test", "tests", "idlelib", "lib2to3", "encodings"),
    *("site-packages", "dist-packages", "__pycache__"),
}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|cf|resp|viz|al|no)|\.\.)\.$")


def read() -> list[str]:
    """The first sentences of the standard library's docstrings, each once, in the files' order."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = list(_python_files(root))
    if not paths:
        raise UserError(f"data.source=python-docs: this Python has no standard library at {root}")
    # Parsing takes 3 s and looking at the files 10 ms. The leading 1 is the rule's version.
    stats = [f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in paths]
    state = hashlib.sha256("\0".join(stats).encode()).hexdigest()
    key = ("python-docs", "1", sys.version.split()[0], state)
    sentences = cache.load(*key)
    if sentences is None:
        found = (_first_sentence(doc) for path in paths for doc in _docstrings(path))
        sentences = list(dict.fromkeys(sentence for sentence in found if sentence))
        cache.store(sentences, *key)
    return sentences


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _NOT_DOCUMENTATION)
        yield from (Path(folder, file) for file in sorted(files) if file.endswith(".py"))


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of the module, its classes and functions, in order; nothing is executed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes and literals in code that is not ours
            module = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # not the library's: its own files all parse
    # ast.walk takes half as long again: expressions are most of the tree, and hold no docstrings.
    waiting: list[Any] = [module]
    while waiting:
        node = waiting.pop()
        if isinstance(node, _DOCUMENTED) and (doc := ast.get_docstring(node)):
            yield doc
        for part in ("cases", "finalbody", "orelse", "handlers", "body"):  # last in, first out
            waiting += reversed(getattr(node, part, ()))


def _first_sentence(docstring: str) -> str | None:
    """The first sentence on one line, or None where the docstring does not begin with one.

    A summary line without a full stop gets one. Signatures, doctests and lists are no sentences.
    """
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    text = re.sub(r":[a-z:]+:`[~!]?([^`]*)`", r"\1", " ".join(paragraph.split()))
    ends = (match.end() for match in re.finditer(r"[.!?](?= [A-Z\"'`(]|$)", text))
    end = next((e for e in ends if e == len(text) or not _ABBREVIATION.search(text[:e])), None)
    if end is None and "\n" not in paragraph and re.search(r"[\w)'\"`*]$", text):
        text += "."
    elif end is None:
        return None
    sentence = text[:end]
    is_prose = (
        re.match("[A-Z]", sentence)
        and len(re.findall("[A-Za-z]{2,}", sentence)) >= 3
        and len(sentence) <= 200
        and not re.search(r">>>|->|::|\) --|\w+ ?= ?\w+.*\)\.?$", sentence)
    )
    return sentence if is_prose else None
