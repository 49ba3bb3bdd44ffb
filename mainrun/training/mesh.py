"""Where arrays lie when several devices train a run: a mesh, and rules from names to its axes.

One program computes on all devices; which part of an array each of them holds is said here, and the
compiler puts in what they must tell each other (GSPMD, Xu et al. 2021, arXiv:2105.04663). Examples
are shared among `data` and `fsdp`; parameters, their moments and gradients among `fsdp`
(Rajbhandari et al. 2020, arXiv:1910.02054, stage 3) and, by heads, hidden units, experts and the
vocabulary, among `model` (Shoeybi et al. 2019, arXiv:1909.08053). A state is the same arrays on
every mesh: what does not divide evenly is held whole, or padded inside the step.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from mainrun import config
from mainrun.errors import UserError
from mainrun.model.gpt import Params

DATA, FSDP, MODEL = "data", "fsdp", "model"
_EXAMPLES = (DATA, FSDP)

# The dimensions of a parameter by its name, first match; what none matches is small, and whole.
_EMBED, _VOCAB, _HIDDEN, _EXPERTS = "embed", "vocab", "hidden", "experts"
_WIDENING = r".*\.(qkv|q_up|kv_up|gate|up)"  # linear layers into heads or hidden units,
_NARROWING = r".*\.(out|down)"  # and those out of them
_DIMENSIONS: list[tuple[str, tuple[str | None, ...]]] = [
    (r"position_embedding\.embedding", (None, _EMBED)),
    (r"(token_embedding|head)\.embedding", (_VOCAB, _EMBED)),
    (r".*\.(kv_down|q_down|router|importance|around)\.kernel", (_EMBED, None)),
    (_WIDENING + r"\.kernel", (_EMBED, _HIDDEN)),
    (_WIDENING + r"\.bias", (_HIDDEN,)),
    (_NARROWING + r"\.kernel", (_HIDDEN, _EMBED)),
    (_NARROWING + r"\.adapter\.down", (_HIDDEN, None)),
    (_NARROWING + r"\.adapter\.up", (None, _EMBED)),
    (r".*\.adapter\.down", (_EMBED, None)),
    (r".*\.adapter\.up", (None, _HIDDEN)),
    (r".*\.mlp\.up", (_EXPERTS, _EMBED, _HIDDEN)),
    (r".*\.mlp\.down", (_EXPERTS, _HIDDEN, _EMBED)),
]
_AXES = {_EMBED: FSDP, _VOCAB: MODEL, _HIDDEN: MODEL, _EXPERTS: MODEL}

_TABLES = ("token_embedding.embedding", "head.embedding")


class Layout:
    """A mesh of devices, and what of each array lies where. On one device nothing is said."""

    def __init__(self, data: int, fsdp: int, model: int, devices: Sequence[jax.Device]) -> None:
        self.sizes = {DATA: data, FSDP: fsdp, MODEL: model}
        self._devices = devices

    @property
    def is_one(self) -> bool:
        return self.devices == 1

    @cached_property
    def _mesh(self) -> jax.sharding.Mesh:
        grid = np.array(self._devices).reshape(tuple(self.sizes.values()))
        return jax.sharding.Mesh(grid, tuple(self.sizes))

    def __str__(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in self.sizes.items())

    @property
    def devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def example_shards(self) -> int:
        """Among how many a batch's examples are shared."""
        return self.sizes[DATA] * self.sizes[FSDP]

    def spec(self, name: str, shape: Sequence[int]) -> Spec:
        """Of a parameter: for each dimension the mesh axis among which it is shared, or None."""
        dimensions = next((d for p, d in _DIMENSIONS if re.fullmatch(p, name)), ())
        if len(dimensions) != len(shape):
            return Spec()
        axes: list[str | None] = []
        for dimension, size in zip(dimensions, shape, strict=True):
            axis = _AXES[dimension] if dimension else None
            shares = axis not in axes and axis is not None and size % self.sizes[axis] == 0
            axes.append(axis if shares and self.sizes[axis or ""] > 1 else None)
        return Spec(*axes)

    @cached_property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self._mesh, Spec())

    def on_devices(self, state: Any) -> Any:
        """The shapes of a state, each with the place where its array lies.

        What stands under a parameter's name and has its shape (a moment, an average) lies with it.
        """
        if self.is_one:
            return state
        shapes = {n: a.shape for n, a in (state.frozen | state.params).items()}

        def placed(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
            names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
            name = next((n for n in reversed(names) if shapes.get(n) == leaf.shape), None)
            spec = Spec() if name is None else self.spec(name, leaf.shape)
            sharding = NamedSharding(self._mesh, spec)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree_util.tree_map_with_path(placed, state)

    def held(self, state: Any) -> Any:
        """Of the shapes of a state, with their places, what one device holds."""
        if self.is_one:
            return state
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype),
            state,
        )

    def share_of(self, settings: config.Config) -> config.Config:
        """The settings of one device's part of a step: its examples."""
        training = settings.training
        examples = training.batch_size // self.example_shards
        return replace(settings, training=replace(training, batch_size=examples))

    def jit_options(self, arguments: Sequence[Any], results: Any) -> dict[str, Any]:
        """What `jax.jit` must be told: where arguments and results lie (or a root of their trees).

        What has no place of its own lies everywhere.
        """
        if self.is_one:
            return {}
        place = jax.tree.map(lambda leaf: getattr(leaf, "sharding", None) or self.replicated, (
            tuple(arguments), results
        ))  # fmt: skip
        return {"in_shardings": place[0], "out_shardings": place[1]}

    def put(self, array: Any) -> Any:
        """The array, whole, on every device; each process has it."""
        if self.is_one:
            return jnp.asarray(array)
        return placed(np.asarray(array), self.replicated)

    # Inside the compiled step:

    def examples(self, tree: Any) -> Any:
        """Arrays [batch, ...], shared among devices by examples."""
        return self._constrained(tree, Spec(_EXAMPLES))

    def micro_batches(self, tree: Any) -> Any:
        """Arrays [micro-batches, batch, ...], each micro-batch shared by examples."""
        return self._constrained(tree, Spec(None, _EXAMPLES))

    def everywhere(self, tree: Any) -> Any:
        return self._constrained(tree, Spec())

    def like_parameters(self, gradient: Params) -> Params:
        """Each gradient where its parameter lies: summed up there, and nowhere else."""
        if self.is_one:
            return gradient
        return {
            name: self._constrained(leaf, self.spec(name, leaf.shape))
            for name, leaf in gradient.items()
        }

    def to_compute(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters as the network reads them: gathered from `fsdp`, the vocabulary shared.

        Left to itself the compiler would rather share activations by width, as parameters are.
        Rows beyond the vocabulary are padding, as the head knows them, and their gradient is none.
        """
        if self.is_one:
            return dict(params)
        return {name: self._gathered(name, array) for name, array in params.items()}

    def _gathered(self, name: str, array: Any) -> Any:
        if name in _TABLES:
            array = self._constrained(array, Spec())
            array = jnp.pad(array, ((0, -array.shape[0] % self.sizes[MODEL]), (0, 0)))
        spec = self.spec(name, array.shape)
        return self._constrained(array, Spec(*(axis if axis != FSDP else None for axis in spec)))

    def _constrained(self, tree: Any, spec: Spec) -> Any:
        if self.is_one:
            return tree
        sharding = NamedSharding(self._mesh, spec)
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), tree)


ONE = Layout(1, 1, 1, ())


def placed(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """The array on the devices of its place; each process has it whole, and keeps its part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


def layout(
    settings: config.Mesh, examples: int, devices: Sequence[jax.Device], *, processes: int = 1
) -> Layout:
    """The mesh that the settings ask for; -1 takes all devices that are left.

    `examples` are those computed at one time, which `data` and `fsdp` share evenly. One process
    leaves devices out for that; of several each must take part. Raises UserError where the devices
    are too few, or the examples cannot be shared.
    """
    said = {DATA: settings.data, FSDP: settings.fsdp, MODEL: settings.model}
    known = math.prod(size for size in said.values() if size != -1)
    asked = ", ".join(f"mesh.{name}={size}" for name, size in said.items())
    if known > len(devices):
        raise UserError(
            f"{asked} takes {known} devices, and there are {len(devices)}: make it smaller, or -1"
        )
    left = len(devices) // known
    if open_axis := next((name for name, size in said.items() if size == -1), None):
        shares = known // said[MODEL] if open_axis != MODEL else 1
        fits = open_axis == MODEL or processes > 1
        said[open_axis] = left if fits else _most(left, examples, shares)
    made = Layout(said[DATA], said[FSDP], said[MODEL], devices[: math.prod(said.values())])
    if examples % made.example_shards:
        raise UserError(
            f"{made.example_shards} devices (mesh.data times mesh.fsdp) cannot share {examples} "
            "examples evenly (training.batch_size / training.grad_accumulation): change the batch "
            "or the mesh"
        )
    if processes > 1 and made.devices != len(devices):
        raise UserError(
            f"{asked} takes {made.devices} of {len(devices)} devices, and every process must take "
            "part: mesh.data=-1 takes all that are left"
        )
    return made


def _most(left: int, examples: int, shares: int) -> int:
    """As many of the devices as can share the examples, each as many times as was said."""
    fitting = [n for n in range(1, left + 1) if examples % (n * shares) == 0]
    return fitting[-1] if fitting else 1
