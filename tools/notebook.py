"""EDA.ipynb, executed as Jupyter would; `task eda` writes its outputs into it anew."""

import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "EDA.ipynb"
_SETTINGS = re.compile(r"^SETTINGS = \[.*\]$", re.MULTILINE)


def read() -> nbformat.NotebookNode:
    """The notebook as it is committed."""
    return nbformat.read(PATH, as_version=4)


def with_settings(notebook: nbformat.NotebookNode, *settings: str) -> nbformat.NotebookNode:
    """The notebook for another corpus: its one variable has another value."""
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source, found = _SETTINGS.subn(lambda _: f"SETTINGS = {list(settings)!r}", first.source)
    assert found == 1, "the first code cell sets SETTINGS in one line"
    return notebook


def executed(notebook: nbformat.NotebookNode, folder: Path = ROOT) -> nbformat.NotebookNode:
    """The notebook with its outputs, run from top to bottom in `folder`; raises at an error."""
    with tempfile.TemporaryDirectory() as sockets:
        # Files of this user, instead of ports that every user of the machine can reach.
        kernel = {"transport": "ipc", "ip": f"{sockets}/kernel"}
        client = NotebookClient(
            notebook,
            timeout=600,  # seconds, of a cell
            record_timing=False,  # times would change the file with each execution
            resources={"metadata": {"path": str(folder)}},
            config=Config({"KernelManager": kernel}),
        )
        return client.execute()


def main() -> None:
    notebook = executed(read())
    # Of the Python only what the notebook needs: the version stands in the first output.
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, PATH)


if __name__ == "__main__":
    main()
