"""A document as files: one HTML page to keep, Markdown beside it, its pictures in a folder.

`report.html`, `report.md` and `report/*.png`. Each file is written whole or
stays as it was.
"""

import os
from pathlib import Path

from mainrun import probe
from mainrun.analysis.document import Document, pictures
from mainrun.analysis.document_html import html
from mainrun.analysis.document_markdown import markdown
from mainrun.errors import RunFailed, UserError


def check(path: Path) -> None:
    """UserError, before any work, where the document cannot be written there."""
    if path.suffix != ".html":
        raise UserError(f"--output {path}: the report is an HTML file: name it {path}.html")
    try:
        if path.is_dir():
            raise UserError(f"--output {path} is a folder: name a file in it")
        probe.check(path)
    except OSError as error:
        raise UserError(
            f"--output {path} cannot be written ({error.strerror}): name a file elsewhere"
        ) from error


def write(document: Document, path: Path) -> Path:
    """The path of the HTML file. Raises UserError for a path it cannot be, RunFailed for a disk."""
    check(path)
    folder = path.with_suffix("")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = {f"{picture.name}.png": picture.light for picture in pictures(document.blocks)}
        if drawn:
            folder.mkdir(exist_ok=True)
        for name, png in drawn.items():
            _write(folder / name, png)
        _write(path.with_suffix(".md"), markdown(document, folder.name).encode())
        _write(path, html(document).encode())
    except OSError as error:
        raise RunFailed(f"{error.filename}: cannot write: {error.strerror}") from error
    return path


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)
