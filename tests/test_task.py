"""The script `task` on machines of every kind, and the taskfile that it hands to go-task.

A machine is a PATH: the few programs that any has, and stand-ins for go-task, uv and Python that
do what the real ones would with the words that they get.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.medium  # each starts processes

ROOT = Path(__file__).parent.parent
TASKS = yaml.safe_load((ROOT / "taskfile.yml").read_text())["tasks"]
BESIDE = Path(sys.executable).parent
EVERYWHERE = ["sh", "dirname", "readlink", "sed", "uname", "mktemp", "mkdir", "rm", "mv", "tail"]
STAND_INS = ["env", "chmod", "cp", "ls", "sleep", "wc"]  # what the stand-ins below need besides

GO_TASK = """
[ "$1" != --version ] || { echo "VERSION"; exit 0; }
echo "$$|$(pwd)|$*"
exit 7
"""
# Of `… install --target DIR …`: what go-task's wheel leaves there.
INSTALL = """
env | sed -n 's/^UV_NO_CACHE=/no cache /p' >>"$CALLS"
echo "${0##*/} $*" >>"$CALLS"
while [ "$1" != --target ]; do shift; done
mkdir -p "$2/bin"
printf '%s\\n' '#!/bin/sh' 'echo "$$|$(pwd)|$*"' 'exit 7' >"$2/bin/task"
chmod +x "$2/bin/task"
"""
UV = (
    """
[ "$*" != "cache dir" ] || { echo "$CACHE"; exit 0; }
"""
    + INSTALL
)
PYTHON = (
    """
[ "$*" != "-m pip --version" ] || exit PIP
[ "$2" != venv ] || { exit VENV; }
"""
    + INSTALL
)


class Machine:
    """A checkout in `mainrun here`, and a PATH."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin = root / "bin"
        self.bin.mkdir()
        for name in EVERYWHERE + STAND_INS:
            (self.bin / name).symlink_to(shutil.which(name) or "/nowhere")
        self.checkout = root / "mainrun here"
        (self.checkout / "requirements").mkdir(parents=True)
        for name in ("task", "taskfile.yml", "requirements/task.txt"):
            shutil.copy(ROOT / name, self.checkout / name)
        self.environment = {
            "PATH": str(self.bin), "CALLS": str(root / "calls"), "CACHE": str(root / "cache"),
        }  # fmt: skip
        self.has("python3", PYTHON.replace("PIP", "1").replace("VENV", "1"))

    def has(self, name: str, text: str, place: Path | None = None) -> None:
        program = (place or self.bin) / name
        program.write_text(f"#!/bin/sh\n{text}")
        program.chmod(0o755)

    def start(self, *words: str, script: Path | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [script or self.checkout / "task", *words], cwd=self.root, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ends(self, *words: str, script: Path | None = None) -> tuple[int, str, str]:
        """Exit code, what go-task was asked, and what the script said itself."""
        process = self.start(*words, script=script)
        out, err = process.communicate(timeout=60)
        if out:
            pid, folder, out = out.split("|", 2)
            assert int(pid) == process.pid, "signals to the script reach go-task"
            assert folder == str(self.root)
        return process.returncode, out, err

    def asked(self, *words: str) -> tuple[int, str]:
        """What `ends` says where go-task got these words."""
        return 7, " ".join(["--taskfile", f"{self.checkout}/taskfile.yml", *words]) + "\n"

    def installs(self) -> list[str]:
        """Which programs installed something, by name."""
        calls = self.root / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        return [line.split()[0] for line in lines]

    def tools(self) -> list[str]:
        folder = self.checkout / ".tools"
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("version", ["3.54.0", "3.54.2+pypi", "Task version: v3.60.1 (h1:x=)"])
def test_go_task_on_path_is_taken_with_all_words_its_exit_code_and_its_place(machine, version):
    machine.has("task", GO_TASK.replace("VERSION", version))
    words = ("-x", "train", "--", "a b", "c=d")
    assert machine.ends(*words) == (*machine.asked(*words), "")
    assert machine.tools() == []


@pytest.mark.parametrize("version", ["3.43.3", "2.6.2", "3.4.1", "4.0.0", "Task version: v3.9", ""])
def test_an_older_go_task_and_another_program_of_that_name_are_not_taken(machine, version):
    machine.has("task", GO_TASK.replace("VERSION", version))
    machine.has("uv", UV)
    assert machine.ends("train")[:2] == machine.asked("train")
    assert machine.installs() == ["uv"]


def test_checkout_on_path_does_not_ask_itself_for_ever(machine):
    machine.environment["PATH"] = f"{machine.checkout}:{machine.bin}"
    machine.has("uv", UV)
    assert machine.ends("train")[:2] == machine.asked("train")


def test_uv_comes_first_then_pip_then_the_pip_of_a_venv(machine):
    code, _, said = machine.ends("train")
    assert code == 2
    assert said == (
        "task: neither pip nor uv on this machine: "
        "install one, on Debian: apt-get install python3-pip\n"
    )

    venv = f'mkdir -p "$3/bin" && cp "{machine.bin}/inner" "$3/bin/python"; exit 0'
    machine.has("inner", INSTALL)
    machine.has("python3", PYTHON.replace("PIP", "1").replace("exit VENV", venv))
    assert_fetched(machine, by="python", said="the pip of a venv")

    machine.has("python3", PYTHON.replace("PIP", "0"))
    assert_fetched(machine, by="python3", said="pip")

    machine.has("uv", UV)
    assert_fetched(machine, by="uv", said="uv")


def assert_fetched(machine: Machine, by: str, said: str) -> None:
    """go-task comes once, by that program, is called, and nothing else is left."""
    line = f"task: putting go-task 3.54.0 (16 MB) into .tools, with {said}\n"
    assert machine.ends("train") == (*machine.asked("train"), line)
    assert machine.ends("train") == (*machine.asked("train"), "")
    assert machine.installs() == [by]
    assert len(machine.tools()) == 1
    shutil.rmtree(machine.checkout / ".tools")
    (machine.root / "calls").unlink()


def test_every_package_is_checked_by_its_hash(machine):
    machine.has("uv", UV)
    machine.ends("train")
    (call,) = (machine.root / "calls").read_text().splitlines()
    assert "--require-hashes" in call
    assert call.endswith(f"-r {machine.checkout}/requirements/task.txt")


def test_machine_without_python_is_told_in_one_line(machine):
    machine.has("uv", UV)
    (machine.bin / "python3").unlink()
    code, _, said = machine.ends("train")
    assert code == 2
    assert said.startswith("task: no python3 on this machine: ")
    assert said.count("\n") == 1


def test_uv_has_no_cache_where_no_home_can_be_written(machine):
    machine.has("uv", UV)
    machine.environment["CACHE"] = str(machine.bin / "uv" / "no-folder")
    assert machine.ends("train")[:2] == machine.asked("train")
    assert machine.installs() == ["no", "uv"]


def test_what_could_not_be_fetched_is_told_with_its_last_lines_and_tried_again(machine):
    machine.has("uv", '[ "$1" = cache ] || { echo "no such host"; exit 3; }\n')
    code, _, said = machine.ends("train")
    assert code == 1
    _, reason, line = said.splitlines()
    assert reason == "    no such host"
    assert "UV_DEFAULT_INDEX" in line
    assert machine.tools() == []
    machine.has("uv", UV)
    assert machine.ends("train")[:2] == machine.asked("train")


def test_two_at_once_both_end_well(machine):
    """Each has begun to fetch before either has finished."""
    both = 'mkdir "$CALLS.$$"; until [ "$(ls -d "$CALLS".* | wc -l)" = 2 ]; do sleep 0.01; done\n'
    machine.has("uv", UV.replace("mkdir", both + "mkdir", 1))
    processes = [machine.start("train") for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [7, 7]
    assert len(machine.tools()) == 1


def test_script_is_called_by_a_link_too(machine):
    machine.has("task", GO_TASK.replace("VERSION", "3.54.0"))
    link = machine.root / "link"
    link.symlink_to(machine.checkout / "task")
    assert machine.ends("train", script=link)[:2] == machine.asked("train")


def test_the_real_go_task_lists_the_tasks_and_hands_on_exit_codes(machine):
    """From .tools, with no `task` on PATH."""
    system = os.uname()
    tools = machine.checkout / ".tools"
    tools.mkdir()
    (tools / f"go-task-3.54.0-{system.sysname}-{system.machine}").symlink_to(BESIDE / "task")
    listed = subprocess.run(
        [machine.checkout / "task"],
        env=machine.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(f"* {name}:" in listed.stdout for name in TASKS if name != "default")
    machine.has("python3", "exit 3")
    assert [machine.start("-x", "setup").wait(60), machine.start("setup").wait(60)] == [3, 201]


@pytest.mark.parametrize("script", ["task", "tests/bare_root.sh"])
def test_scripts_are_clean_and_can_be_run(script):
    done = subprocess.run(
        [BESIDE / "shellcheck", "--severity=style", ROOT / script], capture_output=True, text=True
    )
    assert done.stdout == ""
    assert os.access(ROOT / script, os.X_OK)


@pytest.mark.parametrize("name", sorted(TASKS.keys() - {"default"}))
def test_every_task_says_what_it_does(name):
    assert TASKS[name]["desc"]


@pytest.mark.parametrize("name", TASKS.keys())
def test_every_task_that_uses_the_environment_makes_it_first(name):
    uses = any(str(command).startswith(".venv/bin/") for command in TASKS[name]["cmds"])
    assert not uses or {"setup", "dev"} & set(TASKS[name]["deps"])
