"""What a sweep searches: W&B's format read, the grid spanned, nonsense refused with its line."""

import itertools
import json
from pathlib import Path

import pytest
import yaml

from mainrun import config, yaml12
from mainrun.errors import UserError
from mainrun.record import read_events
from mainrun.sweep import search_space, sweep_file
from mainrun.sweep.search_space import (
    METRICS,
    Choices,
    Fixed,
    Integers,
    Interval,
    Multiples,
    SearchSpace,
    as_overrides,
    grid_point,
    grid_size,
    num_values,
)

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


@pytest.mark.parametrize(
    ("written", "expected"),
    [
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
    ],
)
def test_every_distribution_of_wandb_is_read(
    tmp_path: Path, written: str, expected: search_space.Distribution
):
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
        "method: bayes\nname: a name\nrun_cap: 5\nmetric: {name: val/bits_per_byte}\n"
        'command: [mainrun, train, base.yaml, data.order=shuffled, "${args_no_hyphens}"]',
    )
    definition = sweep_file.definition(written)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(definition, sort_keys=False), encoding="utf-8")
    read = sweep_file.read(again)
    assert read.is_same_search(written)
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


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
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
        ("seed: {distribution: normal, mu: 1}", "unknown key `mu`"),
        ("seed: {distribution: beta}", "distribution='beta': accepted are constant"),
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
    ],
)
def test_a_parameter_that_cannot_be_is_refused_with_its_line(
    tmp_path: Path, parameters: str, said: str
):
    assert said in complaint(tmp_path, parameters)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("method: grit", "sweep.yaml:1: method='grit': accepted are grid, random, bayes"),
        ("metric: {}", "method=None"),
        ("method: random\nmetrics: {}", "2: unknown key `metrics`; did you mean `metric`?"),
        (
            "method: random\nmetric: {name: val_loss}",
            "2: metric.name='val_loss' is never logged; did you mean `val/loss`?",
        ),
        ("method: random\nmetric: {name: val/loss, goal: min}", "metric.goal='min': accepted are"),
        ("method: random\nmetric: val/loss", "`metric` has a `name` and a `goal`"),
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
    ],
)
def test_a_file_that_is_no_sweep_is_refused_with_the_line(tmp_path: Path, head: str, said: str):
    assert said in complaint(tmp_path, "seed: {value: 1}", head)


@pytest.mark.parametrize("content", ["method: random", "method: random\nparameters: {}"])
def test_a_sweep_without_parameters_is_refused(tmp_path: Path, content: str):
    path = tmp_path / "sweep.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match="`parameters` must name at least one setting"):
        sweep_file.read(path)


def test_a_value_that_fits_only_together_with_another_is_no_mistake(tmp_path: Path):
    """Six heads do not divide the base's width of 128, but they do divide 192."""
    both = "model.attention.num_heads: {values: [4, 6]}\nmodel.d_model: {values: [128, 192]}"
    search_space.check(space(tmp_path, both))
    assert "not divisible" in complaint(tmp_path, "model.attention.num_heads: {values: [4, 6]}")


@pytest.mark.parametrize("override", ["model.dropout=0", "--model.dropout=0", "model={dropout: 0}"])
def test_an_override_of_what_is_searched_is_refused(tmp_path: Path, override: str):
    found = space(tmp_path, "model.dropout: {values: [0.1]}")
    with pytest.raises(UserError, match=r"`model.dropout` is a parameter of the sweep \(.*:3\)"):
        search_space.with_overrides(found, [override])
    kept = search_space.with_overrides(found, ["model.d_model=64"])
    assert search_space.base_config(kept).model.d_model == 64


@pytest.mark.parametrize(
    "value",
    [1, 1.0, 1e-06, 1e22, True, None, "adamw", "1e-3", "null", "", " ", "a: b", "[", [1, "x"],
     {"steps": 10}],
)  # fmt: skip
def test_a_value_survives_the_command_line(value: object):
    (word,) = as_overrides({"x": value})
    read = yaml12.parse(word.partition("=")[2])
    assert read == value
    assert type(read) is type(value)


# -------------------------------------------------------------------------------------------
# Against the rest of the program


def test_every_metric_that_a_sweep_may_ask_for_is_logged(finished_run: Path):
    events = read_events(finished_run / "events.jsonl")
    (logged, *_) = [event for event in events if event["event"] == "evaluation"]
    assert set(METRICS) <= logged.keys()


@pytest.mark.parametrize("path", sorted((ROOT / "sweep").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_sweep_is_valid_point_by_point(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT.parent)
    shipped = sweep_file.read(path)
    search_space.check(shipped)
    assert shipped.run_cap or shipped.method == "grid", "a sweep that ends without --count"
    assert shipped.config is not None
    if shipped.method == "grid":
        for index in range(grid_size(shipped)):
            config.load(shipped.config, as_overrides(grid_point(shipped, index)))


@pytest.mark.parametrize("path", sorted((ROOT / "sweep").glob("*.yaml")), ids=lambda p: p.stem)
def test_wandb_itself_reads_the_same_numbers_in_every_shipped_sweep(path: Path):
    """PyYAML takes 1e-3 for a word; `wandb sweep FILE` by hand must not."""
    shipped = sweep_file.definition(sweep_file.read(path))["parameters"]
    for name, spec in yaml.safe_load(path.read_text())["parameters"].items():
        told = {key: value for key, value in spec.items() if key in shipped[name]}
        assert json.dumps(told, sort_keys=True) == json.dumps(
            {key: shipped[name][key] for key in told}, sort_keys=True
        )


def test_only_an_interval_has_no_end():
    for distribution, count in (
        (Fixed(1), 1),
        (Choices((1, 2)), 2),
        (Integers(3, 7), 5),
        (Multiples(0.1, 0, 3, log=False), 4),
        (Interval(0.0, 1.0, log=False), None),
    ):
        assert num_values(distribution) == count
