"""Holds EDA.ipynb to running from top to bottom; what is committed of it, to this corpus alone."""

import ast
import base64
import re

import pytest

from tools import notebook

pytestmark = pytest.mark.medium

COMMITTED = notebook.read()
CODE = [cell for cell in COMMITTED.cells if cell.cell_type == "code"]

COMPUTING = (ast.BinOp, ast.Compare, ast.For, ast.While, ast.comprehension)
# A title of a word or two may stand in any text.
_TELLING = 25  # characters


@pytest.fixture(scope="module")
def executed():
    """On the bundled corpus, all of it."""
    return notebook.executed(notebook.read())


def code_of(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def shown(cell) -> list[str]:
    """The Markdown that a cell displays."""
    data = (output.get("data", {}) for output in cell.outputs)
    return [each["text/markdown"] for each in data if "text/markdown" in each]


def pictures(cell) -> list[bytes]:
    data = (output.get("data", {}) for output in cell.outputs)
    return [base64.b64decode(each["image/png"]) for each in data if "image/png" in each]


@pytest.mark.slow
def test_runs_from_top_to_bottom_and_every_cell_shows_something(executed):
    for cell in code_of(executed.cells):
        assert shown(cell) or pictures(cell), cell.source
        assert {output.output_type for output in cell.outputs} == {"execute_result"}, cell.outputs


@pytest.mark.slow
def test_committed_outputs_are_what_it_shows_where_the_documentation_is_the_same(executed):
    cells = code_of(executed.cells)
    assert [cell.source for cell in cells] == [cell.source for cell in CODE]
    if shown(cells[0]) != shown(CODE[0]):
        pytest.skip("made of another Python's documentation")
    assert [shown(cell) for cell in cells] == [shown(cell) for cell in CODE]


@pytest.mark.slow
def test_runs_on_a_file_when_its_one_variable_names_it(corpus, tmp_path):
    ours = notebook.with_settings(
        notebook.read(), "base/quickstart.yaml", f"data.source=file:{corpus}"
    )
    text = "\n".join(
        table for cell in code_of(notebook.executed(ours, tmp_path).cells) for table in shown(cell)
    )
    assert "python-docs" not in text
    assert "sentences.txt" in text
    assert re.search(r"letter by letter \| \d+ \| \d+ \| \d+ \(", text)


def test_committed_outputs_are_all_there_in_order():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    for cell in CODE:
        assert {output.output_type for output in cell.outputs} == {"execute_result"}, cell.source
    assert len([picture for cell in CODE for picture in pictures(cell)]) == 3
    for cell in CODE:
        assert all(picture.startswith(b"\x89PNG") for picture in pictures(cell))


def test_committed_outputs_are_of_the_bundled_corpus_and_say_of_which_python():
    (source,) = shown(CODE[0])
    assert re.search(r"\| documents from \| python-docs of Python 3\.\d+\.\d+ \|", source)


def test_no_title_of_hacker_news_is_committed(hn_titles):
    committed = notebook.PATH.read_text(encoding="utf-8")
    titles = hn_titles.read_text(encoding="utf-8").splitlines()
    telling = [title for title in titles if len(title) >= _TELLING]
    assert len(telling) > 30_000
    assert [title for title in telling if title in committed] == []


def test_committed_file_is_small_and_names_no_machine():
    raw = notebook.PATH.read_text(encoding="utf-8")
    assert len(raw) < 500_000
    text = re.sub(r'"image/png": "[^"]*"', "", raw)
    assert not re.search(r"\\u001b|\x1b", text), "colours of a terminal"
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|opt|usr|var|Users|mnt)\b", text)
    assert not re.search(r"[A-Z]:\\\\\\\\|Traceback|\b\d+\.\d+\.\d+\.\d+\b|localhost", text)
    for cell in CODE:
        for picture in pictures(cell):
            assert b"tEXt" not in picture, "a picture says what made it"
    assert set(COMMITTED.metadata) == {"kernelspec", "language_info"}
    assert COMMITTED.metadata.language_info == {"name": "python"}
    assert all(cell.metadata == {} for cell in COMMITTED.cells)


def test_cells_are_short_and_compute_nothing_themselves(subtests: pytest.Subtests):
    for cell in CODE:
        with subtests.test(cell.id):
            assert len(cell.source.splitlines()) <= 10
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                else:
                    names = []
                assert {name.split(".")[0] for name in names} <= {"mainrun", "matplotlib"}
                assert not isinstance(node, COMPUTING)
                assert not (isinstance(node, ast.Constant) and isinstance(node.value, int | float))
