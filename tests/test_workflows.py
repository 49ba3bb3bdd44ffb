"""Every workflow file, run by act: the real steps, the real command, an Engine without containers.

What a container does is a function of the test (tests/workflows/engine_server.py); all else is what
a dispatch runs, in a fresh clone. With the real Engine: tests/test_jobs.py.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests import runner_cancellation
from tests.conftest import COMMAND
from tests.test_dispatch import HOSTILE
from tests.workflows import act, policy
from tests.workflows.engine_server import OutOfMemory, Process
from tests.workflows.machine import SECRET, Machine, at


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> act.Source:
    """This tree as one commit; its `.ci/run` says only that it ran."""
    act.binary("act")
    files = {".ci/run": '#!/bin/sh\necho ".ci/run $CI" >> "${STAND_IN_LOG:?}"\n'}
    return act.Source(tmp_path_factory.mktemp("source"), files)


@pytest.fixture
def machine(tmp_path: Path, source: act.Source) -> Iterator[Machine]:
    with at(tmp_path, source) as found:
        yield found


@pytest.fixture
def trains(finished_run: Path) -> Callable[[Process], int]:
    """A program that leaves what a training leaves."""

    def program(process: Process) -> int:
        process.say("step 40 of 40")
        shutil.copytree(finished_run, process.run_dir)
        return 0

    return program


# ---------------------------------------------------------------------------------------------
# It works


def test_a_training_is_dispatched_and_its_run_comes_back_and_goes_on(machine: Machine, trains):
    told = []

    def program(process: Process) -> int:
        told.append(process.read_stdin())
        process.say(f"the key is {SECRET}")
        return trains(process)

    machine.engine.program = program
    done = machine.dispatch("train", overrides="training.max_steps=40 tracking.name='a b'")
    assert done.succeeded, done
    assert done.steps == {
        "Check out": "success", "Set up": "success", "Check": "success", "Image": "success",
        "Run": "success", "Stop": "success", "Summary": "success", "Upload": "success",
    }  # fmt: skip
    (body,) = machine.engine.created
    assert body["Image"] == f"mainrun:{machine.source.sha}"
    assert body["Cmd"] == [
        "task", "-x", "train", "--", "config/base/quickstart.yaml", "--run-dir",
        "runs/quickstart-1-1", "training.max_steps=40", "tracking.name=a b",
    ]  # fmt: skip
    assert policy.container_findings(body, secrets=[SECRET], uid=os.getuid()) == []
    assert json.loads(told[0]) == {"WANDB_API_KEY": SECRET}
    assert "step 40 of 40" in done.log
    files = machine.artifact()
    assert {"job.json", "job.log", "runs/quickstart-1-1/summary.json"} <= files.keys()
    assert machine.job()["ending"]["kind"] == "finished"
    assert "finished" in done.summary
    assert machine.left_behind() == []
    # The secret is masked by act in the log; nothing masks files.
    assert not [name for name, text in files.items() if SECRET in text]
    assert SECRET not in done.summary + done.log + done.messages

    # Another machine has the run from its artifact, as artifacts are: without hidden files, empty
    # folders and symbolic links.
    shutil.rmtree(machine.runs / "quickstart-1-1")
    saved = []

    def resumed(process: Process) -> int:
        saved.extend(path.name for path in (process.run_dir / "checkpoints").iterdir())
        return 0

    machine.engine.program = resumed
    done = machine.dispatch("train", run_id=2, resume_artifact="1")
    assert done.succeeded, done
    assert done.is_well("Fetch the run")
    assert machine.engine.created[-1]["Cmd"][2:] == ["resume", "--", "runs/quickstart-1-1"]
    assert saved


@pytest.mark.slow
def test_a_sweep_is_dispatched_and_sweeps(machine: Machine):
    done = machine.dispatch("sweep", sweep="quickstart", count="3", backend="local")
    assert done.succeeded, done
    (body,) = machine.engine.created
    assert body["Cmd"][:5] == ["task", "-x", "sweep", "--", "config/sweep/quickstart.yaml"]
    assert body["Cmd"][7:11] == ["--backend", "local", "--count", "3"]
    assert policy.container_findings(body, secrets=[SECRET], uid=os.getuid()) == []
    assert machine.job("sweep-1-1")["task"] == "sweep"
    assert machine.left_behind() == []


def test_the_status_of_the_machine_is_a_page_and_a_file(machine: Machine):
    """Green when nothing is wrong with the machine that the tests run on."""
    done = machine.dispatch("gpu-status")
    status = json.loads(machine.artifact("gpu-status-1-1")["gpu-status.json"])
    assert done.succeeded == (status["problems"] == []), done
    assert status["engine"]
    assert done.summary


@pytest.mark.slow
def test_a_stray_makes_the_hourly_status_red_and_a_dispatch_may_reap_it(machine: Machine):
    stray = machine.engine.place(
        {"mainrun.job": "5-1", "mainrun.task": "train", "mainrun.gpus": "", "mainrun.run": ""},
        program=lambda process: 75 if process.wait_for_stop() == "SIGTERM" else 1,
    )
    with machine.started("gpu-status", event="schedule") as running:
        done = running.wait()
    assert done.steps["Status"] == "failure"
    assert done.is_well("Upload"), done
    assert "mainrun-5-1" in machine.artifact("gpu-status-1-1")["gpu-status.json"]
    assert "stray" in done.summary
    assert stray.state == "running"

    machine.dispatch("gpu-status", run_id=2, reap="true")
    assert (stray.state, stray.exit_code) == ("exited", 75)
    assert machine.left_behind() == []


@pytest.mark.slow
def test_a_push_makes_its_image_the_current_one_and_a_dispatch_goes_back(machine: Machine):
    machine.engine.add_image("mainrun:current", **{"mainrun.sha": "a" * 40})
    with machine.started("update", event="push") as running:
        done = running.wait()
    assert done.succeeded, done
    images = machine.engine.images
    assert images["mainrun:current"]["mainrun.sha"] == machine.source.sha
    assert images["mainrun:previous"]["mainrun.sha"] == "a" * 40
    assert machine.left_behind() == []

    built = list(machine.engine.built)
    done = machine.dispatch("update", run_id=2, rollback="true")
    assert done.succeeded, done
    assert images["mainrun:current"]["mainrun.sha"] == "a" * 40
    assert machine.engine.built == built


@pytest.mark.parametrize("event", ["pull_request", "push"])
def test_all_checks_are_one_call(machine: Machine, event: str):
    with machine.started("ci", event=event) as running:
        done = running.wait()
    assert done.succeeded, done
    assert machine.called == [".ci/run true"]


# ---------------------------------------------------------------------------------------------
# It does not work, and says why


def test_a_bad_config_is_refused_before_anything_is_built(machine: Machine):
    done = machine.dispatch("train", config="config/base/quikstart.yaml")
    assert not done.succeeded
    assert done.steps["Check"] == "failure"
    assert not done.has_run("Image")
    assert not done.has_run("Run")
    assert done.is_well("Stop", "Summary", "Upload"), done
    assert machine.engine.created == machine.engine.built == []
    assert machine.job()["ending"]["kind"] == "refused"
    assert "quikstart" in done.summary
    assert "base/quickstart" in done.summary


@pytest.mark.slow
def test_a_failing_training_is_red_and_all_is_told(machine: Machine):
    def program(process: Process) -> int:
        process.run_dir.mkdir()
        process.say("mainrun: failed: the loss is not finite after step 3")
        return 1

    machine.engine.program = program
    done = machine.dispatch("train")
    assert not done.succeeded
    assert done.steps["Run"] == "failure"
    assert done.is_well("Stop", "Summary", "Upload"), done
    assert "the loss is not finite after step 3" in done.summary
    assert machine.job()["ending"]["exit_code"] == 1
    assert machine.left_behind() == []


TOOLKIT = 'could not select device driver "" with capabilities: [[gpu]]'


@pytest.mark.parametrize(
    ("call", "answer", "kind", "sentence"),
    [
        ("build", (500, "the base image is nowhere"), "failed", "base image is nowhere"),
        ("create", (404, "No such image: mainrun:x"), "refused", "is not on this machine"),
        ("start", (500, TOOLKIT), "refused", "NVIDIA Container Toolkit is missing"),
        ("start", (500, "write /x: no space left on device"), "refused", "disk of Docker is full"),
    ],
    ids=["no base image", "no image", "no toolkit", "full disk"],
)
def test_what_docker_refuses_is_said_in_plain_words(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    answer: tuple[int, str],
    kind: str,
    sentence: str,
):
    machine.engine.refusals[call] = answer
    page, record = machine.steps(monkeypatch)
    assert record["ending"]["kind"] == kind
    assert sentence in record["ending"]["sentence"]
    assert sentence in page
    assert machine.left_behind() == []


def test_a_job_that_takes_too_much_memory_is_told_so(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
):
    def program(process: Process) -> int:
        raise OutOfMemory

    machine.engine.program = program
    page, record = machine.steps(monkeypatch)
    assert record["ending"]["kind"] == "out_of_memory"
    assert "ran out of memory" in page
    assert machine.left_behind() == []


def test_no_engine_at_all_is_told(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    machine.environment["DOCKER_HOST"] = f"unix://{machine.folder}/nothing"
    page, record = machine.steps(monkeypatch)
    assert record["ending"]["kind"] == "refused"
    assert "No Docker Engine answers" in page


# ---------------------------------------------------------------------------------------------
# It is cancelled


def test_a_cancelled_training_is_stopped_told_and_uploaded(
    machine: Machine, trains, monkeypatch: pytest.MonkeyPatch
):
    def program(process: Process) -> int:
        trains(process)
        process.say("it trains")
        signal_ = process.wait_for_stop()
        process.say(f"saved after {signal_}")
        return 75

    machine.engine.program = program
    with machine.started("train") as running:
        running.wait_for("it trains")
        running.cancel()
        done = running.wait()
    assert not done.succeeded
    assert done.is_well("Stop", "Summary", "Upload"), done
    assert machine.job()["ending"]["kind"] == "stopped"
    assert "resume" in done.summary
    assert "runs/quickstart-1-1/summary.json" in machine.artifact()
    assert machine.left_behind() == []
    # The next dispatch finds nothing in its way.
    machine.engine.program = lambda process: 0
    _, record = machine.steps(
        monkeypatch, resume="quickstart-1-1", overrides="training.max_steps=60"
    )
    assert record["ending"]["kind"] == "finished"
    assert machine.engine.created[-1]["Cmd"][2:] == [
        "resume", "--", "runs/quickstart-1-1", "training.max_steps=60",
    ]  # fmt: skip


def test_a_build_that_is_cancelled_is_told_and_nothing_is_started(machine: Machine):
    machine.engine.held.add("build")
    with machine.started("train") as running:
        machine.engine.wait_for_call("build")
        running.cancel()
        done = running.wait()
    assert not done.succeeded
    assert not done.has_run("Run")
    assert done.is_well("Stop", "Summary", "Upload"), done
    assert machine.engine.created == []
    assert "while the image was built" in done.summary
    assert machine.left_behind() == []


def test_a_container_that_outlives_its_job_is_cleared_away_by_the_next(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
):
    """What runs without a holder of its lock: the runner died, or the machine's power went."""
    stray = machine.engine.place(
        {"mainrun.job": "5-1", "mainrun.task": "train", "mainrun.gpus": "", "mainrun.run": ""},
        program=lambda process: 75 if process.wait_for_stop() == "SIGTERM" else 1,
    )
    _, record = machine.steps(monkeypatch)
    assert record["ending"]["kind"] == "finished"
    assert (stray.state, stray.exit_code) == ("exited", 75)
    assert machine.left_behind() == []


def test_a_strays_last_word_is_shown_without_secrets(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def program(process: Process) -> int:
        process.wait_for_stop()
        process.say(f"mainrun: failed: {SECRET} is refused")
        return 1

    machine.engine.place({"mainrun.job": "5-1", "mainrun.task": "train"}, program=program)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    machine.steps(monkeypatch)
    shown = capsys.readouterr().out
    assert "[WANDB_API_KEY] is refused" in shown
    assert SECRET not in shown


def test_a_job_whose_runner_dies_stops_and_saves(machine: Machine):
    """Nobody signals it. Going on would keep the GPU from everybody, and nobody would see it."""
    machine.engine.add_image(f"mainrun:{machine.source.sha}")

    def program(process: Process) -> int:
        process.say("it trains")
        return 75 if process.wait_for_stop() == "SIGTERM" else 1

    machine.engine.program = program
    runner = runner_cancellation.start_runner(
        f"exec {COMMAND[0]} job run", cwd=machine.folder, output=subprocess.PIPE,
        environment=machine.variables(),
    )  # fmt: skip
    assert runner.stdout is not None
    assert any(b"it trains" in line for line in runner.stdout)
    steps = runner_cancellation.descendants(runner.pid)
    container = machine.engine.wait_for_container()
    runner.kill()
    try:
        assert container.wait_for_end(30)
        assert container.exit_code == 75
    finally:
        for step in steps:
            with contextlib.suppress(ProcessLookupError):
                os.kill(step, signal.SIGKILL)


# ---------------------------------------------------------------------------------------------
# It is attacked


# Not `${{ }}`: act, unlike GitHub, evaluates an expression that is typed into an input.
BY_ACT = [
    '$(touch CANARY); `touch CANARY`; "; touch CANARY; " && touch CANARY',
    "a=b\n::stop-commands::x\n{{.CLI_ARGS}} <script>alert(1)</script> ../../etc/passwd\u202e",
]


@pytest.mark.parametrize("text", BY_ACT, ids=["shell", "markup"])
@pytest.mark.parametrize("workflow", ["train", "sweep"])
def test_nothing_that_is_typed_is_executed(machine: Machine, workflow: str, text: str):
    """All inputs at once, refused at the first; each by itself: tests/test_dispatch.py."""
    ((_, job),) = policy.read(act.REPOSITORY / ".github" / "workflows" / f"{workflow}.yml").jobs()
    names = [n.removeprefix("INPUT_").lower() for n in job["env"] if n != "INPUT_TASK"]
    done = machine.dispatch(workflow, **dict.fromkeys(names, text))
    assert not done.succeeded
    assert done.steps["Check"] == "failure"
    assert done.is_well("Summary")
    assert machine.engine.created == []
    assert not list(machine.folder.rglob("CANARY"))
    assert not list(machine.source.folder.rglob("CANARY"))
    assert "<script>" not in done.summary


@pytest.mark.parametrize("workflow", ["gpu-status", "update"])
def test_a_choice_takes_nothing_else(machine: Machine, workflow: str):
    machine.engine.add_image("mainrun:current", **{"mainrun.sha": "a" * 40})
    name = {"gpu-status": "reap", "update": "rollback"}[workflow]
    done = machine.dispatch(workflow, **{name: BY_ACT[0]})
    assert not list(machine.folder.rglob("CANARY"))
    assert "CANARY" not in done.summary


def test_what_is_typed_is_shown_as_it_is_and_never_read_as_markup(
    source: act.Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
):
    """The steps that look at inputs, here in this process, with one in every input."""
    names = ("config", "overrides", "resume", "resume_artifact", "tracking", "gpus")
    allowed = {"heading", "paragraph", "inline", "text", "code_inline", "strong", "table", "thead",
               "tbody", "tr", "th", "td"}  # fmt: skip
    for number, text in enumerate(HOSTILE):
        if "\0" in text:
            continue  # no environment variable can hold it
        folder = tmp_path / str(number)
        folder.mkdir()
        with subtests.test(text=text), at(folder, source) as machine:
            page, record = machine.steps(monkeypatch, **dict.fromkeys(names, text))
            assert record["ending"]["kind"] == "refused"
            assert machine.engine.created == machine.engine.built == []
            tokens = rendered(page)
            assert {re.sub("_(open|close)$", "", token.type) for token in tokens} <= allowed
            assert len([token for token in tokens if token.type == "heading_open"]) == 1
            parts = [token for token in tokens if token.type in ("text", "code_inline")]
            shown = "".join(part.content for part in parts)
            assert ("CANARY" in shown) == ("CANARY" in text)
            assert shown.isprintable()
            assert not list(machine.folder.rglob("CANARY"))


def rendered(markdown: str) -> list[Token]:
    """What a page is made of, to another program that reads Markdown."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    blocks = parser.parse(markdown)
    return [token for block in blocks for token in (block, *(block.children or []))]


# ---------------------------------------------------------------------------------------------
# The tools themselves


def test_act_reads_the_workflow_but_for_the_line_that_it_does_not_know():
    for path in (act.REPOSITORY / ".github" / "workflows").glob("*.yml"):
        text = path.read_text()
        assert text.count("queue:") == text.count(act.DROPPED)


def test_stand_ins_are_for_the_commits_that_are_used():
    text = "".join(
        path.read_text() for path in (act.REPOSITORY / ".github" / "workflows").glob("*.yml")
    )
    used = set(re.findall(r"uses: (\S+)@([0-9a-f]{40})", text))
    assert used == set(act.ACTIONS.items())


@pytest.fixture
def step(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts steps as the runner does, and returns when they have said `ready`."""
    started = []

    def start(call: str) -> subprocess.Popen[bytes]:
        process = runner_cancellation.start_step(call, cwd=tmp_path, output=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        runner_cancellation.kill_tree(process)


def test_cancel_ends_an_exec_by_its_first_signal(step):
    assert runner_cancellation.cancel(step("exec sh -c 'echo ready; exec sleep 600'")) == "SIGINT"


def test_cancel_of_a_command_behind_a_shell_leaves_it_running(step):
    """The original's form: the shell goes, what it has started stays."""
    process = step("sh -c 'echo ready; exec sleep 600'\ntrue")
    (child,) = runner_cancellation.descendants(process.pid)
    try:
        assert runner_cancellation.cancel(process, sigint_seconds=0.2) == "SIGTERM"
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


def test_cancel_kills_what_heeds_no_signal(step):
    process = step("trap '' INT TERM; echo ready; while true; do sleep 0.05; done")
    how = runner_cancellation.cancel(process, sigint_seconds=0.2, sigterm_seconds=0.2)
    assert how == "SIGKILL"
    assert runner_cancellation.cancel(process) == "nothing"
