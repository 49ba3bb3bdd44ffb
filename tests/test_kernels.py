"""Attention's kernels: who may have one, whether it is right, and what each path lets through.

cuDNN runs on a GPU alone. Here everything around it runs with `as_documented`, which does by XLA
what JAX documents of the fused kernels; that they are called is read from what is lowered for CUDA;
that they are right is measured by the tests marked `gpu`.
"""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mainrun import config
from mainrun.data import batches
from mainrun.errors import UserError
from mainrun.model import fused, kernels, masks
from mainrun.model.attention import attend
from mainrun.model.fused import Asked, Kernel, by_cudnn
from mainrun.model.gpt import Network
from mainrun.model.kernels import Case, Device, Packing
from mainrun.model.layers import DropoutRate
from tests import variants
from tests.shown import shown
from tests.variants import CONTEXT, VOCAB

LONG = Packing(1024, False)
HOPPER, AMPERE = Device("gpu", (9, 0)), Device("gpu", (8, 0))


def as_documented(q: jax.Array, k: jax.Array, v: jax.Array, asked: Asked) -> jax.Array:
    """`by_cudnn` by XLA, documents as the docstring of JAX's function has them."""
    mask = asked.mask
    if asked.documents is not None:
        lengths, offsets = asked.documents
        places = jnp.arange(q.shape[1])[:, None]
        first = offsets[:, None, : lengths.shape[1]]
        inside = (first >= 0) & (places >= first) & (places < first + lengths[:, None])
        mask = jnp.einsum("btm,bsm->bts", *2 * [inside.astype(jnp.int32)])[:, None] > 0
    newest = None if asked.window is None else (asked.window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=asked.scale, is_causal=True,
        local_window_size=newest, implementation="xla",
    )  # fmt: skip


def leaking(q: jax.Array, k: jax.Array, v: jax.Array, asked: Asked) -> jax.Array:
    """A kernel to which documents are nothing."""
    return as_documented(q, k, v, asked._replace(mask=None, documents=None))


def windowless(q: jax.Array, k: jax.Array, v: jax.Array, asked: Asked) -> jax.Array:
    return as_documented(q, k, v, asked._replace(window=None))


def absent(q: jax.Array, k: jax.Array, v: jax.Array, asked: Asked) -> jax.Array:
    raise NotImplementedError("no such\nkernel")


BY_MASK = Kernel("cudnn", as_documented)
BY_OFFSETS = Kernel("cudnn", as_documented, most_documents=3)


# --- documents ------------------------------------------------------------------------------------


def paths() -> dict[str, Any]:
    """Every kind of attention by the plain form, and by a fused kernel where one can compute it."""
    found = {}
    for label, attention in variants.attentions().items():
        ways = [("plain", fused.PLAIN)]
        if fused.newest_keys(attention, CONTEXT) is not None:
            ways += [("mask", BY_MASK), ("offsets", BY_OFFSETS)]
        for way, kernel in ways:
            found[f"{label}-{way}"] = (attention, kernel)
    return found


DOCUMENTS = jnp.array([[0] * 7 + [1] * 8 + [2] * 9, [0] * 13 + [1] * 11])


def gradients(attention: config.Attention, kernel: Kernel) -> list[np.ndarray]:
    """How much each token moves what is read in each document, [row, time].

    No token stands twice, so a row of the embedding's gradient is that of one place.
    """
    settings = dataclasses.replace(variants.small(config.Gpt), attention=attention)
    network = variants.network(settings).with_kernel(kernel)
    tokens = jnp.arange(2 * CONTEXT).reshape(2, CONTEXT) % VOCAB
    weights = jax.random.normal(jax.random.key(0), (2, CONTEXT, variants.WIDTH))

    @jax.jit
    @jax.grad
    def gradient(params: dict, is_read: jax.Array) -> jax.Array:
        read = network.bind(params).read(tokens, DOCUMENTS)
        return (read.features * weights * is_read[:, :, None]).sum()

    found = (gradient(variants.params(settings), number == DOCUMENTS) for number in range(3))
    tables = (np.asarray(each["token_embedding.embedding"]) for each in found)
    return [np.abs(table).max(-1)[tokens] for table in tables]


def assert_documents_are_apart(attention: config.Attention, kernel: Kernel) -> None:
    for number, found in enumerate(gradients(attention, kernel)):
        is_own = np.asarray(DOCUMENTS) == number
        np.testing.assert_array_equal(found[~is_own], 0)
        assert (found[is_own] > 0).all()


SHOWN = {
    "causal-window_including_self=5-offsets", "causal-mask", "sparse-fixed-plain",
    "sparse-strided-mask", "sparsek-plain", "latent-plain",
}  # fmt: skip


@shown("attention, kernel", paths(), SHOWN.__contains__)
def test_a_token_has_exactly_no_gradient_to_another_document(
    attention: config.Attention, kernel: Kernel
) -> None:
    assert_documents_are_apart(attention, kernel)


def test_a_kernel_that_lets_documents_see_each_other_is_found_by_its_gradient() -> None:
    for most_documents in (None, 3):
        kernel = Kernel("cudnn", leaking, most_documents=most_documents)
        with pytest.raises(AssertionError):
            assert_documents_are_apart(variants.small(config.CausalAttention), kernel)


# --- the same values and gradients as the plain form ----------------------------------------------


def case(**changes: Any) -> Case:
    return Case(
        **{
            "heads": 4, "kv_heads": 4, "dim": 8, "value_dim": 8, "precision": "float32",
            "time": 24, "newest": 24, "has_documents": False, "most_documents": None,
        } | changes
    )  # fmt: skip


CASES = {
    "causal": {},
    "an odd time": {"time": 13, "newest": 13},
    "window": {"newest": 5},
    "window of one": {"newest": 1},
    "grouped": {"kv_heads": 2},
    "one key head": {"kv_heads": 1},
    "latent": {"dim": 16},
    "documents by mask": {"has_documents": True},
    "documents by offsets": {"has_documents": True, "most_documents": 3},
    "more room than documents": {"has_documents": True, "most_documents": 7},
    "window, documents by mask": {"has_documents": True, "newest": 5},
    "window, documents by offsets": {"has_documents": True, "newest": 5, "most_documents": 3},
    "grouped, documents by offsets": {"has_documents": True, "kv_heads": 2, "most_documents": 3},
    "latent, documents by offsets": {"has_documents": True, "dim": 16, "most_documents": 3},
}


def both(case: Case, call: fused.Call) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Output and gradients by the kernel, and by the plain form on the same numbers, float32."""
    segments = DOCUMENTS[:, : case.time] if case.has_documents else None
    shapes = [(case.heads, case.dim), (case.kv_heads, case.dim), (case.kv_heads, case.value_dim)]
    q, k, v, dout = (
        jax.random.normal(jax.random.key(i), (2, heads, case.time, dim), case.precision)
        for i, (heads, dim) in enumerate([*shapes, (case.heads, case.value_dim)])
    )
    places = np.arange(case.time)
    seen = (places <= places[:, None]) & (places > places[:, None] - case.newest)
    seen = jnp.asarray(seen)[None, None]
    if segments is not None:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None])
    by_kernel = partial(
        fused.attend, call=call, newest=case.newest, segment_ids=segments,
        most_documents=case.most_documents, scale=0.3,
    )  # fmt: skip

    def pulled(function: Callable[..., jax.Array], *inputs: jax.Array) -> list[np.ndarray]:
        output, pull = jax.vjp(function, *inputs[:3])
        return [np.asarray(x, np.float32) for x in (output, *pull(inputs[3]))]

    wide = (x.astype(jnp.float32) for x in (q, k, v, dout))
    plain = pulled(lambda q, k, v: attend(q, k, v, seen, scale=0.3), *wide)
    return pulled(by_kernel, q, k, v, dout), plain


@pytest.mark.slow
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_what_a_kernel_is_asked_for_is_the_plain_form(changes: dict[str, Any]) -> None:
    for ours, plain in zip(*both(case(**changes), as_documented), strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_cudnns_kernel_is_the_plain_form(changes: dict[str, Any], precision: str) -> None:
    needed = (9, 0) if "most_documents" in changes else (8, 0)
    _skip_below(needed)
    for ours, plain in zip(*both(case(**changes, precision=precision), by_cudnn), strict=True):
        # Weights and their gradients are rounded to 8 bits inside the kernel.
        assert np.abs(ours - plain).max() <= 0.03 * np.abs(plain).max()


@pytest.mark.gpu
@pytest.mark.parametrize("most_documents", [None, 3])
def test_cudnns_documents_are_apart(most_documents: int | None) -> None:
    _skip_below((8, 0) if most_documents is None else (9, 0))
    found = kernels.difference(
        case(precision="bfloat16", dim=64, value_dim=64, time=256, newest=256,
             has_documents=True, most_documents=most_documents)
    )  # fmt: skip
    assert found is None


def _skip_below(capability: tuple[int, int]) -> None:
    from mainrun.training import backend

    device = backend.attention_device()
    if device.capability is None or device.capability < capability:
        pytest.skip(f"needs an NVIDIA GPU of compute capability {capability}, not {device}")


# --- where documents lie --------------------------------------------------------------------------


def test_offsets_and_lengths_are_those_of_a_walk_along_each_row() -> None:
    rows = np.random.default_rng(0).integers(0, 2, (40, 17)).cumsum(1)
    rows[0] = 5  # one document
    most = 17
    lengths, offsets = fused.lying(jnp.asarray(rows), most)
    assert offsets.shape == (40, most + 1)
    for row, lies, begins in zip(rows, np.asarray(lengths), np.asarray(offsets), strict=True):
        expected = [i for i in range(17) if i == 0 or row[i] != row[i - 1]]
        assert [x for x in begins if x >= 0] == expected
        assert [x for x in lies if x >= 0] == np.diff([*expected, 17]).tolist()
        # A row's numbers come first: JAX takes out what is -1, whose place is therefore nothing.
        assert (begins[len(expected) :] == -1).all()
        assert (lies[len(expected) :] == -1).all()


def test_a_row_of_more_documents_than_were_promised_is_no_number_and_others_are() -> None:
    q = jnp.ones((2, 1, CONTEXT, 8))
    out = fused.attend(
        q, q, q, call=as_documented, newest=CONTEXT, segment_ids=DOCUMENTS, most_documents=2
    )
    assert np.isnan(out[0]).all()
    np.testing.assert_allclose(out[1], 1, rtol=1e-6)


def test_the_most_documents_of_a_window_are_counted_with_the_one_that_it_begins_in() -> None:
    ids = [np.full(n, 9, np.uint16) for n in (3, 1, 1, 1, 20, 2)]
    windows = batches.pack(ids, context_length=8, packing="stream", eos_id=1, pad_id=0)
    segments = batches.take(windows, np.arange(len(windows))).segment_ids
    assert batches.most_documents(windows) == max(len(set(row)) for row in segments.tolist())


# --- the choice -----------------------------------------------------------------------------------


def model(**changes: Any) -> config.Gpt:
    attention = changes.pop("attention", config.CausalAttention(num_heads=8))
    return config.Gpt(**{"attention_dropout": 0.0} | changes, attention=attention)


def chosen(
    asked: Any = "auto",
    settings: config.Network | None = None,
    precision: str = "bfloat16",
    texts: Packing = LONG,
    device: Device = HOPPER,
    check: kernels.Check = lambda case: None,
) -> Kernel:
    return kernels.choose(asked, settings or model(), precision, texts, device, check)


LATENT = config.LatentAttention(num_heads=8)
NOT_FUSED = {
    "cpu": {"device": Device("cpu")},
    "no CUDA": {"device": Device("gpu")},
    "compute capability 7.5": {"device": Device("gpu", (7, 5))},
    "float32": {"precision": "float32"},
    "dropout of attention weights": {"settings": model(attention_dropout=None)},
    "sparsek attention": {"settings": model(attention=config.SparseKAttention())},
    "sparse attention": {"settings": model(attention=config.SparseAttention())},
    "heads of 4 dimensions": {"settings": model(d_model=32)},
    "heads of 136 dimensions": {"settings": model(d_model=8 * 136)},
    "heads of 12 dimensions": {
        "settings": config.UnetGpt(attention_dropout=0.0, bottleneck_sizes=(128, 96, 128))
    },
    "documents in an odd context": {"texts": Packing(127, True)},
}


@pytest.mark.parametrize(("why", "given"), NOT_FUSED.items(), ids=NOT_FUSED.keys())
def test_what_no_kernel_can_compute_is_plain_and_refused_where_fused_is_asked(
    why: str, given: dict[str, Any]
) -> None:
    kernel = chosen(**given)
    assert (kernel.call, kernel.warning, str(kernel)) == (None, None, f"plain ({why})")
    with pytest.raises(UserError, match=re.escape(f"attention_kernel=fused cannot be had ({why})")):
        chosen("fused", **given)


FUSED = {
    "bfloat16 on Ampere": {"device": AMPERE},
    "float16": {"precision": "float16"},
    "no dropout at all": {"settings": model(dropout=0.0, attention_dropout=None)},
    "window": {
        "settings": model(attention=config.CausalAttention(window_including_self=100))
    },
    "all keys": {"settings": model(attention=config.SparseAttention(pattern=config.AllKeys()))},
    "newest": {"settings": model(attention=config.SparseAttention(pattern=config.LocalKeys()))},
    "latent": {"settings": model(position="rotary", attention=LATENT)},
    "documents": {"texts": Packing(128, True, 4)},
}  # fmt: skip


@pytest.mark.parametrize("given", FUSED.values(), ids=FUSED.keys())
def test_the_rest_is_fused_and_is_plain_where_that_is_asked(given: dict[str, Any]) -> None:
    for asked in ("auto", "fused"):
        kernel = chosen(asked, **given)
        assert (kernel.call, kernel.warning, str(kernel)) == (by_cudnn, None, "cudnn")
    assert str(chosen("plain", **given)) == "plain (as training.attention_kernel says)"


@pytest.mark.parametrize(
    ("texts", "device", "told"),
    [
        (Packing(1024, True, 12), HOPPER, 12),
        (Packing(1024, True, 12), AMPERE, None),
        (Packing(512, True, 12), HOPPER, None),
        (Packing(1024, True, 33), HOPPER, None),
        (Packing(1024, True), HOPPER, None),
        (Packing(1024, False, 12), HOPPER, None),
    ],
)
def test_few_documents_in_a_long_text_on_hopper_are_told_by_where_they_begin(
    texts: Packing, device: Device, told: int | None
) -> None:
    assert chosen(texts=texts, device=device).most_documents == told


def test_the_cases_tried_are_the_networks_own_heads() -> None:
    tried: list[Case] = []
    unet = config.UnetGpt(
        attention_dropout=0.0, bottleneck_sizes=(256, 128, 256),
        attention=config.CausalAttention(num_kv_heads=2, window_including_self=300),
    )  # fmt: skip
    chosen(settings=unet, texts=Packing(1024, True, 12), check=lambda case: tried.append(case))
    assert [(x.heads, x.kv_heads, x.dim) for x in tried] == [(8, 2, 64), (8, 2, 32), (8, 2, 16)]
    assert {(x.precision, x.has_documents, x.most_documents) for x in tried} == {
        ("bfloat16", True, 12)
    }
    assert all(x.newest < x.time for x in tried), "the window is to be seen"
    tried.clear()
    latent = model(position="rotary", attention=LATENT)
    chosen(settings=latent, check=lambda case: tried.append(case))
    assert [(x.dim, x.value_dim) for x in tried] == [(96, 64)]


def trying(call: fused.Call) -> kernels.Check:
    """The check as a GPU makes it, of another kernel: in float32, which a CPU is quick with."""
    return lambda case: kernels.difference(dataclasses.replace(case, precision="float32"), call)


@pytest.mark.parametrize(("newest", "texts"), [(None, (128, True)), (50, (128, False))])
def test_a_right_kernel_passes_its_trial(newest: int | None, texts: tuple[int, bool]) -> None:
    settings = model(d_model=64, attention=config.CausalAttention(window_including_self=newest))
    kernel = chosen(settings=settings, texts=Packing(*texts), check=trying(as_documented))
    assert (kernel.call, kernel.warning) == (by_cudnn, None)
    bfloat16 = case(precision="bfloat16", has_documents=True, time=64, newest=64)
    assert kernels.difference(bfloat16, as_documented) is None


@pytest.mark.parametrize(
    ("call", "newest", "masks_documents", "said"),
    [
        (leaking, None, True, "its output is .* of the largest number apart"),
        (windowless, 50, False, "its output is .* of the largest number apart"),
        (absent, None, False, "NotImplementedError: no such kernel"),
        (lambda q, k, v, asked: jnp.full_like(q, jnp.nan), None, False, "its output is nan%"),
    ],
)
def test_a_wrong_kernel_is_left_out_with_a_warning_and_refused_where_it_is_asked(
    call: fused.Call, newest: int | None, masks_documents: bool, said: str
) -> None:
    settings = model(d_model=64, attention=config.CausalAttention(window_including_self=newest))
    given: dict[str, Any] = {
        "settings": settings, "texts": Packing(128, masks_documents), "check": trying(call),
    }  # fmt: skip
    kernel = chosen(**given)
    assert (kernel.call, kernel.name) == (None, "plain")
    assert kernel.warning is not None
    assert re.match(f"cuDNN's attention is not used: {said}", kernel.warning)
    with pytest.raises(UserError, match=r"attention_kernel=fused cannot be had"):
        chosen("fused", **given)


def test_a_small_leak_is_found_by_its_gradient() -> None:
    def faint(q: jax.Array, k: jax.Array, v: jax.Array, asked: Asked) -> jax.Array:
        """Within every tolerance of the right one."""
        return as_documented(q, k, v, asked) + 1e-6 * leaking(q, k, v, asked)

    found = kernels.difference(case(has_documents=True), faint)
    assert found is not None
    assert re.fullmatch(r"a document has a gradient of \d.\de-\d\d to another", found)


def test_wrong_gradients_of_right_values_are_found() -> None:
    @partial(jax.custom_jvp, nondiff_argnums=(3,))
    def call(q: jax.Array, k: jax.Array, v: jax.Array, asked: Asked) -> jax.Array:
        return as_documented(q, k, v, asked)

    @call.defjvp
    def _(asked: Asked, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        function = partial(as_documented, asked=asked)
        output, tangent = jax.jvp(function, primals, (*tangents[:2], 1.1 * tangents[2]))
        return output, tangent

    assert kernels.difference(case(), as_documented) is None
    assert "its dv is" in str(kernels.difference(case(), call))


def test_a_wrong_kernel_for_evaluation_is_found() -> None:
    @partial(jax.custom_vjp, nondiff_argnums=(3,))
    def call(q: jax.Array, k: jax.Array, v: jax.Array, asked: Asked) -> jax.Array:
        return as_documented(q, k, v, asked) * 1.1

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, asked: Asked) -> Any:
        return jax.vjp(partial(as_documented, asked=asked), q, k, v)

    call.defvjp(forward, lambda asked, pull, dout: pull(dout))
    assert "its output without gradients is" in str(kernels.difference(case(), call))


def test_where_telling_documents_by_offsets_fails_the_mask_serves() -> None:
    kernel = chosen(
        texts=Packing(1024, True, 12),
        check=lambda case: None if case.most_documents is None else "no Hopper",
    )
    assert (kernel.call, kernel.most_documents) == (by_cudnn, None)
    assert kernel.warning is not None
    assert "told where documents begin, is not used: no Hopper" in kernel.warning


def test_members_side_by_side_have_no_kernel_for_documents_or_rates_of_their_own() -> None:
    one = chosen()
    assert kernels.for_members(one, masks_documents=False, own_dropout=False) == one
    for given in ((True, False), (False, True)):
        kernel = kernels.for_members(one, masks_documents=given[0], own_dropout=given[1])
        assert kernel.call is None
        assert "members" in str(kernel)


# --- dropout --------------------------------------------------------------------------------------


def features(kernel: Kernel, rate: DropoutRate | None = None, **changes: float | None) -> Any:
    settings = dataclasses.replace(variants.small(config.Gpt), **changes)
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 2))
    network = variants.network(settings).with_kernel(kernel)
    model = network.bind(variants.params(variants.small(config.Gpt)), rate)
    return np.asarray(model.read(variants.tokens(), None, keys).features)


@pytest.mark.slow
def test_attention_weights_have_a_rate_of_their_own_or_that_of_all() -> None:
    none = features(fused.PLAIN, dropout=0.0)
    own = features(fused.PLAIN, dropout=0.0, attention_dropout=0.5)
    every = features(fused.PLAIN, dropout=0.5)
    others = features(fused.PLAIN, dropout=0.5, attention_dropout=0.0)
    assert (own != none).any()
    assert (others != every).any()
    np.testing.assert_array_equal(features(fused.PLAIN, dropout=0.5, attention_dropout=0.5), every)
    # A population's rate, an input of its step, is that of all but what has its own.
    rate = DropoutRate.of(0.5)
    np.testing.assert_array_equal(features(fused.PLAIN, rate, attention_dropout=0.0), others)
    np.testing.assert_array_equal(features(fused.PLAIN, rate), every)


def test_a_kernel_is_never_asked_for_dropout_of_weights() -> None:
    for rate, changes in ((None, {"dropout": 0.5}), (DropoutRate.of(0.5), {})):
        features(Kernel("cudnn", absent), rate, **changes)
    with pytest.raises(NotImplementedError):
        features(Kernel("cudnn", absent), dropout=0.5, attention_dropout=0.0)


# --- what is lowered for CUDA ---------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX asks the GPU and cuDNN that are there; here it is told of some."""
    private = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    asked = {
        "check_cudnn_version": lambda: 91400,
        "check_compute_capability": lambda capability: float(capability) <= 9.0,
        "is_cuda_compute_capability_equal": lambda capability: capability == "9.0",
    }
    for name, answer in asked.items():
        if not hasattr(private, name):
            pytest.skip(f"this JAX has no {name} to stand for a GPU")
        monkeypatch.setattr(private, name, answer)


def lowered(function: Callable[..., Any], *arguments: Any) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


TIME = 1024
LOWERED = {
    "causal": ({}, ["CAUSAL"]),
    "window": ({"newest": 100}, ["CAUSAL", "sliding_window_length\\22: 100"]),
    "grouped": ({"kv_heads": 2}, ["CAUSAL"]),
    "latent": ({"dim": 96}, ["CAUSAL"]),
    "documents by mask": ({"has_documents": True}, ["CAUSAL", "fmhaScaleBiasSoftmax"]),
    "documents by offsets": (
        {"has_documents": True, "most_documents": 5},
        ["PADDING_CAUSAL", "max_seg_per_batch\\22: 5"],
    ),
    "window, documents by offsets": (
        {"has_documents": True, "most_documents": 5, "newest": 100},
        ["PADDING_CAUSAL", "sliding_window_length\\22: 100"],
    ),
}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("changes", "said"), LOWERED.values(), ids=LOWERED.keys())
def test_cudnns_kernels_are_called_with_no_score_in_memory(
    changes: dict[str, Any], said: list[str]
) -> None:
    given = case(**{"dim": 64, "value_dim": 64, "time": TIME, "newest": TIME} | changes)

    def summed(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        output = fused.attend(
            q, k, v, call=by_cudnn, newest=given.newest,
            segment_ids=segments if given.has_documents else None,
            most_documents=given.most_documents,
        )  # fmt: skip
        return output.astype(jnp.float32).sum()

    q, k, v = (
        jax.ShapeDtypeStruct((2, heads, TIME, dim), jnp.bfloat16)
        for heads, dim in (
            (given.heads, given.dim), (given.kv_heads, given.dim), (given.kv_heads, given.value_dim)
        )
    )  # fmt: skip
    ids = jax.ShapeDtypeStruct((2, TIME), jnp.int32)
    text = lowered(jax.grad(summed, (0, 1, 2)), q, k, v, ids)
    calls = re.findall(r"__cudnn\$fmha\w+", text)
    assert len(calls) == 2
    assert calls[1] == calls[0] + "Backward"
    for part in said:
        assert part in text
    pairs = set(re.findall(rf"tensor<([\dx]*{TIME}x{TIME})x(?:bf16|f32|i1)>", text))
    if "fmhaScaleBias" in text:
        assert f"2x4x{TIME}x{TIME}" not in pairs, "one mask serves all heads"
    else:
        assert not pairs


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("masks_documents", [False, True])
def test_a_whole_network_is_lowered_with_its_kernel(masks_documents: bool) -> None:
    settings = model(d_model=64, num_layers=2, attention=config.CausalAttention(num_heads=2))
    kernel = Kernel("cudnn", by_cudnn, most_documents=5 if masks_documents else None)
    network = Network(
        settings, vocab_size=VOCAB, context_length=TIME, precision="bfloat16", kernel=kernel
    )
    params = jax.eval_shape(lambda: network.init(jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((2, TIME), jnp.int32)
    keys = jax.ShapeDtypeStruct((2, 2), jnp.uint32)  # dropout everywhere else

    def loss(params: dict, ids: jax.Array, segments: jax.Array, keys: jax.Array) -> jax.Array:
        read = network.bind(params).read(ids, segments if masks_documents else None, keys)
        return read.features.astype(jnp.float32).sum()

    text = lowered(jax.grad(loss), params, ids, ids, keys)
    assert text.count("@__cudnn$fmhaSoftmax(") == text.count("@__cudnn$fmhaSoftmaxBackward(") == 2
    assert not re.search(rf"tensor<[\dx]*{TIME}x{TIME}x(?:bf16|f32|i1)>", text)


@pytest.mark.usefixtures("hopper")
def test_members_side_by_side_call_one_kernel_for_all() -> None:
    q = jax.ShapeDtypeStruct((3, 2, 4, TIME, 64), jnp.bfloat16)

    def summed(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return fused.attend(q, k, v, call=by_cudnn, newest=TIME).astype(jnp.float32).sum()

    text = lowered(jax.vmap(jax.grad(summed, (0, 1, 2))), q, q, q)
    assert len(re.findall(r"__cudnn\$fmha\w+", text)) == 2
    assert "tensor<6x1024x4x64xbf16>" in text


def test_newest_keys_are_what_the_mask_of_the_kind_lets_a_query_see() -> None:
    for label, attention in variants.attentions().items():
        newest = fused.newest_keys(attention, CONTEXT)
        if newest is None:
            continue
        places = jnp.arange(CONTEXT)
        grid = masks.grid(masks.of_attention(attention), places, places, 4)
        expected = (places <= places[:, None]) & (places > places[:, None] - newest)
        np.testing.assert_array_equal(grid, np.broadcast_to(expected, grid.shape), err_msg=label)
