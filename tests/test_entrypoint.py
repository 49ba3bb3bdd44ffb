"""The first process of a container: one stop goes on, nothing is left, no code is changed.

Real processes, no container: the entrypoint is process 1 only by what it does. Commands say on
stdout where they are and go on when they are let: no test waits for a time to pass.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ENTRYPOINT = Path(__file__).parent.parent / "docker" / "entrypoint.py"
TASK = Path(sys.executable).with_name("task")
PATIENCE_SECONDS = 60

spec = importlib.util.spec_from_file_location("entrypoint", ENTRYPOINT)
assert spec is not None
assert spec.loader is not None
entrypoint = importlib.util.module_from_spec(spec)
spec.loader.exec_module(entrypoint)

# A trainer as the entrypoint sees it: the first stop begins a save, which lasts until it is let;
# then it says how many stops it saw and ends with 75.
SAVER = """
import os, signal, sys
inbox, inlet = os.pipe()
os.set_blocking(inlet, False)
signal.set_wakeup_fd(inlet)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda *_: None)
print("ready", os.getpid(), flush=True)
seen = os.read(inbox, 1)
print("saving", flush=True)
with open(sys.argv[1]):  # a FIFO: returns when the test opens its other end
    pass
os.set_blocking(inbox, False)
try:
    seen += os.read(inbox, 100)
except BlockingIOError:
    pass
print("saw", *(signal.Signals(n).name for n in seen), flush=True)
sys.exit(75)
"""


class Running:
    """The entrypoint with a command, and what a test does to it."""

    def __init__(self, command: list[object], environment: dict[str, str], stdin: int):
        self.process = subprocess.Popen(
            [sys.executable, str(ENTRYPOINT), *map(str, command)], stdin=stdin,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment},
        )  # fmt: skip

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def send(self, *stops: signal.Signals) -> None:
        """One after the other, each taken note of before the next."""
        for stop in stops:
            self.process.send_signal(stop)
            eventually(self._is_settled)

    def _is_settled(self) -> bool:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        pending = [line.split()[1] for line in status.splitlines() if "Pnd:" in line]
        return "State:\tS" in status and all(int(mask, 16) == 0 for mask in pending)

    def end(self) -> tuple[int, str, str]:
        """Exit code, what else was on stdout, stderr."""
        out, err = self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode, out.decode().strip(), err.decode().strip()


def eventually(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < until, "in vain"
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


Run = Callable[..., Running]


@pytest.fixture
def run() -> Iterator[Run]:
    started: list[Running] = []

    def run(*command: object, stdin: int = subprocess.DEVNULL, **environment: str) -> Running:
        started.append(Running(list(command), environment, stdin))
        return started[-1]

    yield run
    for one in started:
        for pid in [*entrypoint.descendants(one.process.pid), one.process.pid]:
            if one.process.poll() is None and is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        one.process.wait()


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A FIFO that holds whoever opens it until the other end is opened."""
    path = tmp_path / "gate"
    os.mkfifo(path)
    return path


@pytest.fixture
def saver(tmp_path: Path, gate: Path) -> list[object]:
    script = tmp_path / "saver.py"
    script.write_text(SAVER)
    return [sys.executable, script, gate]


# --- the end


def test_exit_code_is_the_commands_own(run: Run, subtests: pytest.Subtests):
    for script, code in [
        ("exit 0", 0),
        ("exit 7", 7),
        ("exit 75", 75),
        ("kill -9 $$", 137),
        ("kill $$", 143),
    ]:
        with subtests.test(script=script, code=code):
            assert run("sh", "-c", script).end() == (code, "", "")


def test_unknown_command_is_127_and_one_line(run: Run, tmp_path: Path):
    code, _, said = run("no-such-command", "x").end()
    assert (code, said) == (
        127,
        "mainrun: no-such-command cannot be started: No such file or directory",
    )
    code, _, said = run(tmp_path).end()
    assert (code, said) == (126, f"mainrun: {tmp_path} cannot be started: Permission denied")


def test_no_command_and_a_grace_that_is_none_are_refused(run: Run):
    assert run().end()[0] == 2
    for text in ("soon", "-1", "inf", "nan"):
        code, out, said = run("echo", "started", MAINRUN_GRACE_SECONDS=text).end()
        assert (code, out) == (2, "")
        assert said == f"mainrun: MAINRUN_GRACE_SECONDS={text}: it is a number of seconds"


# --- stop signals


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_stop_signal_reaches_the_command_as_one_sigterm(run: Run, saver, gate, stop):
    running = run(*saver)
    assert running.line().startswith("ready")
    running.send(stop)
    assert running.line() == "saving"
    gate.write_text("")
    code, out, said = running.end()
    assert (code, out) == (75, "saw SIGTERM")
    assert said == f"mainrun: {stop.name}: asking the command to stop, for up to 150 s"


def test_only_the_first_of_many_stop_signals_goes_on(run: Run, saver, gate):
    running = run(*saver)
    assert running.line().startswith("ready")
    running.send(signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    assert running.line() == "saving"
    gate.write_text("")
    assert running.end()[:2] == (75, "saw SIGTERM")


def test_go_task_and_what_it_started_save_under_two_stop_signals(
    run: Run, saver, gate, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    """go-task passes on no SIGTERM, and at its own third signal abandons what it started."""
    monkeypatch.delenv("CI", raising=False)  # it takes that for a terminal with colours
    command = " ".join(map(str, saver))
    taskfile = tmp_path / "taskfile.yml"
    taskfile.write_text(f"version: '3'\ntasks: {{train: {{cmds: ['{command}'], silent: true}}}}\n")
    running = run(TASK, "-x", "-t", taskfile, "train")
    assert running.line().startswith("ready")
    running.send(signal.SIGINT, signal.SIGTERM)
    said = running.line() + running.line()  # task's own and the trainer's, one amid the other even
    assert "saving" in said
    assert said.count("Signal received") == 1
    gate.write_text("")
    assert running.end()[:2] == (75, "saw SIGTERM")


def test_command_that_does_not_end_is_killed_after_the_grace(run: Run):
    running = run(
        "sh", "-c", "trap '' TERM; echo ready $$; while :; do sleep 60 & wait; done",
        MAINRUN_GRACE_SECONDS="0.05",
    )  # fmt: skip
    pid = int(running.line().split()[1])
    running.process.terminate()
    code, _, said = running.end()
    assert code == 137
    assert "killing what is left after 0.05 s" in said
    assert not is_alive(pid)


def test_stop_before_the_command_was_started_starts_nothing(run: Run):
    running = run("echo", "started", stdin=subprocess.PIPE, MAINRUN_SECRETS="stdin")
    catches = 1 << (signal.SIGTERM - 1)
    status = Path(f"/proc/{running.process.pid}/status")
    eventually(lambda: int(status.read_text().split("SigCgt:")[1].split()[0], 16) & catches > 0)
    running.process.terminate()
    assert running.process.wait(PATIENCE_SECONDS) == 143  # stdin is still open
    code, out, said = running.end()
    assert (code, out, said) == (143, "", "mainrun: stopped before the command was started")


def test_stop_while_gpus_are_looked_for_starts_nothing(run: Run, tmp_path: Path):
    one = nvml(tmp_path, 1, "import os; os.kill(os.getpid(), 15)")
    code, out, said = run("echo", "started", MAINRUN_GPUS="1", PYTHONPATH=one).end()
    assert (code, out, said) == (143, "", "mainrun: stopped before the command was started")


def test_command_starts_with_plain_signals_a_session_and_no_stdin(run: Run):
    show = "readlink /proc/self/fd/0; cut -d' ' -f6 /proc/$$/stat; echo $$;"
    show += "grep -E 'Sig(Blk|Ign)' /proc/self/status"
    code, out, _ = run("sh", "-c", show, stdin=subprocess.PIPE).end()
    stdin, session, pid, *masks = out.split("\n")
    assert (code, stdin, session) == (0, "/dev/null", pid)
    classic = (1 << 31) - 1  # above are two of the C library's own
    assert [int(line.split()[1], 16) & classic for line in masks] == [0, 0]


# --- what the command leaves


def test_group_members_that_outlive_the_command_are_waited_for(run: Run, saver, gate):
    """The command dies of the stop at once; what it started is still saving."""
    member = " ".join(map(str, saver))
    running = run("sh", "-c", f"{member} & wait")
    pid = int(running.line().split()[1])
    running.send(signal.SIGTERM)
    assert running.line() == "saving"
    eventually(lambda: entrypoint.descendants(running.process.pid) == [pid])
    assert running.process.poll() is None
    gate.write_text("")
    assert running.end()[:2] == (143, "saw SIGTERM")


def test_group_members_are_asked_to_end_when_the_command_has(run: Run, saver, gate):
    member = " ".join(map(str, saver))
    hold = gate.with_name("hold")
    os.mkfifo(hold)
    running = run("sh", "-c", f"{member} & read _ < {hold}; exit 5")
    assert running.line().startswith("ready")
    hold.write_text("\n")
    assert running.line() == "saving"
    running.send(signal.SIGTERM)
    gate.write_text("")
    code, out, said = running.end()
    assert (code, out) == (5, "saw SIGTERM")
    assert said == "mainrun: the command left processes; they have 150 s to end"


ORPHAN = (
    "import os, sys; inbox, inlet = os.pipe(); os.fork() and os._exit(os.read(inbox, 1) != b'x');"
    "os.setsid(); print(os.getpid(), flush=True); os.write(inlet, b'x');"
    "open(sys.argv[1]); print('done', flush=True)"
)


def test_orphan_that_left_the_group_is_waited_for(run: Run, gate: Path):
    running = run(sys.executable, "-c", ORPHAN, gate)
    pid = int(running.line())
    eventually(lambda: entrypoint.descendants(running.process.pid) == [pid])
    running.send(signal.SIGTERM)
    assert is_alive(pid), "it is no member of the group, so it was not asked"
    gate.write_text("")
    assert running.end()[:2] == (0, "done")


def test_orphan_that_does_not_end_is_killed_after_the_grace(run: Run, gate: Path):
    running = run(sys.executable, "-c", ORPHAN, gate, MAINRUN_GRACE_SECONDS="0.05")
    pid = int(running.line())
    assert running.end()[:2] == (0, "")
    assert not is_alive(pid)


# --- secrets


def test_secrets_reach_the_command_and_nothing_else(run: Run):
    name, canary = "WANDB_API_KEY", "canary-7f3a"
    show = f"echo ${name}; echo \"[$MAINRUN_SECRETS]\"; tr '\\0' '\\n' < /proc/$PPID/environ"
    running = run("sh", "-c", show, stdin=subprocess.PIPE, MAINRUN_SECRETS="stdin")
    assert running.process.stdin is not None
    running.process.stdin.write(json.dumps({name: canary, "HF_TOKEN": "x"}).encode())
    code, out, said = running.end()
    own, rest, *entrypoints = out.split("\n")
    assert (code, own, rest, said) == (0, canary, "[]", "")
    assert "MAINRUN_SECRETS=stdin" in entrypoints
    assert canary not in "\n".join(entrypoints)


def test_stdin_that_holds_no_secrets_is_refused_and_not_shown(run: Run, subtests: pytest.Subtests):
    for text in ["", "canary", '["canary"]', '{"A": 1}', '{"A=B": "canary"}', '{"A": "c\\u0000"}']:
        with subtests.test(text=text):
            running = run("echo", "started", stdin=subprocess.PIPE, MAINRUN_SECRETS="stdin")
            assert running.process.stdin is not None
            running.process.stdin.write(text.encode())
            code, out, said = running.end()
            assert (code, out) == (2, "")
            assert said == (
                "mainrun: MAINRUN_SECRETS=stdin, but stdin holds no JSON object of names and texts"
            )


# --- GPUs


def nvml(folder: Path, count: int, init: str = "pass") -> str:
    """Where to find an NVML that sees so many GPUs."""
    (folder / "pynvml.py").write_text(
        f"class NVMLError(Exception): ...\ndef nvmlInit():\n    {init}\n"
        f"def nvmlDeviceGetCount(): return {count}\n"
    )
    return str(folder)


def test_gpus_asked_for_and_absent_end_before_the_command(run: Run):
    code, out, said = run("echo", "started", MAINRUN_GPUS="999").end()
    assert (code, out) == (2, "")
    assert said.startswith("mainrun: 999 GPUs were asked for, but ")
    assert "\n" not in said


def test_fewer_gpus_than_asked_for_are_an_error(run: Run, tmp_path: Path):
    two = nvml(tmp_path, 2)
    for asked in ("1", "2"):
        assert run("echo", "started", MAINRUN_GPUS=asked, PYTHONPATH=two).end() == (
            0,
            "started",
            "",
        )
    code, out, said = run("echo", "started", MAINRUN_GPUS="3", PYTHONPATH=two).end()
    assert (code, out) == (2, "")
    assert said.startswith("mainrun: 3 GPUs were asked for, but the container sees 2; ")


def test_image_without_cuda_says_so_where_a_gpu_is_asked_for(run: Run, tmp_path: Path):
    one = nvml(tmp_path, 1)
    asked = {"MAINRUN_GPUS": "1", "MAINRUN_DEVICE": "cpu", "PYTHONPATH": one}
    code, _, said = run("echo", "started", **asked).end()
    assert code == 2
    assert said.startswith("mainrun: 1 GPU was asked for, but this image has no CUDA; ")


def test_no_gpu_is_looked_for_where_none_was_asked_for(run: Run, subtests: pytest.Subtests):
    for asked, code in [("", 0), ("none", 0), ("two", 2), ("0", 2)]:
        with subtests.test(asked=asked, code=code):
            assert run("true", MAINRUN_GPUS=asked).end()[0] == code


# --- health


@pytest.fixture
def container(tmp_path: Path) -> Callable[[], bool]:
    """A tree as in the image; whether its health check, with half the age of process 1, is well."""
    (tmp_path / "docker").mkdir()
    (tmp_path / "runs").mkdir()
    copy = shutil.copy(ENTRYPOINT, tmp_path / "docker")
    limit = (time.time() - entrypoint.container_start()) / 2

    def is_well(limit: float = limit) -> bool:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(copy), "--health"],
            env={**os.environ, "MAINRUN_HEALTH_SECONDS": str(limit)},
        )
        assert done.returncode in (0, 1)
        return done.returncode == 0

    return is_well


def record(tmp_path: Path, name: str, written: float) -> Path:
    path = tmp_path / "runs" / name / "events.jsonl"
    path.parent.mkdir(parents=True)
    path.touch()
    os.utime(path, (written, written))
    return path


def test_container_without_a_record_is_healthy_while_it_is_young(container):
    assert container(limit=1e9)
    assert not container()


def test_container_is_healthy_while_its_newest_record_is(container, tmp_path: Path):
    record(tmp_path, "old", written=0)
    assert not container()
    record(tmp_path, "new", written=time.time())
    assert container()


def test_another_containers_record_makes_no_container_healthy(container, tmp_path: Path):
    record(tmp_path, "theirs", written=time.time())
    with record(tmp_path, "sweep/ours", written=0).open():
        assert not container()
    with record(tmp_path, "ours", written=time.time()).open():
        assert container()
