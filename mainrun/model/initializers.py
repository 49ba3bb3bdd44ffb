"""How weights begin. Biases begin at zero, norms at one; what differs says so where it stands."""

from dataclasses import dataclass
from typing import Literal, assert_never

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mainrun import config


@dataclass(frozen=True)
class Initializer:
    """Draws weights of any shape whose last two axes are inputs and outputs."""

    kind: Literal["normal", "xavier", "kaiming", "uniform"]
    d_model: int
    factor: float = 1.0

    @classmethod
    def of(cls, settings: config.Network) -> "Initializer":
        return cls(settings.init, settings.d_model)

    def scaled(self, factor: float) -> "Initializer":
        """The same, its numbers times `factor`."""
        return Initializer(self.kind, self.d_model, self.factor * factor)

    def __call__(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
        return self._drawn(key, shape, fan_in=shape[-2], fan_out=shape[-1])

    def embedding(
        self, key: Key[Array, ""], size: int, width: int
    ) -> Float[Array, "{size} {width}"]:
        """A table with a row for each id. Its fans are those of the head that it is tied to."""
        return self._drawn(key, (size, width), fan_in=width, fan_out=size)

    def _drawn(self, key: Array, shape: tuple[int, ...], fan_in: int, fan_out: int) -> Array:
        match self.kind:
            case "normal":  # Radford et al. 2019
                return self.factor * 0.02 * jax.random.normal(key, shape)
            case "xavier":  # Glorot & Bengio 2010, the normal form
                return self.factor * (2 / (fan_in + fan_out)) ** 0.5 * jax.random.normal(key, shape)
            case "kaiming":  # He et al. 2015 (arXiv:1502.01852), for ReLU
                return self.factor * (2 / fan_in) ** 0.5 * jax.random.normal(key, shape)
            case "uniform":
                limit = self.factor * self.d_model**-0.5
                return jax.random.uniform(key, shape, jnp.float32, -limit, limit)
            case _:
                assert_never(self.kind)
