"""Masks against their definitions, position by position."""

import jax.numpy as jnp
import numpy as np

from mainrun.model import masks


def test_causal_sees_itself_and_the_past() -> None:
    expected = [[key <= query for key in range(5)] for query in range(5)]
    np.testing.assert_array_equal(masks.causal(5)[0, 0], expected)


def test_same_document_sees_its_own_segment_in_its_own_row() -> None:
    segments = np.array([[0, 0, 1, 1, 2], [3, 3, 3, 4, 4]])
    expected = [[[row[q] == row[k] for k in range(5)] for q in range(5)] for row in segments]
    np.testing.assert_array_equal(masks.same_document(jnp.asarray(segments))[:, 0], expected)
