"""What a batch's tokens cost: the likelihood that is reported, and what training adds to it.

Everything here is per token, float32, and not yet summed, so that whoever sums can weigh tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mainrun import config
from mainrun.data.batches import Batch
from mainrun.model import moe
from mainrun.model.gpt import Gpt


class TokenLoss(NamedTuple):
    """Of a batch, before anything is summed."""

    nll: Float[Array, "batch time"]  # negative log likelihood of every target, nats
    balance: Float[Array, " batch"]  # mean balance loss of the layers; 0 without experts


def token_loss(
    model: Gpt, batch: Batch, *, mask_documents: bool, dropout_keys: Array | None
) -> TokenLoss:
    """What the model makes of a batch."""
    return _read(model, batch, mask_documents, dropout_keys)[0]


def training_loss(
    model: Gpt,
    batch: Batch,
    settings: config.Regularization,
    *,
    mask_documents: bool,
    dropout_keys: Array,
) -> tuple[TokenLoss, Float[Array, "batch time"]]:
    """The same, and for each token what is added to its negative log likelihood.

    R-Drop reads the batch twice, with different dropout; the likelihood is then the mean of both.
    """
    if settings.r_drop:
        again = dropout_keys ^ jnp.uint32(0x9E3779B9)  # other keys, for every example its own
        batch = jax.tree.map(lambda x: jnp.concatenate([x, x]), batch)
        dropout_keys = jnp.concatenate([dropout_keys, again])
    found, logits = _read(model, batch, mask_documents, dropout_keys)
    added = _penalties(logits, found.nll, settings)
    if settings.r_drop:
        added = _halves_mean(added) + settings.r_drop / 2 * _disagreement(logits)
        found = TokenLoss(_halves_mean(found.nll), _halves_mean(found.balance))
    return found, added


def _read(
    model: Gpt, batch: Batch, mask_documents: bool, dropout_keys: Array | None
) -> tuple[TokenLoss, Float[Array, "batch time vocab"]]:
    segments = jnp.asarray(batch.segment_ids) if mask_documents else None
    read = model.read(jnp.asarray(batch.inputs), segments, dropout_keys)
    logits = model.logits(read.features)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    weights = jnp.asarray(batch.weights)
    layers = [moe.balance_loss(routing, weights) for routing in read.routings]
    balance = jnp.stack(layers).mean(0) if layers else jnp.zeros(len(nll))
    return TokenLoss(nll, balance), logits


def _penalties(
    logits: Float[Array, "batch time vocab"],
    nll: Float[Array, "batch time"],
    settings: config.Regularization,
) -> Float[Array, "batch time"]:
    added = jnp.zeros_like(nll)
    if not (config.is_zero(settings.label_smoothing) and config.is_zero(settings.z_loss)):
        log_z = jax.nn.logsumexp(logits, axis=-1)
        # Szegedy et al. 2016 (arXiv:1512.00567), section 7: a share of every target is any token.
        added += settings.label_smoothing * (log_z - logits.mean(-1) - nll)
        # Chowdhery et al. 2022 (arXiv:2204.02311), section 5: log Z is kept near 0.
        added += settings.z_loss * jnp.square(log_z)
    return added


def _disagreement(
    logits: Float[Array, "twice_batch time vocab"],
) -> Float[Array, "batch time"]:
    """The mean of both Kullback-Leibler divergences between the two passes' predictions, nats.

    Liang et al. 2021 (arXiv:2106.14448), eq. 2; their whole loss, eq. 3, is twice ours.
    """
    first, second = jnp.split(jax.nn.log_softmax(logits), 2)
    return ((jnp.exp(first) - jnp.exp(second)) * (first - second)).sum(-1) / 2


def _halves_mean(x: Array) -> Array:
    first, second = jnp.split(x, 2)
    return (first + second) / 2
