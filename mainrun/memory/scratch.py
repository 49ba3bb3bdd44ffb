"""What matrix products take on a CPU beside the compiler's count: packed copies of their operands.

XLA:CPU hands a product to Eigen (`TensorContractionThreadPool.h`), which lays its operands out anew
in float32 whatever the model's precision: at most two slices of 256 along the contracted axis, and
of an operand with many rows only those that a thread is at. Products of a batch run side by side,
and so do two that do not wait for each other, as the two gradients of one product. Found by
writing down what a step allocates.
"""

import heapq
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_CONTRACTED = 512
"""Of the contracted axis: two slices."""

_MOST_ROWS = 4096
"""Of an operand that is packed whole: sixteen blocks of about 256 keep two threads busy."""

_AT_ONCE = 2
_FLOAT32 = 4

_DEFINED = re.compile(r"^\s*(?:ROOT )?(%[\w.-]+) = \w+\[([\d,]*)\]", re.MULTILINE)
_PRODUCT = re.compile(r" = \w+\[[\d,]*\]\S* dot\(([^)]*)\), (.*)$", re.MULTILINE)
_NAME = re.compile(r"%[\w.-]+")


class Product(NamedTuple):
    """So many products of rows × contracted by contracted × columns."""

    batch: int
    rows: int
    contracted: int
    columns: int


def packed_bytes(module: str) -> int:
    """Of the largest products that run at once, in the text of a compiled module."""
    shapes = {name: _numbers(shape) for name, shape in _DEFINED.findall(module)}
    return sum(heapq.nlargest(_AT_ONCE, _each(module, shapes)))


def packed_for(products: Iterable[Product]) -> int:
    """The same of a forward pass's products, and of the two gradients of each."""
    sizes = (
        _packed(batch, contracted, *others)
        for batch, *axes in products
        for contracted, *others in (axes[at:] + axes[:at] for at in range(len(axes)))
    )
    return sum(heapq.nlargest(_AT_ONCE, sizes))


def _each(module: str, shapes: dict[str, list[int]]) -> Iterator[int]:
    for operands, attributes in _PRODUCT.findall(module):
        left, right = (shapes[name] for name in _NAME.findall(operands))
        batch = math.prod(left[axis] for axis in _axes("lhs_batch_dims", attributes))
        contracted = math.prod(left[axis] for axis in _axes("lhs_contracting_dims", attributes))
        each = max(1, batch * contracted)
        yield _packed(batch, contracted, math.prod(left) // each, math.prod(right) // each)


def _packed(batch: int, contracted: int, *rows: int) -> int:
    whole = sum(count for count in rows if count <= _MOST_ROWS)
    return _FLOAT32 * batch * min(contracted, _CONTRACTED) * whole


def _axes(name: str, attributes: str) -> list[int]:
    found = re.search(name + r"=\{([\d,]*)\}", attributes)
    return _numbers(found[1]) if found else []


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
