"""Small models of every kind, found by walking the settings: a new variant joins by existing.

`kinds` are as few models as hold every kind of attention, MLP and architecture. `attentions`,
`mlps` and `networks` give each class of a union at a small size, and each of its options in turn;
an option whose values cannot be told from its type needs a line in `OTHERS`.
"""

import dataclasses
import itertools
import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, Union

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mainrun import config
from mainrun.model.gpt import Network, Params

VOCAB, CONTEXT, WIDTH = 50, 24, 16

# What makes a default small.
SMALL: dict[str, Any] = {
    "d_model": WIDTH, "num_layers": 2, "bottleneck_sizes": (16, 8, 16), "dropout": 0.0,
    "hidden": 24, "num_heads": 4, "kv_rank": 8, "rotary_dim": 4, "stride": 8, "num_selected": 3,
    "position": "rotary",
}  # fmt: skip

# The other value of each option that is neither a choice, a switch nor a union.
OTHERS: dict[str, Any] = {
    "num_kv_heads": 1, "intermediate_dim": 32, "head_dim": 6, "query_rank": 6, "block_size": 2,
    "num_verts": 2, "vertsize": 2, "num_experts": 6, "top_k": 1, "layer_scale": 0.3,
    "logit_softcap": 2.0, "rotary_base": 10.0, "norm_eps": 0.5, "hidden": 20, "num_heads": 2,
    "kv_rank": 6, "rotary_dim": 2, "stride": 4, "num_selected": 5, "position_slope": 0.5,
    "d_model": 8, "num_layers": 3, "bottleneck_sizes": (8, 16, 8),
}  # fmt: skip
WINDOW = {"sparsek": (4, 6), "local": (8, 4), "causal": (None, 5)}

# Options that change no output of a network with given parameters, each with its reason.
SILENT = {
    "kind": "chosen by the class",
    "dropout": "off in evaluation; see test_dropout_is_on_in_training",
    "attention_dropout": "off in evaluation; see test_kernels",
    "lora": "begins as no difference; see test_lora",
    "init": "another beginning; see test_initializers",
    "scale_residual_init": "another beginning; see test_initializers",
    "balance_coefficient": "weighs a loss; see test_step",
    "expansion": "says `hidden` in other words; see test_overrides",
    "pad_vocab_to_multiple_of": "adds rows that nothing reads; see test_gpt",
}


def attentions() -> dict[str, Any]:
    return _all(config.Attention)


def mlps() -> dict[str, Any]:
    return _all(config.Mlp)


def networks() -> dict[str, config.Network]:
    """A model for each attention, MLP and option; of a second architecture, what it may change."""
    found: dict[str, config.Network] = {}
    known: set[str] = set()
    for architecture in _classes(config.Model):
        base = small(architecture)
        name = base.kind
        found[name] = base
        for label, attention in attentions().items():
            if not known or label == attention.kind:
                found[f"{name}-{label}"] = _with_attention(base, attention)
        for label, mlp in mlps().items():
            if not known or label == mlp.kind:
                found[f"{name}-{label}"] = dataclasses.replace(base, mlp=mlp)
        for option, changed in options(base):
            if option not in {"attention", "mlp", *SILENT, *known - {"norm_position"}}:
                found[f"{name}-{option}={getattr(changed, option)}"] = changed
        known |= {field.name for field in dataclasses.fields(architecture)}
    return found


def kinds() -> dict[str, config.Network]:
    """Every kind of attention and pattern, of MLP and of architecture; each pair of them once."""
    found: dict[str, config.Network] = {}
    mlp = itertools.cycle((label, each) for label, each in mlps().items() if is_kind(label))
    for label, attention in attentions().items():
        if is_kind(label):
            name, dense = next(mlp)
            base = dataclasses.replace(small(config.Gpt), mlp=dense)
            found[f"gpt-{label}-{name}"] = _with_attention(base, attention)
    others = [cls for cls in _classes(config.Model) if cls is not config.Gpt]
    return found | {_kind(cls): small(cls) for cls in others}


def is_kind(label: str) -> bool:
    """Whether a label of `attentions` or `mlps` is a kind, or a pattern of one; not an option."""
    return "=" not in label and label.count("-") < 2 and label != "sparse"  # its default pattern's


def _with_attention(base: config.Network, attention: Any) -> config.Network:
    return dataclasses.replace(base, attention=attention)


def small(cls: type, **changes: Any) -> Any:
    """The default of a class of settings, small."""
    names = {field.name for field in dataclasses.fields(cls)}
    values = {name: value for name, value in SMALL.items() if name in names}
    if "window_including_self" in names:
        values["window_including_self"] = WINDOW[_kind(cls)][0]
    if "attention" in names:
        values["attention"] = small(config.CausalAttention)
        values["mlp"] = small(config.DenseMlp)
    if "pattern" in names:
        values["pattern"] = small(config.FixedKeys)
    return cls(**values | changes)


def options(base: Any) -> Iterator[tuple[str, Any]]:
    """Each option of these settings with another value, the rest unchanged."""
    hints = typing.get_type_hints(type(base), include_extras=True)
    for field in dataclasses.fields(base):
        for value in _other_values(field.name, hints[field.name], base):
            yield field.name, dataclasses.replace(base, **{field.name: value})


@cache
def network(settings: config.Network, precision: str = "float32") -> Network:
    return Network(settings, vocab_size=VOCAB, context_length=CONTEXT, precision=precision)


@cache
def params(settings: config.Network) -> Params:
    """Random, and not near their beginning, so that every part has a say."""
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: network(settings).init(jax.random.key(0)))
    return {
        name: jnp.asarray(name.endswith("scale") + 0.3 * draw.normal(size=leaf.shape), leaf.dtype)
        for name, leaf in sorted(shapes.items())
    }


def rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


def tokens(batch: int = 2, time: int = CONTEXT, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, time), 0, VOCAB)


def _all(union: Any) -> dict[str, Any]:
    """Each class of the union, each kind of a class of several, each option in turn."""
    found: dict[str, Any] = {}
    for cls in _classes(union):
        base = small(cls)
        found[base.kind] = base
        for option, changed in options(base):
            if option == "kind":
                found[changed.kind] = changed
            elif option == "pattern":
                found[f"{base.kind}-{changed.pattern.kind}"] = changed
                if changed.pattern.kind != "all":
                    blocks = dataclasses.replace(changed, block_size=2)
                    found[f"{base.kind}-{changed.pattern.kind}-blocks"] = blocks
                for inner, pattern in options(changed.pattern):
                    if inner != "kind":
                        label = f"{base.kind}-{pattern.kind}-{inner}"
                        found[label] = dataclasses.replace(changed, pattern=pattern)
            else:
                value = getattr(changed, option)
                found[f"{base.kind}-{option}={value}"] = changed
    return found


def _other_values(name: str, hint: Any, base: Any) -> list[Any]:
    inner = _without_none(hint)
    now = getattr(base, name)
    if name == "kind":
        return [kind for kind in _literals(inner) if kind != now]
    if name in ("attention", "mlp", "lora"):
        return []
    if name == "window_including_self":
        return [WINDOW[base.kind][1]]
    if classes := _classes(inner):
        return [small(cls) for cls in classes]
    if literals := _literals(inner):
        return [value for value in literals if value != now]
    if inner is bool:
        return [not now]
    if name in OTHERS:
        return [OTHERS[name]]
    assert name in SILENT, f"give tests/variants.py another value for the option {name}"
    return []


def _classes(hint: Any) -> list[type]:
    if typing.get_origin(hint) in (Annotated, Union, types.UnionType):
        return [cls for arg in typing.get_args(hint) for cls in _classes(arg)]
    return [hint] if isinstance(hint, type) and dataclasses.is_dataclass(hint) else []


def _literals(hint: Any) -> list[Any]:
    return list(typing.get_args(hint)) if typing.get_origin(hint) is Literal else []


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (Union, types.UnionType):
        rest = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return rest[0] if len(rest) == 1 else hint
    return hint


def _kind(cls: type) -> str:
    default = next(field.default for field in dataclasses.fields(cls) if field.name == "kind")
    assert isinstance(default, str)
    return default
