"""The learning-rate range test: its curve against closed forms, and the command on real steps."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mainrun import config as configs
from mainrun.cli import main
from mainrun.errors import RunFailed
from mainrun.learning_rate import Curve, NoAnswer, Ramp, decimal, range_test, steepest
from mainrun.learning_rate.curve import Smoothing
from mainrun.record import metrics, read_events
from mainrun.training import divergence, precision
from mainrun.training.step import Metrics
from tests.conftest import REPOSITORY, Disk, Mainrun

QUICKSTART = REPOSITORY / "config/base/quickstart.yaml"
PNG = b"\x89PNG\r\n"


def curve(ramp: Ramp, losses: np.ndarray, diverged: str | None = None) -> Curve:
    """These losses at the rates of the ramp's first steps."""
    rates = np.array([float(ramp(step)) for step in range(len(losses))])
    return Curve(ramp.decades_per_step, rates, losses, diverged)


def decades(ramp: Ramp) -> np.ndarray:
    return np.linspace(np.log10(ramp.low), np.log10(ramp.high), ramp.steps)


def drop(ramp: Ramp, at: float, *, fails_at: float = 0.3) -> np.ndarray:
    """From 8 to 5 along a logistic curve that is steepest at a rate; then up without bound."""
    x = decades(ramp)
    fall = 3 / (1 + np.exp(-4 * (x - np.log10(at))))
    return 8 - fall + np.exp(6 * (x - np.log10(fails_at)))


# --- the ramp -------------------------------------------------------------------------------------


def test_ramp_rises_by_one_factor_from_its_least_to_its_largest_rate():
    ramp = Ramp(1e-6, 1.0, 100)
    rates = np.array([float(ramp(step)) for step in range(100)])
    np.testing.assert_allclose(rates, np.geomspace(1e-6, 1.0, 100), rtol=1e-5)  # float32
    assert ramp.decades_per_step == pytest.approx(6 / 99)


@pytest.mark.parametrize(
    ("rate", "shown"), [(0.00321, "3.2e-3"), (1.0, "1.0e0"), (0.0999, "1.0e-1"), (25.0, "2.5e1")]
)
def test_a_rate_is_shown_as_a_config_has_it(rate: float, shown: str):
    assert decimal(rate) == shown
    set_to = configs.load(None, [f"optimizer.learning_rate={shown}"]).optimizer.learning_rate
    assert set_to == pytest.approx(rate, rel=0.05)


# --- smoothing ------------------------------------------------------------------------------------


def test_smoothing_is_the_mean_with_weights_that_fade_and_sum_to_one():
    smoothing = Smoothing(0.1)
    values = np.random.default_rng(0).normal(size=40)
    for number in range(1, 41):
        weights = smoothing.decay ** np.arange(number)[::-1]
        expected = np.average(values[:number], weights=weights)
        assert smoothing.after(values[number - 1]) == pytest.approx(expected)


def test_smoothing_begins_at_the_first_loss_and_leaves_a_constant_alone():
    """Started at zero and not corrected, as it often is, it would begin far below."""
    smoothing = Smoothing(6 / 99)
    assert [smoothing.after(7.5) for _ in range(50)] == pytest.approx([7.5] * 50)


@pytest.mark.parametrize("steps", [50, 100, 1000])
def test_smoothing_is_a_quarter_of_a_decade_old_whatever_the_number_of_steps(steps: int):
    """A loss that falls by one a decade is shown as it was a quarter of a decade before."""
    ramp = Ramp(1e-6, 1.0, steps)
    found = curve(ramp, -decades(ramp))
    assert found.smoothed[-1] - found.losses[-1] == pytest.approx(0.25, abs=1e-3)


# --- the steepest descent -------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [60, 100, 400])
@pytest.mark.parametrize("at", [1e-4, 3e-3, 2e-2])
def test_steepest_point_of_a_smooth_drop_is_found_within_the_age_of_the_smoothing(
    at: float, steps: int
):
    """A quarter of a decade of age, and as much again for half a window of half a decade."""
    ramp = Ramp(1e-6, 1.0, steps)
    found = steepest(curve(ramp, drop(ramp, at)))
    assert at <= found <= at * 10**0.35


@pytest.mark.parametrize("seed", range(20))
def test_noise_of_single_steps_does_not_decide(seed: int):
    """A twentieth of the drop; the steepest single step is then anywhere on it."""
    ramp = Ramp(1e-6, 1.0, 100)
    clean = drop(ramp, 3e-3)
    noisy = clean + np.random.default_rng(seed).normal(scale=0.15, size=100)
    assert steepest(curve(ramp, noisy)) == pytest.approx(steepest(curve(ramp, clean)), rel=0.5)


@pytest.mark.parametrize("at", [1e-4, 3e-3, 2e-2])
def test_answer_is_never_the_least_loss(at: float):
    """A rate too late: the reference's finder answers that one always."""
    ramp = Ramp(1e-6, 1.0, 100)
    found = curve(ramp, drop(ramp, at))
    assert steepest(found) < found.rates[np.argmin(found.losses)] / 2


def test_what_comes_after_the_least_loss_does_not_count():
    """Back from a failure the loss falls more steeply than it ever did before."""
    ramp = Ramp(1e-6, 1.0, 100)
    losses = np.minimum(drop(ramp, 1e-3), 8)
    losses[80:] = 6.0
    failed = losses.copy()
    failed[80:86] = 15.0
    assert steepest(curve(ramp, failed)) == steepest(curve(ramp, losses))


def test_loss_that_diverges_before_a_rate_can_be_told_has_no_answer():
    ramp = Ramp(1e-2, 10.0, 100)
    with pytest.raises(NoAnswer, match=r"diverged after 5 steps.*lower --min"):
        steepest(curve(ramp, np.array([7.0, 7.0, 9.0, 15.0, 40.0]), "diverged"))
    with pytest.raises(NoAnswer, match="lower --min"):
        steepest(curve(ramp, np.array([]), "diverged"))


@pytest.mark.parametrize("seed", range(20))
def test_flat_loss_has_no_answer_however_noisy(seed: int):
    ramp = Ramp(1e-6, 1.0, 100)
    noise = np.random.default_rng(seed).normal(scale=0.1, size=100)
    for losses, remedy in (
        (np.full(100, 7.0), "raise --max"),
        (7 + noise, "raise --max"),
        (7 + noise + np.linspace(0, 3, 100), "lower --min and --max"),
    ):
        with pytest.raises(NoAnswer, match=f"never clearly falls: .* {remedy}"):
            steepest(curve(ramp, losses))


def test_loss_that_only_rises_until_it_diverges_asks_for_lower_rates():
    ramp = Ramp(1e-2, 10.0, 100)
    losses = 7 + np.exp(8 * (decades(ramp)[:60] + 1))
    with pytest.raises(NoAnswer, match=r"never clearly falls.*lower --min and --max"):
        steepest(curve(ramp, losses, "diverged"))


def test_loss_that_falls_fastest_at_an_end_of_the_ramp_asks_for_a_wider_one():
    ramp = Ramp(1e-6, 1e-2, 100)
    with pytest.raises(NoAnswer, match=r"fastest at 1\.0e-2, the end: raise --max"):
        steepest(curve(ramp, drop(ramp, 1e-1)))
    ramp = Ramp(1e-2, 10.0, 100)
    with pytest.raises(NoAnswer, match=r"fastest at 1\.0e-2, the start: lower --min"):
        steepest(curve(ramp, drop(ramp, 1e-3, fails_at=3.0)))


# --- the end of a ramp ----------------------------------------------------------------------------


def fake_step(loss: float, outcome: int = divergence.APPLIED, at_min: int = 0) -> Metrics:
    scale = precision.initial(configs.LossScale())._replace(at_min=jnp.asarray(at_min))
    return Metrics(
        loss=jnp.asarray(loss),
        objective=jnp.asarray(loss),
        grad_norm=jnp.asarray(jnp.inf),
        learning_rate=jnp.asarray(1e-3),
        balance_loss=jnp.asarray(0.0),
        outcome=jnp.asarray(outcome),
        in_a_row=jnp.asarray(0),
        loss_scale=scale,
        noise_tokens=jnp.asarray(jnp.nan),
    )


def measured(monkeypatch: pytest.MonkeyPatch, steps: Sequence[Metrics]) -> Curve:
    monkeypatch.setattr(range_test, "_steps", lambda *_: iter(steps))
    return range_test._measured(configs.load(None), Ramp(1e-6, 1.0, 100), lambda _: None)


def test_ramp_ends_after_its_steps(monkeypatch: pytest.MonkeyPatch):
    found = measured(monkeypatch, [fake_step(7.0)] * 200)
    assert len(found.losses) == 100
    assert found.diverged is None


@pytest.mark.parametrize(
    ("last", "says"),
    [
        (fake_step(float("nan"), divergence.NOT_FINITE), "the loss is nan"),
        (fake_step(7.0, divergence.NOT_FINITE), "gradient norm inf"),
        (fake_step(9.0, divergence.SPIKED), "jumped to 9.000"),
        (fake_step(7.0, divergence.OVERFLOWED, at_min=20), "float16 gradients overflow"),
    ],
)
def test_ramp_ends_at_a_step_that_the_guard_of_training_refuses(
    monkeypatch: pytest.MonkeyPatch, last: Metrics, says: str
):
    found = measured(monkeypatch, [fake_step(7.0)] * 30 + [last] + [fake_step(6.0)] * 99)
    assert found.losses.tolist() == [7.0] * 30
    assert found.diverged is not None
    assert says in found.diverged


def test_ramp_ends_where_the_smoothed_loss_is_four_times_its_least(monkeypatch: pytest.MonkeyPatch):
    """One step of five times the loss is smoothed to less."""
    losses = [8.0] * 30 + [4.0] * 30 + [20.0] + [4.0] * 10 + [40.0] * 29
    found = measured(monkeypatch, [fake_step(loss) for loss in losses])
    assert 71 < len(found.losses) < 80
    assert found.smoothed[-1] > 16 > found.smoothed[-2]


def test_overflow_in_float16_is_no_divergence_but_the_same_rate_again(
    monkeypatch: pytest.MonkeyPatch,
):
    overflow = fake_step(9.0, divergence.OVERFLOWED)
    found = measured(monkeypatch, [overflow] * 15 + [fake_step(7.0)] * 100)
    assert found.losses.tolist() == [7.0] * 100
    assert found.diverged is None


# --- the command ----------------------------------------------------------------------------------


def found_by(
    capsys: pytest.CaptureFixture[str], output: Path, *words: str, code: int = 0
) -> dict[str, object]:
    """The answer as JSON; what is wrong, under `error`."""
    assert main(["find-lr", *words, "--output", str(output), "--json"]) == code
    shown = capsys.readouterr()
    return json.loads(shown.out) if code == 0 else {"error": shown.err.splitlines()[-1]}


def first_loss(run_dir: Path) -> float:
    rows = metrics(read_events(run_dir / "events.jsonl"))
    return next(row["train/loss"] for row in rows if "train/loss" in row)


@pytest.mark.slow
def test_command_prints_an_override_to_paste_and_writes_only_the_picture(
    mainrun: Mainrun, tiny: list[str], tmp_path: Path
):
    done = mainrun("find-lr", *tiny, cwd=tmp_path)
    assert re.fullmatch(r"optimizer\.learning_rate=\d\.\de-\d\n", done.stdout)
    rate = configs.load(None, [done.stdout.strip()]).optimizer.learning_rate
    assert 1e-3 < rate < 1e-1
    assert "step 50/100  rate 9.3e-4  loss " in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["lr_finder.png"]
    assert (tmp_path / "lr_finder.png").read_bytes().startswith(PNG)


def test_first_loss_is_that_of_a_run_and_the_optimizer_decides_the_rate(
    tiny: list[str],
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """The same texts, batches, weights and dropout; SGD wants rates far above Adam's."""
    adamw = found_by(capsys, tmp_path / "a.png", *tiny)
    sgd = found_by(capsys, tmp_path / "s.png", *tiny, "optimizer.kind=sgd", "--max", "10")
    first = pytest.approx(first_loss(finished_run), rel=1e-5)
    assert adamw["losses"][0] == sgd["losses"][0] == first
    assert len(adamw["rates"]) == len(adamw["losses"]) == len(adamw["smoothed"]) == 100
    assert sgd["learning_rate"] > 10 * adamw["learning_rate"]


@pytest.mark.slow
def test_second_rate_of_muon_keeps_its_ratio_and_is_pasted_too(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    muon = "optimizer={kind: muon, learning_rate: 0.02, adamw_learning_rate: 1e-3}"
    words = [word for word in tiny if not word.startswith("optimizer.")]
    found = found_by(capsys, tmp_path / "m.png", *words, muon)
    settings = configs.load(None, [muon, *found["overrides"]]).optimizer
    assert isinstance(settings, configs.Muon)
    assert settings.learning_rate == pytest.approx(found["learning_rate"], rel=0.05)
    assert settings.learning_rate / settings.adamw_learning_rate == pytest.approx(20, rel=0.1)


@pytest.mark.slow
def test_adapters_start_from_their_base(tiny: list[str], finished_run: Path):
    changes = [f"training.init_from={finished_run}", "model.lora={rank: 4}"]
    settings = configs.load(None, [*tiny, *changes])
    found = range_test._measured(settings, Ramp(1e-5, 1e-3, 17), lambda _: None)
    assert found.losses[0] < first_loss(finished_run) - 0.5


@pytest.mark.slow
def test_loss_that_never_falls_is_the_answer_and_still_has_a_picture(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "flat.png"
    ramp = ["--min", "1e-9", "--max", "1e-6", "--steps", "30"]
    found = found_by(capsys, output, *tiny, *ramp, code=1)
    assert "the loss never clearly falls" in str(found["error"])
    assert "raise --max" in str(found["error"])
    assert output.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--min", "0"], "--min=0 is no rate"),
        (["--min", "nan"], "--min=nan is no rate"),
        (["--max", "inf"], "--max=inf is no rate"),
        (["--min", "1e-2", "--max", "1e-3"], "--min=0.01 is not below --max=0.001"),
        (["--min", "1e-2", "--max", "1e-2"], "--min=0.01 is not below --max=0.01"),
        (["--min", "1e-2", "--max", "2e-2"], "less than 100 times"),
        (["--steps", "48"], "--steps=48 are too few from 1e-06 to 1: at least 49"),
        (["--steps", "-3"], "--steps=-3 are too few"),
        (["--output", "."], "--output=."),
        (["--output", "here.png"], "--output=here.png is a folder"),
        (["--output", "nowhere/a.png"], "there is no folder nowhere"),
        (["--output", "a.xyz"], "end its name in .png"),
        (["optimizer.learning_rat=1"], "optimizer.learning_rat"),
    ],
)
def test_mistakes_are_told_in_one_line_before_any_work(
    words: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    Path("here.png").mkdir()
    assert main(["find-lr", *words]) == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert len(shown.err.splitlines()) == 1
    assert shown.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["here.png"]


def test_picture_that_cannot_be_written_is_told_before_any_work(
    disk: Disk, capsys: pytest.CaptureFixture[str]
):
    disk.remount("ro")
    assert main(["find-lr", "--output", str(disk.path / "a.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--output={disk.path / 'a.png'} cannot be written (Read-only file system)" in line


def test_picture_that_fails_in_the_end_does_not_take_the_answer_with_it(tmp_path: Path):
    flat, output = curve(Ramp(1e-6, 1.0, 100), np.full(100, 7.0)), tmp_path / "gone" / "a.png"
    with pytest.raises(RunFailed, match=r"cannot be written: .*\(the answer\)"):
        range_test._draw(output, "a name", flat, 1e-3, "the answer", lambda _: None)


def test_corpus_of_less_than_a_batch_is_told_in_one_line(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "a.png"
    assert main(["find-lr", *tiny, "training.batch_size=4096", "--output", str(output)]) == 2
    assert "training.batch_size=4096 is more than" in capsys.readouterr().err.splitlines()[-1]
    assert not output.exists()


@pytest.mark.slow
def test_answer_for_the_quickstart_is_within_a_factor_of_three_of_the_best_of_a_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """`val/loss` after each whole run of `config/base/quickstart.yaml`, by learning rate:

    1e-3 1.207 · 2e-3 1.157 · 4e-3 1.140 · 8e-3 1.157 · 1.6e-2 1.251, each ± 0.016; found: 2.2e-3.
    """
    found = found_by(capsys, tmp_path / "q.png", str(QUICKSTART))
    assert 4e-3 / 3 < found["learning_rate"] < 4e-3 * 3
