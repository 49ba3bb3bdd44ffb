"""What may be typed on the GitHub page, and what is refused before anything runs."""

import itertools
import os
from pathlib import Path

import pytest

from mainrun import dispatch
from mainrun.errors import UserError
from mainrun.host import Host

GITHUB = {
    "GITHUB_RUN_ID": "1234567",
    "GITHUB_RUN_ATTEMPT": "2",
    "GITHUB_SHA": "a" * 40,
    "GITHUB_SERVER_URL": "https://github.example",
    "GITHUB_REPOSITORY": "ada/mainrun",
    "GITHUB_ACTOR": "ada",
}

HOSTILE = [
    "$(touch CANARY)", "`touch CANARY`", "; touch CANARY", "&& touch CANARY", "| touch CANARY",
    "|| touch CANARY", "> CANARY", "$(<CANARY)", "${IFS}touch${IFS}CANARY", "'; touch CANARY; '",
    '"; touch CANARY; "', "\\$(touch CANARY)", "a=b; touch CANARY", "x=$(touch CANARY)",
    "--run-dir=/etc", "--run-dir /etc/cron.d", "-v /:/host", "--privileged", "--gpus=all",
    "../../etc/passwd", "/etc/passwd", "config/../../../etc/passwd", "....//....//etc/passwd",
    "config/base/quickstart.yaml\0.png", "~/.ssh/id_rsa", "file:///etc/passwd",
    "line\nbreak", "line\r\nbreak", "a=1\n::set-output name=x::y", "::add-mask::x",
    "::error file=x::y", "${{ secrets.WANDB_API_KEY }}", "{{.CLI_ARGS}}", "{{ env }}",
    "!!python/object/apply:os.system ['touch CANARY']", "&a [*a, *a]", "{a: 1, a: 2}",
    "<script>alert(1)</script>", "![x](http://canary.invalid/x.png)", "[x](javascript:alert(1))",
    "| a | b |\n|---|---|", "`" * 200, "A" * 100_000, "\u202ereversed", "\x1b[31mred", "%0A%0D",
    "\ud7ff\uffff", "-", "--", "=", "==", ".=1", "a..b=1", "_wandb=1",
]  # fmt: skip


def env(**inputs: str) -> dict[str, str]:
    return GITHUB | {f"INPUT_{name.upper()}": value for name, value in inputs.items()}


@pytest.fixture
def machine(tmp_path: Path) -> Host:
    return Host(runs=str(tmp_path), gpus="none")


def request(machine: Host, **inputs: str):
    return dispatch.request_from(env(**inputs), machine)


def test_a_button_pressed_without_a_word_trains_the_quickstart(machine: Host):
    found = request(machine)
    assert found.task == "train"
    assert found.words == (
        "config/base/quickstart.yaml", "--run-dir", "runs/quickstart-1234567-2",
    )  # fmt: skip
    assert found.label == "1234567-2"
    assert found.image == f"mainrun:{'a' * 40}"
    assert found.run == "quickstart-1234567-2"
    assert found.url == "https://github.example/ada/mainrun/actions/runs/1234567"
    assert found.by == "ada"


def test_a_config_has_short_names(machine: Host, subtests: pytest.Subtests):
    for typed in ["baseline", "base/baseline", "config/base/baseline.yaml", " baseline "]:
        with subtests.test(typed=typed):
            assert request(machine, config=typed).words[0] == "config/base/baseline.yaml"


def test_unknown_config_is_answered_with_those_there_are(machine: Host):
    with pytest.raises(UserError, match=r"config='basline'.*base/baseline\.yaml"):
        request(machine, config="basline")


def test_overrides_and_tracking_follow_the_config(machine: Host):
    found = request(
        machine, overrides="training.max_steps=5\n tracking.name='two words'", tracking="offline"
    )
    assert found.words[3:] == (
        "training.max_steps=5", "tracking.name=two words", "tracking.wandb=offline",
    )  # fmt: skip


def test_a_setting_that_does_not_fit_is_refused_here_already(machine: Host):
    with pytest.raises(UserError, match=r"optimizer\.learning_rate=-1"):
        request(machine, overrides="optimizer.learning_rate=-1")


def test_a_run_on_the_disk_is_resumed(machine: Host, tmp_path: Path):
    (tmp_path / "baseline-9-1").mkdir()
    found = request(machine, resume="baseline-9-1", overrides="training.epochs=9")
    assert (found.task, found.words) == ("resume", ("runs/baseline-9-1", "training.epochs=9"))


def test_a_run_that_is_not_there_is_answered_with_those_there_are(machine: Host, tmp_path: Path):
    (tmp_path / "baseline-9-1").mkdir()
    with pytest.raises(UserError, match=r"resume=baseline-8-1: no such run.*baseline-9-1"):
        request(machine, resume="baseline-8-1")


@pytest.mark.parametrize("task", ["train", "sweep"])
@pytest.mark.parametrize("target", ["/etc", "real", "absent", "link"])
def test_a_link_among_the_runs_is_not_resumed(
    machine: Host, tmp_path: Path, task: str, target: str
):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(UserError, match=r"^resume=link: it is a link.*no run$"):
        request(machine, task=task, resume="link")


def test_of_the_names_among_the_runs_only_those_that_runs_have_are_repeated(
    machine: Host, tmp_path: Path
):
    names = ["\n::add-mask::x", "a b", "..a", "[x](y)", "\x1b[31m", os.fsdecode(b"\xff"), "b" * 200]
    for name in [*names, "baseline-9-1"]:
        (tmp_path / name).mkdir()
    (tmp_path / "etc").symlink_to("/etc")
    (tmp_path / "gone").symlink_to("absent")
    with pytest.raises(UserError) as error:
        request(machine, resume="baseline-8-1")
    assert str(error.value).endswith("the newest are baseline-9-1")


def test_one_run_is_resumed_at_a_time(machine: Host):
    with pytest.raises(UserError, match="one run is resumed at a time"):
        request(machine, resume="a", resume_artifact="12")


def test_a_sweep_has_its_file_its_count_and_its_folder(machine: Host):
    found = request(machine, task="sweep", sweep="quickstart", count="3", backend="local")
    assert found.task == "sweep"
    assert found.words[:7] == (
        "config/sweep/quickstart.yaml", "--run-dir", "runs/quickstart-1234567-2",
        "--backend", "local", "--count", "3",
    )  # fmt: skip


def test_a_sweep_is_gone_on_with_in_its_folder(machine: Host, tmp_path: Path):
    (tmp_path / "lr-3-1").mkdir()
    found = request(machine, task="sweep", sweep="quickstart", resume="lr-3-1", count="9")
    assert found.words == ("runs/lr-3-1", "--count", "9")


def test_a_sweep_from_an_artifact_gets_its_name_when_it_is_there(machine: Host):
    inputs = dispatch.inputs_from(env(task="sweep", resume_artifact="3", count="9"))
    found = dispatch.named(request(machine, task="sweep", resume_artifact="3"), inputs, "lr-3-1")
    assert (found.run, found.words) == ("lr-3-1", ("runs/lr-3-1", "--count", "9"))


def test_the_gpus_asked_for_are_those_it_gets(machine: Host):
    assert request(machine, gpus="1,0").gpus == (0, 1)
    assert request(machine, gpus="none").gpus == ()


def test_a_count_is_a_number_of_trials(machine: Host, subtests: pytest.Subtests):
    for count in ["0", "-1", "1e3", "10001", "ten"]:
        with subtests.test(count=count), pytest.raises(UserError, match="count="):
            request(machine, task="sweep", count=count)


def test_outside_a_workflow_there_is_no_label(machine: Host):
    with pytest.raises(UserError, match="GITHUB_RUN_ID"):
        dispatch.request_from({}, machine)


def test_hostile_input_is_refused_in_one_line_or_stays_one_literal_word(
    machine: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
):
    monkeypatch.chdir(tmp_path)
    of_a_sweep = ["sweep", "count", "backend", "sweep_id"]
    of_any = ["config", "overrides", "resume", "resume_artifact", "tracking", "gpus", "task"]
    # What passes names our files and settings, or is a value behind a known key.
    known = ("config/", "runs/", "--run-dir", "--backend", "--id", "--count", "tracking.")
    for name, text in itertools.product(of_any + of_a_sweep, HOSTILE):
        with subtests.test(name=name, text=text):
            sweep = {"task": "sweep"} if name in of_a_sweep else {}
            found, refusal = None, ""
            try:
                found = request(machine, **{**sweep, name: text})
            except UserError as error:
                refusal = str(error)
            assert refusal.isprintable()
            assert len(refusal) < 1000
            words = found.words if found else ()
            assert all(word.startswith(known) or word.isalnum() or "=" in word for word in words)
            assert not any("CANARY" in word or "/etc" in word for word in words)
            assert list(tmp_path.iterdir()) == []
