"""Exported folders as Hugging Face `transformers` sees them: same logits, gradients, token ids.

The weights are random and made here; the folders are what `mainrun export` writes. transformers
runs in PyTorch's interpreter, once for all (`tests/transformers_models.py`). Both sides are
float32: logits of size 5 come out within 1e-5 of each other, gradients within 4e-6 of their size.
"""

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiktoken
from pydantic import ValidationError
from tokenizers import Tokenizer

from benchmarks import pytorch
from mainrun import config, export
from mainrun.config import Config
from mainrun.data import tiktoken_encoding, tokenizers
from mainrun.errors import UserError
from mainrun.export import hugging_face
from mainrun.export.architectures import architecture
from mainrun.model.gpt import Network, Params
from mainrun.trained import Trained
from tests import variants

SCRIPT = Path(__file__).parent / "transformers_models.py"


def _missing() -> str:
    """Why nothing can be compared here; empty where it can."""
    python = pytorch.interpreter()
    if python is None:
        return pytorch.MISSING
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('transformers') is None)"
    has_none = subprocess.run([python, "-c", probe], check=False).returncode != 0
    return "no transformers beside PyTorch: `task oracle` installs it" if has_none else ""


MISSING = _missing()
pytestmark = pytest.mark.skipif(MISSING != "", reason=MISSING)

TIME, BATCH = variants.CONTEXT, 3
TEXTS = ["A parser explains", "tiny", "Every kernel breaks its editor in 1987 €", "two  <eos>s"]


def _tiktoken() -> Tokenizer:
    """Of an encoding made here, with bytes and two merges: <eos> is not its second id."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"in": 256, b" p": 257}
    encoding = tiktoken.Encoding(
        "tiny",
        pat_str=r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+",
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 260},
    )
    others = [tokenizers.PAD, tokenizers.UNK]
    made = tiktoken_encoding.convert(encoding, TEXTS, eos=tokenizers.EOS, others=others)
    made.add_special_tokens(tokenizers.SPECIAL)
    made.encode_special_tokens = True
    return made


TOKENIZERS = {
    "bpe": tokenizers.fit(config.Bpe(vocab_size=280), TEXTS),
    "unigram": tokenizers.fit(config.Unigram(vocab_size=280), TEXTS),
    "wordpiece": tokenizers.fit(config.WordPiece(vocab_size=530), TEXTS),
    "char": tokenizers.fit(config.Char(), TEXTS[:2]),  # the other texts have unknown characters
    "tiktoken": _tiktoken(),
}
TOKENIZER = TOKENIZERS["bpe"]

SMALL = (
    "model.d_model=16",
    "model.num_layers=2",
    "model.mlp.hidden=24",
    "model.attention.num_heads=4",
    f"data.context_length={TIME}",
)
LLAMA = (
    "model.norm=rmsnorm",
    "model.position=rotary",
    "model.bias=false",
    "model.mlp.kind=swiglu",
)
MODELS: dict[str, tuple[str, ...]] = {
    "GPT2LMHeadModel": (),
    "LlamaForCausalLM": (
        *LLAMA,
        "model.attention.num_kv_heads=2",
        "model.pad_vocab_to_multiple_of=64",  # the file has no padding
    ),
    "MistralForCausalLM": (*LLAMA, "model.attention.window_including_self=5"),
    "Qwen3ForCausalLM": (*LLAMA, "model.attention.qk_norm=true"),
    "MixtralForCausalLM": (
        *LLAMA,
        "model.attention.num_kv_heads=2",
        "model.mlp={kind: moe, hidden: 24, balance_coefficient: 0}",
    ),
    "DeepseekV3ForCausalLM": (
        *LLAMA,
        "model.attention={kind: latent, num_heads: 4, kv_rank: 8, rotary_dim: 4, query_rank: 5}",
        "model.norm_eps=1e-6",  # of another the file has a factor, and so have gradients
    ),
}
MORE = {
    "relu": ("model.mlp.kind=relu",),
    "no rank of the queries": (*MODELS["DeepseekV3ForCausalLM"], "model.attention.query_rank=null"),
    "a width that the heads do not divide": (
        *LLAMA,
        "model.d_model=18",
        "model.attention.intermediate_dim=32",
    ),
}


def _run(*overrides: str) -> Config:
    return config.load(None, [*SMALL, *overrides])


def _runs() -> dict[str, Config]:
    named = {name: _run(*overrides) for name, overrides in (MODELS | MORE).items()}
    changed = {f"{name}, all else changed": _all_changed(named[name]) for name in MODELS}
    return named | changed


def _all_changed(run: Config) -> Config:
    """Every option of the model another, as long as the class that holds it stays the same.

    So an option that comes to be held without its numbers being right fails here by existing.
    """
    for path, value in _changes(run.model):
        changed = _with(run.model, path, value)
        if changed is not None and _class(changed) == _class(run.model):
            run = replace(run, model=changed)
    return run


def _changes(model: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Settings and another value for each."""
    # The options of a network are those of one whose attention goes with all of them.
    easy = replace(model, attention=variants.small(config.CausalAttention))
    for path, part in ((), easy), (("attention",), model.attention), (("mlp",), model.mlp):
        for name, changed in variants.options(part):
            yield (*path, name), getattr(changed, name)


def _with(settings: Any, path: tuple[str, ...], value: Any) -> Any:
    """The settings with the value there, or None where that cannot be."""
    name, *rest = path
    try:
        inner = _with(getattr(settings, name), tuple(rest), value) if rest else value
        return replace(settings, **{name: inner})
    except ValidationError:
        return None


def _class(model: config.Network) -> str | None:
    try:
        return architecture(model)
    except UserError:
        return None


RUNS = _runs()


def test_every_class_is_tried_and_most_options_with_it() -> None:
    assert {_class(RUNS[name].model) for name in MODELS} == set(MODELS)
    for name in MODELS:
        before, after = RUNS[name].model, RUNS[f"{name}, all else changed"].model
        assert _class(after) == name
        same = {f.name for f in fields(before) if getattr(before, f.name) == getattr(after, f.name)}
        assert same & {"num_layers", "norm_eps", "tie_embeddings", "attention", "mlp"} == set()


# ---------------------------------------------------------------------------------------------
# Both sides


class Theirs(NamedTuple):
    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    """What transformers makes of every folder that the tests below ask about."""
    folder = tmp_path_factory.mktemp("exported")
    batch = {"inputs": INPUTS.tolist(), "targets": TARGETS.tolist()}
    asked: dict[str, Any] = {"models": {}, "tokenizers": {}}
    for name, run in RUNS.items():
        export.write(_trained(run), folder / name, format="huggingface")
        asked["models"][name] = {**batch, "is_whole": name in MODELS}
    for name, tokenizer in TOKENIZERS.items():
        export.write(_trained(_run(), tokenizer), folder / name, format="huggingface")
        asked["tokenizers"][name] = TEXTS
    request, arrays, facts = (folder / name for name in ("asked.json", "out.npz", "out.json"))
    request.write_text(json.dumps(asked), encoding="utf-8")
    command = [pytorch.interpreter(), SCRIPT, folder, request, arrays, facts]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return Theirs(dict(np.load(arrays)), json.loads(facts.read_text(encoding="utf-8")))


def _trained(run: Config, tokenizer: Tokenizer = TOKENIZER) -> Trained:
    network = Network(
        run.model,
        vocab_size=tokenizer.get_vocab_size(),
        context_length=TIME,
        precision="float32",
    )
    return Trained(run, tokenizer, network, _params(network), step=7)


def _params(network: Network) -> Params:
    """Numbers so large that everything tells: at the real initial ones attention is all but
    uniform, biases are zero, and much could be swapped unseen."""
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(name.endswith(".scale") + 0.3 * rng.standard_normal(shape.shape), "f4")
        for name, shape in sorted(shapes.items())
    }


def _batch() -> tuple[np.ndarray, np.ndarray]:
    """Without <pad>, which their embeddings give no gradient; nor has any text of ours it."""
    rng = np.random.default_rng(1)
    assert tokenizers.special_id(TOKENIZER, tokenizers.PAD) == 0
    ids = rng.integers(1, TOKENIZER.get_vocab_size(), (BATCH, TIME + 1), np.int32)
    return ids[:, :-1], ids[:, 1:]


INPUTS, TARGETS = _batch()


# Compiling takes twice as long with LLVM's optimizations, and takes nearly all of the time here.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@lru_cache
def _ours(name: str) -> tuple[Trained, Callable[[Params, Any], jax.Array]]:
    """The model and its logits, of parameters and tokens."""
    found = _trained(RUNS[name])
    return found, quick(lambda params, tokens: found.network.bind(params)(tokens))


def _size(array: np.ndarray) -> float:
    return float(np.abs(array).max())


@pytest.mark.parametrize("name", RUNS)
def test_logits_equal_those_of_transformers(name: str, theirs: Theirs) -> None:
    facts = theirs.facts["models"][name]
    assert facts["class"] == _class(RUNS[name].model)
    assert facts["not as in the file"] == []
    assert facts["dtype"] == "torch.float32"
    named = [tokenizers.special_id(TOKENIZER, n) for n in (tokenizers.EOS, tokenizers.PAD)]
    assert facts["ids"] == named
    found, logits = _ours(name)
    ours = np.asarray(logits(found.params, INPUTS))
    assert _size(ours) > 1
    np.testing.assert_allclose(ours, theirs.arrays[f"{name}/logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_those_of_transformers(name: str, theirs: Theirs) -> None:
    found, _ = _ours(name)

    def loss(params: Params) -> jax.Array:
        ours = found.network.bind(params)(jnp.asarray(INPUTS))
        return optax.softmax_cross_entropy_with_integer_labels(ours, jnp.asarray(TARGETS)).mean()

    value, gradients = quick(jax.value_and_grad(loss))(found.params)
    np.testing.assert_allclose(value, theirs.arrays[f"{name}/loss"], rtol=0, atol=1e-4)
    # Where parameters stand in the file, there stand their gradients, too.
    by_name = {key: np.asarray(gradient) for key, gradient in gradients.items()}
    ours = hugging_face.tensors(RUNS[name].model, by_name, found.network.vocab_size)
    prefix = f"{name}/gradients/"
    expected = {key: array for key, array in theirs.arrays.items() if key.startswith(prefix)}
    assert {prefix + key for key in ours} == expected.keys()
    for key, gradient in ours.items():
        size = _size(expected[prefix + key])
        assert size > 1e-4, f"{key} has no gradient to compare"
        assert _size(gradient - expected[prefix + key]) < 1e-4 * size, key


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation_in_transformers_takes_our_likeliest_tokens(
    name: str, theirs: Theirs
) -> None:
    generated = np.array(theirs.facts["models"][name]["generated"], np.int32)
    assert generated.shape == INPUTS.shape
    found, logits = _ours(name)
    likeliest = np.asarray(logits(found.params, generated)).argmax(-1)
    np.testing.assert_array_equal(likeliest[:, 1:-1], generated[:, 2:])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizer_in_transformers_encodes_and_decodes_as_ours(kind: str, theirs: Theirs) -> None:
    ours, facts = TOKENIZERS[kind], theirs.facts["tokenizers"][kind]
    ids = [row.tolist() for row in tokenizers.encode(ours, TEXTS)]
    texts = [tokenizers.decode(ours, row) for row in ids]
    special = {name: tokenizers.special_id(ours, f"<{name}>") for name in ("eos", "pad", "unk")}
    assert facts["ids"] == ids
    assert facts["texts"] == texts
    # What is left out there as special is <unk> as well, which ours shows.
    assert facts["ended"] == [text.replace(tokenizers.UNK, "") for text in texts]
    assert facts["with_start"] == [[special["eos"], *row] for row in ids]
    assert facts["special"] == {**special, "bos": special["eos"]}
    assert facts["size"] == ours.get_vocab_size()
