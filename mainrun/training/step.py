"""One optimizer step, pure: state and batch in, state and metrics out. No clock, no file here.

`TrainState` is one pytree of arrays, so saving it is exact resume and `eval_shape` of it is the
memory it takes. Sums and weights are carried through the micro-batches and divided once, so how a
batch is cut up never moves the result. A step whose loss or gradient is not to be trusted leaves
parameters, moments and the schedule's count as they were.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, UInt32

from mainrun import config
from mainrun.data.batches import Batch
from mainrun.model import lora
from mainrun.model.gpt import Network, Params
from mainrun.model.layers import DropoutRate
from mainrun.training import averaging, chunks, divergence, loss, noise, precision
from mainrun.training.divergence import Guard
from mainrun.training.mesh import ONE, Layout
from mainrun.training.noise import Noise, Norms
from mainrun.training.optimizer import Optimizer
from mainrun.training.precision import LossScale


class TrainState(NamedTuple):
    """Everything that training changes, and what it reads: parameters that are not trained, and
    the key that its randomness is drawn from."""

    step: Int[Array, ""]  # batches read
    updates: Int[Array, ""]  # of the parameters: batches read, less those skipped
    params: Params
    opt_state: optax.OptState
    key: UInt32[Array, " 2"]
    frozen: Params  # the base under adapters; else empty
    average: Params  # of the trained parameters, where one is kept; else empty
    loss_scale: LossScale
    guard: Guard
    noise: Noise

    @property
    def all_params(self) -> dict[str, Any]:
        """What the network computes with: arrays, or their shapes where this state is abstract."""
        return self.frozen | self.params

    @property
    def all_averaged(self) -> dict[str, Any]:
        """The same with the average in place of the trained parameters."""
        return self.frozen | self.average


class Metrics(NamedTuple):
    """Of one step, on the device until somebody reads them."""

    loss: Float[Array, ""]  # nats per token, mean over the batch
    objective: Float[Array, ""]  # what is minimised: the loss and all that is added to it
    grad_norm: Float[Array, ""]  # before clipping
    learning_rate: Float[Array, ""]
    balance_loss: Float[Array, ""]  # of a mixture of experts: 1 where all are used alike; else 0
    outcome: Int[Array, ""]  # see `divergence`
    in_a_row: Int[Array, ""]  # steps that diverged, up to this one
    loss_scale: LossScale  # after the step; its scale is that of the next
    noise_tokens: Float[Array, ""]  # gradient noise scale; NaN where it is not known


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


class _Sums(NamedTuple):
    """Of micro-batches: what adds up."""

    gradient: Params
    costs: loss.Costs
    norms: Norms


def init(
    network: Network,
    optimizer: Optimizer,
    key: Array,
    training: config.Training,
    base: Params | None = None,
) -> TrainState:
    """The state before the first step: a function of the key, and of a base to start from.

    A network with adapters trains these alone, on the base; another trains all of the base.
    """
    weights_key, step_key = jax.random.split(key)
    params = network.init(weights_key)
    frozen: Params = {}
    if base is not None:
        adapters, fresh = lora.split(params)
        assert {n: a.shape for n, a in fresh.items()} == {n: a.shape for n, a in base.items()}
        params, frozen = (adapters, base) if adapters else (base, {})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        updates=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(step_key),
        frozen=frozen,
        average=averaging.initial(training.weight_average, params),
        loss_scale=precision.initial(training.loss_scale),
        guard=divergence.initial(),
        noise=noise.none(),
    )


def make_train_step(
    network: Network,
    optimizer: Optimizer,
    learning_rate: optax.Schedule,
    training: config.Training,
    *,
    micro_batches: int,
    mask_documents: bool,
    head_tokens: int = loss.ALL,
    samples: averaging.Samples = averaging.EVERY_UPDATE,
    dropout: DropoutRate | None = None,
    layout: Layout = ONE,
) -> TrainStep:
    """The step as a pure function, to be jitted with the state donated.

    The logits of `head_tokens` positions are held at one time, of micro-batches cut further.
    `samples` are the updates that an average of samples (`training.weight_average`) takes.
    `layout` says on which devices. `dropout` stands for the network's rate. Numbers in the settings
    may be arrays, where `config.CARRIED` names them: that is how a population has them.
    """
    mlp = network.settings.mlp
    coefficient = mlp.balance_coefficient if isinstance(mlp, config.MixtureOfExperts) else 0.0
    scales_loss = training.precision == "float16"
    summed_loss = _summed_loss(
        network,
        training,
        dropout,
        layout,
        coefficient,
        mask_documents=mask_documents,
        head_tokens=head_tokens,
    )
    value_and_grad = jax.value_and_grad(summed_loss, has_aux=True)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        keys = _example_keys(state.key, state.step, len(batch.inputs))
        batch, keys = layout.examples((batch, keys))
        tokens = batch.weights.sum()
        # In float16 the mean over tokens is what is scaled: of their sum, gradients would overflow.
        scale = state.loss_scale.scale
        factor, divisor = (scale / tokens, scale) if scales_loss else (1.0, tokens)
        point = optimizer.gradient_point(state.params, state.opt_state)

        def sums(part: Batch, part_keys: Array) -> _Sums:
            (_, costs), gradient = value_and_grad(point, state.frozen, part, part_keys, factor)
            gradient = layout.like_parameters(gradient)
            return _Sums(gradient, costs, _norms(gradient, part, factor))

        total = _accumulated(sums, batch, keys, micro_batches, layout)
        gradient = jax.tree.map(lambda g: g / divisor, total.gradient)
        mean, grad_norm = jax.tree.map(lambda s: s / tokens, total.costs), optax.tree.norm(gradient)
        outcome = divergence.outcome(
            training.divergence, state.guard, mean.nll, grad_norm, scales_loss=scales_loss
        )
        noise_now = noise.observed(
            state.noise,
            total.norms,
            jnp.square(grad_norm),
            tokens,
            decay=training.noise_scale_decay,
        )

        def updated(state: TrainState) -> TrainState:
            after = _updated(state, gradient, optimizer, training, samples)
            return after._replace(noise=noise_now)

        kept = _where(outcome == divergence.APPLIED, updated, state)
        after = kept._replace(
            step=state.step + 1,
            guard=divergence.observed(training.divergence, state.guard, mean.nll, outcome),
        )
        if scales_loss:
            scaled = precision.next_scale(
                training.loss_scale, state.loss_scale, jnp.isfinite(grad_norm)
            )
            after = after._replace(loss_scale=scaled)
        return after, Metrics(
            loss=mean.nll,
            objective=mean.nll + mean.added + coefficient * mean.balance,
            grad_norm=grad_norm,
            learning_rate=jnp.asarray(learning_rate(state.updates), jnp.float32),
            balance_loss=mean.balance,
            outcome=outcome,
            in_a_row=after.guard.in_a_row,
            loss_scale=after.loss_scale,
            noise_tokens=noise.scale_tokens(after.noise),
        )

    return train_step


def _summed_loss(
    network: Network,
    training: config.Training,
    dropout: DropoutRate | None,
    layout: Layout,
    coefficient: float,
    *,
    mask_documents: bool,
    head_tokens: int,
) -> Callable[..., tuple[Array, loss.Costs]]:
    remat = training.remat == "blocks"

    def summed_loss(
        params: Params, frozen: Params, batch: Batch, keys: Array, factor: Array | float
    ) -> tuple[Array, loss.Costs]:
        """What is minimised, times tokens and `factor`; and its parts, times tokens."""
        total, costs = loss.training_loss(
            network.bind(layout.to_compute(frozen | params), dropout, remat=remat),
            batch,
            training.regularization,
            mask_documents=mask_documents,
            dropout_keys=keys,
            head_tokens=head_tokens,
            factor=factor,
        )
        return total + coefficient * factor * costs.balance, costs

    return summed_loss


def _updated(
    state: TrainState,
    gradient: Params,
    optimizer: Optimizer,
    training: config.Training,
    samples: averaging.Samples,
) -> TrainState:
    """The state with the optimizer's update taken, whatever the gradient is worth."""
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state._replace(
        updates=state.updates + 1,
        params=params,
        opt_state=opt_state,
        average=averaging.averaged(
            training.weight_average, state.average, params, state.updates + 1, samples
        ),
    )


_Update = Callable[[TrainState], TrainState]


def _where(applied: Bool[Array, ""], updated: _Update, state: TrainState) -> TrainState:
    """The updated state, or the state as it is."""
    # Selecting keeps moments twice on a CPU (964 MiB instead of 909 for the baseline with AdamW). A
    # GPU would wait for the host at a branch.
    branch, select = partial(_branch, applied, updated), partial(_select, applied, updated)
    return jax.lax.platform_dependent(state, cpu=branch, default=select)


def _branch(applied: Bool[Array, ""], updated: _Update, state: TrainState) -> TrainState:
    return jax.lax.cond(applied, updated, lambda same: same, state)


def _select(applied: Bool[Array, ""], updated: _Update, state: TrainState) -> TrainState:
    return jax.tree.map(lambda new, old: jnp.where(applied, new, old), updated(state), state)


def _norms(gradient: Params, part: Batch, factor: Array | float) -> Norms:
    """Of one micro-batch's mean gradient; `gradient` is its sum over tokens, times `factor`."""
    tokens = part.weights.sum()
    has_tokens, tokens = tokens > 0, jnp.maximum(tokens, 1)
    square = jnp.square(optax.tree.norm(gradient) / (factor * tokens))
    return Norms(
        squares=jnp.where(has_tokens, square, 0.0),
        inverse_tokens=jnp.where(has_tokens, 1 / tokens, 0.0),
        number=has_tokens.astype(jnp.float32),
    )


def _example_keys(key: Array, step: Array, batch_size: int) -> UInt32[Array, "batch 2"]:
    """A key for each example of this step's batch."""
    step_key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
    examples = jnp.arange(batch_size)
    return jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(step_key, examples))


def _accumulated(
    compute: Callable[[Batch, Array], _Sums],
    batch: Batch,
    keys: Array,
    micro_batches: int,
    layout: Layout,
) -> _Sums:
    """The sum of what `compute` gives for each micro-batch, one of them in memory at a time."""
    if micro_batches == 1:
        return compute(batch, keys)

    parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), (batch, keys))
    parts = layout.micro_batches(parts)
    return chunks.sum_of(lambda part: (compute(*part), None), parts)[0]
