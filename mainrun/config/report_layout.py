"""The layout of the mainrun report's own YAML files, translated into ours.

Its files have three sections: `hyperparams`, and in `model_configs` and `attn_configs` one mapping
for each architecture and attention, of which `hyperparams` chooses one. `translate` gives the same
run in our settings, as far as it can be, and one line for all that it assumes, leaves out or
changes. What cannot be had is a `UserError` that names the old key. What single keys are called
here stands in `report_names`.
"""

import difflib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from mainrun.config.report_names import (
    NAMES,
    SECTIONS,
    WORDS,
    general,
    renamed,
    underscored,
    value_of,
    why_left_out,
)
from mainrun.errors import UserError

_EXPECTED = ("optimizer", "lr", "weight_decay", "batch_size", "epochs", "context_length",
             "vocab_size", "num_titles", "val_frac", "seed", "evals_per_epoch")  # fmt: skip


class Translated(typing.NamedTuple):
    """Settings in our layout, where each was written, and what to know of the translation."""

    tree: dict[str, Any]
    origins: dict[str, str]
    notes: tuple[str, ...]


def is_report_layout(tree: Mapping[str, Any]) -> bool:
    """Whether a file's mapping is in the report's layout."""
    return any(underscored(key) in SECTIONS for key in tree)


def translate(tree: Mapping[str, Any], origins: Mapping[str, str], source: str) -> Translated:
    """The settings of a file in the report's layout. Raises UserError naming the old key.

    Only the architecture and the attention that it chooses are looked at.
    """
    places = {underscored(key): place for key, place in origins.items()}
    report = _Report(_with_underscores(tree), places, source)
    for key in report.old:
        if key not in SECTIONS:
            report.refuse(key, f"does not go with the report's layout, which {source} is in")
    chosen = report.section("hyperparams")
    architecture = report.word("hyperparams.model_architecture")
    model = report.section(f"model_configs.{architecture}")
    kind = report.word(f"model_configs.{architecture}.attention_layer")
    attention = report.section(f"attn_configs.{kind}")
    report.put_all("hyperparams", chosen)
    report.put_all(f"model_configs.{architecture}", _blocks(report, architecture, model))
    if kind == "sparse":
        attention = _sparse(report, attention)
    report.put_all(f"attn_configs.{kind}", attention)
    _assume(report, kind, architecture)
    return Translated(report.tree, report.origins, tuple(report.notes))


@dataclass
class _Report:
    """A file being translated: what it says, and what has come of it so far."""

    old: Mapping[str, Any]
    places: Mapping[str, str]
    source: str
    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, key: str, text: str) -> None:
        self.notes.append(f"{self.places.get(key, self.source)}: {key}{text}")

    def refuse(self, key: str, text: str) -> NoReturn:
        raise UserError(f"{self.places.get(key, self.source)}: {key} {text}")

    def section(self, path: str) -> dict[str, Any]:
        found: Any = self.old
        for name in path.split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        if not isinstance(found, Mapping):
            self.refuse(path, "is missing: the report's layout needs a mapping there")
        return dict(found)

    def word(self, key: str) -> str:
        """What the key chooses, of the words that it accepts."""
        parent, _, name = key.rpartition(".")
        value = self.section(parent).get(name)
        if value is None:
            self.refuse(key, f"is missing: accepted are {', '.join(WORDS[general(key)])}")
        return str(self.value(key, value))

    def whole(self, section: str, settings: Mapping[str, Any], name: str) -> int:
        value = settings.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.refuse(f"{section}.{name}", f"is {value}: a whole number above 0 is expected")
        return value

    def value(self, key: str, value: Any) -> Any:
        try:
            return value_of(key, value)
        except ValueError as error:
            raise UserError(f"{self.places.get(key, self.source)}: {error}") from None

    def put_all(self, section: str, settings: Mapping[str, Any]) -> None:
        for name, value in settings.items():
            key = f"{section}.{name}"
            path, reason = renamed(key), why_left_out(key)
            if path is None and reason is None:
                names = [n.rpartition(".")[2] for n in NAMES if n.startswith(section.split(".")[0])]
                close = difflib.get_close_matches(name, names, n=1)
                meant = f"; did you mean `{close[0]}`?" if close else ""
                self.refuse(key, f"is no key of the report's layout{meant}")
            if path is None:
                self.note(key, f" is left out: {reason}")
            elif path in self.origins:
                self.refuse(key, f"says again what {path} is")
            else:
                self.put(path, self.value(key, value), self.places.get(key, self.source))

    def put(self, path: str, value: Any, place: str) -> None:
        *parents, name = path.split(".")
        inner = self.tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        if isinstance(value, Mapping):  # of an optimizer, whose rate may stand there already
            inner[name] = {**value, **inner.get(name, {})}
        else:
            inner[name] = value
        self.origins[path] = place


def _blocks(report: _Report, architecture: str, model: dict[str, Any]) -> dict[str, Any]:
    """The architecture's settings, without those that its code never reads."""
    section = f"model_configs.{architecture}"
    width, d_model = model.pop("hidden_layer", None), model.get("d_model")
    if architecture == "unet_gpt":
        model.pop("n_layer", None)
        report.note(section, ": n_layer and hidden_layer are left out: the widths decide")
    elif width not in (None, d_model):
        report.refuse(f"{section}.hidden_layer", f"is {width}: only d_model, {d_model}, can be")
    return {"init_method": "xavier", **model}  # the default in the report's code


def _sparse(report: _Report, attention: dict[str, Any]) -> dict[str, Any]:
    """The pattern, its numbers lowered to what such a pattern can have, each time with a note.

    The public code never read them: it made dense causal attention of every `sparse`.
    """
    section = "attn_configs.sparse"
    report.note(section, " was dense causal attention in the public code; here it is sparse")
    kind = attention.get("attn_type")
    if kind not in ("all", "fixed", "local", "strided"):
        report.refuse(f"{section}.attn_type", f"is {kind}: accepted are all, fixed, local, strided")

    def number(name: str) -> int:
        return report.whole(section, attention, name)

    def lower(name: str, to: int, because: str) -> None:
        if attention[name] != to:
            report.note(f"{section}.{name}", f"={attention[name]} {because}: {to} is taken")
            attention[name] = to

    context = report.whole("hyperparams", report.section("hyperparams"), "context_length")
    tile, given = number("sparseblocksize"), attention.pop("n_bctx", None)
    if given not in (None, context / tile):
        report.note(f"{section}.n_bctx", f"={given} is left out: {context} / {tile} decides")
    stride = context if kind == "all" else number("local_attn_ctx")
    if stride % tile or context % tile:
        what = f"must divide local_attn_ctx={stride} and context_length={context}"
        lower("sparseblocksize", 1, what)
    if kind == "fixed":
        columns, heads = stride // attention["sparseblocksize"], number("n_head")
        verts = _largest_divisor(heads, min(number("num_verts"), columns))
        lower("num_verts", verts, f"must divide n_head={heads} and be at most {columns}")
        size = _largest_divisor(columns, min(number("vertsize"), columns // verts))
        lower("vertsize", size, f"must divide {columns} columns and fit in them {verts} times")
    unread = {"fixed": (), "local": ("num_verts", "vertsize"), "strided": ("num_verts", "vertsize"),
              "all": ("num_verts", "vertsize", "local_attn_ctx")}[kind]  # fmt: skip
    for name in unread:
        if attention.pop(name, None) is not None:
            report.note(f"{section}.{name}", f" is left out: {kind} has none")
    if kind == "local":
        place = report.places.get(f"{section}.local_attn_ctx", report.source)
        window = attention.pop("local_attn_ctx")
        report.put("model.attention.pattern.window_including_self", window, place)
    return attention


def _largest_divisor(number: int, limit: int) -> int:
    return next(n for n in range(limit, 0, -1) if number % n == 0)


def _assume(report: _Report, kind: str, architecture: str) -> None:
    """What the report's code has without a key for it."""
    source = report.source
    chosen = report.section("hyperparams")
    if "scheduler" not in chosen:
        report.put("schedule", value_of("hyperparams.scheduler", "cosine"), source)
        report.note("hyperparams.scheduler", " is missing: cosine is taken")
    if absent := [name for name in _EXPECTED if name not in chosen]:
        report.note("hyperparams", f": {', '.join(absent)} missing: the defaults here are taken")
    if chosen.get("amp_bool") is True:
        report.note("hyperparams.amp_bool", ": bfloat16 is taken for float16; it needs no scaling")
    if architecture == "unet_gpt":
        report.put("model.skip_connections", False, source)
        report.note("model_configs.unet_gpt", " had no skip connections: skip_connections is false")
    if kind == "sparsek":
        report.put("model.attention.window_including_self", 1, source)
        report.note("attn_configs.sparsek", " had no window: window_including_self is 1")
    report.put("tokenizer.fit_on", "all", source)
    report.put("training.grad_clip", 1.0, source)
    report.notes.append(
        f"{source}: assumed, as in the report's code: tokenizer fitted on all titles, no warm-up, "
        "decay of all parameters, PyTorch's b2, gradients clipped at 1; its loss is "
        "val/loss_mainrun here"
    )


def _with_underscores(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {underscored(key): _with_underscores(item) for key, item in value.items()}
    return value
