"""Holds a data set of the hub to its commit, its files and the cache, against a loopback hub."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from mainrun.data import hub
from mainrun.errors import UserError
from tests.conftest import parquet
from tests.hub_server import HubServer, use_endpoint

NAME = "someone/some-titles"
OTHER_COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("MAINRUN_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def server(tmp_path, monkeypatch):
    with HubServer() as server:
        use_endpoint(server.endpoint, tmp_path / "hub", monkeypatch)
        yield server


def read(name=NAME, field="title", revision=None):
    return hub.read(name, field, revision)


def refusal(name=NAME, **settings):
    with pytest.raises(UserError) as error:
        read(name, **settings)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"data.source=huggingface:{name}")
    return message


def closed_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_pinned_revision_is_what_is_asked_for_and_read(server):
    old = server.add(NAME, data__parquet=parquet(title=["old 1", "old 2"]))
    server.add(NAME, data__parquet=parquet(title=["new 1", "new 2"]))
    assert read(revision=old) == ["old 1", "old 2"]
    asked = [request for request in server.asked if "datasets" in request]
    assert asked
    assert all(old in request for request in asked)
    assert hub.commit_of(NAME, old) == old


def test_a_second_run_asks_nobody_and_reads_the_same(server):
    server.add(NAME, data__parquet=parquet(title=["old 1", "old 2"]))
    first = read()
    server.add(NAME, data__parquet=parquet(title=["new 1", "new 2"]))
    server.stop()
    assert read() == first


def test_the_newest_commit_is_resolved_once_and_a_branch_each_time(server):
    old = server.add(NAME, data__parquet=parquet(title=["old 1", "old 2"]))
    assert hub.commit_of(NAME, None) == old
    new = server.add(NAME, data__parquet=parquet(title=["new 1", "new 2"]))
    assert hub.commit_of(NAME, None) == old
    assert read() == ["old 1", "old 2"]
    assert read(revision="main") == ["new 1", "new 2"]
    assert hub.commit_of(NAME, "main") == new


def test_fields_are_cached_apart(server):
    server.add(NAME, data__csv=b"title,text\na,b\nc,d\n")
    assert read(field="title") == ["a", "c"]
    assert read(field="text") == ["b", "d"]


FILES = {
    "parquet before the others": (
        {"a.csv": b"title\nx\ny", "b.parquet": parquet(title=["p", "q"]), "README.md": b"#"},
        ["p", "q"],
    ),
    "csv before jsonl": ({"a.jsonl": b'{"title": "j"}', "b.csv": b"title\nx\ny"}, ["x", "y"]),
    "the training split": (
        {
            "data/train-00000.csv": b"title\na",
            "data/train-00001.csv": b"title\nb",
            "data/test-00000.csv": b"title\nc",
            "data/extra.csv": b"title\nd",
        },
        ["a", "b"],
    ),
    "a folder named after the split": (
        {"train/2020/0.jsonl": b'{"title":"a"}', "train/2021/0.jsonl": b'{"title":"b"}'},
        ["a", "b"],
    ),
    "no split named, but tests left out": (
        {"2020.csv": b"title\na\nb", "validation.csv": b"title\nc"},
        ["a", "b"],
    ),
    "training is not train": ({"strained.csv": b"title\nb", "brain.csv": b"title\na"}, ["a", "b"]),
}


@pytest.mark.parametrize("case", FILES)
def test_of_a_data_sets_files_the_training_ones_of_one_format_are_read_by_name(case, server):
    files, expected = FILES[case]
    server.datasets[NAME] = {OTHER_COMMIT: files}
    assert read() == expected


def test_a_data_set_of_several_subsets_is_refused(server):
    files = {"raw/train.csv": b"title\na", "clean/train.csv": b"title\nb"}
    server.datasets[NAME] = {OTHER_COMMIT: files}
    message = refusal()
    assert "clean, raw" in message
    assert "file:PATH" in message


def test_what_the_hub_does_not_have_is_refused_in_one_line(server):
    assert "no such data set" in refusal("someone/nothing")
    assert "not a data set's name" in refusal("a/b/c")
    server.add(NAME, data__parquet=parquet(id=[1], headline=["x"]))
    message = refusal()
    assert "data.parquet" in message
    assert "id, headline" in message
    message = refusal(revision=OTHER_COMMIT)
    assert f"no data.revision={OTHER_COMMIT}" in message
    server.add("someone/pictures", a__png=b"", b__png=b"")
    assert "a.png" in refusal("someone/pictures")


def test_a_data_set_larger_than_the_disk_is_refused_before_any_download(server, monkeypatch):
    server.add(NAME, data__csv=b"title\na\nb")
    full = type("Usage", (), {"free": 3})
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: full)
    assert "free" in refusal()
    assert not [request for request in server.asked if "resolve" in request]


def test_an_unreachable_hub_is_refused_at_once_with_what_to_use_instead(tmp_path, monkeypatch):
    use_endpoint(f"http://127.0.0.1:{closed_port()}", tmp_path / "hub", monkeypatch)
    start = time.monotonic()
    message = refusal()
    assert time.monotonic() - start < 5
    assert "data.source=file:PATH" in message
    assert "data.source=python-docs" in message


def test_a_hub_that_never_answers_is_given_up_after_the_timeout(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_TIMEOUT", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        use_endpoint(f"http://127.0.0.1:{port}", tmp_path / "hub", monkeypatch)
        start = time.monotonic()
        assert "data.source=python-docs" in refusal()
        assert time.monotonic() - start < 5


def test_the_hub_switched_off_is_said(server, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refusal()
    assert "HF_HUB_OFFLINE" in message
    assert "python-docs" in message


def test_an_unwritable_hub_cache_costs_only_the_cache(server, tmp_path):
    server.add(NAME, data__csv=b"title\na\nb")
    (tmp_path / "hub").write_text("a file where the folder should be")
    assert read() == ["a", "b"]


READ_AND_PRINT = """
import json, sys
from mainrun.data import hub
print(json.dumps(hub.read(sys.argv[1], "title", None)))
"""


def test_hf_endpoint_names_the_hub(server, tmp_path):
    server.add(NAME, data__parquet=parquet(title=["a", "b"]))
    done = subprocess.run(
        [sys.executable, "-c", READ_AND_PRINT, NAME],
        env=os.environ | {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")},
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout) == ["a", "b"]
    assert done.stderr == ""


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b.replace(b"old", b"0ld"), bytes])
def test_a_damaged_entry_is_made_again(damage, server, cache_folder):
    commit = server.add(NAME, data__csv=b"title\nold 1\nold 2")
    first = read(revision=commit)
    (entry,) = (cache_folder / "documents").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(b"" if damage is bytes else damage(whole))
    assert read(revision=commit) == first
    assert entry.read_bytes() == whole


def test_an_unwritable_cache_costs_only_the_cache(server, cache_folder):
    cache_folder.write_text("a file where the folder should be")
    server.add(NAME, data__csv=b"title\na\nb")
    with pytest.warns(UserWarning, match="MAINRUN_CACHE_DIR"):
        assert read() == ["a", "b"]
