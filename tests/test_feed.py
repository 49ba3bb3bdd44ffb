"""Batches on the device are those that the host would have made, whichever way they come."""

import itertools
from functools import partial

import jax
import numpy as np
import pytest

from mainrun.data import batches
from mainrun.training.feed import Feed, Resident, Sent, table_bytes

BATCH, MOST = 3, 4


def windows(packing: str = "documents") -> batches.Windows:
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 60, n).astype(np.uint16) for n in rng.integers(1, 14, 60)]
    return batches.pack(documents, context_length=10, packing=packing, eos_id=1, pad_id=0)


def some(kind: str, text: batches.Windows, order: str) -> Feed:
    settings = {"batch_size": BATCH, "order": order, "seed": 5}
    if kind == "resident":
        return Resident(text, partial(batches.rows, text, **settings), MOST)
    return Sent(partial(batches.batch, text, **settings), MOST)


def test_each_step_of_a_dispatch_reads_its_own_batch(subtests: pytest.Subtests) -> None:
    for packing, order, kind in itertools.product(
        ["stream", "documents"], ["sequential", "shuffled"], ["resident", "sent"]
    ):
        with subtests.test(packing=packing, order=order, kind=kind):
            text = windows(packing)
            feed = some(kind, text, order)
            batch_at = jax.jit(feed.batch_at)
            per_epoch = batches.steps_per_epoch(text, BATCH)
            # The last goes into a new epoch.
            for first, steps in ((0, 1), (2, MOST), (per_epoch - 2, 3)):
                given = feed(first, steps)
                for step in range(steps):
                    found = batch_at(given, np.int32(step))
                    expected = batches.batch(
                        text, first + step, batch_size=BATCH, order=order, seed=5
                    )
                    for name, ours, host in zip(found._fields, found, expected, strict=True):
                        np.testing.assert_array_equal(ours, host, err_msg=name)
                        assert ours.dtype == host.dtype


def test_fewer_steps_are_fed_in_the_same_shapes(subtests: pytest.Subtests) -> None:
    """So that nothing is compiled again."""
    for kind in ["resident", "sent"]:
        with subtests.test(kind=kind):
            feed = some(kind, windows(), "sequential")
            few, many = (jax.tree.map(np.shape, feed(0, steps)) for steps in (1, MOST))
            assert few == many


def test_what_lies_on_the_device_is_counted() -> None:
    text = windows()
    table, _ = some("resident", text, "sequential")(0, 1)
    assert sum(leaf.nbytes for leaf in table) == table_bytes(text)
