"""Tests of significance against sums and integrals written out, and what is a group of seeds."""

import itertools
import math
import random

import numpy as np
import pytest

from mainrun.analysis import run_folder, significance
from mainrun.analysis.significance import holm, welch
from tests.report_folders import make_run


def upper_tail(t: float, df: float) -> float:
    """P(T > t) of Student's distribution, by Simpson's rule in s where T = tan s · √df.

    In it the density is cos(s)^(df - 1) over a constant: smooth, and of finite range.
    """
    s = np.linspace(math.atan(t / math.sqrt(df)), math.pi / 2, 200_001)
    y = np.cos(s) ** (df - 1)
    weights = np.ones_like(s)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    integral = float((weights * y).sum() * (s[1] - s[0]) / 3)
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    return constant * integral


def by_hand(first, second) -> tuple[float, float, float]:
    """t, degrees of freedom and two-sided p, as the papers have them."""
    (n1, m1, v1), (n2, m2, v2) = (
        (len(x), sum(x) / len(x), sum((y - sum(x) / len(x)) ** 2 for y in x) / (len(x) - 1))
        for x in (first, second)
    )
    error = v1 / n1 + v2 / n2
    t = (m2 - m1) / math.sqrt(error)
    df = error**2 / ((v1 / n1) ** 2 / (n1 - 1) + (v2 / n2) ** 2 / (n2 - 1))
    return t, df, 2 * upper_tail(abs(t), df)


def test_welch_is_what_the_papers_say(subtests: pytest.Subtests):
    for sizes in [(2, 2), (3, 5), (10, 4)]:
        with subtests.test(sizes=sizes):
            draw = random.Random(str(sizes))
            first = [1.3 + draw.gauss(0, 0.01) for _ in range(sizes[0])]
            second = [1.32 + draw.gauss(0, 0.05) for _ in range(sizes[1])]
            found = welch(first, second)
            assert found is not None
            t, df, p = by_hand(first, second)
            assert found.t == pytest.approx(t, rel=1e-9)
            assert found.degrees_of_freedom == pytest.approx(df, rel=1e-9)
            # At few degrees of freedom the density falls slowly at the end of the range: this is
            # Simpson's error.
            assert found.p == pytest.approx(p, rel=1e-4)
            assert found.difference == pytest.approx(
                sum(second) / len(second) - sum(first) / len(first)
            )


def test_the_interval_ends_where_the_test_would_turn():
    """A shift by either end leaves p = 0.05: the defining property of a 95 % interval."""
    first, second = [1.0, 1.2, 1.1, 1.3], [1.5, 1.4, 1.9]
    found = welch(first, second)
    assert found is not None
    for end in (found.low, found.high):
        _, _, p = by_hand([x + end for x in first], second)
        assert p == pytest.approx(0.05, rel=1e-4)


def test_quantiles_of_the_tables_of_student():
    """What every table has: 95 % two-sided for 1, 4 and 30 degrees of freedom."""
    for df, t in ((1, 12.706), (4, 2.776), (30, 2.042)):
        assert 2 * upper_tail(t, df) == pytest.approx(0.05, abs=1e-4)


def test_samples_without_any_spread_are_not_tested():
    assert welch([1.0, 1.0], [2.0, 2.0]) is None
    found = welch([1.0, 1.0, 1.0], [1.1, 1.2, 1.3])
    assert found is not None
    assert found.degrees_of_freedom == pytest.approx(2)


def test_a_true_null_is_called_significant_one_time_in_twenty():
    draw = np.random.default_rng(0)
    found = [welch(*draw.normal(size=(2, 4)).tolist()) for _ in range(2000)]
    rate = np.mean([test.p < 0.05 for test in found if test is not None])
    assert 0.035 < rate < 0.06  # Welch is a little careful with four values; 2000 draws: ± 0.01


def test_holm_by_its_definition():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    # Step by step: an ordered hypothesis is rejected as long as all before it are.
    draw, level = random.Random(0), 0.05
    for size in range(1, 8):
        p = [draw.random() ** 3 / 4 for _ in range(size)]
        rejected = set()
        for rank, place in enumerate(sorted(range(size), key=p.__getitem__)):
            if p[place] > level / (size - rank):
                break
            rejected.add(place)
        assert {i for i, corrected in enumerate(holm(p)) if corrected <= level} == rejected


def runs(tmp_path, *described):
    made = []
    for number, (overrides, loss, options) in enumerate(described):
        folder = make_run(
            tmp_path / f"run-{number}", {0: 4.0, 40: loss}, overrides=overrides, **options
        )
        made.append(run_folder.read(folder))
    return made


def test_runs_that_differ_by_seed_and_by_names_are_one_group(tmp_path):
    found = significance.groups(
        runs(
            tmp_path,
            (["seed=1"], 1.50, {}),
            (["seed=2", "tracking.project=other", "training.checkpoint.keep=9"], 1.52, {}),
            (["seed=3", "training.num_samples=0"], 1.51, {}),
            (["seed=1", "model.dropout=0.3"], 1.6, {}),
        )
    )
    assert [[run.name for run in group.runs] for group in found] == [
        ["run-0", "run-1", "run-2"], ["run-3"],
    ]  # fmt: skip
    assert found[0].mean == pytest.approx(1.51)
    assert found[0].deviation == pytest.approx(0.01)
    assert found[1].deviation is None


def test_a_run_that_was_changed_on_the_way_is_no_seed_of_the_config_it_ended_with(tmp_path):
    resumed = {"event": "resumed", "step": 20}
    described = [
        (["seed=1", "training.patience=3"], 1.5, {}),
        (["seed=2"], 1.5, {"more": [resumed | {"overrides": ["training.patience=3"]}]}),
        (["seed=3", "training.patience=3"], 1.5, {"more": [resumed | {"overrides": ["seed=3"]}]}),
    ]
    found = significance.groups(runs(tmp_path, *described))
    assert [[run.name for run in group.runs] for group in found] == [["run-0", "run-2"], ["run-1"]]


def test_a_seed_counts_once_and_a_run_without_a_result_not_at_all(tmp_path):
    (group,) = significance.groups(
        runs(
            tmp_path,
            (["seed=1"], 1.5, {"ending": "failed"}),
            (["seed=1"], 1.6, {}),
            (["seed=1"], 1.7, {}),
            (["seed=2"], math.nan, {}),
            (["seed=3"], 1.8, {"ending": None}),
            (["seed=4"], 1.9, {}),
        )
    )
    assert group.losses == [1.6, 4.0, 1.9]  # after a loss that is no number the first is the best
    assert [run.name for run in group.left_out] == ["run-0", "run-2"]


def test_all_pairs_of_groups_with_two_seeds_are_compared_and_corrected_together(tmp_path):
    kinds = {"adamw": (1.50, 1.51, 1.52), "lion": (1.60, 1.61, 1.62), "muon": (1.51, 1.50, 1.53)}
    described = [
        ([f"optimizer.kind={kind}", f"seed={seed}"], loss, {})
        for kind, losses in kinds.items()
        for seed, loss in enumerate(losses)
    ]
    found = significance.groups(runs(tmp_path, *described, (["optimizer.kind=sgd"], 1.4, {})))
    compared = significance.pairs(found)
    assert [(pair.first, pair.second) for pair in compared] == [(0, 1), (0, 2), (1, 2)]
    by_pair = itertools.combinations(kinds.values(), 2)
    expected = [by_hand(first, second)[2] for first, second in by_pair]
    assert [pair.test.p for pair in compared] == pytest.approx(expected, rel=1e-4)
    assert [pair.test.corrected_p for pair in compared] == pytest.approx(holm(expected), rel=1e-4)


def test_runs_whose_config_cannot_be_read_are_no_group(tmp_path):
    described = [(["seed=1"], 1.5, {}), (["seed=2"], 1.6, {})]
    for made in runs(tmp_path, *described):
        (made.folder / "config.yaml").unlink()
    again = [run_folder.read(tmp_path / f"run-{i}") for i in range(2)]
    assert len(significance.groups(again)) == 2
