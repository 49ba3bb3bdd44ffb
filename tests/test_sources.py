"""Holds a source to its order, number, split and fingerprint, and each setting to its documents."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from mainrun import config
from mainrun.data import cache, python_docs, sources
from mainrun.errors import UserError
from tests.hub_server import HubServer, use_endpoint


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("MAINRUN_CACHE_DIR", str(folder))
    return folder


def read(source, seed=0, num_documents=None, **settings):
    data = config.Data(source=str(source), num_documents=num_documents, **settings)
    return sources.documents(data, seed)


def refusal(source, **settings):
    with pytest.raises(UserError) as error:
        read(source, **settings)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("data.")
    return message


# ---------------------------------------------------------------------------------------------
# Order, number, split, fingerprint


@pytest.fixture
def numbers(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text("\n".join(f"  number {i}\t" for i in range(50)) + "\n\n \n")
    return f"file:{path}"


def test_documents_are_stripped_shuffled_by_the_seed_and_the_first_are_taken(numbers):
    order = np.random.default_rng(3).permutation(50)
    assert read(numbers, seed=3) == [f"number {i}" for i in order]
    assert read(numbers, seed=3, num_documents=7) == [f"number {i}" for i in order[:7]]
    assert read(numbers, seed=4) != read(numbers, seed=3)


def test_more_documents_than_there_are_means_all(numbers):
    assert sorted(read(numbers, num_documents=1000)) == sorted(read(numbers))


def test_split_is_the_original_arithmetic_and_loses_nothing(subtests: pytest.Subtests):
    for size, fraction in [(100, 0.1), (10, 0.1), (39_438, 0.1), (7, 0.5)]:
        with subtests.test(size=size, fraction=fraction):
            documents = [str(i) for i in range(size)]
            train, validation = sources.split(documents, fraction)
            assert len(train) == int(size * (1 - fraction))
            assert train + validation == documents


def test_an_empty_side_of_the_split_is_refused(subtests: pytest.Subtests):
    for fraction, side in [(0.999, "training"), (1e-17, "validation")]:
        with (
            subtests.test(fraction=fraction),
            pytest.raises(UserError, match=f"leaves none for {side}"),
        ):
            sources.split(["a", "b", "c"], fraction)


def test_fingerprint_is_sha256_of_documents_framed_by_length():
    expected = hashlib.sha256("3:abc5:d\nä!".encode()).hexdigest()
    assert sources.fingerprint(["abc", "d\nä!"]) == expected
    assert sources.fingerprint(["ab", "c"]) != sources.fingerprint(["a", "bc"])
    assert sources.fingerprint(["a", "b"]) != sources.fingerprint(["b", "a"])


def test_fewer_than_two_documents_are_refused(tmp_path):
    (tmp_path / "one.txt").write_text("\nonly one\n \n")
    assert "1 documents" in refusal(f"file:{tmp_path}/one.txt")
    (tmp_path / "header.csv").write_text("id,title\n")
    assert "0 documents" in refusal(f"file:{tmp_path}/header.csv")


# ---------------------------------------------------------------------------------------------
# The four sources


def test_an_unknown_source_is_refused_with_the_four_there_are():
    for source in ("hackernews", "file:", "huggingface:", "s3:bucket"):
        message = refusal(source)
        for known in ("hacker-news", "huggingface:NAME", "file:PATH", "python-docs"):
            assert known in message


def test_paths_are_relative_to_the_working_directory_and_know_home(tmp_path, monkeypatch):
    (tmp_path / "titles.txt").write_text("one\ntwo")
    monkeypatch.chdir(tmp_path)
    assert len(read("file:titles.txt")) == 2
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(read("file:~/titles.txt")) == 2
    assert "no such file" in refusal("file:~nobody-of-this-name/x.txt")


def test_data_field_chooses_the_column(tmp_path):
    (tmp_path / "t.csv").write_text("title,text\na,b\nc,d\n")
    assert sorted(read(f"file:{tmp_path}/t.csv", field="text")) == ["b", "d"]


def test_reading_a_file_writes_nothing(tmp_path, cache_folder):
    (tmp_path / "titles.txt").write_text("one\ntwo")
    read(f"file:{tmp_path}/titles.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["titles.txt"]


def test_what_is_wrong_with_a_file_is_said_of_the_setting(tmp_path):
    (tmp_path / "t.csv").write_text("id,headline\n1,x\n")
    message = refusal(f"file:{tmp_path}/t.csv")
    assert message.startswith(f"data.source=file:{tmp_path}/t.csv: ")


@pytest.fixture
def server(tmp_path, monkeypatch):
    with HubServer() as server:
        use_endpoint(server.endpoint, tmp_path / "hub", monkeypatch)
        yield server


def test_hacker_news_is_the_original_data_sets_titles(server):
    commit = server.add(sources.HACKER_NEWS, story__csv=b"id,title,text\n1,a,c\n2, b ,d\n3,,e\n")
    assert sorted(read("hacker-news")) == ["a", "b"]
    assert sorted(read("hacker-news", field="text")) == ["c", "d", "e"]
    assert sources.revision(config.Data(source="hacker-news")) == commit


def test_a_data_sets_field_is_named_in_the_source_or_by_data_field(server):
    server.add("someone/some-titles", data__csv=b"title,text\na,b\nc,d\n")
    assert sorted(read("huggingface:someone/some-titles")) == ["a", "c"]
    assert sorted(read("huggingface:someone/some-titles:text")) == ["b", "d"]
    assert sorted(read("huggingface:someone/some-titles", field="text")) == ["b", "d"]


def test_the_revision_is_read_and_told(server):
    old = server.add("someone/some-titles", data__csv=b"title\nold 1\nold 2\n")
    new = server.add("someone/some-titles", data__csv=b"title\nnew 1\nnew 2\n")
    for revision, commit, texts in [
        (old, old, ["old 1", "old 2"]),
        ("main", new, ["new 1", "new 2"]),
        (None, new, ["new 1", "new 2"]),
    ]:
        data = config.Data(source="huggingface:someone/some-titles", revision=revision)
        assert sorted(sources.documents(data, 0)) == texts
        assert sources.revision(data) == commit


def test_only_the_hub_has_revisions(numbers):
    assert sources.revision(config.Data(source="python-docs")) is None
    assert sources.revision(config.Data(source=numbers)) is None


def test_python_docs_are_the_docstrings_of_the_running_python(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text('"""Sentence one of a."""')
    (tmp_path / "b.py").write_text('"""Sentence one of b."""')
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda _: str(tmp_path))
    assert sorted(read("python-docs")) == ["Sentence one of a.", "Sentence one of b."]


# ---------------------------------------------------------------------------------------------
# The cache


def test_the_cache_folder_is_named_by_three_variables_in_turn(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("MAINRUN_CACHE_DIR", "/chosen")
    assert cache.folder() == Path("/chosen")
    monkeypatch.delenv("MAINRUN_CACHE_DIR")
    assert cache.folder() == Path("/xdg/mainrun")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path("/home/someone/.cache/mainrun")


def test_stored_texts_are_loaded_under_their_name_only():
    texts = ["a\nb", "", "ü 🎉"]
    cache.store(texts, "set/one", "../field")
    assert cache.load("set/one", "../field") == texts
    assert cache.load("set/one", "field") is None


def test_no_name_leads_out_of_the_folder(cache_folder, tmp_path):
    cache.store(["a"], "../../../outside")
    assert {p.name for p in tmp_path.iterdir()} == {cache_folder.name}


def test_a_write_that_fails_leaves_the_old_entry_and_nothing_else(cache_folder, monkeypatch):
    cache.store(["old"], "name")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        cache.store(["new"], "name")
    assert len(list((cache_folder / "documents").iterdir())) == 1
    assert cache.load("name") == ["old"]
