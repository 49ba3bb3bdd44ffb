"""Where a token stands, told to the network without parameters: sinusoids and rotations."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sinusoids(positions: Int[Array, " time"], width: int) -> Float[Array, "time {width}"]:
    """Sines in the even dimensions, cosines in the odd. Vaswani et al. 2017, section 3.5."""
    angles = _angles(positions, (width + 1) // 2, width, 10_000.0)
    both = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return both.reshape(len(positions), -1)[:, :width]


def rotate(
    x: Float[Array, "batch heads time dim"], positions: Int[Array, " time"], base: float
) -> Float[Array, "batch heads time dim"]:
    """x with each pair of dimensions turned by an angle that grows with the position.

    Pairs are (i, i + dim/2), as Llama of Hugging Face has them, not neighbours as in the paper: Su
    et al. 2021 (arXiv:2104.09864), eq. 34. Angles and products are float32.
    """
    half = x.shape[-1] // 2
    angles = _angles(positions, half, x.shape[-1], base)
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _angles(positions: Array, count: int, width: int, base: float) -> Array:
    frequency = base ** (-2.0 * jnp.arange(count, dtype=jnp.float32) / width)
    return positions[:, None].astype(jnp.float32) * frequency
