"""The lock files: what they pin, and that they agree with one another and with pyproject.toml."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LOCKS = ["cpu.txt", "cuda12.txt", "dev.txt"]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


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


@pytest.mark.parametrize("name", [*LOCKS, "host.txt", "task.txt"])
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


def test_the_same_go_task_comes_before_the_environment_and_into_it():
    block = re.compile(r"^go-task-bin==.*(?:\\\n.*)+", re.MULTILINE)
    alone, inside = ((ROOT / "requirements" / name).read_text() for name in ("task.txt", "cpu.txt"))
    assert block.findall(alone) == block.findall(inside)
    assert len(locked("task.txt")) == 1
