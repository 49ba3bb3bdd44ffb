"""A member of a population equals its solo run, whatever kind of optimizer or model it is."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mainrun import config, parts
from mainrun.config import CARRIED, Config
from mainrun.opening import prepare
from mainrun.parts import Parts, Texts
from mainrun.population.choice import Choice, choose
from mainrun.population.group import Group
from mainrun.population.hyper import hyper, hyper_stretch
from mainrun.population.places import Places, PopulationStep, compile_for
from mainrun.training.feed import Sent
from mainrun.training.trainee import Pace
from tests.conftest import REPOSITORY

STEPS = 4
QUICKSTART = REPOSITORY / "config" / "base" / "quickstart.yaml"

# What the second member has other than the first, of each kind that it may be.
OPTIMIZERS = {
    "sgd": ["optimizer.momentum=0.5", "optimizer.weight_decay=0.1"],
    "adam": ["optimizer.b1=0.5", "optimizer.b2=0.9", "optimizer.eps=1e-3"],
    "adamw": ["optimizer.b1=0.5", "optimizer.b2=0.9", "optimizer.weight_decay=0.5"],
    "adagrad": ["optimizer.eps=1e-3", "optimizer.weight_decay=0.5"],
    "rmsprop": ["optimizer.b2=0.5", "optimizer.eps=1e-3", "optimizer.momentum=0.5"],
    "adafactor": ["optimizer.weight_decay=0.5"],
    "lion": ["optimizer.b1=0.5", "optimizer.b2=0.7", "optimizer.weight_decay=0.5"],
    "muon": ["optimizer.momentum=0.5", "optimizer.adamw_learning_rate=1e-2", "optimizer.b1=0.5"],
    "schedule_free_adamw": ["optimizer.b1=0.5", "optimizer.b2=0.9", "optimizer.weight_decay=0.5"],
}
FIRST = {"sgd": ["optimizer.momentum=0.9"], "rmsprop": ["optimizer.momentum=0.9"]}
MODELS = {
    "causal": [],
    "sparse": ["model.attention={kind: sparse, num_heads: 2, pattern: {stride: 4}}"],
    "latent": ["model.attention.kind=latent", "model.position=rotary",
               "model.attention.rotary_dim=4", "model.attention.kv_rank=8"],
    "moe": ["model.mlp.kind=moe"],
    "unet": ["model={kind: unet_gpt, d_model: 16, bottleneck_sizes: [8], bias: false}",
             "model.attention.num_heads=2", "model.mlp.hidden=32"],
}  # fmt: skip
OTHERS = [
    "seed=7",
    "model.dropout=0.4",
    "optimizer.learning_rate=0.02",
    "schedule.kind=wsd",
    "training.max_steps=6",
    "training.grad_clip=0.05",
    "training.regularization.label_smoothing=0.1",
    "training.regularization.z_loss=0.01",
]


@pytest.fixture(scope="module")
def base(tiny: list[str]) -> list[str]:
    return [
        *(word for word in tiny if not word.startswith("model.num_layers")),
        "training.max_steps=9",
        "model.dropout=0.1",
        "model.num_layers=1",
        "model.bias=false",  # the true gradient of the keys' is zero: noise, which Adam blows up
    ]


def trained(settings: Config, joined: Parts) -> tuple[Any, list[Any]]:
    """The state after a few steps of the step of a run of its own, and the metrics."""
    step = jax.jit(parts.train_step(settings, joined))
    state = parts.initial_state(settings, joined, None)
    metrics = []
    for index in range(STEPS):
        state, found = step(state, parts.batch(settings, joined.texts, index))
        metrics.append(found)
    return state, metrics


def side_by_side(members: list[Config], texts: list[Texts]) -> tuple[list[Any], list[list[Any]]]:
    """The same of members that share the step of the first."""
    joined = [parts.assemble(*pair) for pair in zip(members, texts, strict=True)]
    paths = frozenset(CARRIED)
    states = [parts.initial_state(m, j, None) for m, j in zip(members, joined, strict=True)]
    hypers = [hyper(m, j, paths, 16) for m, j in zip(members, joined, strict=True)]
    feeds = [Sent(partial(parts.batch, m, t), most=3) for m, t in zip(members, texts, strict=True)]
    run = hyper_stretch(members[0], joined[0], paths, feeds[0])
    compiled = compile_for(run, len(members), hypers[0], states[0], feeds[0](0, 1))
    places = Places(compiled, Pace(3))
    for place, pair in enumerate(zip(hypers, states, strict=True)):
        places.fill(place, *pair)
    metrics: list[list[Any]] = [[] for _ in members]
    for first, steps in ((0, 1), (1, STEPS - 1)):
        given = {place: feed(first, steps) for place, feed in enumerate(feeds)}
        for place, done in places.take(given, steps).items():
            metrics[place] += done.wait().metrics
    return [places.state(place) for place in range(len(members))], metrics


def assert_each_equals_its_solo_run(first: list[str], second: list[str]) -> None:
    members = [config.load(QUICKSTART, words) for words in (first, second)]
    assert config.structure(members[0], frozenset(CARRIED)) == config.structure(
        members[1], frozenset(CARRIED)
    )
    texts = [parts.read_texts(member) for member in members]
    states, metrics = side_by_side(members, texts)
    for place, member in enumerate(members):
        state, found = trained(member, parts.assemble(member, texts[place]))
        # Batched products are summed in another order; Muon and the signs of Lion magnify that.
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(metrics[place]), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-6)
        for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(states[place]), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(
    "kind",
    # Each compiles three programs; one of them is enough for every day.
    [k if k == "adamw" else pytest.param(k, marks=pytest.mark.slow) for k in OPTIMIZERS],
)
def test_a_member_equals_its_solo_run_with_every_optimizer(kind: str, base: list[str]):
    first = [*base, f"optimizer.kind={kind}", *FIRST.get(kind, [])]
    assert_each_equals_its_solo_run(
        [*first, "training.regularization={label_smoothing: 0.2, z_loss: 0.02}"],
        [*first, *OPTIMIZERS[kind], *OTHERS],
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_member_equals_its_solo_run_with_every_model(name: str, base: list[str]):
    """Also one without dropout beside one that has it."""
    common = [word for word in base if name != "unet" or "num_layers" not in word]
    first = [*common, *MODELS[name], "model.dropout=0"]
    assert_each_equals_its_solo_run(first, [*first, *OTHERS])


def test_what_changes_the_computation_is_no_member(base: list[str], subtests: pytest.Subtests):
    cases = [
        ["model.d_model=32"],
        ["training.batch_size=4"],
        ["optimizer.kind=lion"],
        ["training.grad_clip=null"],
        ["training.precision=bfloat16"],
        ["model.attention.qk_norm=true"],
        ["training.regularization.r_drop=1"],
    ]
    for words in cases:
        with subtests.test(words=words):
            paths = frozenset([*CARRIED, "model.d_model", "training.batch_size"])
            one, other = config.load(QUICKSTART, base), config.load(QUICKSTART, [*base, *words])
            assert config.structure(one, paths) != config.structure(other, paths)


def test_momentum_from_nothing_and_the_dropout_of_sparsek_are_no_numbers_of_the_step(
    base: list[str],
):
    """Without momentum there is no buffer; SparseK plans with the rate."""
    paths = frozenset(CARRIED)
    sgd = [*base, "optimizer.kind=sgd"]
    none, some = (config.load(QUICKSTART, [*sgd, f"optimizer.momentum={m}"]) for m in (0, 0.9))
    assert config.structure(none, paths) != config.structure(some, paths)
    sparsek = [
        *base,
        "model.attention={kind: sparsek, num_heads: 2, window_including_self: 8, num_selected: 4}",
    ]
    one, other = (config.load(QUICKSTART, [*sparsek, f"model.dropout={r}"]) for r in (0.1, 0.2))
    assert config.structure(one, paths) != config.structure(other, paths)


def test_a_setting_that_is_not_varied_stays_a_constant_of_the_step(base: list[str]):
    loaded = config.load(QUICKSTART, base)
    assert config.carried_values(loaded, frozenset(["model.dropout"])) == {"model.dropout": 0.1}
    assert config.carried_values(loaded, frozenset(["model.d_model"])) == {}


def test_runs_whose_averages_take_other_samples_share_no_step(base: list[str]):
    """The samples of an average lie where the run's length puts them, and the step knows them."""
    average = ["training.weight_average={kind: swa, start: {fraction: 0.5}}"]
    short, long = (
        prepare(config.load(QUICKSTART, [*base, *average, *words]), None, "run", command=())
        for words in (["training.max_steps=9"], ["training.max_steps=12"])
    )
    group = Group(short, frozenset(), Choice(1, most=1))
    assert group.fits(short)
    assert not group.fits(long)
    assert group.fits(replace(long, joined=replace(long.joined, samples=short.joined.samples)))


def test_a_place_that_is_left_is_taken_while_the_others_stay():
    step = compile_for(
        lambda hypers, state, feed, count: (state + feed + hypers, state[None]),
        3, np.float32(0), jnp.float32(0), np.float32(0),
    )  # fmt: skip
    places = Places(step, Pace(1))
    for place in range(3):
        places.fill(place, np.float32(place), jnp.float32(10 * place))
    places.take({0: np.float32(1), 2: np.float32(3)}, 1)
    assert [float(places.state(place)) for place in (0, 2)] == [1.0, 25.0]
    places.fill(1, np.float32(0.5), jnp.float32(100))
    places.set_state(2, jnp.float32(-1))
    done = places.take({place: np.float32(0) for place in range(3)}, 1)
    assert [float(places.state(place)) for place in range(3)] == [1.0, 100.5, 1.0]
    assert [float(done[place].wait().metrics[0]) for place in range(3)] == [1.0, 100.0, -1.0]


def test_on_a_cpu_runs_go_one_after_another_unless_told_otherwise():
    """And no more side by side than there are."""
    made: list[int] = []

    def compiled(places: int) -> PopulationStep:
        made.append(places)
        return PopulationStep(places, None, 0.0, 0)

    def never(_: PopulationStep) -> float:
        raise AssertionError("nothing is measured on a CPU")

    assert choose(Choice(None, 8), compiled, never).places == 1
    assert choose(Choice(8, 3), compiled, never).places == 3
    assert made == [1, 3]


def test_elsewhere_the_number_is_doubled_as_long_as_it_pays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    seconds = {1: 1.0, 2: 0.6, 4: 0.35, 8: 0.34, 16: 0.1}

    def compiled(places: int) -> PopulationStep:
        return PopulationStep(places, None, 0.0, 0)

    def measured(step: PopulationStep) -> float:
        return seconds[step.places]

    assert choose(Choice(None, 100), compiled, measured).places == 4
    assert choose(Choice(None, 3), compiled, measured).places == 2
    huge = lambda places: PopulationStep(places, None, 0.0, 2**60 * (places > 2))  # noqa: E731
    assert choose(Choice(None, 100), huge, measured).places == 2
