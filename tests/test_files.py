"""Holds every format to its documents, and every way a file can be wrong to one line."""

from pathlib import Path

import pyarrow as pa
import pytest

from mainrun.data import files
from mainrun.errors import UserError
from tests.conftest import parquet

PLACE = "data.source=file:the-file"


def read(path, field="title"):
    """The documents that are not blank, stripped: what becomes of them in `sources.documents`."""
    return [text for raw in files.read(path, field, PLACE) if (text := raw.strip())]


def refusal(path):
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{PLACE}: ")
    return message


GOOD = {
    "lines.txt": "one\r\n  two \n\n\u3000\nthree\u2028still three\x85\x0cyes\n".encode(),
    "marked.txt": b"\xef\xbb\xbfone\ntwo",
    "table.csv": b"\xef\xbb\xbfid,title\r\n1,one\r\n"
    b'2,"two, with a ""comma""\r\nand a line"\r\n\r\n3,\r\n',
    "rows.jsonl": '{"title": "one"}\n\n{"id": 1, "title": "zw\\u00f6lf\u2028"}\n{"title": null}\n'
    '{"title": " "}'.encode(),
    "UPPER.TXT": b"one\ntwo",
    "column.parquet": parquet(title=["one", None, "two", ""], id=[1, 2, 3, 4]),
    "large.parquet": parquet(title=pa.array(["one", "two"], pa.large_string())),
    "coded.parquet": parquet(title=pa.array(["one", "two", "one"]).dictionary_encode()),
}
NOT_BLANK = {
    "lines.txt": ["one", "two", "three\u2028still three\x85\x0cyes"],
    "marked.txt": ["one", "two"],
    "table.csv": ["one", 'two, with a "comma"\r\nand a line'],
    "rows.jsonl": ["one", "zwölf"],
    "UPPER.TXT": ["one", "two"],
    "column.parquet": ["one", "two"],
    "large.parquet": ["one", "two"],
    "coded.parquet": ["one", "two", "one"],
}


def test_a_file_has_these_documents_in_its_order(tmp_path, subtests: pytest.Subtests):
    for name in GOOD:
        with subtests.test(name=name):
            (tmp_path / name).write_bytes(GOOD[name])
            assert read(tmp_path / name) == NOT_BLANK[name]


def test_lines_and_values_are_as_they_stand_in_the_file(tmp_path):
    (tmp_path / "lines.txt").write_bytes(b" one \r\n\ntwo")
    assert files.read(tmp_path / "lines.txt", "title", PLACE) == [" one \r", "", "two"]
    (tmp_path / "table.csv").write_bytes(b"title\n one \n")
    assert files.read(tmp_path / "table.csv", "title", PLACE) == [" one "]


def test_the_field_chooses_the_column(tmp_path, subtests: pytest.Subtests):
    for name in ["table.csv", "rows.jsonl", "column.parquet"]:
        with subtests.test(name=name):
            (tmp_path / name).write_bytes(
                {
                    "table.csv": b"title,text\na,b\nc,d\n",
                    "rows.jsonl": b'{"title": "a", "text": "b"}\n{"text": "d", "title": "c"}\n',
                    "column.parquet": parquet(title=["a", "c"], text=["b", "d"]),
                }[name]
            )
            assert read(tmp_path / name, field="text") == ["b", "d"]


BAD = {
    "empty.txt": (b"", ["empty"]),
    "blank.txt": (b"\n  \n\r\n", ["empty"]),
    "picture.txt": (b"\x89PNG\r\n\x00\x00", ["binary", "UTF-8"]),
    "wide.txt": ("wide".encode("utf-16"), ["UTF-16", "save it as UTF-8"]),
    "latin.txt": ("ab\ncaf\xe9\n".encode("latin-1"), ["byte 6", "0xe9"]),
    "marked.txt": (b"\xef\xbb\xbfa\xff", ["byte 4", "0xff"]),
    "letter.docx": (b"text", ["unknown suffix", ".csv .jsonl .parquet .txt"]),
    "README": (b"text", ["unknown suffix"]),
    "empty.csv": (b"", ["empty"]),
    "other.csv": (b"id,headline\n1,x\n", ["'title'", "data.field", "id, headline"]),
    "ragged.csv": (b"id,title\n1,a\n2,b,c\n", ["line 3", "3 columns", "header 2"]),
    "short.csv": (b"id,title\n1\n", ["line 2", "1 columns"]),
    "open.csv": (b'id,title\n1,"never closed\n2,x\n', ["not CSV", "line 3"]),
    "cut.jsonl": (b'{"title": "a"}\n\n{"title": ', ["line 3", "not JSON"]),
    "list.jsonl": (b'["title"]\n', ["line 1", "not an object"]),
    "nofield.jsonl": (b'{"title": "a"}\n{"id": 1, "text": "b"}\n', ["line 2", "id, text"]),
    "number.jsonl": (b'{"title": 5}\n', ["line 1", "'title' is int, not text"]),
    "half.jsonl": (b'{"title": "\\ud83d"}\n', ["line 1", "surrogate"]),
    "deep.jsonl": (b"[" * 100_000, ["line 1", "not JSON"]),
    "text.parquet": (b"title\n", ["not a readable Parquet"]),
    "zero.parquet": (b"", ["not a readable Parquet"]),
    "cut.parquet": (parquet(title=["a"] * 99)[:-9], ["not a readable Parquet"]),
    "other.parquet": (parquet(id=[1], text=["x"]), ["'title'", "data.field", "id, text"]),
    "number.parquet": (parquet(title=[1, 2]), ["'title' is int64, not text"]),
    "bytes.parquet": (
        parquet(title=pa.array([b"\xff", b"a"], pa.binary()).view(pa.string())),
        ["not a readable Parquet", "utf-8"],
    ),
}


def test_a_bad_file_is_refused_in_one_line(tmp_path, subtests: pytest.Subtests):
    for name in BAD:
        with subtests.test(name=name):
            body, parts = BAD[name]
            (tmp_path / name).write_bytes(body)
            message = refusal(tmp_path / name)
            for part in parts:
                assert part in message


def test_a_missing_file_and_a_directory_are_refused(tmp_path):
    message = refusal(tmp_path / "none.txt")
    assert "no such file" in message
    assert str(tmp_path / "none.txt") in message
    assert "a directory" in refusal(tmp_path)


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "secret.txt"
    path.write_text("a\nb")

    def denied(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", denied)  # the tests may run as root
    assert "cannot be read (Permission denied)" in refusal(path)


def test_the_real_titles_are_all_read(hn_titles):
    documents = read(hn_titles)
    assert len(documents) == len(set(documents)) == 39_438
