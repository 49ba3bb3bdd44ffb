"""Low-rank adapters on the linear layers of a network: where they are put, split off and merged.

Hu et al. 2021 (arXiv:2106.09685). An adapter's parameters stand beside its layer's under
`<layer>.adapter.down` and `.up`; without them the names are those of the network without adapters.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from mainrun import config
from mainrun.errors import UserError
from mainrun.model.layers import Adapter, Linear

_SITE = 100  # dropout sites of adapters begin here, above those of a block

Params = dict[str, jax.Array]
Leaf = TypeVar("Leaf")


def attach(model: nnx.Module, settings: config.Lora, *, rngs: nnx.Rngs) -> None:
    """Gives every linear layer that a target names an adapter.

    A target is `all` or a part of a layer's dotted name: `attention`, `mlp`, `qkv`, `blocks.0`.
    Raises UserError for a target that names none.
    """
    layers = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    }
    for target in settings.targets:
        if not any(_names(target, name) for name in layers):
            words = {word for name in layers for word in name.split(".") if not word.isdigit()}
            raise UserError(
                f"model.lora.targets={target} names no linear layer of this model; accepted are "
                f"all, {', '.join(sorted(words))}, and dotted names such as {next(iter(layers))}"
            )
    chosen = {n: m for n, m in layers.items() if any(_names(t, n) for t in settings.targets)}
    for number, layer in enumerate(chosen.values()):
        inputs, outputs = layer.kernel[...].shape
        adapter = Adapter(settings, inputs, outputs, _SITE + number, rngs=rngs)
        layer.adapter = nnx.data(adapter)  # said, because None, which stands there, is static


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".adapter." in name


def split(params: Mapping[str, Leaf]) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """The adapters' parameters, and the others: arrays, or their shapes."""
    adapters = {name: array for name, array in params.items() if is_adapter(name)}
    return adapters, {name: array for name, array in params.items() if not is_adapter(name)}


def merged(params: Mapping[str, jax.Array], settings: config.Lora) -> Params:
    """The parameters of the plain network that computes the same."""
    adapters, plain = split(params)
    for name, down in adapters.items():
        layer, _, part = name.rpartition(".adapter.")
        if part == "down":
            # In full precision, which a GPU's own choice for a product (TF32) is not: this stays.
            product = jnp.matmul(down, adapters[f"{layer}.adapter.up"], precision="highest")
            plain[f"{layer}.kernel"] += settings.alpha / settings.rank * product
    return plain


def _names(target: str, layer: str) -> bool:
    """Whether the target's words stand whole in the layer's dotted name."""
    return target == "all" or re.search(rf"(^|\.){re.escape(target)}(\.|$)", layer) is not None
