"""The lock files, `requirements/install.py`, and the taskfile that calls it."""

import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LOCKS = ["cpu.txt", "cuda12.txt", "dev.txt"]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]

spec = importlib.util.spec_from_file_location("install", ROOT / "requirements" / "install.py")
assert spec is not None
assert spec.loader is not None
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)


def locked(name: str) -> list[Requirement]:
    """The requirements of a lock file, each on one line and without its hashes."""
    text = (ROOT / "requirements" / name).read_text().replace("\\\n", " ")
    lines = (line.split("--hash")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def versions(name: str, python: str) -> dict[str, list[str]]:
    """Package to the versions that a Linux machine with that Python installs."""
    environment = {
        "python_full_version": f"{python}.0", "python_version": python, "sys_platform": "linux",
        "platform_machine": "x86_64", "platform_python_implementation": "CPython",
    }  # fmt: skip
    found: dict[str, list[str]] = {}
    for requirement in locked(name):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            found.setdefault(requirement.name, []).append(str(requirement.specifier))
    return found


@pytest.mark.parametrize("name", [*LOCKS, "host.txt"])
def test_lock_pins_every_package_by_hash_and_names_no_address(name):
    text = (ROOT / "requirements" / name).read_text()
    assert not re.search(r"https?:|file:|://|--(extra-)?index|--find-links|--trusted| @ ", text)
    blocks = re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip())
    loose = [b for b in blocks if not re.match(r"[a-z0-9.-]+==\S+( ; .+)? \\\n +--hash=sha256:", b)]
    assert loose == []


@pytest.mark.parametrize("python", PYTHONS)
def test_locks_agree_wherever_they_share_a_package(python):
    cpu, cuda12, dev = (versions(name, python) for name in LOCKS)
    assert cpu.keys() <= cuda12.keys()
    assert cpu.keys() <= dev.keys()
    assert {name: dev[name] for name in cpu} == cpu
    assert {name: found for name, found in cuda12.items() if name in dev} == {
        name: found for name, found in dev.items() if name in cuda12
    }


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", LOCKS)
def test_lock_gives_one_version_of_each_package_to_each_python(name, python):
    found = versions(name, python)
    assert {package for package, pins in found.items() if len(pins) != 1} == set()
    jax = tuple(int(part) for part in found["jax"][0].removeprefix("==").split("."))
    assert jax >= (0, 11) if python != "3.11" else jax >= (0, 10, 2)
    assert "torch" not in found


def test_lock_satisfies_what_pyproject_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for name, asked in [("cpu.txt", "train"), ("cuda12.txt", "cuda12"), ("dev.txt", "dev")]:
        pins = versions(name, "3.13")
        for line in project["dependencies"] + extras[asked] + extras["editable"]:
            wanted = Requirement(line)
            if wanted.name != "mainrun":
                pin = pins[wanted.name.lower()][0].removeprefix("==")
                assert wanted.specifier.contains(pin), f"{name}: {line}, but {pin}; run `task lock`"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_host_needs_a_part_of_the_lock_and_no_jax(python):
    host, dev = versions("host.txt", python), versions("dev.txt", python)
    assert host.items() <= dev.items()
    assert not {"jax", "jaxlib", "numpy", "wandb", "torch"} & host.keys()


def test_host_lock_satisfies_what_pyproject_asks_for():
    test_lock_pins_every_package_by_hash_and_names_no_address("host.txt")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"] + project["optional-dependencies"]["editable"]:
        wanted = Requirement(line)
        (pin,) = versions("host.txt", "3.13")[wanted.name.lower()]
        assert wanted.specifier.contains(pin.removeprefix("==")), f"{line}, but {pin}"


# --- which Python


class Machine:
    """A machine whose interpreters are shell scripts that answer as they are told."""

    def __init__(self, root: Path):
        self.root = root
        for folder in ("bin", "shims", "home"):
            (root / folder).mkdir()

    def has(self, place: str, version: str | None, status: int = 0) -> Path:
        """An interpreter at `place` that calls itself `version` and ends with `status`."""
        path = self.root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers = (version or "0").replace(".", ", ")
        path.write_text(f"#!/bin/sh\necho '[[{numbers}], \"{path}\"]'\nexit {status}\n")
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
    assert setup.suitable_python(setup.MINORS) == ("3.13.2", str(newest))


def test_shim_that_does_not_run_is_passed_over_for_the_same_name_behind_it(machine):
    machine.has("shims/python3.13", None, status=127)
    behind = machine.has("bin/python3.13", "3.13.0")
    assert setup.suitable_python(setup.MINORS) == ("3.13.0", str(behind))


def test_newest_python_that_cannot_make_an_environment_gives_way_to_an_older_one(machine):
    machine.has("bin/python3.14", "3.14.0", status=1)
    older = machine.has("bin/python3.12", "3.12.7")
    assert setup.suitable_python(setup.MINORS) == ("3.12.7", str(older))


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
    assert setup.suitable_python(setup.MINORS) == ("3.13.10", str(hidden))


def test_python_that_is_not_what_its_name_says_is_not_taken_for_it(machine):
    machine.has("bin/python3.14", "3.10.2")
    honest = machine.has("bin/python3.11", "3.11.2")
    assert setup.suitable_python(setup.MINORS) == ("3.11.2", str(honest))


def test_machine_without_a_suitable_python_is_told_in_one_line(machine, capsys):
    machine.has("bin/python3.10", "3.10.2")
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

        def run(self, command, what):
            if "venv" in command:
                python = tmp_path / ".venv" / "bin" / "python"
                python.parent.mkdir(parents=True, exist_ok=True)
                python.write_text("#!/bin/sh\necho 3.13.0\n")
                python.chmod(0o755)
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


# --- the taskfile

TASKS = yaml.safe_load((ROOT / "taskfile.yml").read_text())["tasks"]


@pytest.mark.parametrize("name", sorted(TASKS.keys() - {"default"}))
def test_every_task_says_what_it_does(name):
    assert TASKS[name]["desc"]


@pytest.mark.parametrize("name", TASKS.keys())
def test_every_task_that_uses_the_environment_makes_it_first(name):
    uses = any(str(command).startswith(".venv/bin/") for command in TASKS[name]["cmds"])
    assert not uses or {"setup", "dev"} & set(TASKS[name]["deps"])
