"""`requirements/install.py`: with which Python, when, and by what it installs."""

import fcntl
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

spec = importlib.util.spec_from_file_location("install", ROOT / "requirements" / "install.py")
assert spec is not None
assert spec.loader is not None
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)


# --- which Python


class Machine:
    """A machine whose interpreters are shell scripts that answer as they are told."""

    def __init__(self, root: Path):
        self.root = root
        for folder in ("bin", "shims", "home"):
            (root / folder).mkdir()

    def has(
        self,
        place: str,
        version: str | None,
        status: int = 0,
        ensurepip: bool = True,
        pip: bool = False,
    ) -> Path:
        """An interpreter at `place` that calls itself `version` and ends with `status`."""
        path = self.root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers = (version or "0").replace(".", ", ")
        answer = f'[[{numbers}], "{path}", {json.dumps(ensurepip)}, {json.dumps(pip)}]'
        path.write_text(f"#!/bin/sh\necho '{answer}'\nexit {status}\n")
        path.chmod(0o755)
        return path

    def has_uv(self, cache: str = "cache") -> Path:
        """A uv whose cache is in `cache`."""
        path = self.root / "bin" / "uv"
        path.write_text(f"#!/bin/sh\necho '{self.root / cache}'\n")
        path.chmod(0o755)
        return path


@pytest.fixture
def machine(tmp_path, monkeypatch):
    found = Machine(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/shims:{tmp_path}/bin")
    monkeypatch.setenv("HOME", f"{tmp_path}/home")
    for name in ("PYENV_ROOT", "XDG_DATA_HOME", "MAINRUN_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    return found


def test_newest_python_is_taken(machine):
    machine.has("bin/python3.11", "3.11.9")
    newest = machine.has("bin/python3.13", "3.13.2")
    machine.has("bin/python3.12", "3.12.7")
    assert setup.suitable_python(setup.MINORS) == ("3.13.2", str(newest), [])


def test_shim_that_does_not_run_is_passed_over_for_the_same_name_behind_it(machine):
    machine.has("shims/python3.13", None, status=127)
    behind = machine.has("bin/python3.13", "3.13.0")
    assert setup.suitable_python(setup.MINORS) == ("3.13.0", str(behind), [])


def test_newest_python_that_cannot_make_an_environment_gives_way_to_an_older_one(machine):
    machine.has("bin/python3.14", "3.14.0", status=1)
    older = machine.has("bin/python3.12", "3.12.7")
    assert setup.suitable_python(setup.MINORS) == ("3.12.7", str(older), [])


@pytest.mark.parametrize(
    "place",
    [
        "home/.pyenv/versions/3.13.10/bin/python",
        "home/.local/share/uv/python/cpython-3.13.10-linux-x86_64-gnu/bin/python3.13",
    ],
)
def test_pyenv_and_uv_are_searched_and_the_latest_patch_wins(machine, place):
    machine.has("bin/python3.13", "3.13.9")
    hidden = machine.has(place, "3.13.10")
    assert setup.suitable_python(setup.MINORS) == ("3.13.10", str(hidden), [])


def test_python_that_is_not_what_its_name_says_is_not_taken_for_it(machine):
    machine.has("bin/python3.14", "3.10.2")
    honest = machine.has("bin/python3.11", "3.11.2")
    assert setup.suitable_python(setup.MINORS) == ("3.11.2", str(honest), [])


def test_debian_without_ensurepip_gets_an_environment_without_pip(machine):
    """Its pip, where there is one, installs into that from outside; so does uv."""
    debian = machine.has("bin/python3.13", "3.13.5", ensurepip=False, pip=True)
    bare = ("3.13.5", str(debian), ["--without-pip"])
    assert setup.suitable_python(setup.MINORS) == bare

    machine.has("bin/python3.13", "3.13.5", ensurepip=False)
    older = machine.has("bin/python3.11", "3.11.2")
    assert setup.suitable_python(setup.MINORS) == ("3.11.2", str(older), [])

    machine.has_uv()
    assert setup.suitable_python(setup.MINORS) == bare


def test_machine_without_a_suitable_python_is_told_in_one_line(machine, capsys):
    machine.has("bin/python3.10", "3.10.2")
    machine.has("bin/python3.12", "3.12.2", ensurepip=False)
    with pytest.raises(SystemExit) as stopped:
        setup.suitable_python(setup.MINORS)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no Python 3.11 to 3.14" in said


def test_device_is_cuda_only_where_nvidia_smi_answers(machine, monkeypatch):
    assert setup.device() == "cpu"
    machine.has("bin/nvidia-smi", None, status=9)
    assert setup.device() == "cpu"
    machine.has("bin/nvidia-smi", None)
    assert setup.device() == "cuda12"
    monkeypatch.setenv("MAINRUN_DEVICE", "cpu")
    assert setup.device() == "cpu"


# --- when to install


@pytest.fixture
def project(machine, tmp_path, monkeypatch):
    """A project whose environments are made by a stand-in that notes what it was asked."""
    (tmp_path / "requirements").mkdir()
    for name in ("pyproject.toml", "requirements/cpu.txt", "requirements/dev.txt"):
        (tmp_path / name).write_text("as it was")
    machine.has("bin/python3.13", "3.13.0")
    monkeypatch.setattr(setup, "ROOT", tmp_path)

    class Project:
        fails_at = ""

        def run(self, command, what, venv):
            if "venv" in command:
                python = tmp_path / ".venv" / "bin" / "python"
                python.parent.mkdir(parents=True, exist_ok=True)
                python.write_text("#!/bin/sh\necho 3.13.0\n")
                python.chmod(0o755)
                python.with_name("pip").touch()
            if what == self.fails_at:
                raise KeyboardInterrupt
            self.done.append(what)

        def needs(self, *files):
            """What an installation of these files did."""
            self.done = []
            setup.install(tmp_path / ".venv", list(files), setup.MINORS)
            return self.done

    found = Project()
    monkeypatch.setattr(setup, "run", found.run)
    return found


TRAIN = ("cpu.txt", "pyproject.toml")
DEV = ("cpu.txt", "dev.txt", "pyproject.toml")


def test_second_setup_does_nothing(project):
    assert project.needs(*TRAIN) == [".venv", "cpu.txt", "pyproject.toml"]
    assert project.needs(*TRAIN) == []


def test_tools_come_only_when_asked_for_and_stay(project):
    project.needs(*TRAIN)
    assert project.needs(*DEV) == ["dev.txt"]
    assert project.needs(*TRAIN) == []
    assert project.needs(*DEV) == []


def test_only_what_changed_is_installed_again(project, tmp_path):
    project.needs(*DEV)
    (tmp_path / "pyproject.toml").write_text("changed")
    assert project.needs(*DEV) == ["pyproject.toml"]
    (tmp_path / "requirements" / "cpu.txt").write_text("changed")
    assert project.needs(*DEV) == ["cpu.txt"]


@pytest.mark.parametrize("broken_at", [".venv", "cpu.txt", "pyproject.toml"])
def test_interrupted_setup_is_made_anew(project, broken_at):
    project.fails_at = broken_at
    with pytest.raises(KeyboardInterrupt):
        project.needs(*TRAIN)
    project.fails_at = ""
    assert project.needs(*TRAIN) == [".venv", "cpu.txt", "pyproject.toml"]


def test_interrupted_update_is_made_anew(project, tmp_path):
    project.needs(*TRAIN)
    (tmp_path / "requirements" / "cpu.txt").write_text("changed")
    project.fails_at = "cpu.txt"
    with pytest.raises(KeyboardInterrupt):
        project.needs(*TRAIN)
    project.fails_at = ""
    assert project.needs(*TRAIN) == [".venv", "cpu.txt", "pyproject.toml"]


@pytest.mark.parametrize("answer", ["echo 3.13.1", "exit 127"], ids=["changed", "gone"])
def test_environment_whose_python_changed_or_went_is_made_anew(project, tmp_path, answer):
    project.needs(*TRAIN)
    (tmp_path / ".venv" / "bin" / "python").write_text(f"#!/bin/sh\n{answer}\n")
    assert project.needs(*TRAIN) == [".venv", "cpu.txt", "pyproject.toml"]


def test_environment_made_for_the_other_device_is_made_anew(project, tmp_path):
    project.needs(*TRAIN)
    (tmp_path / "requirements" / "cuda12.txt").write_text("CUDA")
    assert project.needs("cuda12.txt", "pyproject.toml")[0] == ".venv"


def test_host_has_an_environment_of_its_own(project, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(setup, "install", lambda venv, files, minors: asked.append((venv, files)))
    monkeypatch.setattr(sys, "argv", ["install.py", "host"])
    setup.main()
    assert asked == [(tmp_path / ".venv-host", ["host.txt", "pyproject.toml"])]


def test_wheels_come_before_the_project_and_are_not_installed_again_with_it(project, monkeypatch):
    monkeypatch.setenv("MAINRUN_DEVICE", "cpu")
    for word, done in [("wheels", [".venv", "cpu.txt"]), ("train", ["pyproject.toml"])]:
        project.done = []
        monkeypatch.setattr(sys, "argv", ["install.py", word])
        setup.main()
        assert project.done == done


def test_a_workflows_page_says_why_it_could_not_be_set_up(project, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "page.md"))
    with pytest.raises(SystemExit):
        setup.stop("no suitable Python")
    assert "    no suitable Python\n" in (tmp_path / "page.md").read_text()


def test_unknown_word_is_told_what_there_is_to_install(project, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["install.py", "hots"])
    with pytest.raises(SystemExit) as stopped:
        setup.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "setup: say what to install: train, wheels, dev, host or oracle\n"
    )


# --- how to install


def test_uv_installs_where_it_is_and_without_a_cache_where_that_cannot_be_written(machine):
    python = machine.has(".venv/bin/python", "3.13.0")
    uv = str(machine.has_uv())
    install = ["pip", "install", "--compile-bytecode", "--python", str(python)]
    assert setup.installer(python) == [uv, *install]
    machine.has_uv(cache="bin/uv/no-folder")
    assert setup.installer(python) == [uv, "--no-cache", *install]


def test_pip_of_the_environment_comes_before_the_one_beside_its_python(machine):
    python = machine.root / ".venv" / "bin" / "python"
    outside = machine.has("bin/python3.13", "3.13.0", ensurepip=False, pip=True)
    python.parent.mkdir(parents=True)
    python.write_text(outside.read_text().replace("true", "false"))  # as a venv's answers
    python.chmod(0o755)
    pip = ["-m", "pip", "--disable-pip-version-check", "--no-input"]
    assert setup.installer(python) == [str(outside), *pip, "--python", str(python), "install"]
    python.with_name("pip").touch()
    assert setup.installer(python) == [str(python), *pip, "install"]


def test_environment_that_nothing_installs_into_is_told_in_one_line(machine, capsys):
    with pytest.raises(SystemExit):
        setup.installer(machine.has(".venv/bin/python", "3.13.0"))
    assert re.fullmatch(r"setup: neither uv nor a pip .+\n", capsys.readouterr().err)


@pytest.mark.medium
def test_this_python_makes_an_environment_without_pip_and_installs_into_it(tmp_path, monkeypatch):
    """The real way of a Debian without ensurepip, with a package that needs no index."""
    monkeypatch.setenv("PATH", "/nowhere")
    found = setup.probe(sys.executable)
    assert found is not None
    python = tmp_path / ".venv" / "bin" / "python"
    subprocess.run([found[1], "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    if not setup.probe(found[1])[3]:
        pytest.skip(f"no pip 22.3 beside {found[1]}: python -m ensurepip")
    (tmp_path / "nothing.txt").write_text("")
    setup.run([*setup.installer(python), "-r", str(tmp_path / "nothing.txt")], "it", tmp_path)
    assert not python.with_name("pip").exists()

    # A pip in an environment is none beside its Python.
    (site,) = (tmp_path / ".venv" / "lib").glob("python3*/site-packages/")
    (site / "pip").mkdir()
    for name in ("__init__.py", "__pip-runner__.py"):
        (site / "pip" / name).touch()
    assert setup.probe(str(python))[3] is False


def test_two_at_once_do_the_work_once(project, monkeypatch):
    """The second says that it waits, then finds what the first has done."""
    monkeypatch.setenv("MAINRUN_DEVICE", "cpu")
    monkeypatch.setattr(sys, "argv", ["install.py", "train"])
    project.needs(*TRAIN)
    project.done = []
    install, said = setup.install, []

    def install_under_the_lock(*arguments):
        with open(setup.__file__) as third, pytest.raises(BlockingIOError):
            fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
        install(*arguments)

    monkeypatch.setattr(setup, "install", install_under_the_lock)
    with open(setup.__file__) as first:
        fcntl.flock(first, fcntl.LOCK_EX)

        def say(line):
            said.append(line)
            fcntl.flock(first, fcntl.LOCK_UN)

        monkeypatch.setattr(setup, "say", say)
        setup.main()
    assert said == ["another task is at it; waiting for that"]
    assert project.done == []
