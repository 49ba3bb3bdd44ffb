"""The loss curve is what the rows say, in a form that every Mermaid 11 draws where it belongs."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mainrun.chart import loss_curve
from mainrun.record import Row

LAWS = settings(deadline=None, derandomize=True, database=None)

# What the grammar of xychart takes for a number: digits and a point, no exponent.
NUMBER = r"-?\d+(?:\.\d+)?"


@dataclass
class Chart:
    """A chart read back: axes, curves by name, and the text below it."""

    x: tuple[float, float]
    y: tuple[float, float]
    unit: str
    curves: dict[str, list[float]]
    notes: str

    def steps(self, name: str) -> np.ndarray:
        """Where Mermaid puts the values of a curve: evenly from end to end."""
        return np.linspace(*self.x, len(self.curves[name]))


def read(markdown: str) -> Chart:
    block, _, notes = markdown.removeprefix("```mermaid\n").partition("\n```")
    settings, body = block.removeprefix("---\n").split("\n---\n")
    kind, title, x, y, *lines = [line.strip() for line in body.splitlines()]
    assert kind == "xychart-beta"
    assert "height" in settings
    horizontal = re.fullmatch(rf'x-axis "optimizer step" ({NUMBER}) --> ({NUMBER})', x)
    vertical = re.fullmatch(rf'y-axis "nats per (\w+)" ({NUMBER}) --> ({NUMBER})', y)
    assert horizontal
    assert vertical
    curves = {}
    for line in lines:
        found = re.fullmatch(rf'line "(\w+)" \[({NUMBER}(?:, {NUMBER})*)\]', line)
        assert found, line
        assert f"{found[1]} (" in title
        curves[found[1]] = [float(value) for value in found[2].split(", ")]
    return Chart(
        x=(float(horizontal[1]), float(horizontal[2])),
        y=(float(vertical[2]), float(vertical[3])),
        unit=vertical[1],
        curves=curves,
        notes=notes.strip(),
    )


def rows(
    evaluations: Sequence[tuple[int, float]], training: Sequence[tuple[int, float]] = ()
) -> list[Row]:
    """Rows with both metrics, the loss per character half of that per token."""
    found: dict[int, Row] = {}
    for step, loss in evaluations:
        row = found.setdefault(step, {"step": step})
        row |= {"val/nats_per_token": loss, "val/loss": loss / 2}
    for step, loss in training:
        found.setdefault(step, {"step": step})["train/loss"] = loss
    return [found[step] for step in sorted(found)]


def test_there_is_no_curve_before_the_second_number(subtests: pytest.Subtests):
    for evaluations in [[], [(0, 5.0)], [(0, 5.0), (9, math.nan)]]:
        with subtests.test(evaluations=evaluations):
            assert loss_curve(rows(evaluations, [(1, 4.0), (2, 3.0)])) == ""


def test_evaluations_at_even_distances_are_drawn_as_they_are():
    evaluations = [(step, 5 - step / 100) for step in range(0, 301, 50)]
    chart = read(loss_curve(rows(evaluations)))
    assert chart.x == (0, 300)
    assert chart.unit == "token"
    assert list(zip(chart.steps("validation"), chart.curves["validation"], strict=True)) == [
        (step, pytest.approx(loss, abs=1e-3)) for step, loss in evaluations
    ]


def test_the_curve_runs_through_the_evaluations_wherever_they_are(subtests: pytest.Subtests):
    def loss(step: float) -> float:
        return 9 - step / 100

    for steps in [[0, 7, 100, 101, 640], list(range(0, 1000, 3)), [5, 6, 8]]:
        with subtests.test(steps=steps):
            training = [(step, loss(step) + 1) for step in range(steps[0], steps[-1] + 50)]
            chart = read(loss_curve(rows([(step, loss(step)) for step in steps], training)))
            assert chart.x == (steps[0], steps[-1])
            for name, above in (("validation", 0), ("training", 1)):
                places = chart.steps(name)
                distance = places[1] - places[0]
                expected = [loss(place) + above for place in places]
                # A value stands at the nearest place, at most half a distance from its step.
                np.testing.assert_allclose(chart.curves[name], expected, atol=distance / 200 + 2e-3)


def test_a_point_of_the_training_loss_is_the_mean_of_the_losses_around_it():
    last = 64 * 101  # an odd distance: no step lies half-way between two points
    noise = np.random.default_rng(0).normal(size=last + 1)
    training = [(step, 3 + float(noise[step])) for step in range(last + 1)]
    chart = read(loss_curve(rows([(0, 3.0), (last, 3.0)], training)))
    expected = [
        np.mean([loss for step, loss in training if abs(step - place) < 50.5])
        for place in range(0, last + 1, 101)
    ]
    assert chart.curves["training"] == pytest.approx(expected, abs=1e-3)
    assert "a mean over 101 steps" in chart.notes


@LAWS
@given(
    st.lists(st.integers(0, 2_000_000), min_size=2, max_size=90, unique=True).map(sorted),
    st.integers(0, 100),
)
def test_old_mermaid_draws_as_many_points_as_there_are(steps: list[int], logged: int):
    evaluations = [(step, 1.0 + i) for i, step in enumerate(steps)]
    training = [(step, 2.0) for step in range(steps[0], steps[-1], max(1, logged * 1000))][:500]
    chart = read(loss_curve(rows(evaluations, training)))
    for values in chart.curves.values():
        assert len(values) <= 65
        # Mermaid before 11.17: places are added up, and those beyond the axis get no point.
        place, places = chart.x[0], 0
        while place <= chart.x[1]:
            place, places = place + (chart.x[1] - chart.x[0]) / (len(values) - 1), places + 1
        assert places == len(values)


def test_what_is_no_number_is_left_out_and_said():
    evaluations = [(0, 5.0), (10, math.nan), (20, 4.0), (30, math.inf), (40, 3.0)]
    training = [(5, 4.5), (15, -math.inf), (25, 3.5)]
    markdown = loss_curve(rows(evaluations, training))
    chart = read(markdown)
    assert not re.search(r"nan|inf", markdown.split("\n```\n")[0].partition("xychart")[2])
    assert chart.curves["validation"] == pytest.approx([5, 4, 3])
    assert "2 evaluations that were not a number, the first at step 10." in chart.notes
    assert "1 training loss that was not a number, at step 15." in chart.notes


def test_training_after_the_last_evaluation_is_said():
    markdown = loss_curve(rows([(0, 5.0), (10, 4.0)], [(5, 4.5), (11, 3.9), (17, 3.5)]))
    assert read(markdown).x == (0, 10)
    assert "training went on to step 17, loss 3.500 there" in markdown
    assert "went on" not in loss_curve(rows([(0, 5.0), (10, 4.0)], [(5, 4.5), (10, 4.2)]))


def test_the_axis_holds_all_values_with_a_little_room(subtests: pytest.Subtests):
    for losses in [(5.0, 4.0), (3.0, 3.0), (0.0, 0.0), (1e-7, 2e-7), (1e12, 3.0), (-1.0, 2.0)]:
        with subtests.test(losses=losses):
            evaluations = [(0, losses[0]), (1, losses[1])]
            chart = read(loss_curve(rows(evaluations)))
            values = chart.curves["validation"]
            assert values == pytest.approx(losses, rel=1e-2, abs=0)
            low, high = chart.y
            assert low < min(values) <= max(values) < high
            assert high - low <= 1.2 * (max(values) - min(values) or max(abs(values[0]), 1))


def test_a_record_without_nats_per_token_is_drawn_per_character_and_without_training():
    made = rows([(0, 4.0), (10, 2.0)], [(5, 3.0)])
    for row in made:
        row.pop("val/nats_per_token", None)
    chart = read(loss_curve(made))
    assert (chart.unit, chart.curves.keys()) == ("character", {"validation"})
    assert chart.curves["validation"] == pytest.approx([2, 1])
