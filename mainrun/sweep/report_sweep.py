"""Parameters of a sweep under the names of the mainrun report's layout, translated into ours.

Such a file says `program: train.py`, and dotted keys into the report's YAML: `hyperparams.lr`. What
the names and values mean is `config.report_names`'s; here is what is particular to a sweep: which
base its trials have, and that a value which cannot be had is left out of a list.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mainrun import config
from mainrun.config import report_names
from mainrun.errors import UserError

Parameter = tuple[str, Mapping[str, Any], str]
"""A setting's dotted path, what is said of it, and `file:line`."""


def translate(
    parameters: Sequence[Parameter],
) -> tuple[list[Parameter], Path, tuple[str, ...]]:
    """The parameters in our terms, a shipped config that has them, and what to know.

    Raises UserError, with the line, for one of which nothing can be had.
    """
    translated: list[Parameter] = []
    notes: list[str] = []
    for setting, spec, place in parameters:
        if not report_names.is_old_name(setting):
            translated.append((setting, spec, place))
        elif path := report_names.renamed(setting):
            notes.append(f"{place}: {setting} is {path} here")
            translated.append((path, _translated(setting, spec, place, notes), place))
        elif reason := report_names.why_left_out(setting):
            notes.append(f"{place}: {setting} is left out: {reason}")
        else:
            raise UserError(f"{place}: `{setting}` is no key of the report's layout")
    return translated, _base(setting for setting, _, _ in parameters), tuple(notes)


def _base(settings: Iterable[str]) -> Path:
    """Which shipped config has the architecture and the attention that the keys are about."""
    words = {word for setting in settings for word in setting.split(".")}
    files = {"unet_gpt": "unet", "sparsek": "sparsek", "sparse": "gpt_sparse"}
    file = next((file for name, file in files.items() if name in words), "gpt")
    return config.default_config_root() / "base" / f"{file}.yaml"


def _translated(
    setting: str, spec: Mapping[str, Any], place: str, notes: list[str]
) -> Mapping[str, Any]:
    """The content with its values in our terms; of a list, those that can be had."""
    if "value" in spec:
        return {**spec, "value": _value(setting, spec["value"], place)}
    if not isinstance(spec.get("values"), list):
        return spec
    kept: list[Any] = []
    refused: list[UserError] = []
    for value in spec["values"]:
        try:
            kept.append(_value(setting, value, place))
        except UserError as error:
            refused.append(error)
    if refused and not kept:
        raise refused[0]
    notes += [f"{error}; it is left out" for error in refused]
    return {**spec, "values": kept}


def _value(setting: str, value: Any, place: str) -> Any:
    try:
        return report_names.value_of(setting, value)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None
