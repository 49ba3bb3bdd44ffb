"""`model.attention.num_heads: auto`: as many heads as make each about 64 dimensions wide.

What fits depends on widths that a sweep varies, so the number is found when a config is loaded; the
resolved config states it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mainrun import complaints
from mainrun.config import trees
from mainrun.config.model import Attention, Gpt, Model, Pattern
from mainrun.errors import UserError

_DIM = 64
"""What GPT-2, Llama and their kin have had at these sizes."""

_SETTING = "model.attention.num_heads"


def with_number(tree: Mapping[str, Any], origins: Mapping[str, str]) -> Mapping[str, Any]:
    """The settings of a config with a number for `auto`. UserError where there is none.

    Whatever else is wrong is left to the schema to say.
    """
    heads = trees.leaves(tree).get(_SETTING)
    if not isinstance(heads, str):
        return tree
    if heads != "auto":
        raise UserError(
            f"{_SETTING}={heads!r}: a whole number or 'auto' is expected"
            f"{complaints.place([_SETTING], origins)}"
        )
    model = trees.with_kinds(tree["model"], Model, Gpt())
    number = _number(_whole(model, Model), _whole(model["attention"], Attention), origins)
    return trees.merge(tree, {"model": {"attention": {"num_heads": number}}})


def best(widths: Sequence[int], multiple: int, *, even: bool) -> int | None:
    """The multiple of `multiple` that divides all widths into heads nearest 64 dimensions.

    Nearness is that of ratios, over all widths together; of two as near, the fewer heads. `even`:
    heads must have an even number of dimensions. None where there is none.
    """
    least = math.gcd(*widths)
    fitting = [
        heads
        for heads in range(multiple, least + 1, multiple)
        if least % heads == 0 and not (even and any(width // heads % 2 for width in widths))
    ]
    return min(fitting, key=lambda heads: (_distance(widths, heads), heads), default=None)


def _distance(widths: Sequence[int], heads: int) -> float:
    """Squared: wide blocks and narrow ones meet in the middle. Rounded: as near is as near."""
    return round(sum(math.log2(width / heads / _DIM) ** 2 for width in widths), 9)


def _number(
    model: Mapping[str, Any], attention: Mapping[str, Any], origins: Mapping[str, str]
) -> int:
    if attention.get("head_dim") is not None:
        raise UserError(
            f"{_SETTING}=auto chooses the heads' dimension, which "
            f"model.attention.head_dim={attention['head_dim']} says: give a number of heads, or "
            f"head_dim=null{complaints.place([_SETTING, 'model.attention.head_dim'], origins)}"
        )
    standing, dividing = _widths(model, attention), _divisors(attention)
    widths = [width for value in standing.values() for width in _listed(value)]
    if not widths or not all(map(_is_count, (*widths, *dividing.values()))):
        return 1  # the schema refuses the other number
    even = model.get("position") == "rotary" and attention.get("kind") != "latent"
    found = best(widths, math.lcm(*dividing.values()), even=even)
    if found is None:
        also = "".join(f" is a multiple of {name}={n} and" for name, n in dividing.items())
        said = " and ".join(f"{name}={_shown(value)}" for name, value in standing.items())
        parts = " into heads of an even dimension (model.position=rotary)" if even else ""
        raise UserError(
            f"{_SETTING}=auto: no number{also} divides {said}{parts}: change one of "
            f"them{complaints.place([_SETTING, *standing, *dividing], origins)}"
        )
    return found


def _widths(model: Mapping[str, Any], attention: Mapping[str, Any]) -> dict[str, Any]:
    """What the heads must divide, by the setting that says it: a number, or several."""
    if attention.get("intermediate_dim") is not None:
        return {"model.attention.intermediate_dim": attention["intermediate_dim"]}
    names = ("d_model", "bottleneck_sizes")
    return {f"model.{name}": model[name] for name in names if name in model}


def _divisors(attention: Mapping[str, Any]) -> dict[str, Any]:
    """What must divide the number of heads, by the setting that says it."""
    found: dict[str, Any] = {}
    if attention.get("num_kv_heads") is not None:
        found["model.attention.num_kv_heads"] = attention["num_kv_heads"]
    pattern = attention.get("pattern")
    if isinstance(pattern, Mapping) and "num_verts" in _whole(pattern, Pattern):
        found["model.attention.pattern.num_verts"] = _whole(pattern, Pattern)["num_verts"]
    return found


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _whole(settings: Mapping[str, Any], annotation: Any) -> dict[str, Any]:
    """With the defaults of what is not said, as far as its kind is one."""
    classes = trees.of_kind(complaints.dataclasses_in(annotation), settings.get("kind"))
    return {**(trees.defaults(classes[0]) if classes else {}), **settings}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
