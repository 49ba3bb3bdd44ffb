"""The layers every architecture is built of: linear, embedding, norms, MLP, dropout.

Parameters are float32 `nnx.Param`; a layer computes in the dtype of its input. The functions
below the modules hold what was measured to matter for speed; the plain forms stand in the tests.
"""

from typing import NamedTuple, assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt32

from mainrun import config
from mainrun.model.initializers import Initializer

DropoutKeys = UInt32[Array, "batch 2"]
"""One random key per example. Masks then do not depend on how a batch is cut into micro-batches."""


class Linear(nnx.Module):
    """x @ kernel + bias, and what an adapter adds (see `lora`)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        init: Initializer,
        bias: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.adapter: Adapter | None = None

    def __call__(
        self, x: Float[Array, "batch time inputs"], keys: DropoutKeys | None = None
    ) -> Float[Array, "batch time outputs"]:
        rows = x.reshape(-1, x.shape[-1])
        bias = None if self.bias is None else self.bias[...]
        y = linear(rows, self.kernel[...], bias).reshape(*x.shape[:-1], -1)
        return y if self.adapter is None else y + self.adapter(x, keys)

    def weight(self) -> Float[Array, "inputs outputs"]:
        """The kernel, float32, with what an adapter adds to it."""
        kernel = self.kernel[...]
        return kernel if self.adapter is None else kernel + self.adapter.difference()


class Adapter(nnx.Module):
    """A low-rank difference to a linear layer: x @ down @ up · alpha / rank.

    `up` begins at zero, so that training begins at the base. Hu et al. 2021 (arXiv:2106.09685),
    section 4.1; their A is `down`, their B `up`.
    """

    def __init__(
        self, settings: config.Lora, inputs: int, outputs: int, site: int, *, rngs: nnx.Rngs
    ) -> None:
        draw = jax.random.normal(rngs.params(), (inputs, settings.rank))
        self.down = nnx.Param(draw * inputs**-0.5)
        self.up = nnx.Param(jnp.zeros((settings.rank, outputs)))
        self.factor = settings.alpha / settings.rank
        self.rate, self.site = settings.dropout, site

    def __call__(
        self, x: Float[Array, "batch time inputs"], keys: DropoutKeys | None
    ) -> Float[Array, "batch time outputs"]:
        x = dropout(x, keys, self.site, self.rate)
        rows = x.reshape(-1, x.shape[-1])
        y = linear(linear(rows, self.down[...], None), self.up[...], None)
        return (y * self.factor).reshape(*x.shape[:-1], -1)

    def difference(self) -> Float[Array, "inputs outputs"]:
        """What merging adds to the kernel."""
        return self.factor * (self.down[...] @ self.up[...])


class Embedding(nnx.Module):
    """One row of `width` numbers per id."""

    def __init__(self, size: int, width: int, *, init: Initializer | None, rngs: nnx.Rngs) -> None:
        """Without an initializer, zeros."""
        self.embedding = nnx.Param(
            init.embedding(rngs.params(), size, width) if init else jnp.zeros((size, width))
        )


class LayerNorm(nnx.Module):
    """Ba et al. 2016 (arXiv:1607.06450), statistics in float32."""

    def __init__(self, width: int, *, eps: float, bias: bool) -> None:
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width)) if bias else None
        self.eps = eps

    def __call__(self, x: Float[Array, "*any width"]) -> Float[Array, "*any width"]:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps) * self.scale[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


class RmsNorm(nnx.Module):
    """Zhang & Sennrich 2019 (arXiv:1910.07467), statistics in float32."""

    def __init__(self, width: int, *, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: Float[Array, "*any width"]) -> Float[Array, "*any width"]:
        wide = x.astype(jnp.float32)
        variance = jnp.square(wide).mean(-1, keepdims=True)
        return (wide * jax.lax.rsqrt(variance + self.eps) * self.scale[...]).astype(x.dtype)


def norm(settings: config.Network, width: int) -> LayerNorm | RmsNorm:
    """The norm that these settings name, fresh."""
    match settings.norm:
        case "layernorm":
            return LayerNorm(width, eps=settings.norm_eps, bias=settings.bias)
        case "rmsnorm":
            return RmsNorm(width, eps=settings.norm_eps)
        case _:
            assert_never(settings.norm)


class Mlp(nnx.Module):
    """Two linear layers with an activation between them. SwiGLU's `up` is gate | up in columns."""

    def __init__(
        self,
        settings: config.DenseMlp,
        width: int,
        *,
        init: Initializer,
        out_init: Initializer,
        bias: bool,
        rngs: nnx.Rngs,
    ) -> None:
        self.kind = settings.kind
        hidden = settings.hidden_in(width)
        wide = 2 * hidden if self.kind == "swiglu" else hidden
        self.up = Linear(width, wide, init=init, bias=bias, rngs=rngs)
        self.down = Linear(hidden, width, init=out_init, bias=bias, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch time width"], keys: DropoutKeys | None = None
    ) -> Float[Array, "batch time width"]:
        return self.down(activate(self.kind, self.up(x, keys)), keys)


def activate(kind: config.Activation, x: Float[Array, "*any wide"]) -> Float[Array, "*any hidden"]:
    """The activation of what `up` gives; SwiGLU joins its two halves."""
    match kind:
        case "gelu":  # exact, Hendrycks & Gimpel 2016 (arXiv:1606.08415)
            return jax.nn.gelu(x, approximate=False)
        case "relu":
            return jax.nn.relu(x)
        case "relu2":  # So et al. 2021 (arXiv:2109.08668)
            return jnp.square(jax.nn.relu(x))
        case "swiglu":  # Shazeer 2020 (arXiv:2002.05202)
            gate, up = jnp.split(x, 2, axis=-1)
            return jax.nn.silu(gate) * up
        case _:
            assert_never(kind)


@jax.custom_vjp
def linear(
    x: Float[Array, "rows inputs"],
    kernel: Float[Array, "inputs outputs"],
    bias: Float[Array, " outputs"] | None,
) -> Float[Array, "rows outputs"]:
    """x @ kernel + bias in the dtype of x; the gradients of kernel and bias are float32."""
    y = x @ kernel.astype(x.dtype)
    return y if bias is None else y + bias.astype(x.dtype)


def _linear_forward(x: Array, kernel: Array, bias: Array | None) -> tuple[Array, tuple]:
    return linear(x, kernel, bias), (x, kernel, bias)


def _linear_backward(saved: tuple, dy: Array) -> tuple[Array, Array, Array | None]:
    # Without the barrier XLA:CPU fuses the norm's and dropout's backward into transposed copies
    # that feed this product: a third of the step (SPEED 3.2).
    x, kernel, bias = saved
    x, dy = jax.lax.optimization_barrier((x, dy))
    dkernel = jnp.matmul(x.T, dy, preferred_element_type=jnp.float32)
    dbias = None if bias is None else dy.astype(jnp.float32).sum(0)
    return dy @ kernel.astype(dy.dtype).T, dkernel, dbias


linear.defvjp(_linear_forward, _linear_backward)


class DropoutRate(NamedTuple):
    """A rate as the mask needs it: arrays, so that a rate may be a value of a compiled step."""

    threshold: UInt32[Array, ""]  # of 32 random bits, below which a number is zeroed
    scale: Float[Array, ""]  # of the numbers that stay

    @classmethod
    def of(cls, rate: float) -> "DropoutRate":
        return cls(jnp.uint32(int(rate * 2**32)), jnp.float32(1 / (1 - rate)))


def dropout(
    x: Float[Array, "batch *rest"],
    keys: DropoutKeys | None,
    site: int,
    rate: float | DropoutRate,
) -> Float[Array, "batch *rest"]:
    """x with a fraction `rate` of its numbers zeroed and the rest scaled up; no keys: x itself.

    `site` numbers the places within one use of the keys, so that no two share a mask. The mask is
    a hash of (key, site, index) and is computed again in the backward pass: nothing is stored,
    and it costs what no dropout costs, where threefry's took 8 % of the step (SPEED 3.3).
    """
    if keys is None or rate == 0:
        return x
    known = rate if isinstance(rate, DropoutRate) else DropoutRate.of(rate)
    return _dropout(x, fold(keys, site), known)


def fold(keys: DropoutKeys, number: int) -> DropoutKeys:
    """Keys of their own for the part of the network that has this number."""
    salt = jnp.array([2 * number + 1, 2 * number + 2], jnp.uint32) * jnp.uint32(0x9E3779B1)
    return _scramble(keys + salt)


@jax.custom_vjp
def _dropout(x: Array, keys: Array, rate: DropoutRate) -> Array:
    per_example = x.shape[1:]
    index = jax.lax.iota(jnp.uint32, max(1, _product(per_example))).reshape(1, *per_example)
    key, second = (keys[:, i].reshape(-1, *[1] * len(per_example)) for i in (0, 1))
    bits = _scramble(((index + key) * jnp.uint32(0x9E3779B1)) ^ second)
    return jnp.where(bits >= rate.threshold, x * rate.scale.astype(x.dtype), 0).astype(x.dtype)


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _scramble(bits: UInt32[Array, "*any"]) -> UInt32[Array, "*any"]:
    """The finaliser of MurmurHash3 (Appleby): every bit in moves half the bits out."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def _dropout_forward(
    x: Array, keys: Array, rate: DropoutRate
) -> tuple[Array, tuple[Array, DropoutRate]]:
    return _dropout(x, keys, rate), (keys, rate)


def _dropout_backward(saved: tuple[Array, DropoutRate], dy: Array) -> tuple[Array, None, None]:
    keys, rate = saved
    return _dropout(dy, keys, rate), None, None


_dropout.defvjp(_dropout_forward, _dropout_backward)
