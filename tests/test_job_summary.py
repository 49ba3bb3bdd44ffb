"""A job's page says whether it worked, why not and what to do; nothing it quotes is markup."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from mainrun.job_summary import markdown
from mainrun.summary import write_summary
from tests.test_summary import Log

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
MAX_BYTES = 2**20  # of a step summary

HOSTILE = (
    "`a` ```` | **b** ~~c~~ <script>alert(1)</script> <img src=x onerror=y> </details> "
    "[d](http://e.example) ![f](http://g.example/h.png) &lt; $i$ \\ \x1b[31mred\x1b[0m \u202e\x00"
)


def job(kind: str = "finished", sentence: str = "the task is done", **changes: Any) -> dict:
    remedy = changes.pop("remedy", "")
    return {
        "label": "4711-1",
        "task": "train",
        "words": ["config/base/quickstart.yaml", "--run-dir", "runs/quickstart-4711-1"],
        "run": "runs/quickstart-4711-1",
        "image": "mainrun:" + "ab" * 20,
        "commit": "ab" * 20,
        "gpus": "0,1",
        "url": "https://github.example/me/mainrun/actions/runs/4711",
        "by": "ada",
        "inputs": {"task": "train", "config": "quickstart", "overrides": "a.b=1", "gpus": "auto"},
        "started": "2026-11-23T05:00:00+00:00",
        "ended": "2026-11-23T05:01:30+00:00",
        "step": "run",
        "ending": {"kind": kind, "exit_code": 0, "sentence": sentence, "remedy": remedy},
        **changes,
    }


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def log(runs: Path) -> Log:
    """The record of the job's run: started, evaluated twice, trained to step 7 of 10."""
    log = Log(runs / "quickstart-4711-1")
    log.start(name="quickstart-4711-1")
    for step, loss in ((0, 4.0), (5, 2.5)):
        log.evaluate(step, loss, **{"val/nats_per_token": 2 * loss})
    log.train(*range(1, 8))
    return log


def save(log: Log, *names: str) -> None:
    for name in names:
        (log.run_dir / "checkpoints" / name).mkdir(parents=True)


def tokens(page: str) -> list[Any]:
    parsed = PARSER.parse(page)
    return [inner for token in parsed for inner in (token, *(token.children or ()))]


def headings(page: str) -> list[tuple[str, str]]:
    parsed = PARSER.parse(page)
    return [
        (token.tag, "".join(child.content for child in parsed[i + 1].children or ()))
        for i, token in enumerate(parsed)
        if token.type == "heading_open"
    ]


def fences(page: str) -> dict[str, str]:
    """The content of each code block, the last one of its kind, by its language."""
    return {token.info: token.content for token in tokens(page) if token.type == "fence"}


def facts(page: str) -> dict[str, str]:
    """All rows of tables of two columns."""
    rows = [[]]
    for token in PARSER.parse(page):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and token.level >= 3:
            rows[-1].append("".join(child.content for child in token.children or ()))
    return {row[0]: row[1] for row in rows if len(row) == 2}


# -------------------------------------------------------------------------------------------
# What it says


def test_a_finished_run_has_loss_curve_facts_and_how_to_use_it(finished_run: Path, tmp_path: Path):
    runs = tmp_path / "runs"
    shutil.copytree(finished_run, runs / "quickstart-4711-1")
    page = markdown(job(), runs, ["line 1", "line 2"])
    assert headings(page)[:2] == [("h1", "Training finished"), ("h2", "quickstart-4711-1")]
    first = page.split("| job |")[0]
    assert "40 of 40 steps" in first
    assert "nats/char** at step 40" in first
    assert "xychart-beta" in fences(page)["mermaid"]
    told = facts(page)
    assert told["job"] == "4711-1, by ada"
    assert told["config"] == "quickstart"
    assert told["overrides"] == "a.b=1"
    assert told["GPUs"] == "0,1"
    assert told["commit"] == "ab" * 20
    assert told["image"] == "mainrun:" + "ab" * 20
    assert told["time"] == "1 min 30 s, from 2026-11-23 05:00 UTC"
    assert told["artifact"] == "train-4711-1"
    assert told["run folder"] == "runs/quickstart-4711-1"
    assert fences(page)["sh"] == (
        "mainrun evaluate runs/quickstart-4711-1\nmainrun generate runs/quickstart-4711-1\n"
    )
    assert "`resume` = `quickstart-4711-1` and more `training.epochs`" in page
    assert fences(page)["text"] == "line 1\nline 2\n"
    assert str(tmp_path) not in page.replace("\\", "")


def test_a_stopped_run_says_what_is_saved_and_how_to_go_on(log: Log, runs: Path):
    log("stopped", resume_command="mainrun resume runs/quickstart-4711-1 a=1")
    save(log, "5", "7")
    page = markdown(job("stopped", "it was stopped", remedy="resume it: all is saved"), runs, [])
    assert headings(page)[0] == ("h1", "Training was stopped")
    assert "**It was stopped.**\n\nIt came to step 7 of 10. All of it is saved.\n\n" in page
    assert "**What to do:** Resume it\\: all is saved.\n" in page
    assert ("h2", "To go on") in headings(page)
    assert fences(page)["sh"] == "mainrun resume runs/quickstart-4711-1 a=1\n"
    workflow = "https://github.example/me/mainrun/actions/workflows/train.yml"
    assert [t.attrs["href"] for t in tokens(page) if t.type == "link_open"] == [workflow]
    assert "`resume` = `quickstart-4711-1`" in page
    assert "`resume_artifact` = `4711`" in page


@pytest.mark.parametrize(
    ("kind", "heading"),
    [
        ("failed", "Training failed"),
        ("out_of_memory", "Training ran out of memory"),
        ("killed", "Training was killed"),
        ("lost", "Training broke off"),
    ],
)
def test_a_run_that_ended_badly_says_how_much_of_it_is_saved(
    log: Log, runs: Path, kind: str, heading: str
):
    save(log, "2", "4", "6.orbax-checkpoint-tmp")
    ended = job(kind, "the disk is full", remedy="make room, then `mainrun resume` it")
    page = markdown(ended, runs, ["why"])
    assert headings(page)[0] == ("h1", heading)
    assert "**The disk is full.**" in page
    assert "**What to do:** Make room, then `mainrun resume` it." in page
    assert "checkpoint is that of step 4, so 3 steps will be done again." in page
    # The record has no last word, so the command is made from the job's name of the folder.
    assert fences(page)["sh"] == "mainrun resume runs/quickstart-4711-1\n"
    assert "<details open>" in page


def test_a_run_without_a_checkpoint_is_not_to_be_resumed(log: Log, runs: Path):
    page = markdown(job("killed", "it was killed", remedy="resume it"), runs, [])
    assert "No checkpoint was saved yet" in page
    assert "Resume it" not in page
    assert ("h2", "To go on") not in headings(page)
    page = markdown(job("out_of_memory", "too big", remedy="make it smaller"), runs, [])
    assert "**What to do:** Make it smaller." in page


@pytest.mark.parametrize("runs_dir", [None, Path("nowhere")])
def test_a_job_without_a_run_folder_has_a_page_all_the_same(runs_dir: Path | None):
    page = markdown(job("failed", "no such corpus"), runs_dir, ["the last line"])
    assert headings(page) == [("h1", "Training failed")]
    assert "No checkpoint was saved yet" in page
    assert fences(page) == {"text": "the last line\n"}


@pytest.mark.parametrize(
    ("kind", "step", "sentence", "heading"),
    [
        ("refused", "check", "config='x': no such file", "Training was not started"),
        ("refused", "run", "GPU 0 is taken by job 12", "Training was not started"),
        ("refused", "image", "the disk of Docker is full", "Training was not started"),
        ("failed", "image", "the image could not be built", "Training was not started"),
        ("stopped", "image", "it was stopped while the image was built", "Training was stopped"),
        ("lost", "check", "it ended before its inputs were checked", "Training broke off"),
        ("lost", None, "it ended before anything", "Training broke off"),
    ],
)
def test_a_job_that_never_began_says_why_and_nothing_of_the_run_it_was_to_resume(
    log: Log, runs: Path, kind: str, step: str | None, sentence: str, heading: str
):
    save(log, "7")
    page = markdown(job(kind, sentence, step=step, remedy="see the log"), runs, [])
    assert headings(page) == [("h1", heading)]
    assert sentence[1:] in facts_and_text(page)
    assert "What to do: See the log." in facts_and_text(page)
    assert "checkpoint" not in page


def facts_and_text(page: str) -> str:
    return "".join(token.content for token in tokens(page) if token.type != "inline")


def test_a_job_refused_at_once_has_no_name_and_no_artifact():
    early = job("refused", "overrides: 'x' is not key.path=value", step="check", label=None,
                run=None, words=[], image=None, gpus=None, ended=None)  # fmt: skip
    told = facts(markdown(early, None, []))
    assert told == {
        "job": "by ada", "config": "quickstart", "overrides": "a.b=1", "GPUs": "auto",
        "commit": "ab" * 20,
    }  # fmt: skip


@pytest.mark.parametrize("task", ["train", "resume", "sweep", "evaluate", None, "other"])
@pytest.mark.parametrize(
    "kind", ["finished", "failed", "stopped", "refused", "out_of_memory", "killed", "lost", "new"]
)
def test_every_ending_of_every_task_has_one_headline(
    log: Log, runs: Path, task: str | None, kind: str
):
    for changes in ({}, {"run": None}, {"words": None, "inputs": None, "url": None, "by": None}):
        page = markdown(job(kind, "so it is", task=task, **changes), runs, [])
        assert [tag for tag, _ in headings(page)].count("h1") == 1
        assert "None" not in page.replace("mainrun None", "")


def test_a_job_without_a_last_word_says_so():
    page = markdown(job() | {"ending": None}, None, [])
    assert headings(page) == [("h1", "Training broke off")]
    assert "**It left no word of how it ended.**" in page


# -------------------------------------------------------------------------------------------
# Run folders in any state


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text(""),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_text("{}\n" + path.read_text()),
        lambda path: path.write_text("5\n" + path.read_text()),
        lambda path: path.write_text('{"event": 1, "timestamp": 2}\n'),
        lambda path: path.write_text("no JSON\n" + path.read_text()),
        lambda path: path.write_bytes(b"\xff\xfe\x00" * 100 + b"\n" + path.read_bytes()),
        lambda path: path.write_text(path.read_text().replace('_steps": 10', '_steps": "x"')),
        lambda path: path.write_text(path.read_text().replace("2026-01-01T", "yesterday")),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: path.write_text(path.read_text() + "[" * 100_000 + "\n{}\n"),
        lambda path: path.write_text(path.read_text().replace('"step": 7', '"step": 1e999')),
        lambda path: path.write_text(path.read_text().replace("2026-01-01T", "0001-01-01T")),
        lambda path: os.truncate(path, 2**30),
        lambda path: (path.parent / "config.yaml").write_bytes(b"a" * 2**19),
    ],
)  # fmt: skip
def test_a_damaged_record_leaves_the_rest_of_the_page(log: Log, runs: Path, damage: Any):
    save(log, "4")
    damage(log.run_dir / "events.jsonl")
    page = markdown(job("killed", "it was killed", remedy="resume it"), runs, ["the end"])
    assert headings(page)[0] == ("h1", "Training was killed")
    assert "checkpoint is that of step 4" in page or "It came to step" in page
    assert fences(page)["sh"] == "mainrun resume runs/quickstart-4711-1\n"
    assert fences(page)["text"] == "the end\n"
    assert str(runs) not in page.replace("\\", "")


def test_the_page_is_made_from_the_record_and_not_from_an_old_summary(log: Log, runs: Path):
    log("stopped", resume_command="x")
    write_summary(log.run_dir)
    log("tracking_started", wandb="disabled")
    log("resumed", 5)
    log.train(6, 7, 8, 9)
    page = markdown(job("killed", "it was killed"), runs, [])
    assert "It came to step 9 of 10" in page


# -------------------------------------------------------------------------------------------
# Data is data

ALLOWED_HTML = {
    "<details>", "<details open>", "</details>", "<summary>", "</summary>",
}  # fmt: skip


def assert_harmless(page: str, links: int = 0) -> None:
    found = tokens(page)
    kinds = [token.type for token in found]
    assert not set(kinds) & {"image", "html_inline", "em_open", "s_open", "blockquote_open",
                             "list_item_open", "code_block"}  # fmt: skip
    html = [token.content.strip() for token in found if token.type == "html_block"]
    assert all("<details" in block or block == "</details>" for block in html)
    assert not any("script" in block or "img" in block for block in html)
    assert kinds.count("link_open") == links
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "\x00" not in page


def test_hostile_data_in_every_field_is_shown_and_never_obeyed(runs: Path):
    log = Log(runs / "quickstart-4711-1")
    log("tracking_started", wandb="online", wandb_id="x", wandb_url=HOSTILE, sync_command=HOSTILE)
    log("run_started", 0, name=HOSTILE, device=HOSTILE, precision=HOSTILE, total_steps=10)
    log.evaluate(0, 4.0)
    log.evaluate(5, 3.0)
    log("samples", 5, texts=[HOSTILE, "```\n# out of it\n", "::set-output name=a::b"])
    log("stopped", resume_command=HOSTILE)
    save(log, "5")
    names = ["label", "image", "commit", "gpus", "url", "by", "started", "ended"]
    inputs = {"overrides": HOSTILE, "con|fig\n#": HOSTILE}
    tail = [HOSTILE, "```", "````text", "</details>", "# heading", "::set-output name=a::b", "~~~"]
    for kind in ("stopped", "failed", "refused", HOSTILE):
        page = markdown(
            job(kind, HOSTILE, remedy=HOSTILE, inputs=inputs, **dict.fromkeys(names, HOSTILE)),
            runs,
            tail,
        )
        assert_harmless(page)
        expected = {"Evaluations", "Samples at step 5", "To go on", "quickstart-4711-1"}
        assert {text for _, text in headings(page)[1:]} <= expected
        assert "</details>\n::" not in page
        log_block = [t.content for t in tokens(page) if t.type == "fence"][-1]
        assert log_block.splitlines()[1:] == tail[1:]
        assert "red" in log_block
        assert "[31m" not in log_block


ANYTHING = st.recursive(
    st.sampled_from([None, True, -1, 0, 7, 10**400, 1.5, 5e-324, 1e308, math.inf, math.nan, "NaN",
                     "2026-01-01T00:00:00Z", "", HOSTILE, "https://evil.example/log-in"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.just(HOSTILE), inner),
    max_leaves=3,
)  # fmt: skip
FIELDS = [
    "timestamp", "step", "name", "parameters", "trained_parameters", "total_steps", "device",
    "precision", "steps_per_epoch", "train_tokens", "wandb", "wandb_url", "sync_command", "texts",
    "reason", "resume_command", "best_step", "val/loss", "val/loss_stderr", "val/nats_per_token",
    "train/loss", "perf/step_ms", "perf/tokens_per_second", "perf/peak_memory_bytes",
    "noise/scale_tokens",
]  # fmt: skip
EVENTS = [
    "tracking_started", "run_started", "evaluation", "train_step", "samples", "stopped_early",
    "step_skipped", "went_back", "resumed", "failed", "stopped", "finished",
]  # fmt: skip


@settings(deadline=None, derandomize=True, database=None, max_examples=100)
@given(st.dictionaries(st.tuples(st.sampled_from(EVENTS), st.sampled_from(FIELDS)), ANYTHING,
                       max_size=4))  # fmt: skip
def test_a_record_of_any_values_makes_a_harmless_page(changes: dict[tuple[str, str], Any]):
    with tempfile.TemporaryDirectory() as folder:
        log = Log(Path(folder) / "quickstart-4711-1")
        whole = {"name": "a", "total_steps": 9, "texts": ["x"], "val/loss": 2.0, "train/loss": 1.0,
                 "perf/step_ms": 3.0, "best_step": 1, "val/nats_per_token": 3.0}  # fmt: skip
        for step, event in enumerate(EVENTS):
            changed = {field: value for (name, field), value in changes.items() if name == event}
            log(event, **{"step": step, **whole, **changed})
        page = markdown(job("failed", "x", url=""), Path(folder), [])
    assert_harmless(page)
    assert len(page.encode()) < MAX_BYTES


@pytest.mark.parametrize(
    ("address", "linked"),
    [
        ("https://wandb.ai/me/p/runs/a", True),
        ("https://wandb.example/me/p/runs/a", True),
        ("https://evil.example/log-in", False),
        ("https://wandb.ai.evil.example/me", False),
        ("https://wandb.ai@evil.example/", False),
        ("https://wandb.example.evil.example/", False),
    ],
)
def test_a_page_links_to_weights_and_biases_and_to_nowhere_else(
    runs: Path, monkeypatch: pytest.MonkeyPatch, address: str, linked: bool
):
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    log = Log(runs / "quickstart-4711-1")
    log("tracking_started", wandb="online", wandb_url=address)
    page = markdown(job("failed", "x", url=""), runs, [])
    targets = [token.attrs["href"] for token in tokens(page) if token.type == "link_open"]
    assert targets == [address] * linked
    assert address in facts(page)["Weights & Biases"].replace("\u2060", "")


def test_a_hostile_run_name_or_command_is_shown_and_never_obeyed(runs: Path):
    page = markdown(job("failed", "x", run=f"runs/{HOSTILE}", words=[HOSTILE], inputs={}), runs, [])
    assert_harmless(page)
    assert "alert(1)" in facts(page)["command"]


@pytest.mark.parametrize(
    "line",
    [
        "x" * 100_000, "\x1b]" * 50_000, "\x1b[" * 50_000, "`" * 100_000, "\U0010ffff" * 100_000,
        "\udcff" * 10, "a\r" * 50_000,
    ],
    ids=["long", "titles", "colours", "fences", "unprintable", "surrogates", "overwritten"],
)  # fmt: skip
def test_everything_too_long_is_cut_and_the_page_stays_below_the_limit(
    log: Log, runs: Path, line: str
):
    log("samples", 5, texts=[line.replace("\udcff", "?")] * 60)
    log("failed", reason=line.replace("\udcff", "?"))
    save(log, "5")
    told = dict.fromkeys(("label", "image", "commit", "gpus", "url", "by"), line)
    inputs = {f"input {i}": line for i in range(50)}
    page = markdown(job("failed", line, remedy=line, inputs=inputs, **told), runs, [line] * 300)
    assert len(page.encode()) < MAX_BYTES
    assert_harmless(page)
    log_lines = fences(page)["text"].splitlines()
    assert len(log_lines) == 20
    assert max(map(len, log_lines)) < 5100
    assert "The first 20 of 60" in page


def test_a_long_log_line_says_how_much_of_it_is_missing():
    page = markdown(job("failed", "x"), None, ["y" * 100_000])
    assert fences(page)["text"] == "y" * 500 + "… (99,500 characters more)\n"


def test_colours_and_overwritten_lines_of_the_log_are_gone():
    lines = [
        "\x1b[1;32mgreen\x1b[0m\ttab",
        "10%\r50%\r100%\r\n",
        "\x1b]0;title\x07text",
        "bell\x07",
    ]
    page = markdown(job(), None, lines)
    assert fences(page)["text"] == "green   tab\n100%\ntext\nbell\\x07\n"


# -------------------------------------------------------------------------------------------
# Secrets


def test_no_secret_is_on_the_page_wherever_it_stood(
    log: Log, runs: Path, monkeypatch: pytest.MonkeyPatch
):
    secret = "canary_*[x](y)_0123456789"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    log("samples", 5, texts=[secret])
    log("stopped", resume_command=f"mainrun resume x {secret}")
    save(log, "5")
    ended: Mapping[str, Any] = job(
        "stopped", f"it was {secret}", remedy=secret, inputs={"overrides": secret}, by=secret,
        gpus=secret, image=secret,
    )  # fmt: skip
    # Coloured in the middle, and across the place where the line is cut.
    tail = [secret, f"\x1b[1m{secret[:5]}\x1b[0m{secret[5:]}", "z" * 490 + secret]
    page = markdown(ended, runs, tail, f"1 file is left out: {secret} (a link)")
    assert "canary" not in page
    assert "0123456789" not in page
    assert page.count("WANDB") >= 10


def test_the_page_is_text_that_a_file_takes(log: Log, runs: Path, tmp_path: Path):
    lone = json.loads('"\\ud800"')
    page = markdown(job("failed", lone, by=lone, inputs={lone: lone}), runs, [lone])
    (tmp_path / "page.md").write_text(page, encoding="utf-8")
