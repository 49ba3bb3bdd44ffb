"""Which trial comes next, against closed forms; and a journal that survives whatever kills it."""

import contextlib
import fcntl
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import pytest

from mainrun.errors import RunFailed, UserError
from mainrun.sweep.distribution import Choices, Distribution, Fixed, Integers, Interval, Multiples
from mainrun.sweep.hyperband import Hyperband
from mainrun.sweep.journal import Journal
from mainrun.sweep.metric import Goal, Metric
from mainrun.sweep.sampler import next_values
from mainrun.sweep.search_space import Method, SearchSpace
from mainrun.sweep.study import Outcome, Study, Trial

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


def study_in(folder: Path, searched: SearchSpace, seed: int = 0, worker: str = "") -> Study:
    folder.mkdir(exist_ok=True)
    return Study(folder, searched, seed, worker)


def begun(study: Study) -> Trial:
    trial = study.begin()
    assert trial is not None
    return trial


def walk(folder: Path, searched: SearchSpace, trials: int, seed: int = 0) -> list[dict]:
    """The values of the trials, each told its result before the next begins."""
    study = study_in(folder, searched, seed)
    study.want(trials)
    while trial := study.begin():
        study.finish(trial, Outcome("finished", value=quadratic(dict(trial.values)), step=1))
    study.close()
    return [dict(trial.values) for trial in study_in(folder, searched, seed).trials()]


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


def test_the_first_four_trials_of_bayes_are_those_of_random(tmp_path: Path):
    one, other = (
        walk(tmp_path / method, space(method, x=Interval(0.0, 1.0, log=False)), 5)
        for method in ("bayes", "random")
    )
    assert [one[i] == other[i] for i in range(5)] == [True] * 4 + [False]


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
    searched = space("grid", x=Integers(1, 3))
    study = study_in(tmp_path / "a", searched)
    study.finish(begun(study), Outcome("failed", reason="out of memory"))
    study.finish(begun(study), Outcome("finished", value=2.0, stderr=0.5, step=7, seconds=1.5))
    begun(study)
    assert study.begin() is None, "a grid has an end"
    study.close()
    failed, finished, last = study_in(tmp_path / "a", searched).trials()
    assert (failed.number, failed.outcome) == (1, Outcome("failed", reason="out of memory"))
    assert finished.outcome == Outcome("finished", value=2.0, stderr=0.5, step=7, seconds=1.5)
    assert (last.number, last.values, last.outcome.status) == (3, {"x": 3}, "running")


def test_what_is_refused_is_written_down_and_does_not_count(tmp_path: Path):
    study = study_in(tmp_path / "a", space("grid", x=Integers(1, 6)))
    study.want(2)

    def odd(values: Mapping[str, Any]) -> str | None:
        return "odd" if values["x"] % 2 else None

    for value in (2, 4):
        trial = study.begin(odd)
        assert trial is not None
        assert trial.values == {"x": value}
    assert study.begin(odd) is None
    reasons = [(trial.outcome.status, trial.outcome.reason) for trial in study.trials()]
    assert reasons == [("refused", "odd"), ("running", None)] * 2
    with pytest.raises(RunFailed, match="100 trials in a row were refused, the last: never"):
        study_in(tmp_path / "b", space(x=Interval(0.0, 1.0, log=False))).begin(lambda _: "never")


def test_a_search_ends_with_the_trial_that_reaches_the_target(tmp_path: Path):
    searched = space("grid", x=Integers(1, 9))
    searched = replace(searched, metric=replace(searched.metric, target=1.0))
    study = study_in(tmp_path / "a", searched)
    study.finish(begun(study), Outcome("finished", value=1.5))
    study.finish(begun(study), Outcome("finished", value=0.9))
    assert study.begin() is None


def test_failures_in_a_row_end_with_a_success_and_a_refusal_is_none(tmp_path: Path):
    study = study_in(tmp_path / "a", space("grid", x=Integers(1, 9)))
    before = datetime.now()
    for status in ("failed", "finished", "failed", "refused", "failed"):
        value = 1.0 if status == "finished" else None
        study.finish(begun(study), Outcome(status, value=value))
    assert [trial.number for trial in study.failures_since(before)] == [3, 5]
    assert study.failures_since(datetime.now()) == []


def test_a_trial_is_the_claim_of_one_process_as_long_as_that_lives(tmp_path: Path):
    """POSIX's locks are a process's, so the other must be one."""
    searched = space("grid", x=Integers(1, 3))
    study = study_in(tmp_path / "a", searched, worker="ours")
    assert begun(study).number == 1
    assert study.claim_interrupted() is None, "it is ours already"
    program = f"""
import sys
from pathlib import Path
from mainrun.sweep.distribution import Integers
from mainrun.sweep.metric import Metric
from mainrun.sweep.search_space import SearchSpace
from mainrun.sweep.study import Study
space = SearchSpace("a sweep", "grid", Metric("val/loss", "minimize"), {{"x": Integers(1, 3)}},
                    None, (), None, {{}}, {{}})
study = Study(Path({str(tmp_path / "a")!r}), space, 0, "theirs")
print(study.claim_interrupted(), study.begin().number, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "None 2\n"
        assert begun(study).number == 3
        assert study.claim_interrupted() is None
        other.kill()
    interrupted = study.claim_interrupted()
    assert interrupted is not None
    assert interrupted.number == 2
    assert [trial.number for trial in study.left_by("ours")] == [1, 2, 3]


def test_a_study_that_is_pruned_compares_trials_at_the_bands(tmp_path: Path):
    """Of those that came as far, one half goes on: of one, of two and of three the best."""
    early = replace(space("grid", x=Integers(1, 9)), early_terminate=Hyperband((2, 4), 2.0))
    study = study_in(tmp_path / "a", early)
    first, second, third = begun(study), begun(study), begun(study)
    assert study.report(first, 0, 9.0) is None, "no band"
    assert study.report(first, 5, 3.0) is None, "nobody else came as far"
    assert study.report(second, 0, 1.0) is None
    reason = study.report(second, 5, 4.0)
    assert reason is not None
    assert reason.startswith("pruned at evaluation 2: 1 of the 1 other trials that came as far")
    study.finish(second, Outcome("pruned", value=1.0, reason=reason))
    assert study.report(third, 0, 0.0) is None
    assert study.report(third, 5, 2.5) is None, "the better one"
    assert study.report(third, 5, 2.5) is None, "an evaluation made again after a stop"
    assert study.trials()[1].outcome.status == "pruned"


def test_one_process_at_a_time_writes_the_journal(tmp_path: Path):
    path = tmp_path / "study.journal"
    with contextlib.closing(Journal(path)) as journal, path.open() as other:
        with journal.exclusively(), pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_half_line_of_a_killed_process_is_cut_and_the_study_goes_on(tmp_path: Path):
    searched = space(x=Interval(0.0, 1.0, log=False))
    whole = walk(tmp_path / "whole", searched, 4)
    walk(tmp_path / "a", searched, 2)
    with (tmp_path / "a" / "study.journal").open("ab") as file:
        file.write(b'{"op_code":4,"study_id":0,"da')
    walk(tmp_path / "a", searched, 3)
    assert walk(tmp_path / "a", searched, 4) == whole


def test_a_damaged_journal_is_said_so_and_left_as_it_is(tmp_path: Path):
    searched = space(x=Interval(0.0, 1.0, log=False))
    walk(tmp_path / "a", searched, 2)
    path = tmp_path / "a" / "study.journal"
    lines = path.read_bytes().splitlines(keepends=True)
    for spoilt in (b"no JSON\n", b"[]\n", b'{"op_code": 77, "study_id": 5}\n'):
        damaged = b"".join([lines[0], spoilt, *lines[1:]])
        path.write_bytes(damaged)
        with pytest.raises(RunFailed, match=r"study.*damaged"):
            study_in(tmp_path / "a", searched)
        assert path.read_bytes() == damaged


def test_the_study_of_another_search_is_left_alone(tmp_path: Path):
    walk(tmp_path / "a", space("grid", x=Integers(1, 3)), 2)
    before = (tmp_path / "a" / "study.journal").read_bytes()
    with pytest.raises(UserError, match="is the study of another search space: move it away"):
        study_in(tmp_path / "a", space("grid", x=Integers(1, 4)))
    assert (tmp_path / "a" / "study.journal").read_bytes() == before


def test_optuna_itself_reads_the_journal(tmp_path: Path):
    walk(tmp_path / "a", space("bayes", x=Interval(0.0, 1.0, log=False)), 3)
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "a" / "study.journal"))
    study = optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(backend))
    assert study.best_value == min(quadratic(trial.params) for trial in study.trials)
    assert len(study.trials) == 3
