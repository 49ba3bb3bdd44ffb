"""The comparison of search methods, against closed forms."""

from dataclasses import replace

import pytest

from benchmarks import search
from benchmarks.search import DECAY, DROPOUT, RATE
from mainrun.sweep import sweep_file

SETTINGS = [
    {RATE: rate, DECAY: decay, DROPOUT: dropout}
    for rate in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    for decay in (0.0, 0.1, 0.3)
    for dropout in (0.0, 0.2, 0.3)
]


def test_the_valley_is_least_where_it_says_so():
    """On the line of best rates at dropout 0.1, which weight decay moves: 1.2 and a little."""
    best = {RATE: 3e-3 * 10**-0.1, DECAY: 0.1, DROPOUT: 0.1}
    assert search.valley(best) == pytest.approx(1.2)
    assert all(search.valley(other) > 1.2 for other in SETTINGS)


def test_a_formula_of_its_own_terms_is_found_again():
    weights = [1.2, 0.1, 0.3, 0.02, -0.01, 0.05, 0.2, 0.4, -0.1, 0.3]

    def loss(values: dict) -> float:
        return sum(w * x for w, x in zip(weights, search.features(values), strict=True))

    objective = search.fitted(SETTINGS, [loss(values) for values in SETTINGS])
    other = {RATE: 2e-3, DECAY: 0.2, DROPOUT: 0.1}
    assert objective.loss(other) == pytest.approx(loss(other))
    assert objective.noise == pytest.approx(0, abs=1e-9)


def test_noise_belongs_to_the_values_and_the_seed():
    objective = search.Objective("valley", search.valley, 0.1, "")
    first, other = SETTINGS[0], SETTINGS[1]
    assert objective.measured(first, 1) == objective.measured(dict(reversed(first.items())), 1)
    noises = {
        objective.measured(v, seed) - search.valley(v) for v in (first, other) for seed in (1, 2)
    }
    assert len(noises) == 4


def test_an_interval_is_students():
    """Of 1, 2, 3: mean 2, standard error 1/√3, and t of two degrees of freedom 4.303."""
    assert search.difference([1.0, 2.0, 3.0]) == pytest.approx((2, -0.484, 4.484), abs=1e-3)
    assert search.verdict(-2, -1) == "bayes is better"
    assert search.verdict(1, 2) == "bayes is worse"
    assert search.verdict(-1, 2) == "not told apart"


def test_more_trials_find_more_and_the_methods_part():
    space = sweep_file.read(search.SPACE)
    objective = search.Objective("valley", search.valley, 0.005, "")
    random, bayes = (
        search.found(replace(space, method=method), objective, 3) for method in ("random", "bayes")
    )
    assert random[8] != bayes[8]
    assert random[32] <= random[16] + 0.02, "noise may take a worse one, by little"
