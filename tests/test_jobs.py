"""The steps of a workflow's job: the record they keep, and what they tell GitHub.

Nothing here needs an Engine: what runs containers is tested in test_launch.py, the steps together
in test_workflows.py.
"""

import json
from pathlib import Path

import pytest

from mainrun import artifact, jobs
from mainrun.errors import RunFailed, Stopped, UserError

CANARY = "canary-0123456789-canary"


pytestmark = pytest.mark.usefixtures("workspace")


def record() -> dict:
    return json.loads(Path("out/job.json").read_text())


def test_refused_input_is_recorded_and_shown_on_the_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("INPUT_CONFIG", "no-such-config")
    with pytest.raises(UserError):
        jobs.check()
    assert record()["ending"]["kind"] == "refused"
    assert "no-such-config" in record()["ending"]["sentence"]
    assert record()["inputs"] == {"config": "no-such-config"}
    assert "::error::config='no-such-config'" in capsys.readouterr().out


def test_summary_after_a_refusal_says_why(monkeypatch: pytest.MonkeyPatch, workspace: Path):
    monkeypatch.setenv("INPUT_CONFIG", "no-such-config")
    with pytest.raises(UserError):
        jobs.check()
    jobs.summary()
    assert "no such file in config" in (workspace / "page.md").read_text()
    assert record()["ended"] is not None


def test_summary_where_nothing_else_ran_says_so(workspace: Path):
    jobs.summary()
    assert record()["ending"]["kind"] == "lost"
    assert "before its inputs were checked" in (workspace / "page.md").read_text()


@pytest.mark.parametrize(
    ("error", "kind"),
    [(UserError("no"), "refused"), (RunFailed("full"), "failed"), (Stopped(), "stopped")],
)
def test_how_a_step_ends_is_recorded(error: Exception, kind: str):
    with pytest.raises(type(error)), jobs._step("image"):
        raise error
    assert record()["step"] == "image"
    assert record()["ending"]["kind"] == kind


def test_a_step_after_the_job_does_not_change_how_it_ended():
    with pytest.raises(UserError), jobs._step("check"):
        raise UserError("the reason")
    with pytest.raises(RunFailed), jobs._step("stop", required=False):
        raise RunFailed("no engine")
    assert record()["step"] == "check"
    assert record()["ending"]["sentence"] == "the reason"


def test_too_little_disk_is_told_before_anything_is_built(workspace: Path):
    text = json.loads((workspace / "host.yaml").read_text()) | {"free_disk": "9999t"}
    (workspace / "host.yaml").write_text(json.dumps(text))
    with pytest.raises(UserError, match=r"GiB free, and a job wants .*free_disk"):
        jobs.check()


def test_an_annotation_is_one_line(capsys: pytest.CaptureFixture[str]):
    jobs._annotate("100%\nsure\r::warning::x")
    assert capsys.readouterr().out == "::error::100%25%0Asure%0D::warning::x\n"


def test_the_runner_does_not_listen_while_the_job_speaks(capsys: pytest.CaptureFixture[str]):
    with jobs._log() as output:
        output("::add-mask::everything")
    first, said, last = capsys.readouterr().out.splitlines()
    token = first.removeprefix("::stop-commands::")
    assert (len(token), said, last) == (32, "::add-mask::everything", f"::{token}::")
    assert Path("out/job.log").read_text() == "::add-mask::everything\n"


def test_no_secret_is_written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    with pytest.raises(UserError), jobs._step("check"):
        raise UserError(f"bad key {CANARY}")
    assert CANARY not in Path("out/job.json").read_text()
    assert CANARY not in capsys.readouterr().out


def test_the_run_folder_is_put_beside_the_record(workspace: Path):
    run = workspace / "disk" / "quickstart-77-1"
    run.mkdir(parents=True)
    (run / "events.jsonl").write_text("")
    (run / "metrics.csv").write_text("step\n1\n")
    (run / "secret").symlink_to("/etc/hostname")
    with jobs._step("run") as found:
        found["run"] = "runs/quickstart-77-1"
    jobs.summary()
    copied = workspace / "out" / "runs" / "quickstart-77-1"
    assert (copied / "metrics.csv").read_text() == "step\n1\n"
    assert not (copied / "secret").exists()


def fetched_run(workspace: Path, name: str = "baseline-5-1", attempt: int = 1) -> Path:
    run = workspace / "in" / f"train-5-{attempt}" / "runs" / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 1\n")
    (run / "tokenizer.json").write_text("{}")
    return run


def brought_in(workspace: Path) -> str:
    return artifact.bring_in(workspace / "in", workspace / "disk", say=print)


def test_a_run_from_an_artifact_comes_among_the_machines_runs(
    workspace: Path, capsys: pytest.CaptureFixture[str]
):
    fetched_run(workspace)
    assert brought_in(workspace) == "baseline-5-1"
    assert [path.name for path in (workspace / "disk").iterdir()] == ["baseline-5-1"]
    assert (workspace / "disk" / "baseline-5-1" / "config.yaml").is_file()
    assert capsys.readouterr().out == ""


def test_a_run_that_is_there_is_not_written_over(workspace: Path):
    fetched_run(workspace)
    (workspace / "disk" / "baseline-5-1").mkdir(parents=True)
    with pytest.raises(UserError, match="resume=baseline-5-1"):
        brought_in(workspace)


def test_an_artifact_without_a_run_is_refused(workspace: Path):
    (workspace / "in").mkdir()
    with pytest.raises(UserError, match="no artifact with a run folder"):
        brought_in(workspace)


def test_the_last_attempt_is_the_one_that_is_resumed(workspace: Path):
    for attempt in (9, 10, 2):
        fetched_run(workspace, f"baseline-5-{attempt}", attempt)
    assert brought_in(workspace) == "baseline-5-10"


def test_a_lone_artifact_and_a_sweep_are_found_too(workspace: Path):
    sweep = workspace / "in" / "runs" / "lr-5-1"
    (sweep / "trials" / "trial-001").mkdir(parents=True)
    for file in ("sweep.yaml", "base.yaml", "trials/trial-001/config.yaml"):
        (sweep / file).write_text("seed: 1\n")
    (sweep / "trials" / "trial-001" / "tokenizer.json").write_text("{}")
    assert brought_in(workspace) == "lr-5-1"
    assert (workspace / "disk" / "lr-5-1" / "trials" / "trial-001" / "config.yaml").is_file()


def test_a_name_that_no_run_has_is_refused(workspace: Path):
    fetched_run(workspace, name="-rf")
    with pytest.raises(UserError, match="a name that no run has"):
        brought_in(workspace)
