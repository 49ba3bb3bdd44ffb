"""What products pack on a CPU, by hand; what a step takes with it is measured elsewhere."""

import jax
import jax.numpy as jnp
import pytest

from mainrun.memory import compiled, scratch
from mainrun.memory.scratch import Product

MIB = 2**20


def executable(function, *shapes: tuple[int, ...]) -> jax.stages.Compiled:
    return (
        jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()
    )


def test_a_product_packs_its_operands(subtests: pytest.Subtests):
    cases = [
        ((1000, 300), (300, 700), 4 * 300 * (1000 + 700)),
        ((1000, 900), (900, 700), 4 * 512 * (1000 + 700)),  # in two slices
        ((1000, 300), (300, 9000), 4 * 300 * 1000),  # the other, block by block
        ((3, 4, 200, 64), (3, 4, 64, 500), 3 * 4 * 4 * 64 * (200 + 500)),  # a batch side by side
    ]
    for left, right, expected in cases:
        with subtests.test(left=left, right=right):
            assert scratch.packed_bytes(executable(jnp.matmul, left, right).as_text()) == expected


def test_the_two_largest_products_run_at_once():
    def three(x, small, large, larger):
        return (x @ small) @ large @ larger

    text = executable(three, (256, 128), (128, 300), (300, 400), (400, 500)).as_text()
    assert scratch.packed_bytes(text) == 4 * (300 * (256 + 400) + 400 * (256 + 500))


def test_a_product_and_its_gradients_are_counted_from_the_settings_as_from_the_module():
    gradients = jax.grad(lambda x, w: jnp.sum(jnp.matmul(x, w) ** 2), argnums=(0, 1))
    text = executable(gradients, (6, 256, 96), (6, 96, 384)).as_text()
    assert scratch.packed_for([Product(6, 256, 96, 384)]) == scratch.packed_bytes(text)


def test_the_count_of_a_step_has_it():
    made = executable(jnp.matmul, (512, 512), (512, 512))
    assert compiled.executable_bytes(made) == 3 * MIB + 4 * 512 * 1024


def test_without_products_there_is_none():
    assert scratch.packed_bytes(executable(jnp.sin, (64, 64)).as_text()) == 0
