"""The ring of a cache holds the newest positions, wherever they come to lie."""

import jax.numpy as jnp
import numpy as np

from mainrun.model import cache as caches


def values(places: range) -> jnp.ndarray:
    """[1, places, 1], each holding ten times its position."""
    return jnp.array([[[10.0 * place] for place in places]])


def held(cache: caches.Cache) -> dict[int, float]:
    """What the filled slots hold, by position."""
    filled = np.flatnonzero(caches.filled(cache))
    return {int(cache["positions"][i]): float(cache["v"][0, i, 0]) for i in filled}


def test_what_is_written_is_held_under_its_position() -> None:
    cache = caches.empty(5, v=jnp.zeros((1, 0, 1)))
    assert held(cache) == {}
    cache = caches.written(cache, jnp.arange(3), v=values(range(3)))
    assert held(cache) == {0: 0.0, 1: 10.0, 2: 20.0}


def test_a_full_ring_forgets_the_oldest() -> None:
    cache = caches.empty(3, v=jnp.zeros((1, 0, 1)))
    cache = caches.written(cache, jnp.arange(2), v=values(range(2)))
    for place in range(2, 8):
        cache = caches.written(cache, jnp.array([place]), v=values(range(place, place + 1)))
        newest = range(max(0, place - 2), place + 1)
        assert held(cache) == {p: 10.0 * p for p in newest}


def test_of_more_than_fit_the_newest_are_kept() -> None:
    cache = caches.empty(3, v=jnp.zeros((1, 0, 1)))
    cache = caches.written(cache, jnp.arange(8), v=values(range(8)))
    assert held(cache) == {5: 50.0, 6: 60.0, 7: 70.0}
