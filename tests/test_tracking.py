"""One fact, told once, reaches record, table, console and W&B; and no trouble there ends a run.

W&B is the real one, offline, read back with its own reader.
"""

import atexit
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mainrun import config
from mainrun.errors import RunFailed, Stopped, UserError
from mainrun.record import WALL_CLOCK, metrics, read_events
from mainrun.tracking import Tracker, open_tracker, write_views
from mainrun.wandb_run import check_wandb
from tests.conftest import Disk

DISABLED = config.load(None, ["tracking.wandb=disabled"])
SECRET = "a-secret-0123456789-0123456789-0123456789"

FONTS = tempfile.mkdtemp(prefix="mainrun-tests-fonts-")  # Matplotlib takes 3 s to find them
atexit.register(shutil.rmtree, FONTS, ignore_errors=True)

# A run as the loop logs it, for programs in a process of their own; argv: folder, overrides.
PROGRAM = """
import sys, time
from pathlib import Path
from mainrun import config
from mainrun.tracking import open_tracker

run_dir, settings = Path(sys.argv[1]), config.load(None, sys.argv[2:])
run_dir.mkdir(exist_ok=True)
(run_dir / "config.yaml").write_text(config.to_yaml(settings))
with open_tracker(run_dir, settings, total_steps=4) as tracker:
    tracker.log("run_started", 0, name="a run", parameters=1000, total_steps=4, device="cpu")
    for step in range(5):
        if step:
            tracker.log("train_step", step, **{"train/loss": 4.0 - step, "perf/step_ms": 9})
        if step in (0, 2, 4):
            tracker.log("evaluation", step, **{"val/loss": 3.0 - step / 2, "val/tokens": 100})
            tracker.log("samples", step, texts=[f"text of step {step}"])
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def program(
    run_dir: Path, *overrides: str, code: str = PROGRAM, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, at home in an empty folder."""
    home = run_dir.parent / "home"
    home.mkdir(exist_ok=True)
    keep = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(run_dir), *overrides],
        env={**keep, "HOME": str(home), "MPLCONFIGDIR": FONTS, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def wandb_records(run_dir: Path) -> list[dict[str, Any]]:
    """What W&B's own reader finds, over all processes of the run."""
    records = []
    for folder in sorted((run_dir / "wandb").glob("offline-run-*")):
        reader = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json"]
        found = subprocess.run([*reader, str(folder)], capture_output=True, text=True, check=True)
        records += [json.loads(line) for line in found.stdout.splitlines()]
    return records


def of_type(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records if record["type"] == kind]


# -------------------------------------------------------------------------------------------
# Weights & Biases


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("offline") / "run"
    done = program(
        run_dir,
        "tracking.wandb=auto",
        "tracking.tags=[one, two]",
        f"tracking.name=named after {SECRET}",
        MY_API_KEY=SECRET,
    )
    assert done.returncode == 0, done.stderr
    (run_dir.parent / "shown").write_text(done.stdout + done.stderr)
    return run_dir


@pytest.fixture(scope="module")
def records(offline: Path) -> list[dict[str, Any]]:
    return wandb_records(offline)


def test_wandb_has_every_metric_of_the_record_with_its_step(
    offline: Path, records: list[dict[str, Any]]
):
    history = [row["item"] for row in of_type(records, "history")]
    told = [
        {name: value for name, value in row.items() if not name.startswith("_")}
        for row in history
        if "samples._type" not in row
    ]
    expected = [
        {name: value for name, value in event.items() if name == "step" or "/" in name}
        for event in read_events(offline / "events.jsonl")
        if event["event"] in ("train_step", "evaluation")
    ]
    assert len(expected) == 7
    assert told == expected
    assert len(history) == 7 + 3


def test_wandb_has_the_whole_resolved_config(offline: Path, records: list[dict[str, Any]]):
    (run,) = of_type(records, "run")
    stored = run["config"]["update"]
    resolved = config.as_dict(config.load(offline / "config.yaml"))
    resolved["tracking"]["name"] = "named after [MY_API_KEY]"
    assert {name: stored[name] for name in resolved} == resolved
    assert run["tags"] == ["one", "two"]
    assert run["project"] == "mainrun"


def test_wandb_plots_every_metric_against_the_step(records: list[dict[str, Any]]):
    assert {"*": "step"}.items() <= {
        metric.get("glob_name", metric.get("name")): metric.get("step_metric")
        for metric in of_type(records, "metric")
    }.items()


def test_wandb_has_the_log_artifact_and_its_files_lie_in_the_run_folder(
    offline: Path, records: list[dict[str, Any]]
):
    (log,) = [a for a in of_type(records, "artifact") if a["type"] == "log"]
    contents = {file["path"]: Path(file["local_path"]) for file in log["manifest"]["contents"]}
    # No config.yaml: its user, above, has written a secret into it.
    assert set(contents) == {"events.jsonl", "summary.md", "summary.json"}
    for name, staged in contents.items():
        assert staged.is_relative_to(offline)
        if name != "events.jsonl":  # which may have gone on since
            assert staged.read_bytes() == (offline / name).read_bytes()
    home = offline.parent / "home"
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_wandb_has_a_table_of_samples_for_each_evaluation(offline: Path):
    tables = [json.loads(path.read_text()) for path in offline.rglob("files/media/table/*.json")]
    assert sorted(table["data"][0] for table in tables) == [
        [0, "text of step 0"], [2, "text of step 2"], [4, "text of step 4"],
    ]  # fmt: skip


def test_secrets_of_the_environment_are_nowhere_in_the_run_folder_or_on_the_screen(
    offline: Path, records: list[dict[str, Any]]
):
    places = [p for p in offline.rglob("*") if p.is_file()] + [offline.parent / "shown"]
    assert len(places) > 10
    found = [p.name for p in places if SECRET.encode() in p.read_bytes()]
    assert found == ["config.yaml"]  # the user's own words, written by the program above
    (run,) = of_type(records, "run")
    assert run["display_name"] == "named after [MY_API_KEY]"


@pytest.mark.slow
def test_an_offline_key_and_a_secret_in_a_failure_are_not_told(run_dir: Path):
    failing = PROGRAM + f"    raise ValueError('cannot reach https://me:{SECRET}@host')\n"
    done = program(
        run_dir,
        "tracking.wandb=offline",
        code=failing,
        WANDB_API_KEY="k" * 40 + "canary",
        HUB_TOKEN=SECRET,
    )
    assert done.returncode == 1
    for path in filter(Path.is_file, run_dir.rglob("*")):
        data = path.read_bytes()
        assert b"canary" not in data, path
        assert SECRET.encode() not in data, path
    records = wandb_records(run_dir)
    assert [exit["exit_code"] for exit in of_type(records, "exit")] == [1]
    (log,) = [a for a in of_type(records, "artifact") if a["type"] == "log"]
    assert "config.yaml" in {file["path"] for file in log["manifest"]["contents"]}
    reason = read_events(run_dir / "events.jsonl")[-1]["reason"]
    assert reason == "ValueError: cannot reach https://me:[HUB_TOKEN]@host"


def test_a_stopped_run_goes_on_as_the_same_wandb_run_though_its_folder_moved(run_dir: Path):
    stopping = PROGRAM + "    from mainrun.errors import Stopped\n    raise Stopped\n"
    program(run_dir, "tracking.wandb=offline", code=stopping)
    moved = run_dir.rename(run_dir.parent / "elsewhere")
    resuming = PROGRAM.replace("total_steps=4)", "total_steps=4, resume_step=2)", 1)
    done = program(moved, "tracking.wandb=offline", code=resuming)
    assert done.returncode == 0, done.stderr
    records = wandb_records(moved)
    assert [exit.get("exit_code", 0) for exit in of_type(records, "exit")] == [75, 0]
    assert [r["type"] for r in records].count("preempting") == 1
    assert [a["type"] for a in of_type(records, "artifact")].count("log") == 2
    first, second = of_type(records, "run")
    assert first["run_id"] == second["run_id"]


def test_disabled_never_imports_wandb(run_dir: Path):
    ask = PROGRAM + "\nprint(sorted(name for name in sys.modules if name.startswith('wandb')))\n"
    done = program(run_dir, "tracking.wandb=disabled", code=ask)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert not (run_dir / "wandb").exists()


def test_importing_the_tracker_imports_nothing_heavy():
    ask = "import sys, mainrun.tracking; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    heavy = {"wandb", "rich", "structlog", "matplotlib", "numpy", "jax"}
    assert not heavy & set(found.stdout.split())


def test_a_server_out_of_reach_is_one_warning_and_the_run_goes_on_offline(run_dir: Path):
    impatient = PROGRAM.replace(
        "run_dir, settings =",
        "import mainrun.wandb_run\nmainrun.wandb_run._INIT_SECONDS = 1\nrun_dir, settings =",
    )
    done = program(
        run_dir,
        "tracking.wandb=online",
        code=impatient,
        WANDB_API_KEY="k" * 40,
        WANDB_BASE_URL="http://127.0.0.1:9",  # nobody listens at the discard port
    )
    assert done.returncode == 0, done.stderr
    events = read_events(run_dir / "events.jsonl")
    (warning,) = [e["message"] for e in events if e["event"] == "warning"]
    assert warning.startswith("Weights & Biases, online: ")
    assert events[0]["wandb"] == "offline"
    assert len(of_type(wandb_records(run_dir), "history")) == 10


@pytest.mark.slow
def test_wandb_dying_in_the_middle_is_one_warning_and_no_end(run_dir: Path):
    killing = PROGRAM.replace(
        "        if step in",
        "        if step == 2:\n"
        "            import os, signal\n"
        "            for task in Path('/proc/self/task').iterdir():\n"
        "                for child in (task / 'children').read_text().split():\n"
        "                    os.kill(int(child), signal.SIGKILL)\n"
        "            time.sleep(1)\n"
        "        if step in",
    )
    done = program(run_dir, "tracking.wandb=offline", code=killing)
    assert done.returncode == 0, done.stderr
    events = read_events(run_dir / "events.jsonl")
    assert [e["event"] for e in events].count("warning") == 1
    assert [e["step"] for e in events if e["event"] == "train_step"] == [1, 2, 3, 4]
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "finished"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [n for n in os.environ if n.startswith("WANDB_") or n == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda home, env: None, "offline"),
        (lambda home, env: env("WANDB_API_KEY", "k"), "online"),
        (lambda home, env: put(home / ".netrc", "machine api.wandb.ai password k"), "online"),
        (lambda home, env: put(home / ".netrc", "machine example.org password k"), "offline"),
        (lambda home, env: put(home / ".netrc", "not a netrc"), "offline"),
        (
            lambda home, env: put(home / ".config/wandb/settings", "[default]\napi_key = k"),
            "online",
        ),
        (lambda home, env: env("WANDB_MODE", "disabled"), "disabled"),
    ],
)
def test_auto_is_online_where_a_key_is_found(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[..., None],
    expected: str,
):
    prepare(home, monkeypatch.setenv)
    assert check_wandb(config.load(None, ["tracking.wandb=auto"])) == expected
    assert check_wandb(config.load(None, ["tracking.wandb=offline"])) == "offline"


def test_online_without_a_key_is_refused_before_anything_is_touched(home: Path, run_dir: Path):
    online = config.load(None, ["tracking.wandb=online"])
    with pytest.raises(UserError, match=r"tracking\.wandb=online.*WANDB_API_KEY"):
        check_wandb(online)
    with pytest.raises(UserError), open_tracker(run_dir, online, total_steps=1):
        pass
    assert list(run_dir.iterdir()) == []


# -------------------------------------------------------------------------------------------
# Record, table and endings


def train(tracker: Tracker, steps: range, *, seconds: float) -> None:
    """The same losses for the same steps; the clock's part differs from process to process."""
    for step in steps:
        loss = {"train/loss": np.float32(1 / 3 + step), "optimizer/learning_rate": 1e-3 / step}
        clocks = {"perf/step_ms": seconds * step, "elapsed_seconds": seconds}
        tracker.log("train_step", step, **loss, **clocks)
        if step % 3 == 0:
            scores = {"val/loss": math.pi / step, "val/seconds": seconds}
            tracker.log("evaluation", step, **scores)


def test_a_killed_and_resumed_run_has_the_table_of_an_uninterrupted_one(tmp_path: Path):
    folders = {name: tmp_path / name for name in ("straight", "killed")}
    for folder in folders.values():
        folder.mkdir()
    with open_tracker(folders["straight"], DISABLED, total_steps=20) as tracker:
        train(tracker, range(1, 21), seconds=1.0)

    # A killed process says nothing more: what it logged, and half a line.
    with open_tracker(folders["killed"], DISABLED, total_steps=20) as tracker:
        train(tracker, range(1, 14), seconds=2.0)
    record = folders["killed"] / "events.jsonl"
    lines = record.read_bytes().splitlines(keepends=True)[:-1]
    record.write_bytes(b"".join(lines) + b'{"event": "train_step", "st')
    with open_tracker(folders["killed"], DISABLED, total_steps=20, resume_step=8) as tracker:
        tracker.log("resumed", 8, overrides=[])
        train(tracker, range(9, 21), seconds=3.0)

    straight, killed = (table(folder / "metrics.csv") for folder in folders.values())
    assert straight.keys() == killed.keys()
    differing = {name for name in straight if straight[name] != killed[name]}
    assert differing == {"perf/step_ms", "elapsed_seconds", "val/seconds"}
    assert all(name.startswith(WALL_CLOCK) for name in differing)


def train_until(error: BaseException, run_dir: Path, **last_words: dict[str, Any]) -> None:
    with open_tracker(run_dir, DISABLED, total_steps=3) as tracker:
        train(tracker, range(1, 3), seconds=1.0)
        for event, fields in last_words.items():
            tracker.log(event, 2, **fields)
        raise error


def table(path: Path) -> dict[str, list[str]]:
    header, *rows = [line.split(",") for line in path.read_text().splitlines()]
    return dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))


def test_train_and_validation_values_of_a_step_share_a_row(run_dir: Path):
    with open_tracker(run_dir, DISABLED, total_steps=3) as tracker:
        train(tracker, range(1, 4), seconds=1.0)
        now = table(run_dir / "metrics.csv")  # while the run goes on
    assert now["step"] == ["1", "2", "3"]
    assert now["val/loss"] == ["", "", repr(math.pi / 3)]
    assert now["train/loss"][2] == repr(float(np.float32(1 / 3 + 3)))


@pytest.mark.parametrize(
    ("error", "event", "fields"),
    [
        (RunFailed("loss is NaN"), "failed", {"reason": "loss is NaN"}),
        (OSError(28, "No space"), "failed", {"reason": "OSError: [Errno 28] No space"}),
        (KeyboardInterrupt(), "failed", {"reason": "KeyboardInterrupt"}),
        (Stopped(), "stopped", {"resume_command": "mainrun resume {}"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_record_says_how_the_run_ended_and_the_error_goes_on(
    run_dir: Path, error: BaseException, event: str, fields: dict[str, str]
):
    with pytest.raises(type(error)) as caught:
        train_until(error, run_dir)
    assert caught.value is error
    last = read_events(run_dir / "events.jsonl")[-1]
    assert last["event"] == event
    assert {k: v.format(run_dir) for k, v in fields.items()}.items() <= last.items()
    assert json.loads((run_dir / "summary.json").read_text())["status"] == event
    assert (run_dir / "plots" / "loss.png").is_file()


def test_an_ending_that_the_run_told_itself_is_not_told_twice(run_dir: Path):
    with pytest.raises(Stopped):
        train_until(Stopped(), run_dir, stopped={"resume_command": "mainrun resume there k=v"})
    names = [e["event"] for e in read_events(run_dir / "events.jsonl")]
    assert names == ["tracking_started", "train_step", "train_step", "stopped"]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["resume_command"] == "mainrun resume there k=v"


def test_a_full_disk_ends_the_run_with_the_reason_on_the_console(run_dir: Path):
    full = PROGRAM.replace(
        "    for step",
        "    import resource\n"
        "    size = (run_dir / 'events.jsonl').stat().st_size + 300\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n"
        "    for step",
    )
    done = program(run_dir, "tracking.wandb=disabled", code=full)
    assert done.returncode == 1
    complaint = f"{run_dir / 'events.jsonl'}: cannot write `failed`: File too large"
    assert f"failed: {complaint}" in done.stderr
    assert "RunFailed" in done.stderr.splitlines()[-1]
    assert read_events(run_dir / "events.jsonl")[-1]["event"] == "samples"


def test_a_picture_that_cannot_be_drawn_does_not_change_how_the_run_ended(run_dir: Path):
    (run_dir / "plots").write_text("a file where the folder should be")
    with open_tracker(run_dir, DISABLED, total_steps=3) as tracker:
        train(tracker, range(1, 3), seconds=1.0)
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "finished"
    assert "FileExistsError" in read_events(run_dir / "events.jsonl")[-1]["message"]


def spoil(path: Path, how: str) -> None:
    """What happens to a table while a run goes on."""
    if path.exists() or path.is_symlink():
        path.unlink()
    match how:
        case "a folder":
            path.mkdir()
        case "on a full disk":
            path.symlink_to("/dev/full")


@pytest.mark.parametrize("how", ["deleted", "a folder", "on a full disk"])
def test_a_table_that_is_lost_while_a_run_goes_on_is_a_warning_and_made_again(
    run_dir: Path, how: str
):
    """At the next evaluation, else at the end."""
    path = run_dir / "metrics.csv"
    with open_tracker(run_dir, DISABLED, total_steps=20) as tracker:
        train(tracker, range(1, 5), seconds=1.0)
        spoil(path, how)
        train(tracker, range(5, 6), seconds=1.0)
        train(tracker, range(6, 11), seconds=1.0)
        if how != "a folder":
            assert table(path)["step"] == [str(step) for step in range(1, 11)]
        else:
            path.rmdir()
            train(tracker, range(11, 12), seconds=1.0)
            assert not path.exists()
        spoil(path, how)
        train(tracker, range(12, 13), seconds=1.0)
        if path.is_dir():
            path.rmdir()
    assert table(path)["step"] == [row["step"] for row in metrics_of(run_dir)]
    messages = [e["message"] for e in read_events(run_dir / "events.jsonl") if "message" in e]
    assert len(messages) == (1 if how == "a folder" else 2)
    assert all(message.startswith(f"{path}: cannot be written (") for message in messages)


def metrics_of(run_dir: Path) -> list[dict[str, str]]:
    """The rows of the record, as the table spells them."""
    rows = metrics(read_events(run_dir / "events.jsonl"))
    return [{name: repr(value) for name, value in row.items()} for row in rows]


VIEWS = (
    "metrics.csv", "summary.json", "summary.md",
    "plots/loss.png", "plots/learning_rate.png", "plots/throughput.png",
)  # fmt: skip


def test_the_views_of_a_record_are_made_again_by_themselves(run_dir: Path):
    with open_tracker(run_dir, DISABLED, total_steps=6) as tracker:
        train(tracker, range(1, 7), seconds=1.0)
    before = {name: (run_dir / name).read_bytes() for name in VIEWS}
    record = (run_dir / "events.jsonl").read_bytes()
    for name in VIEWS:
        (run_dir / name).unlink()
    (run_dir / "summary.md").write_text("of an earlier process")
    write_views(run_dir)
    assert {name: (run_dir / name).read_bytes() for name in VIEWS} == before
    assert (run_dir / "events.jsonl").read_bytes() == record


def test_views_that_another_process_is_about_to_write_are_left_to_it(run_dir: Path):
    with open_tracker(run_dir, DISABLED, total_steps=6) as tracker:
        train(tracker, range(1, 7), seconds=1.0)
        write_views(run_dir)
        assert not (run_dir / "summary.json").exists()


def test_views_that_cannot_be_written_are_told_of_and_raise_nothing(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    with open_tracker(run_dir, DISABLED, total_steps=6) as tracker:
        train(tracker, range(1, 7), seconds=1.0)
    (run_dir / "summary.json").unlink()
    (run_dir / "summary.json").mkdir()
    (run_dir / "plots" / "loss.png").unlink()
    capsys.readouterr()
    write_views(run_dir)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: IsADirectoryError: ")
    assert (run_dir / "plots" / "loss.png").is_file()


def test_views_on_a_disk_that_only_reads_are_a_warning(
    disk: Disk, capsys: pytest.CaptureFixture[str]
):
    run_dir = disk.path / "run"
    run_dir.mkdir()
    with open_tracker(run_dir, DISABLED, total_steps=6) as tracker:
        train(tracker, range(1, 7), seconds=1.0)
    disk.remount("ro")
    capsys.readouterr()
    write_views(run_dir)
    path = run_dir / "events.jsonl"
    assert capsys.readouterr().err == f"warning: {path} cannot be opened: Read-only file system\n"


def test_what_is_no_plain_value_is_a_mistake_of_ours(run_dir: Path):
    with (
        pytest.raises(AttributeError),
        open_tracker(run_dir, DISABLED, total_steps=3) as tracker,
    ):
        tracker.log("warning", message=object())
