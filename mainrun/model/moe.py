"""A mixture of experts in place of an MLP: each token goes to its `top_k`, and none is dropped.

Shazeer et al. 2017 (arXiv:1701.06538); routing as Mixtral has it (arXiv:2401.04088, section 2.1):
softmax over all experts, the `top_k` most probable, their weights scaled to sum to 1.

Only the chosen experts compute a token. Rows are grouped by expert; every expert has room for an
even share, so that all shares are one batched product. What is beyond an expert's share follows in
a loop over small blocks, as many as there happen to be: hardly any under an even load, and never
more rows in all than the shares have. The compiler counts the floating-point operations of the
shares and of one block, whatever the number of experts. Against what else could be done, forward
and backward (two shared CPU cores, 1,024 tokens, width 512, hidden 2,048, SwiGLU, even loads):

                                             4 experts, top_k 2     16 experts, top_k 1
                                             CPU s   temporaries    CPU s   temporaries
    this                                      0.45        85 MiB     0.40        42 MiB
    a dense MLP of as many operations         0.37        80 MiB     0.20        38 MiB
    blocks alone, each with a gathered
      copy of its expert's weights            0.53       366 MiB     0.99     1,020 MiB
    every expert on every token               1.26       256 MiB     4.91     1,024 MiB

Where two of four experts take everything, this needs 0.79 s. `jax.lax.ragged_dot` is the last line
on CPUs (JAX 0.10 and 0.12: operations in proportion to the experts) and, as others report of
0.10, on NVIDIA GPUs.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from mainrun import config
from mainrun.model.initializers import Initializer
from mainrun.model.layers import activate


class Routing(NamedTuple):
    """What the router made of each token: its opinion of every expert, and who was taken."""

    probabilities: Float32[Array, "batch time experts"]
    chosen: Bool[Array, "batch time experts"]


class Router(nnx.Module):
    """How probable each expert is for a token, float32 whatever the input. No bias.

    Fedus et al. 2021 (arXiv:2101.03961), section 2.4: in bfloat16 training was not stable.
    """

    def __init__(self, width: int, experts: int, *, init: Initializer, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(init(rngs.params(), (width, experts)))

    def __call__(self, x: Float[Array, "tokens width"]) -> Float32[Array, "tokens experts"]:
        # A GPU's own choice for a float32 product (TF32) has hardly more digits than bfloat16.
        logits = jnp.matmul(x.astype(jnp.float32), self.kernel[...], precision="highest")
        return jax.nn.softmax(logits)


class MoeMlp(nnx.Module):
    """Experts, each an MLP, and the router that chooses among them.

    Experts have no biases, whatever the other layers have: Mixtral's have none, so that an export
    can hold ours. SwiGLU's `up` is gate | up in columns.
    """

    def __init__(
        self,
        settings: config.MixtureOfExperts,
        width: int,
        *,
        init: Initializer,
        out_init: Initializer,
        rngs: nnx.Rngs,
    ) -> None:
        experts, hidden = settings.num_experts, settings.hidden_in(width)
        wide = 2 * hidden if settings.activation == "swiglu" else hidden
        self.activation, self.top_k = settings.activation, settings.top_k
        self.router = Router(width, experts, init=init, rngs=rngs)
        self.up = nnx.Param(init(rngs.params(), (experts, width, wide)))
        self.down = nnx.Param(out_init(rngs.params(), (experts, hidden, width)))

    def __call__(
        self, x: Float[Array, "batch time width"]
    ) -> tuple[Float[Array, "batch time width"], Routing]:
        batch, time, width = x.shape
        tokens = x.reshape(-1, width)
        probabilities = self.router(tokens)
        experts = probabilities.shape[-1]
        weights, choices = jax.lax.top_k(probabilities, self.top_k)
        weights /= weights.sum(-1, keepdims=True)
        chosen = (choices[..., None] == jnp.arange(experts)).any(1)

        room = Room.for_tokens(len(tokens), self.top_k, experts)
        places, ends = assigned(room, choices, chosen)
        copies = jnp.repeat(tokens, self.top_k, axis=0)
        rows = jnp.zeros((room.rows, width), x.dtype).at[places].set(copies, unique_indices=True)
        rows = _computed(self.activation, room, rows, self.up[...], self.down[...], ends)
        copies = rows.at[places].get(unique_indices=True).reshape(-1, self.top_k, width)
        y = (copies.astype(jnp.float32) * weights[..., None]).sum(1).astype(x.dtype)
        shape = (batch, time, experts)
        return y.reshape(x.shape), Routing(probabilities.reshape(shape), chosen.reshape(shape))


def balance_loss(routing: Routing, weights: Float[Array, "batch time"]) -> Float32[Array, " batch"]:
    """How unevenly each example's tokens load the experts: 1 if evenly, experts / top_k at worst.

    E · Σ f_e P_e of Fedus et al. 2021 (arXiv:2101.03961), section 2.2, with f_e expert e's share of
    the places, which sum to 1 for any top_k, and P_e its mean probability. Per example, as
    DeepSeek-V3 has it (arXiv:2412.19437, section 2.1.2): neither the batch nor what pads it moves
    an example's loss. Tokens count by `weights`; an example without weight gives 0.
    """
    weights = weights.astype(jnp.float32)
    total = weights.sum(-1)[:, None]
    total = jnp.where(total > 0, total, 1)
    chosen = routing.chosen.astype(jnp.float32)
    shares = chosen / chosen.sum(-1, keepdims=True)
    shares = (shares * weights[..., None]).sum(1) / total
    means = (routing.probabilities * weights[..., None]).sum(1) / total
    return chosen.shape[-1] * (shares * means).sum(-1)


class Room(NamedTuple):
    """How many rows are kept for what, known before any token is."""

    share: int  # rows of each expert in the one batched product
    block: int  # rows of one turn of the loop
    rows: int  # all: the shares, then as many blocks as the most uneven routing needs

    @classmethod
    def for_tokens(cls, tokens: int, top_k: int, experts: int) -> "Room":
        # Fewer places than experts (text is generated token by token): blocks of one row alone,
        # which read the chosen experts' weights and no others. Half the time at 8 experts.
        places = tokens * top_k
        share = -(-places // experts) if places >= experts else 0
        # A block costs a copy of an expert's weights, as much as some 80 rows on two CPU cores,
        # and its last rows may be empty; a quarter was no slower than a half or an eighth.
        block = max(share // 4, 1)
        # Most blocks are needed where `top_k` experts have all tokens: each expert more that is
        # beyond its share keeps a share, and fills no more than a block with its remainder.
        blocks = top_k * (tokens - share + block - 1) // block
        return cls(share, block, experts * share + blocks * block)


def assigned(
    room: Room,
    choices: Int32[Array, "tokens top_k"],
    chosen: Bool[Array, "tokens experts"],
) -> tuple[Int32[Array, " places"], Int32[Array, " experts"]]:
    """The row of every choice; and how many blocks there are, up to and with each expert's.

    An expert's tokens come in their order, first into its share, then into blocks of its own.
    """
    upto = jnp.cumsum(chosen, axis=0, dtype=jnp.int32)
    blocks = -(-jnp.maximum(upto[-1] - room.share, 0) // room.block)
    ends = jnp.cumsum(blocks, dtype=jnp.int32)
    beyond = chosen.shape[1] * room.share + (ends - blocks) * room.block - room.share
    rank = jnp.take_along_axis(upto, choices, axis=1) - 1
    rows = rank + jnp.where(rank < room.share, choices * room.share, beyond[choices])
    return rows.reshape(-1), ends


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _computed(
    activation: config.Activation,
    room: Room,
    rows: Float[Array, "rows width"],
    up: Float[Array, "experts width wide"],
    down: Float[Array, "experts hidden width"],
    ends: Int32[Array, " experts"],
) -> Float[Array, "rows width"]:
    """What each row's expert makes of it, in the dtype of rows; gradients of weights are float32.

    The reverse pass is our own: none exists for a loop whose number of turns the tokens decide.
    """
    return _computed_forward(activation, room, rows, up, down, ends)[0]


def _computed_forward(
    activation: config.Activation, room: Room, rows: Array, up: Array, down: Array, ends: Array
) -> tuple[Array, tuple]:
    saved = (rows, up, down, ends)
    up, down = up.astype(rows.dtype), down.astype(rows.dtype)
    wide = _shares(room, rows, len(up)) @ up
    y = _with_shares(jnp.zeros_like(rows), activate(activation, wide) @ down)

    def add_block(number: Array, y: Array) -> Array:
        expert, start = _block(room, ends, number)
        x = jax.lax.dynamic_slice_in_dim(rows, start, room.block)
        made = activate(activation, x @ up[expert]) @ down[expert]
        return jax.lax.dynamic_update_slice_in_dim(y, made, start, 0)

    return jax.lax.fori_loop(0, ends[-1], add_block, y), (*saved, wide)


def _computed_backward(
    activation: config.Activation, room: Room, saved: tuple, dy: Array
) -> tuple[Array, Array, Array, None]:
    rows, up, down, ends, wide = saved
    up, down = up.astype(rows.dtype), down.astype(rows.dtype)
    dshares, dup, ddown = _gradients(
        activation, _shares(room, rows, len(up)), wide, up, down, _shares(room, dy, len(up))
    )

    def add_block(number: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        drows, dup, ddown = sums
        expert, start = _block(room, ends, number)
        x, dx = (jax.lax.dynamic_slice_in_dim(a, start, room.block) for a in (rows, dy))
        wide = x @ up[expert]
        dx, more_up, more_down = _gradients(activation, x, wide, up[expert], down[expert], dx)
        drows = jax.lax.dynamic_update_slice_in_dim(drows, dx, start, 0)
        return drows, dup.at[expert].add(more_up), ddown.at[expert].add(more_down)

    sums = (_with_shares(jnp.zeros_like(rows), dshares), dup, ddown)
    return *jax.lax.fori_loop(0, ends[-1], add_block, sums), None


_computed.defvjp(_computed_forward, _computed_backward)


def _gradients(
    activation: config.Activation, x: Array, wide: Array, up: Array, down: Array, dy: Array
) -> tuple[Array, Array, Array]:
    """Of x, up and down, where wide = x @ up; of one expert, or of all in a leading axis."""
    hidden, pull = jax.vjp(partial(activate, activation), wide)
    ddown = jnp.matmul(hidden.mT, dy, preferred_element_type=jnp.float32)
    (dwide,) = pull(dy @ down.mT)
    dup = jnp.matmul(x.mT, dwide, preferred_element_type=jnp.float32)
    return dwide @ up.mT, dup, ddown


def _shares(room: Room, rows: Array, experts: int) -> Array:
    """The rows of every expert's share: [experts, share, width]."""
    return rows[: experts * room.share].reshape(experts, room.share, rows.shape[1])


def _with_shares(rows: Array, shares: Array) -> Array:
    """`rows` that begin with these shares."""
    flat = shares.reshape(shares.shape[0] * shares.shape[1], shares.shape[2])
    return jax.lax.dynamic_update_slice_in_dim(rows, flat, 0, 0)


def _block(room: Room, ends: Array, number: Array) -> tuple[Array, Array]:
    """The expert of a block beyond the shares, and the block's first row."""
    expert = (number >= ends).sum()
    return expert, len(ends) * room.share + number * room.block
