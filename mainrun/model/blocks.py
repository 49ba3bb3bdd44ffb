"""A block: attention, then an MLP, each with a norm, a way around it and what else settings add."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mainrun import config
from mainrun.model.attention import Attended, MultiHeadAttention
from mainrun.model.cache import Cache, Span
from mainrun.model.initializers import Initializer
from mainrun.model.latent import LatentAttention
from mainrun.model.layers import DropoutKeys, Linear, Mlp, dropout, norm
from mainrun.model.moe import MoeMlp, Routing


class Passed(NamedTuple):
    """What a block gives: its output, its attention's values, its routing, what it remembers."""

    output: Float[Array, "batch time width"]
    values: Float[Array, "batch kv_heads time dim"] | None
    routing: Routing | None
    cache: Cache | None


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the norms around instead, where post.

    Where the width changes, attention changes it, and a projection does on the way around.
    """

    def __init__(
        self,
        settings: config.Network,
        inputs: int,
        outputs: int,
        *,
        is_first: bool,
        rngs: nnx.Rngs,
    ) -> None:
        self.dropout = settings.dropout
        self.is_pre = settings.norm_position == "pre"
        init = Initializer.of(settings)
        branches = 2 * (len(settings.widths) - 1)
        # Radford et al. 2019, section 2.3: the residual stream then begins no wider when deeper.
        out_init = init.scaled(branches**-0.5) if settings.scale_residual_init else init
        self.attention_norm = norm(settings, inputs if self.is_pre else outputs)
        self.attention = _attention(
            settings, inputs, outputs, is_first=is_first, out_init=out_init, rngs=rngs
        )
        self.mlp_norm = norm(settings, outputs)
        match settings.mlp:
            case config.MixtureOfExperts():
                self.mlp: Mlp | MoeMlp = MoeMlp(
                    settings.mlp, outputs, init=init, out_init=out_init, rngs=rngs
                )
            case config.DenseMlp():
                self.mlp = Mlp(
                    settings.mlp, outputs, init=init, out_init=out_init, bias=settings.bias,
                    rngs=rngs,
                )  # fmt: skip
        changes = inputs != outputs
        self.around = Linear(inputs, outputs, init=init, bias=False, rngs=rngs) if changes else None
        # Touvron et al. 2021 (arXiv:2103.17239), section 2.
        start = settings.layer_scale
        scale = None if start is None else jnp.full(outputs, start)
        self.attention_scale = None if scale is None else nnx.Param(scale)
        self.mlp_scale = None if scale is None else nnx.Param(scale + 0)

    def __call__(
        self,
        x: Float[Array, "batch time inputs"],
        span: Span,
        keys: DropoutKeys | None = None,
        first_values: Float[Array, "batch kv_heads time dim"] | None = None,
        cache: Cache | None = None,
    ) -> Passed:
        """See `MultiHeadAttention` for the cache and the first values."""
        attended = self._attended(
            self.attention_norm(x) if self.is_pre else x, span, keys, first_values, cache
        )
        x = x if self.around is None else self.around(x, keys)
        x = x + self._branch(attended.output, self.attention_scale, keys, site=1)
        x = x if self.is_pre else self.attention_norm(x)
        y, routing = self._transformed(self.mlp_norm(x) if self.is_pre else x, keys)
        x = x + self._branch(y, self.mlp_scale, keys, site=2)
        x = x if self.is_pre else self.mlp_norm(x)
        return Passed(x, attended.values, routing, attended.cache)

    def _attended(
        self,
        x: Array,
        span: Span,
        keys: DropoutKeys | None,
        first_values: Array | None,
        cache: Cache | None,
    ) -> Attended:
        if isinstance(self.attention, LatentAttention):
            return self.attention(x, span, keys, cache)
        return self.attention(x, span, keys, first_values, cache)

    def _transformed(self, x: Array, keys: DropoutKeys | None) -> tuple[Array, Routing | None]:
        if isinstance(self.mlp, MoeMlp):
            return self.mlp(x)
        return self.mlp(x, keys), None

    def _branch(
        self, y: Array, scale: nnx.Param | None, keys: DropoutKeys | None, site: int
    ) -> Array:
        y = y if scale is None else y * scale[...].astype(y.dtype)
        return dropout(y, keys, site, self.dropout)


def _attention(
    settings: config.Network,
    inputs: int,
    outputs: int,
    *,
    is_first: bool,
    out_init: Initializer,
    rngs: nnx.Rngs,
) -> MultiHeadAttention | LatentAttention:
    attention = settings.attention
    if isinstance(attention, config.LatentAttention):
        return LatentAttention(settings, attention, inputs, outputs, out_init=out_init, rngs=rngs)
    return MultiHeadAttention(
        settings, attention, inputs, outputs, is_first=is_first, out_init=out_init, rngs=rngs
    )


class Skip(nnx.Module):
    """From a block of the first half to its mirror image: x + gate · saved, the gate shut at first.

    Ronneberger et al. 2015 (arXiv:1505.04597) join the halves so; the gate, one for each channel,
    is ours, that training begins as without.
    """

    def __init__(self, saved: int, width: int, *, init: Initializer, rngs: nnx.Rngs) -> None:
        changes = saved != width
        self.project = Linear(saved, width, init=init, bias=False, rngs=rngs) if changes else None
        self.gate = nnx.Param(jnp.zeros(width))

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        saved: Float[Array, "batch time saved"],
        keys: DropoutKeys | None = None,
    ) -> Float[Array, "batch time width"]:
        saved = saved if self.project is None else self.project(saved, keys)
        return x + self.gate[...].astype(x.dtype) * saved
