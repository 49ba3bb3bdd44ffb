"""What a step is compiled for: this machine's device, or a card that is not here.

JAX compiles for a description of a card where the CUDA wheels are installed, with or without a
driver; nothing is run. JAX's own tests do the same (tests/aot_test.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from mainrun.host import Host
from mainrun.memory.cards import Card, description
from mainrun.training import backend


@dataclass(frozen=True)
class Target:
    title: str
    platform: str  # as JAX calls it: cpu or gpu
    limit_bytes: int | None  # that a step may take; None: unknown
    device: Any  # what shapes are placed on; None: this machine's own
    can_compile: bool = True


def here() -> Target:
    """This machine's device."""
    limit = backend.memory_limit_bytes()
    return Target(backend.describe_device(), jax.default_backend(), limit, None)


def of_card(card: Card) -> Target:
    """The card, with as much of its memory as a job is given (`gpu_memory_fraction`)."""
    limit = int(Host().gpu_memory_fraction * card.memory_bytes)
    title = f"{card.title}, {card.memory_bytes / 2**30:.1f} GiB"
    found = devices(card, 1)
    if found is None:
        return Target(title, "gpu", limit, None, can_compile=False)
    return Target(title, "gpu", limit, found[0])


def devices(card: Card, count: int) -> Sequence[Any] | None:
    """So many of the card in one machine, to compile for; None where there is no plug-in.

    This process computes on its CPU from now on: only so does JAX start the cards' plug-in where
    there is no driver, and a card that is here is left to others.
    """
    jax.config.update("jax_platforms", "cpu")
    try:
        found = topologies.get_topology_desc(
            platform="cuda", target_config=description(card), topology=f"1x1x{count}"
        )
    except NotImplementedError:
        return None
    return found.devices
