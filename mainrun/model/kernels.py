"""Which kernel computes attention: a fused one where network and device have it and it is right.

What a device is comes from `training.backend`. A fused kernel is tried once, on a small random
text of several documents, against the plain form: other systems' fused paths have let documents
see each other (MaxText #4476), and a wrong kernel trains without a word.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mainrun import config
from mainrun.errors import UserError, one_line
from mainrun.model import fused, masks
from mainrun.model.attention import attend
from mainrun.model.fused import PLAIN, Call, Kernel, by_cudnn

_BY_MASK = 512
"""The longest text whose documents are told by a mask where both can be: the mask is one bfloat16 a
pair, for all heads and layers (SPEED 1.1; not measured here)."""

_MOST_DOCUMENTS = 32
"""More of them in a row are told by a mask. The kernel keeps a float32 for each document, head and
token of every layer (its softmax statistics), which then outweigh the mask."""

_OLDEST = (8, 0)  # compute capability: Ampere
_PACKING = (9, 0)  # of where documents begin: Hopper

_TOLERANCE = 0.04
"""Of the largest number, as large a difference as 8 bits of mantissa make: weights and their
gradients are rounded to them inside the kernel."""


class Device(NamedTuple):
    """What there is to know of one."""

    platform: str  # cpu · gpu
    capability: tuple[int, int] | None = None  # CUDA's; None: unknown, or none


class Packing(NamedTuple):
    """The texts that attention meets."""

    context_length: int
    masks_documents: bool
    most_documents: int | None = None  # in a row; None: unknown


@dataclass(frozen=True)
class Case:
    """One shape of attention, to try a kernel on."""

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    precision: str
    time: int
    newest: int
    has_documents: bool
    most_documents: int | None


Check = Callable[[Case], str | None]
"""What is wrong with the fused kernel in this case; None: nothing."""


def choose(
    asked: Literal["auto", "plain", "fused"],
    network: config.Network,
    precision: str,
    texts: Packing,
    device: Device,
    check: Check | None = None,
) -> Kernel:
    """The fastest kernel that is right; plain, with a warning, where a fused one is wrong.

    Raises UserError where `fused` is asked for and cannot be had.
    """
    if asked == "plain":
        return replace(PLAIN, why="as training.attention_kernel says")
    against = _obstacle(network, precision, texts, device)
    if against is not None:
        return _refused(asked, against)
    found: list[str] = []
    for most_documents in _tellings(texts, device):
        cases = _cases(network, precision, texts, most_documents)
        wrong = next(filter(None, map(check or _checked, cases)), None)
        if wrong is None:
            return Kernel("cudnn", by_cudnn, "", most_documents, "; ".join(found) or None)
        told = "" if most_documents is None else ", told where documents begin,"
        found.append(f"cuDNN's attention{told} is not used: {wrong}")
    kernel = _refused(asked, "this cuDNN")
    return replace(kernel, warning="; ".join([*found, "the plain form is"]))


def difference(case: Case, call: Call = by_cudnn, seed: int = 0) -> str | None:
    """How the kernel differs from the plain form in values or gradients, or what it raises.

    With documents, a token must have exactly no gradient to another document.
    """
    segments = _documents(case.time) if case.has_documents else None
    inputs, cotangent = _random(case, seed)

    def by_kernel(q: Array, k: Array, v: Array) -> Array:
        return fused.attend(
            q, k, v, call=call, newest=case.newest, segment_ids=segments,
            most_documents=case.most_documents,
        )  # fmt: skip

    try:
        ours = _pulled(by_kernel, inputs, cotangent)
        rest = _pulled(by_kernel, inputs, _of_last(cotangent, segments))
        # Without gradients, as in evaluation, JAX calls another kernel of cuDNN's.
        alone = np.asarray(jax.jit(by_kernel)(*inputs), np.float32)
    except Exception as error:  # private parts of JAX, cuDNN and the driver raise as they please
        return f"{type(error).__name__}: {one_line(error)[:200]}"

    places = jnp.arange(case.time)
    mask = masks.causal & masks.window_including_self(case.newest)
    mask = mask if segments is None else mask & masks.same_document(segments)
    grid = masks.grid(mask, places, places, case.heads)
    wide = tuple(x.astype(jnp.float32) for x in inputs)
    theirs = _pulled(lambda *x: attend(x[0], x[1], x[2], grid), wide, cotangent.astype(jnp.float32))
    names = ("output", "dq", "dk", "dv", "output without gradients")
    for name, one, other in zip(names, [*ours, alone], [*theirs, theirs[0]], strict=True):
        apart = float(np.abs(one - other).max() / np.abs(other).max())
        if not apart <= _TOLERANCE:  # nor a number
            return f"its {name} is {apart:.1%} of the largest number apart from the plain form's"
    if segments is None:
        return None
    others = np.asarray(segments != segments[:, -1:])[:, None, :, None]
    leaked = max(float(np.abs(gradient * others).max()) for gradient in rest[1:])
    return f"a document has a gradient of {leaked:.1e} to another" if leaked else None


def for_members(kernel: Kernel, *, masks_documents: bool, own_dropout: bool) -> Kernel:
    """What runs side by side under `vmap` can use: there JAX's kernel takes no documents.

    `own_dropout`: each has a rate of its own, of attention weights too.
    """
    if kernel.call is None or not (masks_documents or own_dropout):
        return kernel
    why = "members mask documents" if masks_documents else "members differ in dropout"
    return replace(PLAIN, why=why)


@functools.cache
def _checked(case: Case) -> str | None:
    """Once a process."""
    return difference(case)


def _obstacle(
    network: config.Network, precision: str, texts: Packing, device: Device
) -> str | None:
    """What no fused kernel of this device can compute, or None."""
    if device.platform != "gpu":
        return device.platform
    if device.capability is None or device.capability < _OLDEST:
        major, minor = device.capability or (0, 0)
        return f"compute capability {major}.{minor}" if device.capability else "no CUDA"
    if precision not in ("bfloat16", "float16"):
        return precision
    if network.attention_rate:
        return "dropout of attention weights"
    if fused.newest_keys(network.attention, texts.context_length) is None:
        return f"{network.attention.kind} attention"
    for dim, _ in _widths(network):
        if dim % 8 or dim > fused.WIDEST_HEAD:
            return f"heads of {dim} dimensions"
    if texts.masks_documents and texts.context_length % 2:
        return "documents in an odd context"
    return None


def _refused(asked: str, against: str) -> Kernel:
    if asked == "fused":
        raise UserError(
            f"training.attention_kernel=fused cannot be had ({against}): it needs an NVIDIA GPU of "
            "compute capability 8.0 and its cuDNN, training.precision=bfloat16 or float16, "
            "model.attention_dropout=0, causal, windowed or latent attention, heads of a multiple "
            f"of 8 and at most {fused.WIDEST_HEAD} dimensions; set auto or plain"
        )
    return replace(PLAIN, why=against)


def _tellings(texts: Packing, device: Device) -> list[int | None]:
    """How documents can be told to a kernel, the best first: `Kernel.most_documents`."""
    most = texts.most_documents
    packs = device.capability is not None and device.capability >= _PACKING
    is_long = texts.masks_documents and texts.context_length > _BY_MASK
    if packs and is_long and most is not None and most <= _MOST_DOCUMENTS:
        return [most, None]
    return [None]


def _cases(
    network: config.Network, precision: str, texts: Packing, most_documents: int | None
) -> list[Case]:
    """The network's heads, on short texts."""
    time = min(texts.context_length, 256)
    newest = fused.newest_keys(network.attention, texts.context_length)
    assert newest is not None
    heads = network.attention.num_heads
    return [
        Case(
            heads=heads,
            kv_heads=getattr(network.attention, "num_kv_heads", None) or heads,
            dim=dim,
            value_dim=value_dim,
            precision=precision,
            time=time,
            newest=time if newest == texts.context_length else min(newest, time // 3 + 1),
            has_documents=texts.masks_documents,
            most_documents=None if most_documents is None else max(most_documents, 3),
        )
        for dim, value_dim in _widths(network)
    ]


def _widths(network: config.Network) -> list[tuple[int, int]]:
    """Dimensions of the heads of queries and of values, of every kind of block."""
    attention = network.attention
    found = []
    for width in network.widths[:-1]:
        match attention:
            case config.LatentAttention():
                dim = attention.head_dim or width // attention.num_heads
                found.append((dim + attention.rotary_dim, dim))
            case _:
                dim = (attention.intermediate_dim or width) // attention.num_heads
                found.append((dim, dim))
    return list(dict.fromkeys(found))


def _documents(time: int) -> Array:
    """Segment ids of two rows: three documents, and two."""
    borders = np.array([[time // 4, time // 2 + 1], [time // 3, time]])
    return jnp.asarray((np.arange(time)[None, :, None] >= borders[:, None]).sum(-1), jnp.int32)


def _random(case: Case, seed: int) -> tuple[tuple[Array, ...], Array]:
    """Queries, keys, values, and the output's gradient.

    Queries are long, so that a query's weights are few and large, and a key too many is seen.
    """
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [
        (2, heads, case.time, dim)
        for heads, dim in (
            (case.heads, case.dim),
            (case.kv_heads, case.dim),
            (case.kv_heads, case.value_dim),
            (case.heads, case.value_dim),
        )
    ]
    q, k, v, cotangent = (
        jax.random.normal(key, shape, case.precision)
        for key, shape in zip(keys, shapes, strict=True)
    )
    return (2 * q, k, v), cotangent


def _of_last(
    cotangent: Float[Array, "batch heads time dim"], segments: Array | None
) -> Float[Array, "batch heads time dim"]:
    """That of the last document alone."""
    if segments is None:
        return cotangent
    return cotangent * (segments == segments[:, -1:])[:, None, :, None].astype(cotangent.dtype)


def _pulled(
    function: Callable[..., Array], inputs: tuple[Array, ...], cotangent: Array
) -> list[np.ndarray]:
    """The output and the gradients of the inputs, float32."""

    @jax.jit
    def both(inputs: tuple[Array, ...], cotangent: Array) -> tuple[Array, ...]:
        output, pull = jax.vjp(function, *inputs)
        return output, *pull(cotangent)

    return [np.asarray(x, np.float32) for x in both(inputs, cotangent)]
