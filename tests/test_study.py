"""Which trial comes next, against closed forms; and a journal that survives whatever kills it."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
import pytest

from mainrun.errors import RunFailed, UserError
from mainrun.sweep.search_space import (
    Choices,
    Distribution,
    Fixed,
    Goal,
    Integers,
    Interval,
    Method,
    Metric,
    Multiples,
    SearchSpace,
)
from mainrun.sweep.study import Outcome, Study, next_values

DRAWS = 400


def space(
    method: Method = "random", goal: Goal = "minimize", **parameters: Distribution
) -> SearchSpace:
    return SearchSpace(
        name="a sweep",
        method=method,
        metric=Metric("val/loss", goal),
        parameters=parameters,
        config=None,
        overrides=(),
        run_cap=None,
        others={},
        places={},
    )


def drawn(distribution: Distribution) -> list:
    """Its values in the first trials of a random search."""
    searched = space(x=distribution)
    trial = optuna.trial.create_trial(value=0.0)
    return [next_values(searched, 0, [trial] * number)["x"] for number in range(DRAWS)]


def largest_difference(values: Sequence[float], cumulative: Callable[[float], float]) -> float:
    """Kolmogorov's statistic: how far the values' shares lie from the distribution's."""
    ordered = sorted(values)
    return max(
        max(abs(cumulative(x) - i / len(ordered)), abs(cumulative(x) - (i + 1) / len(ordered)))
        for i, x in enumerate(ordered)
    )


# At this distance one draw in a thousand would fail; the seed is fixed, so none does by chance.
FAR = 1.95 / math.sqrt(DRAWS)


def test_uniform_values_are_uniform():
    values = drawn(Interval(2.0, 5.0, log=False))
    assert min(values) >= 2.0
    assert max(values) <= 5.0
    assert largest_difference(values, lambda x: (x - 2) / 3) < FAR


def test_log_uniform_values_have_uniform_logarithms():
    values = drawn(Interval(1e-4, 1e-1, log=True))
    assert min(values) >= 1e-4
    assert max(values) <= 1e-1
    assert largest_difference(values, lambda x: math.log(x / 1e-4) / math.log(1e3)) < FAR


def expected_within_four_sigma(values: list, shares: dict) -> None:
    counts = Counter(values)
    assert set(counts) <= set(shares)
    for value, share in shares.items():
        sigma = math.sqrt(DRAWS * share * (1 - share))
        assert abs(counts[value] - DRAWS * share) < 4 * sigma, value


def test_choices_whole_numbers_and_multiples_are_equally_likely():
    expected_within_four_sigma(drawn(Choices(("a", "b", "c"))), dict.fromkeys("abc", 1 / 3))
    expected_within_four_sigma(drawn(Integers(2, 5)), dict.fromkeys((2, 3, 4, 5), 1 / 4))
    tenths = drawn(Multiples(0.1, 1, 3, log=False))
    expected_within_four_sigma(tenths, dict.fromkeys((0.1, 0.2, 0.3), 1 / 3))


def test_log_multiples_are_as_likely_as_the_ratio_that_they_cover():
    shares = {8 * k: math.log((k + 0.5) / (k - 0.5)) / math.log(8.5 / 0.5) for k in range(1, 9)}
    assert sum(shares.values()) == pytest.approx(1)
    expected_within_four_sigma(drawn(Multiples(8, 1, 8, log=True)), shares)


def test_lists_mappings_and_null_may_be_chosen():
    values = drawn(Choices(([1, 2], {"steps": 3}, None, True)))
    assert {json.dumps(value) for value in values} == {"[1, 2]", '{"steps": 3}', "null", "true"}


def test_sampled_numbers_are_short_enough_to_type():
    assert all(len(repr(value)) <= 11 for value in drawn(Interval(1e-4, 1e-1, log=True)))


def quadratic(values: dict) -> float:
    return (values["x"] - 0.3) ** 2


def walk(path: Path, searched: SearchSpace, trials: int, seed: int = 0) -> list[dict]:
    """The values of the trials, each told its result before the next begins."""
    study = Study(path, searched, seed)
    for _ in range(trials - len(study.trials())):
        trial = study.begin()
        study.finish(trial, Outcome("finished", value=quadratic(dict(trial.values)), step=1))
    study.close()
    return [dict(trial.values) for trial in study.trials()]


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_a_sweep_in_pieces_has_the_trials_of_one_in_one_piece(tmp_path: Path, method: Method):
    searched = space(method, x=Interval(0.0, 1.0, log=False), kind=Choices(("a", "b")), y=Fixed(1))
    whole = walk(tmp_path / "whole", searched, 14)
    for trials in (3, 4, 12, 14):
        pieces = walk(tmp_path / "pieces", searched, trials)
    assert pieces == whole
    assert all(values["y"] == 1 for values in whole)
    assert len({values["x"] for values in whole}) == 14
    assert walk(tmp_path / "other", searched, 14, seed=1) != whole


@pytest.mark.parametrize(
    ("goal", "towards", "at_random"),
    [("minimize", 0.3, (0.3**2 + 0.7**2) / 2), ("maximize", 1.0, 1 / 2)],
)
def test_bayes_looks_where_the_metric_was_good(
    tmp_path: Path, goal: Goal, towards: float, at_random: float
):
    """After its first ten guesses; `at_random` is the mean distance of uniform ones."""
    found = walk(tmp_path / "study", space("bayes", goal, x=Interval(0.0, 1.0, log=False)), 30)
    distances = [abs(values["x"] - towards) for values in found[10:]]
    assert sum(distances) / len(distances) < at_random / 2


def test_a_failed_trial_teaches_nothing_but_keeps_its_number_and_reason(tmp_path: Path):
    study = Study(tmp_path / "study", space("grid", x=Integers(1, 3)), 0)
    study.finish(study.begin(), Outcome("failed", reason="out of memory"))
    study.finish(study.begin(), Outcome("finished", value=2.0, stderr=0.5, step=7, seconds=1.5))
    study.begin()
    study.close()
    failed, finished, begun = Study(tmp_path / "study", space("grid", x=Integers(1, 3)), 0).trials()
    assert (failed.number, failed.outcome) == (1, Outcome("failed", reason="out of memory"))
    assert finished.outcome == Outcome("finished", value=2.0, stderr=0.5, step=7, seconds=1.5)
    assert (begun.number, begun.values, begun.outcome.status) == (3, {"x": 3}, "running")


def test_the_half_line_of_a_killed_process_is_cut_and_the_study_goes_on(tmp_path: Path):
    path, searched = tmp_path / "study", space(x=Interval(0.0, 1.0, log=False))
    whole = walk(tmp_path / "whole", searched, 4)
    walk(path, searched, 2)
    with path.open("ab") as file:
        file.write(b'{"op_code":4,"study_id":0,"da')
    walk(path, searched, 3)
    assert walk(path, searched, 4) == whole


def test_a_damaged_journal_is_said_so_and_left_as_it_is(tmp_path: Path):
    path, searched = tmp_path / "study", space(x=Interval(0.0, 1.0, log=False))
    walk(path, searched, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    for spoilt in (b"no JSON\n", b"[]\n", b'{"op_code": 77, "study_id": 5}\n'):
        damaged = b"".join([lines[0], spoilt, *lines[1:]])
        path.write_bytes(damaged)
        with pytest.raises(RunFailed, match=r"study.*damaged"):
            Study(path, searched, 0)
        assert path.read_bytes() == damaged


def test_one_process_at_a_time_works_on_a_study(tmp_path: Path):
    searched = space(x=Integers(1, 3))
    study = Study(tmp_path / "study", searched, 0)
    with pytest.raises(UserError, match="is being worked on by another process"):
        Study(tmp_path / "study", searched, 0)
    study.close()
    Study(tmp_path / "study", searched, 0).close()
    assert [path.name for path in tmp_path.iterdir()] == ["study"], "no lock file is left"


def test_optuna_itself_reads_the_journal(tmp_path: Path):
    walk(tmp_path / "study", space("bayes", x=Interval(0.0, 1.0, log=False)), 3)
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study"))
    study = optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(backend))
    assert study.best_value == min(quadratic(trial.params) for trial in study.trials)
    assert len(study.trials) == 3
