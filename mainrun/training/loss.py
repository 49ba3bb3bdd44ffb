"""What a batch's tokens cost: the likelihood that is reported, and what training adds to it.

Each token's cost is float32. Training needs their sum alone, evaluation every one; both compute
the logits of a few positions at a time where all of them would be many (`chunks`).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mainrun import config
from mainrun.data.batches import Batch
from mainrun.model import moe
from mainrun.model.gpt import Gpt, Read
from mainrun.model.head import Unembedding
from mainrun.training import chunks

ALL = 2**62
"""Positions whose logits are held at one time: no limit."""


class TokenLoss(NamedTuple):
    """Of a batch, before anything is summed."""

    nll: Float[Array, "batch time"]  # negative log likelihood of every target, nats
    balance: Float[Array, " batch"]  # mean balance loss of the layers; 0 without experts


class Costs(NamedTuple):
    """Of a batch, summed over its tokens with their weights."""

    nll: Float[Array, ""]
    added: Float[Array, ""]  # by regularizers
    balance: Float[Array, ""]


def token_loss(
    model: Gpt,
    batch: Batch,
    *,
    mask_documents: bool,
    dropout_keys: Array | None,
    head_tokens: int = ALL,
) -> TokenLoss:
    """What the model makes of a batch, the logits of so many positions at a time."""
    read = _read(model, batch, mask_documents, dropout_keys)
    targets = jnp.asarray(batch.targets)
    head, table = model.unembedding, model.head_table
    number = chunks.count(*targets.shape, most_tokens=head_tokens)

    def one(part: tuple[Array, Array]) -> tuple[None, Array]:
        features, targets = part
        return None, _nll(head.logits(features, table), targets)[0]

    nll = chunks.over(one, number, (read.features, targets))[1]
    return TokenLoss(nll, _balance(read, batch))


def training_loss(
    model: Gpt,
    batch: Batch,
    settings: config.Regularization,
    *,
    mask_documents: bool,
    dropout_keys: Array,
    head_tokens: int = ALL,
    factor: float | Float[Array, ""] = 1.0,
) -> tuple[Float[Array, ""], Costs]:
    """What is minimised of a batch, times `factor`, and its parts; their balance is not in it.

    R-Drop reads the batch twice, with different dropout; the likelihood is then the mean of both.
    """
    if settings.r_drop:
        again = dropout_keys ^ jnp.uint32(0x9E3779B9)  # other keys, for every example its own
        batch = jax.tree.map(lambda x: jnp.concatenate([x, x]), batch)
        dropout_keys = jnp.concatenate([dropout_keys, again])
    read = _read(model, batch, mask_documents, dropout_keys)
    rows = _Rows(jnp.asarray(batch.targets), jnp.asarray(batch.weights))
    is_plain = config.is_zero(settings.label_smoothing) and config.is_zero(settings.z_loss)
    of = partial(_costs, model.unembedding, settings.r_drop, is_plain)
    number = chunks.count(*rows.targets.shape, most_tokens=head_tokens)
    given = settings.label_smoothing, settings.z_loss, factor
    numbers = tuple(jnp.asarray(number, jnp.float32) for number in given)
    total, (nll, added) = chunks.summed(of, number, read.features, model.head_table, rows, numbers)
    # An example's balance counts as often as it has tokens: no cut of the batch moves that.
    balance = (_balance(read, batch) * rows.weights.sum(1)).sum()
    passes = 2 if settings.r_drop else 1
    return total, Costs(nll, added, balance / passes)


class _Rows(NamedTuple):
    targets: Int[Array, "batch time"]
    weights: Float[Array, "batch time"]


def _costs(
    head: Unembedding,
    r_drop: float,
    is_plain: bool,
    features: Float[Array, "batch time width"],
    table: Float[Array, "rows width"],
    rows: _Rows,
    numbers: tuple[Array, Array, Array],
) -> tuple[Array, tuple[Array, Array]]:
    """What is minimised, times the factor; the likelihood and what is added to it, without."""
    label_smoothing, z_loss, factor = numbers
    logits = head.logits(features, table)
    nll, log_z = _nll(logits, rows.targets)
    added = jnp.zeros_like(nll)
    if not is_plain:
        # Szegedy et al. 2016 (arXiv:1512.00567), section 7: a share of every target is any token.
        added += label_smoothing * (log_z - logits.mean(-1) - nll)
        # Chowdhery et al. 2022 (arXiv:2204.02311), section 5: log Z is kept near 0.
        added += z_loss * jnp.square(log_z)
    weights = rows.weights
    if r_drop:
        nll, added, (weights, _) = _mean(nll), _mean(added), jnp.split(weights, 2)
        added += r_drop / 2 * _disagreement(logits)
    total, more = (nll * weights).sum(), (added * weights).sum()
    return (total + more) * factor, (total, more)


def _read(model: Gpt, batch: Batch, mask_documents: bool, dropout_keys: Array | None) -> Read:
    segments = jnp.asarray(batch.segment_ids) if mask_documents else None
    return model.read(jnp.asarray(batch.inputs), segments, dropout_keys)


def _nll(
    logits: Float[Array, "batch time vocab"], targets: Int[Array, "batch time"]
) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"]]:
    """Of every target, and the logarithm of what its probability is divided by."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A comparison, where looking the target's logit up would scatter its gradient, and gather the
    # logits of a vocabulary that devices share.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return log_z - jnp.where(is_target, logits, 0.0).sum(-1), log_z


def _balance(read: Read, batch: Batch) -> Float[Array, " batch"]:
    layers = [moe.balance_loss(routing, jnp.asarray(batch.weights)) for routing in read.routings]
    return jnp.stack(layers).mean(0) if layers else jnp.zeros(len(read.features))


def _disagreement(
    logits: Float[Array, "twice_batch time vocab"],
) -> Float[Array, "batch time"]:
    """The mean of both Kullback-Leibler divergences between the two passes' predictions, nats.

    Liang et al. 2021 (arXiv:2106.14448), eq. 2; their whole loss, eq. 3, is twice ours.
    """
    first, second = jnp.split(jax.nn.log_softmax(logits), 2)
    return ((jnp.exp(first) - jnp.exp(second)) * (first - second)).sum(-1) / 2


def _mean(x: Any) -> Array:
    """Of the two passes."""
    first, second = jnp.split(x, 2)
    return (first + second) / 2
