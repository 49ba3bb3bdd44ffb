"""Causal attention by cuDNN's fused kernels: no scores in memory, forward or backward.

A kernel is told what it may see by a window, and of documents by where they begin, or else by a
dense mask that all heads share. Which networks and devices this is for, and whether it can be
trusted there, is `kernels`' to say; the plain form is `attention.attend`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from mainrun import config
from mainrun.model import masks

WIDEST_HEAD = 128
"""The widest head that every GPU's kernels take."""


class Documents(NamedTuple):
    """Where the documents of each row lie, -1 where a row has no more, as cuDNN reads it."""

    lengths: Int32[Array, "batch most"]
    offsets: Int32[Array, "batch most_and_one"]  # the last is always -1


class Asked(NamedTuple):
    """What a kernel is asked for: causal attention, and what else hides keys."""

    scale: float
    window: int | None  # newest keys that a query sees, its own counted
    mask: Bool[Array, "batch 1 time time"] | None
    documents: Documents | None


Call = Callable[[Array, Array, Array, Asked], Array]
"""Queries, keys and values [batch, time, heads, dim] to the output."""


@dataclass(frozen=True)
class Kernel:
    """How attention over a whole text is computed, where the kind of attention lets it."""

    name: Literal["plain", "cudnn"]
    call: Call | None = None  # None: the plain form
    why: str = ""  # no other
    most_documents: int | None = None  # in a row, if the kernel is told where they begin
    warning: str | None = None

    def __str__(self) -> str:
        """`plain (cpu)`, `cudnn`, `cudnn (up to 12 documents by offsets)`."""
        packed = self.most_documents
        said = self.why if packed is None else f"up to {packed} documents by offsets"
        return self.name + (f" ({said})" if said else "")


PLAIN = Kernel("plain")


def newest_keys(attention: config.Attention, time: int) -> int | None:
    """How many keys a query sees, its own and the newest before it; None: it sees others."""
    match attention:
        case config.CausalAttention(window_including_self=window):
            return time if window is None else min(window, time)
        case config.SparseAttention(pattern=config.AllKeys()) | config.LatentAttention():
            return time
        case config.SparseAttention(
            block_size=1, pattern=config.LocalKeys(window_including_self=window)
        ):
            return min(window, time)
        case _:
            return None


def by_cudnn(
    q: Float[Array, "batch time heads dim"],
    k: Float[Array, "batch time kv_heads dim"],
    v: Float[Array, "batch time kv_heads dim"],
    asked: Asked,
) -> Float[Array, "batch time heads dim"]:
    """float16 or bfloat16. Raises what JAX raises where this cuDNN or GPU has no such kernel."""
    if asked.documents is None:
        newest = None if asked.window is None else (asked.window - 1, 0)
        return jax.nn.dot_product_attention(
            q, k, v, mask=asked.mask, scale=asked.scale, is_causal=True,
            local_window_size=newest, implementation="cudnn",
        )  # fmt: skip
    # JAX's public function has no documents; where this one moves, the mask is used (`kernels`).
    from jax._src.cudnn import fused_attention_stablehlo as private

    lengths, offsets = asked.documents
    return private.dot_product_attention(
        q, k, v, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=offsets, kv_offsets=offsets,
        scale=asked.scale, mask_type=private.MaskType.PADDING_CAUSAL,
        sliding_window_length=asked.window,
    )  # fmt: skip


def attend(
    q: Float[Array, "batch heads time dim"],
    k: Float[Array, "batch kv_heads time dim"],
    v: Float[Array, "batch kv_heads time value_dim"],
    *,
    call: Call,
    newest: int,
    segment_ids: Int[Array, "batch time"] | None = None,
    most_documents: int | None = None,
    scale: float | None = None,
) -> Float[Array, "batch heads time value_dim"]:
    """What `attention.attend` gives where each query sees the `newest` keys of its document.

    Without `most_documents`, documents are told by a mask, and the window in it too: not every
    cuDNN takes a window beside a mask. With it, by where they begin; the output of a row with more
    of them is NaN. Segment ids must not come back within a row. Values may be narrower than keys.
    """
    time, dim, value_dim = q.shape[2], q.shape[3], v.shape[3]
    window = None if newest >= time else newest
    mask = documents = None
    if segment_ids is not None and most_documents is None:
        seen = masks.causal & masks.same_document(segment_ids)
        seen = seen if window is None else seen & masks.window_including_self(window)
        mask, window = masks.grid(seen, jnp.arange(time), jnp.arange(time), 1), None
    elif segment_ids is not None and most_documents is not None:
        documents = lying(segment_ids, most_documents)
    asked = Asked(dim**-0.5 if scale is None else scale, window, mask, documents)
    # Every kernel takes one width of heads; a value's zeros cost less than scores in memory.
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, dim - value_dim)))
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    mixed = call(q, k, v, asked).swapaxes(1, 2)[..., :value_dim]
    if segment_ids is None or documents is None:
        return mixed
    is_whole = documents.lengths.clip(0).sum(1) == time
    return jnp.where(is_whole[:, None, None, None], mixed, jnp.nan)


def lying(segment_ids: Int[Array, "batch time"], most: int) -> Documents:
    """Where the documents of each row lie; of more than `most`, the last are left out."""
    most = max(2, most)  # JAX takes one as no documents at all
    begins = segment_ids[:, 1:] != segment_ids[:, :-1]
    number = jnp.pad(jnp.cumsum(begins, axis=1), ((0, 0), (1, 0)))
    lengths = (number[:, :, None] == jnp.arange(most)).sum(1)
    offsets = jnp.cumsum(lengths, axis=1) - lengths
    lengths, offsets = (jnp.where(lengths > 0, x, -1) for x in (lengths, offsets))
    ended = jnp.pad(offsets, ((0, 0), (0, 1)), constant_values=-1)
    return Documents(lengths.astype(jnp.int32), ended.astype(jnp.int32))
