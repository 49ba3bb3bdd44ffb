"""The README's pictures, from a real quickstart run: `task pictures`."""

import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import rich.console
import rich.text

DOCS = Path(__file__).resolve().parent.parent / "docs"
COMMAND = "mainrun train"
SHOWN_LINES = 34


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "runs" / "quickstart"
        mainrun = Path(sys.executable).with_name("mainrun")
        done = subprocess.run(
            [mainrun, "train", "--run-dir", run_dir.relative_to(folder)],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        DOCS.mkdir(exist_ok=True)
        (DOCS / "console.svg").write_text(as_svg(done.stdout.splitlines()), encoding="utf-8")
        shutil.copyfile(run_dir / "plots" / "loss.png", DOCS / "loss.png")


def as_svg(lines: list[str]) -> str:
    """The first and the last lines of a console as a picture."""
    half = SHOWN_LINES // 2
    if len(lines) > SHOWN_LINES:
        lines = [*lines[:half], "⋮", *lines[-half:]]
    console = rich.console.Console(record=True, width=104, file=io.StringIO())
    for line in (f"$ {COMMAND}", *lines):
        text = rich.text.Text(line, no_wrap=True, overflow="ellipsis")
        text.highlight_regex(r"^(evaluation|val/loss).*", "bold green")
        text.highlight_regex(r"^(sample at step \d+):.*", "cyan")
        text.highlight_regex(r"^\$.*", "bold")
        console.print(text)
    # Without the web font that Rich names: a picture in a README loads nothing.
    svg = console.export_svg(title=COMMAND)
    return re.sub(r"@font-face \{[^}]*\}\s*", "", svg)


if __name__ == "__main__":
    main()
