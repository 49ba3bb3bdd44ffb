"""What a sweep searches: W&B's format read, the grid spanned, nonsense refused with its line."""

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest
import yaml

from mainrun import config, yaml12
from mainrun.errors import UserError
from mainrun.record import read_events
from mainrun.sweep import search_space, sweep_file
from mainrun.sweep.distribution import Choices, Fixed, Integers, Interval, Multiples, num_values
from mainrun.sweep.hyperband import Hyperband
from mainrun.sweep.metric import AVERAGE_METRICS, METRICS, Metric
from mainrun.sweep.search_space import SearchSpace, as_overrides, grid_point, grid_size
from tests.conftest import Mainrun

ROOT = config.default_config_root()


def space(tmp_path: Path, parameters: str, head: str = "method: random") -> SearchSpace:
    """A file of these parameters, one a line, read."""
    lines = "\n".join(f"  {line}" for line in parameters.splitlines())
    path = tmp_path / "sweep.yaml"
    path.write_text(f"{head}\nparameters:\n{lines}\n", encoding="utf-8")
    return sweep_file.read(path)


def complaint(tmp_path: Path, parameters: str, head: str = "method: random") -> str:
    with pytest.raises(UserError) as caught:
        search_space.check(space(tmp_path, parameters, head))
    text = str(caught.value)
    assert "\n" not in text
    return text.removeprefix(f"{tmp_path}/")


# -------------------------------------------------------------------------------------------
# W&B's format


def test_every_distribution_of_wandb_is_read(tmp_path: Path, subtests: pytest.Subtests):
    cases = [
        ("{value: 1e-3}", Fixed(0.001)),
        ("{distribution: constant, value: null}", Fixed(None)),
        ("{values: [1e-3, 6E-3]}", Choices((0.001, 0.006))),
        ("{distribution: categorical, values: [a, [1, 2]]}", Choices(("a", [1, 2]))),
        ("{min: 1, max: 4}", Integers(1, 4)),
        ("{min: 0, max: 0.5}", Interval(0.0, 0.5, log=False)),
        ("{distribution: uniform, min: 1, max: 2}", Interval(1.0, 2.0, log=False)),
        ("{distribution: log_uniform_values, min: 1e-4, max: 1}", Interval(1e-4, 1.0, log=True)),
        ("{distribution: q_uniform, min: 10, max: 39, q: 10}", Multiples(10, 1, 3, log=False)),
        ("{distribution: q_uniform, min: 0.0, max: 0.3, q: 0.1}", Multiples(0.1, 0, 3, log=False)),
        ("{distribution: q_uniform, min: 0.5, max: 3}", Multiples(1, 1, 3, log=False)),
        (
            "{distribution: q_log_uniform_values, min: 1, max: 64, q: 8}",
            Multiples(8, 1, 8, log=True),
        ),
        # Exponents of e, W&B's older words; that 1/x is log-uniform is the same as that x is.
        ("{distribution: log_uniform, min: 0, max: 2}", Interval(1.0, math.exp(2), log=True)),
        ("{distribution: inv_log_uniform, min: -2, max: 0}", Interval(1.0, math.exp(2), log=True)),
        (
            "{distribution: inv_log_uniform_values, min: 1e-4, max: 1}",
            Interval(1e-4, 1.0, log=True),
        ),
        ("{distribution: q_log_uniform, min: 0, max: 3, q: 4}", Multiples(4, 1, 5, log=True)),
    ]
    for written, expected in cases:
        with subtests.test(written=written):
            found = space(tmp_path, f"seed: {written}").parameters["seed"]
            assert found == expected
            assert type(getattr(found, "quantum", None)) is type(getattr(expected, "quantum", None))


def test_nested_parameters_are_dotted_paths(tmp_path: Path):
    nested = space(
        tmp_path,
        "model:\n  parameters:\n    dropout: {value: 0.1}\n"
        "    mlp: {parameters: {hidden: {values: [8, 16]}}}\nseed: {value: 1}",
    )
    assert list(nested.parameters) == ["model.dropout", "model.mlp.hidden", "seed"]
    search_space.check(nested)


def test_multiples_are_the_numbers_that_people_write():
    assert [Multiples(0.1, 1, 3, log=False).at(k) for k in (1, 2, 3)] == [0.1, 0.2, 0.3]
    assert isinstance(Multiples(8, 1, 3, log=False).at(2), int)


def test_config_and_overrides_of_all_trials_stand_in_the_command(tmp_path: Path):
    head = (
        "method: random\nprogram: mainrun\n"
        'command: ["${env}", "${program}", train, base.yaml, seed=7, "${args_no_hyphens}"]'
    )
    found = space(tmp_path, "model.dropout: {value: 0.1}", head)
    assert (found.config, found.overrides) == (Path("base.yaml"), ("seed=7",))


def test_what_is_stored_and_registered_reads_back_as_the_same_search(tmp_path: Path):
    written = space(
        tmp_path,
        "optimizer.learning_rate: {distribution: log_uniform_values, min: 1e-05, max: 0.1}\n"
        "model: {parameters: {dropout: {distribution: q_uniform, q: 0.1, min: 0.05, max: 0.3}}}\n"
        "model.d_model: {distribution: q_log_uniform_values, q: 8, min: 8, max: 64}\n"
        "training.batch_size: {min: 1, max: 8}\nseed: {value: 3}\n"
        "schedule.warmup: {values: [{steps: 10}, {fraction: 0.1}]}",
        "method: bayes\nname: a name\nrun_cap: 5\n"
        "metric: {name: val/bits_per_byte, target: 1.5, impute: worst}\n"
        "early_terminate: {type: hyperband, max_iter: 27, s: 2, eta: 3}\n"
        'command: [mainrun, train, base.yaml, data.order=shuffled, "${args_no_hyphens}"]',
    )
    definition = sweep_file.definition(written)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(definition, sort_keys=False), encoding="utf-8")
    read = sweep_file.read(again)
    assert read.is_same_search(written)
    assert read.metric == Metric("val/bits_per_byte", "minimize", target=1.5, impute="worst")
    assert read.early_terminate == written.early_terminate == Hyperband((3, 9), 3.0)
    assert (read.config, read.overrides) == (written.config, written.overrides)
    assert (read.name, read.run_cap) == ("a name", 5)
    # W&B reads YAML 1.1 and passes what it has read: no number may have become a word.
    assert yaml.safe_load(again.read_text()) == definition


# -------------------------------------------------------------------------------------------
# The grid


def test_the_grid_is_the_whole_product_in_the_order_of_the_file(tmp_path: Path):
    found = space(
        tmp_path,
        "model.num_layers: {values: [4, 2]}\nseed: {value: 9}\n"
        "training.batch_size: {min: 1, max: 3}\n"
        "model.dropout: {distribution: q_uniform, q: 0.1, min: 0.0, max: 0.1}",
        "method: grid",
    )
    expected = itertools.product([4, 2], [9], [1, 2, 3], [0.0, 0.1])
    assert grid_size(found) == 12
    points = [grid_point(found, index) for index in range(12)]
    assert [tuple(point.values()) for point in points] == list(expected)
    assert all(list(point) == list(found.parameters) for point in points)


def test_a_grid_over_endlessly_many_values_is_refused(tmp_path: Path):
    text = complaint(tmp_path, "model.dropout: {min: 0.0, max: 0.5}", "method: grid")
    assert "sweep.yaml:3: `model.dropout` has endlessly many values" in text


# -------------------------------------------------------------------------------------------
# What no trial could use


def test_a_parameter_that_cannot_be_is_refused_with_its_line(
    tmp_path: Path, subtests: pytest.Subtests
):
    cases = [
        ("optimizer.lr: {value: 1}", "sweep.yaml:3: unknown setting `optimizer.lr`"),
        ("learning_rate: {value: 1}", "did you mean `optimizer.learning_rate`?"),
        ("model.dropout: {values: [0.1, 1.5]}", "3: model.dropout=1.5: must be less than 1"),
        ("model.dropout: {min: 0.5, max: 1.0}", "3: model.dropout=1.0: must be less than 1"),
        ("seed: {value: 1}\nmodel.num_layers: {min: 1.0, max: 4.0}", "4: model.num_layers=1.0"),
        (
            "training.precision: {values: [float8]}",
            "accepted are 'float32', 'bfloat16' or 'float16'",
        ),
        ("model.d_model: {value: 102}", "model.d_model=102 is not divisible by"),
        ("seed: {values: []}", "3: `seed`: `values` must be a list that is not empty"),
        ("seed: {values: 5}", "`values` must be a list"),
        ("seed: {min: 5, max: 1}", "3: `seed`: min=5 is above max=1"),
        ("seed: {min: 5}", "`seed` needs `value`, `values`, or `min` and `max`"),
        ("seed: {min: a, max: 1}", "min='a': a number is expected"),
        ("seed: 5", "a parameter is a mapping, such as {value: 5}"),
        ("seed: {vales: [1]}", "`seed` has an unknown key `vales`; did you mean `values`?"),
        ("seed: {value: 1, min: 1}", "distribution constant has no `min`"),
        (
            "seed: {distribution: normal, mu: 1}",
            "distribution='normal' cannot be had here, where values are searched between bounds: "
            "write uniform with min and max",
        ),
        ("seed: {distribution: q_log_normal}", "write q_log_uniform_values with min and max"),
        ("seed: {distribution: beta, a: 2, b: 2}", "write uniform with min and max"),
        ("seed: {distribution: gamma}", "distribution='gamma': accepted are constant"),
        ("seed: {values: [1, 2], probabilities: [0.1, 0.9]}", "leave them out"),
        ("seed: {distribution: categorical_w_probabilities, values: [1]}", "leave them out"),
        ("seed: {distribution: log_uniform, min: 0, max: 800}", "exponents of e, too large here"),
        ("seed: {value: 1, mu: 1}", "distribution constant has no `mu`"),
        ("seed: {distribution: q_uniform, q: 0, min: 1, max: 2}", "q=0: must be above 0"),
        ("seed: {distribution: q_uniform, q: 9, min: 1, max: 2}", "no multiple of q=9 lies"),
        ("seed: {distribution: log_uniform_values, min: 0, max: 2}", "min=0: must be above 0"),
        ("seed: {distribution: int_uniform, min: 0.5, max: 2}", "are whole numbers"),
        ("seed: {parameters: {x: {value: 1}}}", "3: "),
        ("model: {value: 1, parameters: {}}", "nested `parameters` and nothing beside"),
        (
            "model.dropout: {value: 0}\nmodel: {parameters: {dropout: {value: 0}}}",
            "4: `model.dropout` is given twice",
        ),
    ]
    for parameters, said in cases:
        with subtests.test(parameters=parameters):
            assert said in complaint(tmp_path, parameters)


def test_a_file_that_is_no_sweep_is_refused_with_the_line(
    tmp_path: Path, subtests: pytest.Subtests
):
    cases = [
        ("method: grit", "sweep.yaml:1: method='grit': accepted are grid, random, bayes"),
        ("metric: {}", "method=None"),
        ("method: random\nmetrics: {}", "2: unknown key `metrics`; did you mean `metric`?"),
        (
            "method: random\nmetric: {name: val_loss}",
            "2: metric.name='val_loss' is never logged; did you mean `val/loss`?",
        ),
        ("method: random\nmetric: {name: val/loss, goal: min}", "metric.goal='min': accepted are"),
        ("method: random\nmetric: val/loss", "`metric` has a `name` and a `goal`"),
        (
            "method: random\nmetric: {nam: val/loss}",
            "2: `metric` has an unknown key `nam`; did you",
        ),
        ("method: random\nmetric: {target: low}", "metric.target='low': a number is expected"),
        ("method: random\nmetric: {impute: mean}", "metric.impute='mean': accepted are latest"),
        (
            "method: random\nmetric: {name: val_average/loss}",
            "2: metric.name=val_average/loss is never logged with training.weight_average=null",
        ),
        (
            "method: random\nearly_terminate: {type: hyperband, min_iter: 0}",
            "2: early_terminate.min_iter=0: a whole number above 0 is expected",
        ),
        ("method: custom", "method='custom': accepted are grid, random, bayes"),
        ("method: random\njob: x", "2: `job` cannot be had: it is for W&B Launch"),
        ("method: random\nscheduler: {engine: ax}", "`scheduler` cannot be had: what chooses"),
        ("method: random\ncontroller: {type: local}", "accepted is {type: cloud}"),
        ("method: random\nrun_cap: 0", "2: run_cap=0: a whole number of trials"),
        ("method: random\nprogram: train.py", "program='train.py': every trial is a `mainrun"),
        ("method: random\ncommand: mainrun train", "2: `command` is a list of words"),
        ("method: random\ncommand: [rm, -rf, /]", "2: `command` must run `mainrun train`"),
        ("method: random\ncommand: [mainrun, train]", "`command` must run `mainrun train`"),
        (
            'method: random\ncommand: [mainrun, train, --run-dir, x, "${args_no_hyphens}"]',
            "`command` cannot have '--run-dir'",
        ),
        (
            'method: random\ncommand: [mainrun, train, a.yaml, b.yaml, "${args_no_hyphens}"]',
            "`command` names one config, not a.yaml and b.yaml",
        ),
        (
            'method: random\ncommand: [mainrun, train, absent.yaml, "${args_no_hyphens}"]',
            "absent.yaml: cannot read the config file",
        ),
    ]
    for head, said in cases:
        with subtests.test(head=head):
            assert said in complaint(tmp_path, "seed: {value: 1}", head)


def test_a_sweep_without_parameters_is_refused(tmp_path: Path, subtests: pytest.Subtests):
    for content in ["method: random", "method: random\nparameters: {}"]:
        with subtests.test(content=content):
            path = tmp_path / "sweep.yaml"
            path.write_text(content)
            with pytest.raises(UserError, match="`parameters` must name at least one setting"):
                sweep_file.read(path)


def test_a_value_that_fits_only_together_with_another_is_no_mistake(tmp_path: Path):
    """Six heads do not divide the base's width of 128, but they do divide 192."""
    both = "model.attention.num_heads: {values: [4, 6]}\nmodel.d_model: {values: [128, 192]}"
    search_space.check(space(tmp_path, both))
    assert "not divisible" in complaint(tmp_path, "model.attention.num_heads: {values: [4, 6]}")


AVERAGED = "method: random\nmetric: {name: val_average/loss}"


def test_the_average_may_be_asked_for_where_every_trial_has_one(tmp_path: Path):
    head = (
        f'{AVERAGED}\ncommand: [mainrun, train, "training.weight_average={{kind: ema}}", '
        '"${args_no_hyphens}"]'
    )
    search_space.check(space(tmp_path, "seed: {values: [1, 2]}", head))
    kinds = "training.weight_average.kind: {values: [ema, swa]}\nseed: {values: [1, 2]}"
    search_space.check(space(tmp_path, kinds, AVERAGED))
    some = "training.weight_average: {values: [{kind: ema}, null]}"
    said = complaint(tmp_path, some, AVERAGED)
    assert said.startswith("sweep.yaml:4: metric.name=val_average/loss is never logged with")


# -------------------------------------------------------------------------------------------
# Settings of one kind


KINDS = "model.mlp.kind: {values: [gelu, moe]}\n"


def test_a_parameter_may_be_said_of_one_kind(tmp_path: Path, subtests: pytest.Subtests):
    cases = [
        f"{KINDS}model.mlp.moe.top_k: {{values: [1, 2]}}",
        f"model.mlp.moe.top_k: {{values: [1, 2]}}\n{KINDS}",
        "model.mlp: {values: [{kind: gelu}, {kind: moe}]}\nmodel.mlp.moe.top_k: {value: 1}",
        "model: {parameters: {mlp: {parameters: {kind: {values: [gelu, moe]}, moe: "
        "{parameters: {top_k: {values: [1, 2]}}}}}}}",
        f"model.mlp.kind: {{values: [{'gelu, ' * 999}moe]}}\nmodel.mlp.moe.top_k: {{value: 1}}",
        "model.attention.kind: {values: [causal, sparse]}\n"
        "model.attention.sparse.pattern.fixed.stride: {values: [16, 32]}",
    ]
    for parameters in cases:
        with subtests.test(parameters=parameters):
            search_space.check(space(tmp_path, parameters))


def test_a_parameter_of_a_kind_is_checked_where_it_holds(tmp_path: Path, subtests: pytest.Subtests):
    cases = [
        (f"{KINDS}model.mlp.moe.top_k: {{values: [1, 9]}}", "4: model.mlp.top_k=9 is more than"),
        (f"{KINDS}model.mlp.gelu.top_k: {{value: 1}}", "4: unknown setting `model.mlp.gelu.top_k`"),
        (f"{KINDS}model.mlp.mo.top_k: {{value: 1}}", "4: unknown setting `model.mlp.mo`"),
        (
            "model.mlp.moe.top_k: {values: [1, 2]}",
            "3: `model.mlp.moe.top_k` changes nothing: no trial has model.mlp.kind=moe",
        ),
        (
            f"{KINDS}model.mlp.relu.hidden: {{value: 8}}",
            "4: `model.mlp.relu.hidden` changes nothing: no trial has model.mlp.kind=relu",
        ),
    ]
    for parameters, said in cases:
        with subtests.test(parameters=parameters):
            assert f"sweep.yaml:{said}" in complaint(tmp_path, parameters)


def test_what_the_command_says_of_a_kind_must_hold_for_the_base(tmp_path: Path):
    """Trials start from what the base became, in which it would be lost."""
    head = 'method: random\ncommand: [mainrun, train, {}, "${{args_no_hyphens}}"]'
    said = complaint(tmp_path, KINDS.strip(), head.format("model.mlp.moe.top_k=1"))
    assert "`model.mlp.moe.top_k` is said of a kind that the base config has not" in said
    assert "make it a parameter" in said


def test_an_override_may_not_say_what_a_parameter_of_a_kind_does(
    tmp_path: Path, subtests: pytest.Subtests
):
    cases = [
        ("model.mlp.hidden=8", True),
        ("model.mlp.moe.hidden=8", True),
        ("model.mlp={kind: moe}", True),
        ("model.mlp.gelu.hidden=8", False),
        ("model.mlp.moe.top_k=1", False),
        ("model.mlp.kind=moe", False),
    ]
    for override, clashes in cases:
        with subtests.test(override=override, clashes=clashes):
            found = space(tmp_path, "model.mlp.moe.hidden: {values: [8, 16]}")
            if clashes:
                with pytest.raises(
                    UserError, match=r"`model.mlp.moe.hidden` is a parameter of the sweep"
                ):
                    search_space.with_overrides(found, [override])
            else:
                search_space.with_overrides(found, [override])


def test_what_trials_start_from_keeps_auto(tmp_path: Path):
    """Or the heads of the base would be those of every width."""
    head = (
        "method: grid\ncommand: [mainrun, train, model.attention.num_heads=auto, "
        'model.d_model=64, "${args_no_hyphens}"]'
    )
    found = space(tmp_path, "model.num_layers: {values: [1, 2]}", head)
    base = tmp_path / "base.yaml"
    base.write_text(search_space.base_yaml(found), encoding="utf-8")
    assert config.load(base) == search_space.base_config(found)
    assert config.load(base).model.attention.num_heads == 1
    assert config.load(base, ["model.d_model=256"]).model.attention.num_heads == 4


# -------------------------------------------------------------------------------------------
# The points of a grid, one by one


def test_points_that_are_no_config_are_counted_by_reason(tmp_path: Path):
    found = space(
        tmp_path,
        "model.d_model: {values: [96, 100, 128]}\nmodel.attention.num_heads: {values: [4, 8]}\n"
        "training.grad_accumulation: {values: [1, 3]}",
        "method: grid",
    )
    counted = search_space.grid(found)
    assert counted is not None
    assert (counted.points, counted.repeated) == (12, 0)
    heads = "model.d_model=100 is not divisible by model.attention.num_heads=8"
    assert counted.impossible[heads] == 2
    reason = "training.batch_size=32 is not divisible by training.grad_accumulation=3"
    assert counted.impossible[reason] == 5
    assert counted.impossible.total() == 7
    points = [grid_point(found, index) for index in range(12)]
    refused = [point for point in points if not loads(found, point)]
    assert len(refused) == 7


def test_points_that_differ_in_nothing_that_is_used_are_counted(tmp_path: Path):
    parameters = f"{KINDS}model.mlp.moe.top_k: {{values: [1, 2, 3]}}\nseed: {{values: [1, 2]}}"
    counted = search_space.grid(space(tmp_path, parameters, "method: grid"))
    assert counted == search_space.Grid(points=12, impossible=Counter(), repeated=4)


def test_a_large_grid_is_not_looked_at(tmp_path: Path):
    found = space(tmp_path, "seed: {min: 1, max: 1000}\nmodel.num_layers: {min: 1, max: 11}",
                  "method: grid")  # fmt: skip
    assert search_space.grid(found) is None


def loads(found: SearchSpace, values: dict) -> bool:
    try:
        config.load(ROOT / "base" / "quickstart.yaml", as_overrides(values))
    except UserError:
        return False
    return True


def test_an_override_of_what_is_searched_is_refused(tmp_path: Path, subtests: pytest.Subtests):
    for override in ["model.dropout=0", "--model.dropout=0", "model={dropout: 0}"]:
        with subtests.test(override=override):
            found = space(tmp_path, "model.dropout: {values: [0.1]}")
            with pytest.raises(
                UserError, match=r"`model.dropout` is a parameter of the sweep \(.*:3\)"
            ):
                search_space.with_overrides(found, [override])
            kept = search_space.with_overrides(found, ["model.d_model=64"])
            assert search_space.base_config(kept).model.d_model == 64


def test_a_value_survives_the_command_line(subtests: pytest.Subtests):
    cases = [1, 1.0, 1e-06, 1e22, True, None, "adamw", "1e-3", "null", "", " ", "a: b", "[",
             [1, "x"], {"steps": 10}]  # fmt: skip
    for value in cases:
        with subtests.test(value=value):
            (word,) = as_overrides({"x": value})
            read = yaml12.parse(word.partition("=")[2])
            assert read == value
            assert type(read) is type(value)


# -------------------------------------------------------------------------------------------
# Against the rest of the program


def test_every_metric_that_a_sweep_may_ask_for_is_logged(finished_run: Path):
    assert set(METRICS) <= logged(finished_run)
    assert not set(AVERAGE_METRICS) & logged(finished_run)


@pytest.mark.slow
def test_those_of_the_average_are_logged_where_there_is_one(
    tmp_path: Path, tiny: list[str], mainrun: Mainrun
):
    words = ["training.weight_average.kind=ema", "training.max_steps=2"]
    mainrun("train", *tiny, *words, "--run-dir", tmp_path / "run")
    assert {*METRICS, *AVERAGE_METRICS} <= logged(tmp_path / "run")


def logged(run_dir: Path) -> set[str]:
    events = read_events(run_dir / "events.jsonl")
    return set(next(event for event in events if event["event"] == "evaluation"))


def test_only_an_interval_has_no_end():
    for distribution, count in (
        (Fixed(1), 1),
        (Choices((1, 2)), 2),
        (Integers(3, 7), 5),
        (Multiples(0.1, 0, 3, log=False), 4),
        (Interval(0.0, 1.0, log=False), None),
    ):
        assert num_values(distribution) == count
