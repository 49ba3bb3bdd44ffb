"""One optimizer step, pure: state and batch in, state and metrics out. No clock, no file here.

`TrainState` is one pytree of arrays, so saving it is exact resume and `eval_shape` of it is the
memory it takes. Sums and weights are carried through the micro-batches and divided once, so how a
batch is cut up never moves the result.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt32

from mainrun.config import MixtureOfExperts
from mainrun.data.batches import Batch
from mainrun.model import lora, moe
from mainrun.model.gpt import Gpt, Network, Params


class TrainState(NamedTuple):
    """Everything that training changes, and what it reads: parameters that are not trained, and
    the key that its randomness is drawn from."""

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    key: UInt32[Array, " 2"]
    frozen: Params  # the base under adapters; else empty

    @property
    def all_params(self) -> dict[str, Any]:
        """What the network computes with: arrays, or their shapes where this state is abstract."""
        return self.frozen | self.params


class Metrics(NamedTuple):
    """Of one step, on the device until somebody reads them."""

    loss: Float[Array, ""]  # nats per token, mean over the batch
    grad_norm: Float[Array, ""]  # before clipping
    learning_rate: Float[Array, ""]
    balance_loss: Float[Array, ""]  # of a mixture of experts: 1 where all are used alike; else 0


class TokenLoss(NamedTuple):
    """Of a batch, before anything is summed."""

    nll: Float[Array, "batch time"]  # negative log likelihood of every target, nats
    balance: Float[Array, " batch"]  # mean balance loss of the layers; 0 without experts


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def init(
    network: Network,
    optimizer: optax.GradientTransformation,
    seed: int,
    base: Params | None = None,
) -> TrainState:
    """The state before the first step: a function of the seed, and of a base to start from.

    A network with adapters trains these alone, on the base; another trains all of the base.
    """
    weights_key, step_key = jax.random.split(jax.random.key(seed))
    params = network.init(weights_key)
    frozen: Params = {}
    if base is not None:
        adapters, fresh = lora.split(params)
        assert {n: a.shape for n, a in fresh.items()} == {n: a.shape for n, a in base.items()}
        params, frozen = (adapters, base) if adapters else (base, {})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(step_key),
        frozen=frozen,
    )


def token_loss(
    model: Gpt, batch: Batch, *, mask_documents: bool, dropout_keys: Array | None
) -> TokenLoss:
    """What the model makes of a batch, float32."""
    segments = jnp.asarray(batch.segment_ids) if mask_documents else None
    read = model.read(jnp.asarray(batch.inputs), segments, dropout_keys)
    logits = model.logits(read.features)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    weights = jnp.asarray(batch.weights)
    layers = [moe.balance_loss(routing, weights) for routing in read.routings]
    balance = jnp.stack(layers).mean(0) if layers else jnp.zeros(len(nll))
    return TokenLoss(nll, balance)


def make_train_step(
    network: Network,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    *,
    micro_batches: int,
    mask_documents: bool,
) -> TrainStep:
    """The step as a pure function, to be jitted with the state donated."""

    mlp = network.settings.mlp
    coefficient = mlp.balance_coefficient if isinstance(mlp, MixtureOfExperts) else 0.0

    def summed_loss(params: Params, frozen: Params, batch: Batch, keys: Array) -> tuple:
        """What is minimised, times the tokens; and its parts."""
        model = network.bind(frozen | params)
        found = token_loss(model, batch, mask_documents=mask_documents, dropout_keys=keys)
        # An example's balance counts as often as it has tokens: no cut of the batch moves that.
        balance = (found.balance * batch.weights.sum(1)).sum()
        nll = (found.nll * batch.weights).sum()
        return nll + coefficient * balance, (nll, balance)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        keys = _example_keys(state.key, state.step, len(batch.inputs))
        value_and_grad = jax.value_and_grad(summed_loss, has_aux=True)
        (_, (nll, balance)), gradient = _accumulated(
            lambda part, part_keys: value_and_grad(state.params, state.frozen, part, part_keys),
            batch,
            keys,
            micro_batches,
        )
        weight = batch.weights.sum()
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        metrics = Metrics(
            loss=nll / weight,
            grad_norm=optax.tree.norm(gradient),
            learning_rate=jnp.asarray(learning_rate(state.step), jnp.float32),
            balance_loss=balance / weight,
        )
        params = optax.apply_updates(state.params, updates)
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step


def _example_keys(key: Array, step: Array, batch_size: int) -> UInt32[Array, "batch 2"]:
    """A key for each example of this step's batch."""
    step_key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
    examples = jnp.arange(batch_size)
    return jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(step_key, examples))


def _accumulated(
    compute: Callable[[Batch, Array], Any], batch: Batch, keys: Array, micro_batches: int
) -> Any:
    """The sum of what `compute` gives for each micro-batch, one of them in memory at a time."""
    if micro_batches == 1:
        return compute(batch, keys)

    def add(total: Any, part: tuple[Batch, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, compute(*part)), None

    parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), (batch, keys))
    one = jax.tree.map(lambda x: x[0], parts)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, *one))
    return jax.lax.scan(add, zero, parts)[0]
