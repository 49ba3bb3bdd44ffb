"""Optimizers: settings in, Optax out.

Each is a chain of Optax's own parts: clipping by the global norm, the rule, weight decay, the
learning rate. Where a kind departs from Optax's ready-made one, it is to be PyTorch's: decay that
is coupled to the gradient, an epsilon outside the root. Moments are float32, as parameters are,
unless `moment_dtype` says otherwise.
"""

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mainrun import config
from mainrun.errors import UserError

Params = dict[str, jax.Array]
Number = float | Float[Array, ""]
"""A setting; an array where a population has it (`config.CARRIED`)."""


class Optimizer(NamedTuple):
    """Optax's transformation, and where the gradient is taken: at the parameters, for most."""

    init: Callable[[Params], optax.OptState]
    update: Callable[[Params, optax.OptState, Params], tuple[Params, optax.OptState]]
    gradient_point: Callable[[Params, optax.OptState], Params] = lambda params, _: params


def optimizer(
    settings: config.Optimizer, learning_rate: optax.Schedule, grad_clip: Number | None
) -> Optimizer:
    """Clipping, then the optimizer; its state counts updates, and the learning rate follows that.

    Its `init` raises UserError for groups that name no parameter, or one twice.
    """
    clip = optax.identity() if grad_clip is None else optax.clip_by_global_norm(grad_clip)
    made = _rule(settings, learning_rate)
    chained = optax.chain(clip, optax.GradientTransformation(made.init, made.update))

    def init(params: Params) -> optax.OptState:
        _check_groups(settings, params)
        return chained.init(params)

    point = made.gradient_point
    return Optimizer(init, chained.update, lambda params, state: point(params, state[1]))


def _rule(settings: config.Optimizer, learning_rate: optax.Schedule) -> Optimizer:
    decay = optax.stateless(partial(_decayed, settings))
    rate = optax.chain(
        optax.stateless(partial(_scaled, settings)), optax.scale_by_learning_rate(learning_rate)
    )
    match settings:
        # Decay is added to the gradient, as in PyTorch's and the original assessment's.
        case config.Sgd(momentum=momentum):
            rule = optax.chain(decay, _momentum(momentum), rate)
        case config.Adam(b1=b1, b2=b2, eps=eps, moment_dtype=dtype):
            rule = optax.chain(decay, optax.scale_by_adam(b1, b2, eps, mu_dtype=dtype), rate)
        case config.Adagrad(initial_accumulator=initial, eps=eps):  # Duchi et al. 2011
            rule = optax.chain(decay, _over_root_of_sum(initial, eps), rate)
        case config.RmsProp(b2=b2, eps=eps, momentum=momentum):  # Hinton 2012, lecture 6e
            scale = optax.scale_by_rms(b2, eps, eps_in_sqrt=False)
            rule = optax.chain(decay, scale, _momentum(momentum), rate)
        # Decay is of its own, times the learning rate.
        case config.AdamW(b1=b1, b2=b2, eps=eps, moment_dtype=dtype):  # arXiv:1711.05101
            rule = optax.chain(optax.scale_by_adam(b1, b2, eps, mu_dtype=dtype), decay, rate)
        case config.Lion(b1=b1, b2=b2, moment_dtype=dtype):  # Chen et al. 2023, arXiv:2302.06675
            rule = optax.chain(optax.scale_by_lion(b1, b2, mu_dtype=dtype), decay, rate)
        case config.Adafactor():  # Shazeer & Stern 2018, arXiv:1804.04235
            rule = optax.chain(_adafactor(settings), decay, rate)
        case config.Muon():
            rule = optax.chain(_muon(settings), decay, rate)
        case config.ScheduleFreeAdamW():
            return _schedule_free(settings, decay, rate, learning_rate)
        case _:
            assert_never(settings)
    return Optimizer(rule.init, rule.update)


def _momentum(decay: Number) -> optax.GradientTransformation:
    return optax.identity() if config.is_zero(decay) else optax.trace(decay)


def _over_root_of_sum(initial: float, eps: Number) -> optax.GradientTransformation:
    """Optax's `scale_by_rss` with PyTorch's eps, which stands outside the root.

    Inside, it makes the updates of gradients as small as itself √2 times as large.
    """

    def update(
        gradient: Params, state: optax.ScaleByRssState, params: Params | None = None
    ) -> tuple[Params, optax.ScaleByRssState]:
        sums = jax.tree.map(lambda g, s: s + g * g, gradient, state.sum_of_squares)
        scaled = jax.tree.map(lambda g, s: g / (jnp.sqrt(s) + eps), gradient, sums)
        return scaled, optax.ScaleByRssState(sums)

    return optax.GradientTransformation(optax.scale_by_rss(initial).init, update)


def _adafactor(settings: config.Adafactor) -> optax.GradientTransformation:
    clip, by_parameter = settings.clip_update_rms, settings.scale_by_parameter
    return optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=settings.decay_exponent,
            min_dim_size_to_factor=settings.min_size_to_factor,
        ),
        optax.identity() if clip is None else optax.clip_by_block_rms(clip),
        optax.scale_by_param_block_rms() if by_parameter else optax.identity(),
    )


def _muon(settings: config.Muon) -> optax.GradientTransformation:
    """Jordan et al. 2024 for the matrices inside blocks, Adam for all else.

    The fused projection of queries, keys and values is one matrix; each expert is one of its own.
    """
    muon = optax.contrib
    of_matrix = muon.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def dimensions(params: Mapping[str, Any]) -> dict[str, Any]:
        """What is masked out stays so."""
        return {
            name: of_matrix if _is_muons(name, leaf) else optax.MaskedNode()
            for name, leaf in params.items()
        }

    def labels(params: Mapping[str, Any]) -> dict[str, str]:
        return {n: "muon" if _is_muons(n, leaf) else "adam" for n, leaf in params.items()}

    matrices = optax.chain(
        muon.scale_by_muon(
            ns_steps=settings.newton_schulz_steps,
            beta=settings.momentum,
            mu_dtype=settings.moment_dtype,
            weight_dimension_numbers=dimensions,
        ),
        optax.stateless(_width_scaled),
    )
    b1, b2, eps = settings.b1, settings.b2, settings.eps
    others = optax.scale_by_adam(b1, b2, eps, mu_dtype=settings.moment_dtype)
    return optax.partition({"muon": matrices, "adam": others}, labels)


def _width_scaled(updates: Mapping[str, Any], _: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Orthogonal updates that change outputs alike, whatever the shape: times √max(1, out/in)."""
    return jax.tree.map(lambda u: max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5 * u, updates)


def _is_muons(name: str, leaf: Any) -> bool:
    """A weight inside a block that maps one space to another.

    Routers and SparseK's scores do not, whose columns are a number for each expert or head; nor do
    an adapter's two halves, each of which alone is not the map.
    """
    if isinstance(leaf, optax.MaskedNode):
        return False
    others = (".router.", ".importance.", ".adapter.")
    return leaf.ndim >= 2 and name.startswith("blocks.") and not any(o in name for o in others)


def _schedule_free(
    settings: config.ScheduleFreeAdamW,
    decay: optax.GradientTransformation,
    rate: optax.GradientTransformation,
    learning_rate: optax.Schedule,
) -> Optimizer:
    """Defazio et al. 2024 (arXiv:2405.15682), Optax's own, around its averaged iterate.

    The parameters of a run are the average x, which is what is evaluated and kept; gradients are
    taken at y, between x and the fast iterate z. Optax carries y and leaves x to be worked out.
    """
    scale = optax.scale_by_rms(settings.b2, settings.eps, eps_in_sqrt=False, bias_correction=True)
    inner = optax.contrib.schedule_free(
        optax.chain(scale, decay, rate),
        learning_rate,
        b1=settings.b1,
        weight_lr_power=settings.weight_lr_power,
    )

    def point(params: Params, state: optax.OptState) -> Params:
        return optax.tree.add(
            optax.tree.scale(settings.b1, params), optax.tree.scale(1 - settings.b1, state.z)
        )

    def update(
        gradient: Params, state: optax.OptState, params: Params
    ) -> tuple[Params, optax.OptState]:
        y = point(params, state)
        updates, state = inner.update(gradient, state, y)
        x = optax.contrib.schedule_free_eval_params(state, optax.apply_updates(y, updates))
        return optax.tree.sub(x, params), state

    return Optimizer(inner.init, update, point)


# ---------------------------------------------------------------------------------------------
# Weight decay and learning rate of each parameter


def weight_decay(settings: config.Optimizer, params: Mapping[str, Any]) -> dict[str, Number]:
    """Of each parameter: its group's, or that of all weights and embeddings (`matrices`)."""
    decays: dict[str, Number] = {}
    for name, leaf in params.items():
        group = _group(settings, name)
        if group is not None and group.weight_decay is not None:
            decays[name] = group.weight_decay
        else:
            has_decay = settings.decay_on == "all" or leaf.ndim >= 2
            decays[name] = settings.weight_decay if has_decay else 0.0
    return decays


def learning_rate_factors(
    settings: config.Optimizer, params: Mapping[str, Any]
) -> dict[str, Number]:
    """By which each parameter's learning rate differs from the optimizer's."""
    factors: dict[str, Number] = {}
    for name, leaf in params.items():
        group = _group(settings, name)
        factor: Number = 1.0 if group is None else group.learning_rate_factor
        if isinstance(settings, config.Muon) and not _is_muons(name, leaf):
            factor *= settings.adamw_learning_rate / settings.learning_rate
        factors[name] = factor
    return factors


def _decayed(settings: config.Optimizer, updates: Params, params: Params) -> Params:
    decays = weight_decay(settings, params)
    return {
        n: u if config.is_zero(decays[n]) else u + decays[n] * params[n] for n, u in updates.items()
    }


def _scaled(settings: config.Optimizer, updates: Params, params: Params) -> Params:
    factors = learning_rate_factors(settings, params)
    return {n: u if config.is_zero(factors[n] - 1) else factors[n] * u for n, u in updates.items()}


def _group(settings: config.Optimizer, name: str) -> config.Group | None:
    return next((g for g in settings.groups if fnmatchcase(name, g.parameters)), None)


def _check_groups(settings: config.Optimizer, names: Iterable[str]) -> None:
    """UserError for a group that names no parameter, or a parameter that two name."""
    patterns = [group.parameters for group in settings.groups]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"optimizer.groups: {pattern} names no parameter; they are called "
                f"{', '.join(list(names)[:3])} …"
            )
    for name in names:
        naming = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        if len(naming) > 1:
            raise UserError(
                f"optimizer.groups: {name} is in {' and in '.join(naming)}: let one of them name it"
            )
