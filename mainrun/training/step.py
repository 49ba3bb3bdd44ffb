"""One optimizer step, pure: state and batch in, state and metrics out. No clock, no file here.

`TrainState` is one pytree of arrays, so saving it is exact resume and `eval_shape` of it is the
memory it takes. Sums and weights are carried through the micro-batches and divided once, so how a
batch is cut up never moves the result.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt32

from mainrun.data.batches import Batch
from mainrun.model.gpt import Gpt, Network, Params


class TrainState(NamedTuple):
    """Everything that training changes, and the key that its randomness is drawn from."""

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    key: UInt32[Array, " 2"]


class Metrics(NamedTuple):
    """Of one step, on the device until somebody reads them."""

    loss: Float[Array, ""]  # nats per token, mean over the batch
    grad_norm: Float[Array, ""]  # before clipping
    learning_rate: Float[Array, ""]


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def init(network: Network, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step, a function of the seed alone."""
    weights_key, step_key = jax.random.split(jax.random.key(seed))
    params = network.init(weights_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(step_key),
    )


def token_nll(
    model: Gpt, batch: Batch, *, mask_documents: bool, dropout_keys: Array | None
) -> Array:
    """Negative log likelihood of every target, nats, [batch, time], float32."""
    segments = jnp.asarray(batch.segment_ids) if mask_documents else None
    logits = model(jnp.asarray(batch.inputs), segments, dropout_keys)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)


def make_train_step(
    network: Network,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    *,
    micro_batches: int,
    mask_documents: bool,
) -> TrainStep:
    """The step as a pure function, to be jitted with the state donated."""

    def summed_loss(params: Params, batch: Batch, keys: Array) -> Array:
        nll = token_nll(
            network.bind(params), batch, mask_documents=mask_documents, dropout_keys=keys
        )
        return (nll * batch.weights).sum()

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        keys = _example_keys(state.key, state.step, len(batch.inputs))
        total, gradient = _accumulated(summed_loss, state.params, batch, keys, micro_batches)
        weight = batch.weights.sum()
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        metrics = Metrics(
            loss=total / weight,
            grad_norm=optax.tree.norm(gradient),
            learning_rate=jnp.asarray(learning_rate(state.step), jnp.float32),
        )
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return train_step


def _example_keys(key: Array, step: Array, batch_size: int) -> UInt32[Array, "batch 2"]:
    """A key for each example of this step's batch."""
    step_key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
    examples = jnp.arange(batch_size)
    return jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(step_key, examples))


def _accumulated(
    summed_loss: Callable[[Params, Batch, Array], Array],
    params: Params,
    batch: Batch,
    keys: Array,
    micro_batches: int,
) -> tuple[Array, Params]:
    """The summed loss and its gradient, one micro-batch in memory at a time."""
    value_and_grad = jax.value_and_grad(summed_loss)
    if micro_batches == 1:
        return value_and_grad(params, batch, keys)

    def add(carry: tuple[Array, Params], part: tuple[Batch, Array]) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, carry, value_and_grad(params, *part)), None

    parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), (batch, keys))
    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zero, parts)[0]
