"""Where a run was made is on record, and what must not be told is not."""

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mainrun import environment
from mainrun.environment import secret_values, without_secrets, write_environment

PACKAGE = Path(environment.__file__).parent


def write(folder: Path, **changes: object) -> dict[str, object]:
    given = {"command": ["mainrun", "train"], "devices": ["cpu"], "data_fingerprint": "abc"}
    write_environment(folder, **{**given, **changes})
    return json.loads((folder / "environment.json").read_text())


def test_the_record_names_versions_devices_data_and_command(tmp_path: Path):
    record = write(tmp_path)
    assert record["python"] == platform.python_version()
    assert record["packages"]["pydantic"][0].isdigit()
    assert record["packages"].keys() >= {"jax", "flax", "optax", "numpy", "wandb"}
    assert (record["devices"], record["data_fingerprint"]) == (["cpu"], "abc")
    assert record["command"] == ["mainrun", "train"]
    assert platform.node() not in json.dumps(record["platform"]).split()


def test_a_resumed_run_keeps_the_first_record_and_adds_its_own(tmp_path: Path):
    first = write(tmp_path)
    write(tmp_path, command=["mainrun", "resume"])
    both = write(tmp_path, command=["mainrun", "resume", "again"])
    assert {name: both[name] for name in first} == first
    assert [record["command"][1:] for record in both["resumed"]] == [
        ["resume"],
        ["resume", "again"],
    ]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the module in a git checkout of its own, with a remote that holds a password."""
    root = tmp_path / "checkout"
    (root / "mainrun").mkdir(parents=True)
    shutil.copy(PACKAGE / "environment.py", root / "mainrun")
    (root / "mainrun" / "__init__.py").touch()
    git(root, "init", "-q")
    git(root, "remote", "add", "origin", "https://me:hunter22@example.org/r.git")
    git(root, "add", ".")
    git(root, "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "x")
    return root


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def record_of(checkout: Path) -> dict[str, object]:
    ask = "import json, mainrun.environment as e; print(json.dumps(e.environment([], [], None)))"
    command = [sys.executable, "-B", "-c", ask]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    assert "hunter22" not in done.stdout
    return json.loads(done.stdout)


def test_commit_and_whether_anything_differs_from_it_are_on_record(checkout: Path):
    clean = record_of(checkout)
    assert (clean["commit"], clean["dirty"]) == (git(checkout, "rev-parse", "HEAD"), False)
    (checkout / "new.py").touch()
    assert record_of(checkout)["dirty"] is True


def test_a_copy_that_git_does_not_track_has_no_commit_even_inside_a_checkout(checkout: Path):
    git(checkout, "rm", "-rq", "--cached", "mainrun")
    assert (record_of(checkout)["commit"], record_of(checkout)["dirty"]) == (None, None)
    shutil.rmtree(checkout / ".git")
    assert record_of(checkout)["commit"] is None


def test_without_a_checkout_the_commit_is_what_the_image_was_built_from(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
):
    sha = git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("MAINRUN_COMMIT", "f" * 40)
    assert record_of(checkout)["commit"] == sha, "a checkout knows better"
    shutil.rmtree(checkout / ".git")
    for said, known in {
        sha: (sha, False),
        f"{sha}-dirty": (sha, True),
        "unknown": (None, None),
        "": (None, None),
    }.items():
        monkeypatch.setenv("MAINRUN_COMMIT", said)
        record = record_of(checkout)
        assert (record["commit"], record["dirty"]) == known, said


def test_a_secret_is_replaced_by_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, subtests: pytest.Subtests
):
    for name in ["WANDB_API_KEY", "hf_token", "MY_SECRET_2", "PGPASSWORD"]:
        with subtests.test(name=name), monkeypatch.context() as patched:
            folder = tmp_path / name
            folder.mkdir()
            patched.setenv(name, "canary-0123456789")
            text = {"a": ["x canary-0123456789 y"], "b": 1}
            assert without_secrets(text, secret_values()) == {"a": [f"x [{name}] y"], "b": 1}
            record = write(folder, command=["train", "tracking.entity=canary-0123456789"])
            assert record["command"] == ["train", f"tracking.entity=[{name}]"]


def test_the_longer_of_two_secrets_that_begin_alike_is_taken_whole():
    assert without_secrets("abcdefgh-ijk", {"abcdefgh": "A", "abcdefgh-ijk": "B"}) == "[B]"


def test_short_values_and_other_variables_are_no_secrets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setenv("SOMETHING_ELSE", "0123456789")
    assert not {"true", "0123456789"} & secret_values().keys()
