"""Holds the standard library's docstrings to whole sentences, each once, read without executing."""

import os
from pathlib import Path

import pytest

from mainrun.data import python_docs
from mainrun.errors import UserError


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    """Not below tmp_path: that is the library in some of the tests."""
    monkeypatch.setenv("MAINRUN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def library(folder: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """These files, as those of the running Python."""
    for name, source in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda _: str(folder))


def test_the_first_sentence_of_a_docstring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
):
    cases = [
        ("Return the sum of a and b.", "Return the sum of a and b."),
        ("Return the sum\n    of a and b", None),
        ("Return the sum of a and b", "Return the sum of a and b."),
        ("Return the\n    sum of a. Never mind b.\n\nMore here.", "Return the sum of a."),
        ("Opens e.g. Files or others. Then stops.", "Opens e.g. Files or others."),
        ("Is this the version 3.11 of it? Yes.", "Is this the version 3.11 of it?"),
        ("Like :meth:`~os.walk` but slower.", "Like os.walk but slower."),
        ("walk(top) -> iterator", None),
        ("D.items() -> a set-like object.", None),
        (">>> Return the sum of a.", None),
        ("Do nothing.", None),
        ("lower case words begin this.", None),
        ("Word " * 60 + "end.", None),
        ("", None),
    ]
    for number, (docstring, sentence) in enumerate(cases):
        with subtests.test(docstring=docstring):
            library(tmp_path / str(number), {"a.py": repr(docstring)}, monkeypatch)
            assert python_docs.read() == ([sentence] if sentence else [])


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """Read once for all tests below: it parses the whole library."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAINRUN_CACHE_DIR", str(folder))
        yield python_docs.read()


def test_python_docs_are_thousands_of_different_sentences(sentences):
    assert len(sentences) > 4_000
    assert len(set(sentences)) == len(sentences)
    for sentence in sentences:
        assert sentence[0].isupper()
        assert sentence[-1] in ".!?"
        assert " ".join(sentence.split()) == sentence
        assert 10 < len(sentence) <= 201


LIBRARY = {
    "a.py": '"""Sentence one of a.\n\nMore."""\n',
    "b.py": '''raise SystemExit("executed")
class B:
    "Sentence one of b."
    async def method(self):
        "Sentence two of b."
        def inner():
            """Sentence three of b."""
try:
    import c
except ImportError:
    def fallback():
        "Sentence four of b."
else:
    with c:
        if c:
            pass
        elif c:
            def found():
                "Sentence one of a."
        else:
            def other():
                "Sentence five of b."
x = "No docstring at all."
''',
    "broken.py": '"""Sentence of a broken file."""\ndef (',
    "sub/d.py": '"""Sentence one of d."""',
    "test/t.py": '"""Sentence of a test."""',
    "sub/tests/t.py": '"""Sentence of another test."""',
    "idlelib/i.py": '"""Sentence of the editor."""',
    "site-packages/s.py": '"""Sentence of an installed package."""',
    "z.py": '"""Sentence one of z."""',
    "z.txt": '"""Sentence of a text."""',
}


def test_python_docs_of_a_small_library_are_in_order_and_none_of_it_is_executed(
    tmp_path, monkeypatch
):
    library(tmp_path / "library", LIBRARY, monkeypatch)
    in_b = [f"Sentence {n} of b." for n in ("one", "two", "three", "four", "five")]
    others = ["Sentence one of z.", "Sentence one of d."]  # files of a folder before its folders
    assert python_docs.read() == ["Sentence one of a.", *in_b, *others]


def test_python_docs_are_read_again_when_a_file_changes(tmp_path, monkeypatch):
    file = tmp_path / "library" / "a.py"
    library(file.parent, {"a.py": '"""First of the two."""'}, monkeypatch)
    assert python_docs.read() == ["First of the two."]
    before = file.stat()
    file.write_text('"""Other of the two."""')
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if it had not changed
    assert python_docs.read() == ["First of the two."]
    file.write_text('"""Another of the two."""')
    assert python_docs.read() == ["Another of the two."]


def test_python_without_its_library_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda _: str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"^data.source=python-docs: .*no standard library"):
        python_docs.read()
