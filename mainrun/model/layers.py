"""The layers every architecture is built of: linear, embedding, layer norm, MLP, dropout.

Parameters are float32 `nnx.Param`; a layer computes in the dtype of its input. The functions
below the modules hold what was measured to matter for speed; the plain forms stand in the tests.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt32

from mainrun import config

DropoutKeys = UInt32[Array, "batch 2"]
"""One random key per example. Masks then do not depend on how a batch is cut into micro-batches."""

_INIT = nnx.initializers.normal(0.02)


class Linear(nnx.Module):
    """x @ kernel + bias."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(_INIT(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: Float[Array, "batch time inputs"]) -> Float[Array, "batch time outputs"]:
        rows = x.reshape(-1, x.shape[-1])
        return linear(rows, self.kernel[...], self.bias[...]).reshape(*x.shape[:-1], -1)


class Embedding(nnx.Module):
    """One row of `width` numbers per id."""

    def __init__(self, size: int, width: int, *, zeros: bool = False, rngs: nnx.Rngs) -> None:
        shape = (size, width)
        self.embedding = nnx.Param(
            jnp.zeros(shape) if zeros else _INIT(rngs.params(), shape, jnp.float32)
        )


class LayerNorm(nnx.Module):
    """Ba et al. 2016 (arXiv:1607.06450), statistics in float32, epsilon 1e-5."""

    def __init__(self, width: int) -> None:
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(variance + 1e-5)
        return (normal * self.scale[...] + self.bias[...]).astype(x.dtype)


class Mlp(nnx.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, settings: config.Mlp, width: int, *, rngs: nnx.Rngs) -> None:
        self.up = Linear(width, settings.hidden, rngs=rngs)
        self.down = Linear(settings.hidden, width, rngs=rngs)

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


@jax.custom_vjp
def linear(
    x: Float[Array, "rows inputs"],
    kernel: Float[Array, "inputs outputs"],
    bias: Float[Array, " outputs"],
) -> Float[Array, "rows outputs"]:
    """x @ kernel + bias in the dtype of x; the gradients of kernel and bias are float32."""
    return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


def _linear_forward(x: Array, kernel: Array, bias: Array) -> tuple[Array, tuple[Array, Array]]:
    return linear(x, kernel, bias), (x, kernel)


def _linear_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array, Array]:
    # Without the barrier XLA:CPU fuses the norm's and dropout's backward into transposed copies
    # that feed this product: a third of the step (SPEED 3.2).
    x, kernel = saved
    x, dy = jax.lax.optimization_barrier((x, dy))
    dkernel = jnp.matmul(x.T, dy, preferred_element_type=jnp.float32)
    return dy @ kernel.astype(dy.dtype).T, dkernel, dy.astype(jnp.float32).sum(0)


linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def unembed(
    x: Float[Array, "rows width"], embedding: Float[Array, "vocab width"]
) -> Float[Array, "rows vocab"]:
    """Logits, float32: x @ embedding.T."""
    return jnp.matmul(x, embedding.astype(x.dtype).T, preferred_element_type=jnp.float32)


def _unembed_forward(x: Array, embedding: Array) -> tuple[Array, tuple[Array, Array]]:
    return unembed(x, embedding), (x, embedding)


def _unembed_backward(saved: tuple[Array, Array], dlogits: Array) -> tuple[Array, Array]:
    x, embedding = saved
    x, dlogits = jax.lax.optimization_barrier((x, dlogits.astype(x.dtype)))
    dembedding = jnp.matmul(dlogits.T, x, preferred_element_type=jnp.float32)
    return dlogits @ embedding.astype(x.dtype), dembedding


unembed.defvjp(_unembed_forward, _unembed_backward)


def dropout(
    x: Float[Array, "batch *rest"], keys: DropoutKeys | None, site: int, rate: float
) -> Float[Array, "batch *rest"]:
    """x with a fraction `rate` of its numbers zeroed and the rest scaled up; no keys: x itself.

    `site` numbers the places within one use of the keys, so that no two share a mask. The mask is
    a hash of (key, site, index) and is computed again in the backward pass: nothing is stored,
    and it costs what no dropout costs, where threefry's took 8 % of the step (SPEED 3.3).
    """
    return x if keys is None or rate == 0 else _dropout(x, fold(keys, site), rate)


def fold(keys: DropoutKeys, number: int) -> DropoutKeys:
    """Keys of their own for the part of the network that has this number."""
    salt = jnp.array([2 * number + 1, 2 * number + 2], jnp.uint32) * jnp.uint32(0x9E3779B1)
    return _scramble(keys + salt)


def _dropout_value(x: Array, keys: Array, rate: float) -> Array:
    per_example = x.shape[1:]
    index = jax.lax.iota(jnp.uint32, max(1, _product(per_example))).reshape(1, *per_example)
    key, second = (keys[:, i].reshape(-1, *[1] * len(per_example)) for i in (0, 1))
    bits = _scramble(((index + key) * jnp.uint32(0x9E3779B1)) ^ second)
    keep = bits >= jnp.uint32(int(rate * 2**32))
    return jnp.where(keep, x * (1 / (1 - rate)), 0).astype(x.dtype)


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


def _dropout_forward(x: Array, keys: Array, rate: float) -> tuple[Array, Array]:
    return _dropout_value(x, keys, rate), keys


def _dropout_backward(rate: float, keys: Array, dy: Array) -> tuple[Array, None]:
    return _dropout_value(dy, keys, rate), None


_dropout = jax.custom_vjp(_dropout_value, nondiff_argnums=(2,))
_dropout.defvjp(_dropout_forward, _dropout_backward)
