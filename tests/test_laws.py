"""What holds for every model that the settings can name: see `variants` for how they are found."""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mainrun import config
from mainrun.data.batches import Batch
from mainrun.model.attention import MultiHeadAttention
from mainrun.model.cache import Span
from mainrun.model.generate import generate
from mainrun.model.initializers import Initializer
from mainrun.training.loss import token_loss
from tests import variants
from tests.shown import shown
from tests.variants import CONTEXT, VOCAB, WIDTH, network, params, tokens

MODELS = variants.networks()


# Where compiling is long: one that chooses its keys, one of few of them, another architecture.
FEW = {
    name: model
    for name, model in variants.kinds().items()
    if model.kind != "gpt" or model.attention.kind in ("sparsek", "latent")
}
OPTIONS = [name for name in MODELS if "=" in name]


def every_model(law: int, kinds: dict[str, config.Network] | None = None) -> pytest.MarkDecorator:
    """One of each kind; with the slow tests every kind in every architecture, and every option.

    Of the options, which are three times as many, each law has every fourth: any two laws four
    apart share theirs, so of the eight each option meets two.
    """
    kinds = variants.kinds() if kinds is None else kinds
    others = {name: MODELS[name] for name in OPTIONS[law % 4 :: 4]}
    plain = {name: model for name, model in MODELS.items() if "=" not in name}
    return shown("settings", kinds | plain | others, kinds.__contains__)


SEGMENTS = jnp.array([[0] * 7 + [1] * 17, [0] * 13 + [1] * 11])


@cache
def compiled(settings: config.Network) -> Any:
    """Parameters, tokens and segment ids to logits, jitted. One compilation serves most laws."""
    return jax.jit(lambda p, t, s: network(settings).bind(p)(t, s))


def forward(settings: config.Network) -> Any:
    return partial(compiled(settings), params(settings))


def apart(one: jax.Array, other: jax.Array) -> np.ndarray:
    """The largest difference at each position of each row."""
    return np.abs(np.asarray(one) - np.asarray(other)).max(-1)


@every_model(0)
def test_later_tokens_and_other_documents_change_nothing(settings: config.Network) -> None:
    run, before = forward(settings), tokens()
    for position in (3, 9, 16):
        changed = before.at[:, position].set((before[:, position] + 1) % VOCAB)
        for segments in (jnp.zeros_like(before), SEGMENTS):
            difference = apart(run(before, segments), run(changed, segments))
            is_seen = (np.arange(CONTEXT) >= position) & (segments == segments[:, [position]])
            # A mixture of experts groups tokens anew: another order of the same products.
            limit = 1e-5 if isinstance(settings.mlp, config.MixtureOfExperts) else 0.0
            assert difference[~is_seen].max() <= limit
            assert (difference[:, position] > 1e-4).all(), "the token itself has a say"


@every_model(1)
def test_rows_are_computed_apart(settings: config.Network) -> None:
    run, rows = forward(settings), tokens()
    other = rows.at[1].set(tokens(seed=3)[1])
    difference = apart(run(rows, SEGMENTS), run(other, SEGMENTS))
    assert difference[0].max() < 1e-5
    assert difference[1].max() > 1e-3


@every_model(2)
def test_text_after_text_by_the_cache_equals_the_whole(settings: config.Network) -> None:
    text = tokens()
    whole = forward(settings)(text, jnp.zeros_like(text))
    np.testing.assert_allclose(token_by_token(settings, text, 10), whole, atol=1e-4, rtol=1e-4)


def token_by_token(settings: config.Network, text: jax.Array, beginning: int) -> jax.Array:
    """Logits of a text whose first tokens are read at once, and each of the others alone."""

    def read(p: dict) -> jax.Array:
        model = network(settings).bind(p)
        features, memory = model.go_on(text[:, :beginning], 0, model.empty_memory(2, CONTEXT))

        def one(memory: Any, place: jax.Array) -> tuple:
            token = jax.lax.dynamic_slice_in_dim(text, place, 1, axis=1)
            features, memory = model.go_on(token, place, memory)
            return memory, features[:, 0]

        _, rest = jax.lax.scan(one, memory, jnp.arange(beginning, CONTEXT))
        return model.logits(jnp.concatenate([features, rest.swapaxes(0, 1)], axis=1))

    return jax.jit(read)(params(settings))


@every_model(3)
def test_gradients_reach_every_parameter(settings: config.Network) -> None:
    _, gradients = summed(settings, some_batch())
    for name, gradient in gradients.items():
        if name.endswith("qkv.bias"):
            # A key bias moves every score of a query alike, which softmax does not see.
            heads = settings.attention.num_heads
            groups = settings.attention.num_kv_heads or heads
            inner = len(gradient) * heads // (heads + 2 * groups)
            gradient = jnp.delete(gradient, slice(inner, inner + inner * groups // heads))
        assert np.isfinite(gradient).all(), name
        assert (jnp.abs(gradient) > 0).any(), name


@every_model(4)
def test_padding_changes_no_loss_and_no_gradient(settings: config.Network) -> None:
    """Rows of padding, and padding behind a text, weigh nothing, whatever they hold."""
    batch = some_batch()
    batch.weights[1, 15:] = 0
    batch.weights[2] = 0
    other = batch._replace(inputs=batch.inputs.copy(), targets=batch.targets.copy())
    for array in (other.inputs, other.targets):
        array[batch.weights == 0] = 7
    (loss, gradients), (same, others) = summed(settings, batch), summed(settings, other)
    np.testing.assert_allclose(same, loss, rtol=1e-5)
    for name, gradient in gradients.items():
        largest = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(others[name], gradient, atol=1e-4 * largest + 1e-6, err_msg=name)


def some_batch() -> Batch:
    text = np.array(tokens(batch=3, time=CONTEXT + 1))
    ones = np.ones((3, CONTEXT), np.float32)
    return Batch(text[:, :-1].copy(), text[:, 1:].copy(), np.zeros((3, CONTEXT), np.int32), ones)


def summed(settings: config.Network, batch: Batch) -> Any:
    """The summed loss of a batch, the balance loss with it, and its gradient."""
    return _summed(settings)(params(settings), batch)


@cache
def _summed(settings: config.Network) -> Any:
    def loss(p: dict, batch: Batch) -> jax.Array:
        found = token_loss(
            network(settings).bind(p), batch, mask_documents=False, dropout_keys=None
        )
        weights = jnp.asarray(batch.weights)
        return (found.nll * weights).sum() + (found.balance * weights.sum(1)).sum()

    return jax.jit(jax.value_and_grad(loss))


@every_model(5, FEW)
def test_blocks_computed_again_change_neither_loss_nor_gradient(settings: config.Network) -> None:
    """Masks of dropout among them: these are functions of keys, so they come out the same."""
    settings = dataclasses.replace(settings, dropout=0.3)
    keys, batch = jax.random.key_data(jax.random.split(jax.random.key(0), 3)), some_batch()

    def loss(p: dict, *, remat: bool) -> jax.Array:
        model = network(settings).bind(p, remat=remat)
        return token_loss(model, batch, mask_documents=True, dropout_keys=keys).nll.sum()

    run = jax.jit(jax.value_and_grad(loss), static_argnames="remat")
    kept, again = (run(params(settings), remat=remat) for remat in (False, True))
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        # The same products; XLA fuses what is around them differently.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * (1 + float(jnp.abs(a).max())))


@every_model(6)
def test_the_second_call_compiles_nothing(settings: config.Network) -> None:
    for seed in range(2):
        scaled = {name: array * (1 + seed) for name, array in params(settings).items()}
        compiled(settings)(scaled, tokens(seed=seed), SEGMENTS)
    assert compiled(settings)._cache_size() == 1


CHANGED = {
    f"{name}.{option}={getattr(changed, option)}": (base, changed)
    for name, base in MODELS.items()
    if name in ("gpt", "unet_gpt")
    for option, changed in variants.options(base)
    if option not in variants.SILENT
}
for _label, _part, _base in [
    *((label, "attention", variants.small(config.Gpt)) for label in variants.attentions()),
    *((label, "mlp", variants.small(config.Gpt)) for label in variants.mlps()),
]:
    _settings = (variants.attentions() if _part == "attention" else variants.mlps())[_label]
    CHANGED |= {
        f"{_label}.{option}={getattr(changed, option)}": (
            dataclasses.replace(_base, **{_part: _settings}),
            dataclasses.replace(_base, **{_part: changed}),
        )
        for option, changed in variants.options(_settings)
        if (option not in variants.SILENT or option == "kind")
        and changed != _settings
        # All keys are all keys, in tiles or not.
        and (_label, option) != ("sparse-all", "block_size")
    }


@shown("before, after", CHANGED, lambda name: name.startswith("gpt."))
def test_every_option_changes_the_output(before: config.Network, after: config.Network) -> None:
    """Either there are other parameters, or the same ones compute something else."""
    ours, theirs = params(before), params(after)
    if {n: p.shape for n, p in ours.items()} == {n: p.shape for n, p in theirs.items()}:
        text = tokens()
        changed = compiled(after)(ours, text, SEGMENTS)
        assert apart(forward(before)(text, SEGMENTS), changed).max() > 1e-4


MULTI_HEAD = {
    label: settings
    for label, settings in variants.attentions().items()
    if not isinstance(settings, config.LatentAttention)
}


@shown("settings", MULTI_HEAD, variants.is_kind)
@pytest.mark.parametrize("documents", [False, True], ids=["one text", "documents"])
def test_each_head_looks_at_the_keys_of_its_definition(
    settings: config.MultiHead, documents: bool
) -> None:
    """With the unit vectors for values, what comes out is the weight of each key."""
    layer = MultiHeadAttention(
        variants.small(config.Gpt), settings, WIDTH, WIDTH, is_first=True,
        out_init=Initializer("normal", WIDTH), rngs=variants.rngs(),
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (2, CONTEXT, WIDTH))
    span = Span(jnp.arange(CONTEXT), SEGMENTS if documents else None)

    def looked() -> tuple[jax.Array, jax.Array | None]:
        q, k, _ = layer._projected(x, span, None)
        scores = None if layer.importance is None else 40 * layer._scores(x, span, None)
        parts = []
        for first in range(0, CONTEXT, layer.head_dim):  # as many unit vectors as a head is wide
            unit = jnp.eye(CONTEXT)[:, first : first + layer.head_dim]
            unit = jnp.broadcast_to(unit, (2, layer.num_kv_heads, *unit.shape))
            parts.append(layer._whole(q, k, unit, scores, span, None))
        return jnp.concatenate(parts, axis=-1), scores

    weights, scores = jax.tree.map(np.asarray, jax.jit(looked)())
    for row in range(2):
        for head in range(settings.num_heads):
            for query in range(CONTEXT):
                same = {
                    key
                    for key in range(query + 1)
                    if not documents or SEGMENTS[row, key] == SEGMENTS[row, query]
                }
                expected = seen(settings, query, head, same, scores, row)
                assert set(np.flatnonzero(weights[row, head, query])) == expected


def seen(
    settings: config.MultiHead, i: int, head: int, before: set[int], scores: Any, row: int
) -> set[int]:
    """Keys of query `i` among those of its document up to it, by the papers' definitions."""
    match settings:
        case config.CausalAttention(window_including_self=window):
            return {j for j in before if window is None or i - j < window}
        case config.SparseKAttention(window_including_self=window, num_selected=count):
            near = {j for j in before if i - j < window}
            kv_head = head * scores.shape[1] // settings.num_heads
            ranked = sorted(before - near, key=lambda j: -float(scores[row, kv_head, j]))
            return near | _open(ranked, [float(scores[row, kv_head, j]) for j in ranked], count)
        case config.SparseAttention(pattern=pattern, block_size=b):
            match pattern:
                case config.AllKeys():
                    return before
                case config.LocalKeys(window_including_self=window):
                    return {j for j in before if i // b - j // b < window // b}
                case config.StridedKeys(stride=stride):
                    near = {j for j in before if i // b - j // b < stride // b}
                    return near | {j for j in before if (i // b - j // b) % (stride // b) == 0}
                case config.FixedKeys(stride=stride, num_verts=verts, vertsize=size):
                    group = head % verts
                    last = stride // b - group * size  # block after the group, in its stride
                    columns = {j for j in before if last - size <= j % stride // b < last}
                    return columns | {j for j in before if j // stride == i // stride}
    raise AssertionError(settings)


def _open(keys: list[int], scores: list[float], count: int) -> set[int]:
    """The `count` best keys whose gate clip(score - τ, 0, 1) is open; gates sum to count."""
    if len(keys) <= count:
        return set(keys)
    low, high = min(scores) - 1, max(scores)
    for _ in range(100):
        middle = (low + high) / 2
        total = sum(min(max(s - middle, 0.0), 1.0) for s in scores)
        low, high = (middle, high) if total > count else (low, middle)
    return {key for key, s in zip(keys[:count], scores, strict=False) if s - high > 1e-6}


@every_model(7, FEW)
def test_greedy_text_is_the_likeliest_token_each_time(settings: config.Network) -> None:
    prompts = tokens(time=4)
    text = generate(
        network(settings), params(settings), np.asarray(prompts), np.array([4, 3]),
        jax.random.key(0), max_tokens=6, eos_id=VOCAB, temperature=0.0,
    )  # fmt: skip
    text = np.asarray(text)
    for row, length in enumerate((4, 3)):
        read = np.where(text[row] == VOCAB, 0, text[row])[None]
        likeliest = np.asarray(forward(settings)(jnp.asarray(read), jnp.zeros_like(read)))
        given = likeliest.argmax(-1)[0, length - 1 : length + 5]
        np.testing.assert_array_equal(text[row, length : length + 6], given)
        assert (text[row, length + 6 :] == VOCAB).all()
