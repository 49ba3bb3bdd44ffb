"""What a run came to is read rightly from its record, also where the run came to little."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from markdown_it import MarkdownIt

from mainrun import config
from mainrun.console import printable
from mainrun.plots import _smoothed, write_plots
from mainrun.summary import result_lines, write_summary

HOSTILE = "a|b *c* `d` <script>x</script> [e](http://f.example) $g$^{ www.h.example\n# i \\"


class Log:
    """A record written by hand, with a clock of its own: one second an event."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.seconds = 0
        run_dir.mkdir()

    def __call__(self, event: str, step: int | None = None, **fields: Any) -> None:
        self.seconds += 1
        time = f"2026-01-01T{self.seconds // 3600:02}:{self.seconds // 60 % 60:02}:"
        line = {"event": event, "timestamp": f"{time}{self.seconds % 60:02}.000000Z"}
        line |= fields if step is None else {"step": step, **fields}
        with (self.run_dir / "events.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def start(self, total_steps: int = 10, name: str = "run") -> None:
        self("tracking_started", wandb="disabled")
        self(
            "run_started", 0, name=name, parameters=1234, total_steps=total_steps,
            steps_per_epoch=5, train_tokens=5000, compile_seconds=2.5, device="cpu",
            precision="float32",
        )  # fmt: skip

    def train(self, *steps: int, ms: float = 100.0) -> None:
        for step in steps:
            metrics = {"train/loss": 5 / step, "optimizer/learning_rate": 1e-3 / step}
            speed = {"perf/step_ms": ms + step, "perf/tokens_per_second": 1e4 / (ms + step)}
            self("train_step", step, **metrics, **speed, **{"perf/peak_memory_bytes": 2**20 * step})

    def evaluate(self, step: int, loss: float, **fields: float) -> None:
        self("evaluation", step, **{"val/loss": loss, "val/loss_stderr": 0.01}, **fields)


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "run")


def stored(log: Log) -> dict[str, Any]:
    written = write_summary(log.run_dir)
    read = json.loads((log.run_dir / "summary.json").read_text(), parse_constant=lambda name: 1 / 0)
    assert read == written
    return read


def test_first_last_and_best_evaluation_with_step_and_standard_error(log: Log):
    log.start()
    for step, loss in [(0, 4.0), (4, 1.5), (8, 1.75)]:
        log.evaluate(step, loss)
    log("finished")
    assert stored(log)["val/loss"] == {
        "first": {"step": 0, "value": 4.0, "stderr": 0.01},
        "best": {"step": 4, "value": 1.5, "stderr": 0.01},
        "last": {"step": 8, "value": 1.75, "stderr": 0.01},
    }


def test_sums_and_medians_of_a_resumed_run_count_no_voided_step(log: Log):
    log.start()
    log.train(1, 2, 3, 4, ms=100.0)  # killed here, and 3 and 4 are lost
    log.seconds += 1000  # nobody worked
    log("tracking_started", wandb="offline", wandb_id="x", wandb_url=None)
    log("resumed", 2, overrides=[])
    log.train(3, 4, 5, 6, ms=200.0)
    log("finished")
    result = stored(log)
    assert result["status"] == "finished"
    assert (result["steps"], result["total_steps"]) == (6, 10)
    assert result["training_seconds"] == pytest.approx((101 + 102 + 203 + 204 + 205 + 206) / 1000)
    assert result["total_seconds"] == 5 + 6  # of six and of seven events, a second apart
    # Without the first step of each process.
    warm = [1e4 / ms for ms in (102, 204, 205, 206)]
    assert result["tokens_per_second"] == pytest.approx(statistics.median(warm))
    assert result["peak_memory_bytes"] == 6 * 2**20
    assert result["wandb"] == {"mode": "offline", "id": "x", "url": None}


def test_the_noise_scale_suggests_a_batch_by_its_median(log: Log):
    log.start()
    overrides = ["data.context_length=100", "training.batch_size=8"]
    (log.run_dir / "config.yaml").write_text(config.to_yaml(config.load(None, overrides)))
    for step, scale in enumerate((500.0, 1540.0, 90_000.0), start=1):
        log("train_step", step, **{"train/loss": 1.0, "noise/scale_tokens": scale})
    log("finished")
    assert stored(log)["noise"] == {
        "median_scale_tokens": 1540.0,
        "last_scale_tokens": 90_000.0,
        "suggested_batch_size": 15,
        "batch_size": 8,
    }
    page = (log.run_dir / "summary.md").read_text()
    assert "1,540 tokens in the median, 90,000 at the end: a batch of about 15 sequences" in page


def test_without_micro_batches_nothing_is_said_of_noise(log: Log):
    log.start()
    log.train(1, 2)
    assert stored(log)["noise"] is None
    assert "noise" not in (log.run_dir / "summary.md").read_text()


def test_skipped_steps_and_returns_count_once_however_often_they_were_walked(log: Log):
    log.start()
    log("step_skipped", 3, reason="x")
    log("went_back", 4, reason="x", to_step=2)
    log("tracking_started", wandb="disabled")
    log("resumed", 2, overrides=[])
    log("step_skipped", 3, reason="x")
    log("went_back", 4, reason="x", to_step=2)
    log("step_skipped", 6, reason="x")
    log("finished")
    stored(log)
    page = (log.run_dir / "summary.md").read_text()
    assert "| steps skipped | 2;" in page
    assert "| returns to a checkpoint | 1;" in page


def test_an_early_end_is_told_until_a_later_process_goes_on(log: Log):
    log.start()
    log.train(1, 2)
    log("stopped_early", 2, best_step=1)
    log("finished")
    stored(log)
    told = "| stopped early | at step 2, no better since 1 |"
    assert told in (log.run_dir / "summary.md").read_text()
    log("tracking_started", wandb="disabled")
    log("resumed", 2, overrides=["training.patience=9"])
    log.train(3)
    log("finished")
    stored(log)
    assert "stopped early" not in (log.run_dir / "summary.md").read_text()


def test_steps_that_are_not_recorded_took_time_too(log: Log):
    log.start()
    log.train(5, 10, ms=0.0)
    assert stored(log)["training_seconds"] == pytest.approx((5 * 5 + 5 * 10) / 1000)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.batch_size=10", "data.context_length=90"], 10 * 90 * 7),
        # Padded: 5 steps of 12 × 100 places are an epoch of 5,000 tokens.
        (["training.batch_size=12", "data.context_length=100"], 5000 * 7 / 5),
    ],
)
def test_tokens_seen_are_those_of_the_text_and_not_the_padding(
    log: Log, overrides: list[str], expected: float
):
    (log.run_dir / "config.yaml").write_text(config.to_yaml(config.load(None, overrides)))
    log.start()
    log.train(*range(1, 8))
    assert stored(log)["tokens_seen"] == expected


@pytest.mark.parametrize(
    ("ending", "fields", "status", "reason", "resumable"),
    [
        ("finished", {}, "finished", None, None),
        ("stopped", {"resume_command": "mainrun resume x k=v"}, "stopped", None, "x k=v"),
        ("failed", {"reason": "no disk"}, "failed", "no disk", "run"),
        ("warning", {"message": "w"}, "failed", "killed", "run"),
    ],
)
def test_the_status_is_the_last_word_of_the_last_process(
    log: Log, ending: str, fields: Any, status: str, reason: str | None, resumable: str | None
):
    log.start()
    log("finished")
    log("tracking_started", wandb="disabled")
    log(ending, **fields)
    result = stored(log)
    assert result["status"] == status
    assert (reason or "") in (result["reason"] or "")
    assert (reason is None) == (result["reason"] is None)
    assert (resumable is None) == (result["resume_command"] is None)
    assert (result["resume_command"] or "").endswith(resumable or "")


@pytest.mark.parametrize("events", [0, 1, 2])
def test_a_run_that_died_in_its_first_second_has_a_summary_and_no_plots(log: Log, events: int):
    (log.run_dir / "events.jsonl").touch()
    log.start()
    lines = (log.run_dir / "events.jsonl").read_text().splitlines(keepends=True)
    (log.run_dir / "events.jsonl").write_text("".join(lines[:events]))
    result = stored(log)
    assert (result["status"], result["steps"], result["last"]) == ("failed", 0, {})
    assert result["val/loss"]["best"] is None
    assert (log.run_dir / "summary.md").read_text().startswith("# run: failed\n")
    assert result_lines(result)[0].startswith("failed: 0 ")
    write_plots(log.run_dir)
    assert not (log.run_dir / "plots").exists()


def test_a_diverged_run_is_valid_json_and_its_best_is_the_best_number(log: Log):
    log.start()
    log.evaluate(0, math.nan)
    log.evaluate(3, 4.0)
    log.evaluate(5, math.nan)
    log("train_step", 5, **{"train/loss": math.inf})
    log("failed", reason="loss is NaN")
    path = log.run_dir / "events.jsonl"
    path.write_text(path.read_text().replace("NaN,", '"NaN",').replace("Infinity}", '"Infinity"}'))
    result = stored(log)
    assert result["val/loss"]["best"]["value"] == 4.0
    assert result["val/loss"]["last"]["value"] is None
    assert result["last"]["train/loss"] is None
    assert "not a number" in (log.run_dir / "summary.md").read_text()
    write_plots(log.run_dir)
    assert picture(log, "loss").std() > 0


# -------------------------------------------------------------------------------------------
# Words


def tokens(markdown: str) -> list[Any]:
    """What a reader of Markdown makes of it, flat; tables and bare links as on GitHub."""
    parsed = MarkdownIt("commonmark").enable("table").parse(markdown)
    return [inner for token in parsed for inner in (token, *(token.children or ()))]


def test_the_summary_for_people_says_result_speed_and_how_to_go_on(log: Log):
    log.start(name="tiny run")
    log.evaluate(0, 4.0)
    log.train(*range(1, 11))
    log.evaluate(10, 1.5, **{"val/nats_per_token": 3.25})
    log("samples", 10, texts=["one text", "two"])
    log("stopped", resume_command="mainrun resume there")
    write_summary(log.run_dir)
    text = (log.run_dir / "summary.md").read_text()
    assert text.startswith("# tiny run: stopped\n")
    assert "`val/loss` **1.500 ± 0.010 nats/char** at step 10 (the best); 4.000" in text
    assert "| steps | 10 of 10 |" in text
    assert "| parameters | 1,234 |" in text
    assert "| 10 | 1.5000 | 0.0100 | 3.2500 |  |  |" in text
    assert "```text\none text\ntwo\n```" in text
    assert "```sh\nmainrun resume there\n```" in text


def test_the_curve_stands_between_facts_and_evaluations_once_there_is_one(log: Log):
    log.start()
    log.evaluate(0, 4.0)
    write_summary(log.run_dir)
    assert "mermaid" not in (log.run_dir / "summary.md").read_text()
    log.evaluate(10, 1.5)
    write_summary(log.run_dir)
    found = tokens((log.run_dir / "summary.md").read_text())
    kinds = [(token.type, token.info) for token in found]
    curve = kinds.index(("fence", "mermaid"))
    assert kinds.index(("table_close", "")) < curve < kinds.index(("heading_open", ""), 5)
    assert "xychart-beta" in found[curve].content


@pytest.mark.parametrize(
    ("address", "row"),
    [
        ({"wandb": "disabled"}, "disabled"),
        (
            {"wandb": "online", "wandb_url": "https://wandb.example/me/p/runs/x"},
            "<https://wandb.example/me/p/runs/x>",
        ),
        (
            {"wandb": "offline", "wandb_url": None, "sync_command": "wandb sync runs/r/wandb/x"},
            "offline; to upload: wandb sync runs/r/wandb/x",
        ),
    ],
)
def test_the_summary_says_where_weights_and_biases_has_the_run(log: Log, address: Any, row: str):
    log("tracking_started", **address)
    write_summary(log.run_dir)
    assert f"| Weights & Biases | {row} |" in (log.run_dir / "summary.md").read_text()


def test_twenty_samples_are_shown_each_of_a_bounded_length(log: Log):
    log.start()
    log("samples", 3, texts=["y" * 9000] + [f"text {i}" for i in range(1, 50)])
    write_summary(log.run_dir)
    text = (log.run_dir / "summary.md").read_text()
    block = next(token.content for token in tokens(text) if token.type == "fence").splitlines()
    assert (len(block), len(block[0]), block[19]) == (20, 2000, "text 19")
    assert "The first 20 of 50" in text


@pytest.mark.parametrize("sample", [HOSTILE, "```\n# out of the fence", "````", ""])
def test_data_is_shown_as_it_is_and_never_read_as_markup(log: Log, sample: str):
    log.start(name=HOSTILE)
    log.evaluate(0, 4.0)
    log("samples", 0, texts=[sample])
    log("failed", reason=HOSTILE)
    write_summary(log.run_dir)
    found = tokens((log.run_dir / "summary.md").read_text())
    kinds = {token.type for token in found}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "em_open", "softbreak"}
    shown = " ".join(HOSTILE.split())
    headings = [found[i + 1].children for i, t in enumerate(found) if t.type == "heading_open"]
    assert "".join(part.content for part in headings[0]) == f"{shown}: failed"
    assert len(headings) == 4  # title, evaluations, samples, to go on
    fences = [token.content.strip() for token in found if token.type == "fence"]
    assert fences == [printable(sample), f"mainrun resume {log.run_dir}"]
    # GitHub makes links of bare addresses in the text, which this parser does not.
    text = (log.run_dir / "summary.md").read_text().split("```")[0]
    assert "http://" not in text
    assert "www." not in text


def test_ten_evaluations_at_most_are_listed_first_last_and_best_among_them(log: Log):
    log.start(total_steps=1000)
    for step in range(0, 1000, 7):
        log.evaluate(step, 1.0 if step == 343 else 2.0 + step / 1e4)
    write_summary(log.run_dir)
    table = (log.run_dir / "summary.md").read_text().partition("## Evaluations")[2]
    steps = [int(line.split("|")[1]) for line in table.splitlines() if line[2:3].isdigit()]
    assert len(steps) == 10
    assert {0, 343, 994} <= set(steps)


def test_the_result_on_the_screen_says_where_it_is_and_how_to_go_on(log: Log):
    log.start()
    log.evaluate(0, 4.0)
    log.train(1, 2)
    log.evaluate(2, 1.5)
    log("stopped", resume_command="mainrun resume there")
    assert result_lines(stored(log)) == [
        "stopped: 2 of 10 steps in 6.0 s",
        "val/loss 1.500 ± 0.010 nats/char at step 2 (the best); 4.000 ± 0.010 nats/char at step 0",
        "98 tokens/s, peak memory 2 MiB",
        f"run folder: {log.run_dir}",
        "to go on: mainrun resume there",
    ]


# -------------------------------------------------------------------------------------------
# Pictures


def picture(log: Log, name: str) -> np.ndarray:
    return matplotlib.image.imread(log.run_dir / "plots" / f"{name}.png")[..., :3]


def orange(image: np.ndarray) -> int:
    """How many pixels have the colour of validation."""
    return int((np.abs(image - np.array([0xD9, 0x54, 0x1E]) / 255).max(axis=-1) < 0.02).sum())


@pytest.mark.parametrize("evaluations", [0, 1, 5])
def test_pictures_are_drawn_whatever_the_number_of_evaluations(log: Log, evaluations: int):
    log.start(name=r"$\frac{$")  # a broken formula, if it were one
    for step in range(1, 11):
        log.train(step)
    for step in range(evaluations):
        log.evaluate(step, 4.0 - step, **{"val/nats_per_token": 8.0 - step})
    write_plots(log.run_dir)
    assert sorted(p.name for p in (log.run_dir / "plots").iterdir()) == [
        "learning_rate.png", "loss.png", "throughput.png",
    ]  # fmt: skip
    assert (orange(picture(log, "loss")) > 0) == (evaluations > 0)
    assert picture(log, "learning_rate").std() > 0


def test_the_slow_first_step_is_not_in_the_picture_of_throughput(log: Log, tmp_path: Path):
    other = Log(tmp_path / "other")
    for one, first in ((log, 90_000.0), (other, 100.0)):
        one.start()
        one.train(1, ms=first)
        one.train(*range(2, 20))
        write_plots(one.run_dir)
    np.testing.assert_array_equal(picture(log, "throughput"), picture(other, "throughput"))


def test_smoothing_is_the_mean_of_the_known_values_around(subtests: pytest.Subtests):
    for length in [0, 1, 3, 250, 1001]:
        with subtests.test(length=length):
            values = np.random.default_rng(0).normal(size=length)
            values[length // 2 : length // 2 + 1] = np.nan
            reach = length // 100
            for i, smooth in enumerate(_smoothed(values)):
                around = values[max(0, i - reach) : i + reach + 1]
                expected = np.nan if np.isnan(values[i]) else np.nanmean(around)
                np.testing.assert_allclose(smooth, expected, rtol=1e-12)
