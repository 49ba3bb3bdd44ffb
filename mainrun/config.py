"""Every setting of a run, and how files and overrides become one frozen `Config`.

The classes are the schema: names, types, ranges, defaults. `config/base.yaml` states the same
defaults with their units, and a test holds the two together. `load` merges a file, its `extends`
parents and the overrides of the command line; whatever does not fit is a `UserError` that names
the dotted path, where it was written and what would be accepted. No JAX here.
"""

import ast
import contextlib
import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from mainrun import complaints, yaml12
from mainrun.errors import UserError

_STRICT = ConfigDict(extra="forbid", strict=True)

Settings = TypeVar("Settings")

Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, config=_STRICT)
class Duration:
    """A stretch of training, said in exactly one of three units."""

    steps: Annotated[int, Field(ge=0)] | None = None
    epochs: NonNegative | None = None
    fraction: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _one_unit(self) -> "Duration":
        if sum(x is not None for x in (self.steps, self.epochs, self.fraction)) != 1:
            raise ValueError("give exactly one of {steps: n}, {epochs: x}, {fraction: x}")
        return self

    def in_steps(self, *, total_steps: int, steps_per_epoch: int) -> int:
        """The same stretch in optimizer steps, rounded to the nearest."""
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            return round(self.epochs * steps_per_epoch)
        assert self.fraction is not None
        return round(self.fraction * total_steps)


@dataclass(frozen=True, config=_STRICT)
class Data:
    source: Annotated[str, Field(min_length=1)] = "hacker-news"
    field: Annotated[str, Field(min_length=1)] = "title"
    revision: str | None = None
    num_documents: Count | None = 100_000
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.10
    context_length: Annotated[int, Field(ge=2)] = 128
    packing: Literal["stream", "documents"] = "stream"
    mask_documents: bool = False
    order: Literal["sequential", "shuffled"] = "sequential"


@dataclass(frozen=True, config=_STRICT)
class Bpe:
    kind: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Field(ge=259)] = 16_000  # 256 bytes and three special tokens
    fit_on: Literal["train", "all"] = "train"


@dataclass(frozen=True, config=_STRICT)
class Char:
    kind: Literal["char"] = "char"
    fit_on: Literal["train", "all"] = "train"


Tokenizer = Annotated[Bpe | Char, Field(discriminator="kind")]


@dataclass(frozen=True, config=_STRICT)
class GeluMlp:
    kind: Literal["gelu"] = "gelu"
    hidden: Count = 2048


Mlp = GeluMlp


@dataclass(frozen=True, config=_STRICT)
class CausalAttention:
    kind: Literal["causal"] = "causal"
    num_heads: Count = 8


Attention = CausalAttention


@dataclass(frozen=True, config=_STRICT)
class Gpt:
    kind: Literal["gpt"] = "gpt"
    d_model: Count = 512
    num_layers: Count = 6
    dropout: Probability = 0.1
    tie_embeddings: bool = True
    mlp: Mlp = dataclasses.field(default_factory=GeluMlp)
    attention: Attention = dataclasses.field(default_factory=CausalAttention)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "Gpt":
        if self.d_model % self.attention.num_heads:
            raise ValueError(
                f"model.d_model={self.d_model} is not divisible by "
                f"model.attention.num_heads={self.attention.num_heads}"
            )
        return self


Model = Gpt


@dataclass(frozen=True, config=_STRICT)
class Sgd:
    kind: Literal["sgd"] = "sgd"
    learning_rate: NonNegative = 6e-3
    momentum: Probability = 0.0
    weight_decay: NonNegative = 0.0
    decay_on: Literal["matrices", "all"] = "matrices"


@dataclass(frozen=True, config=_STRICT)
class AdamW:
    kind: Literal["adamw"] = "adamw"
    learning_rate: NonNegative = 1e-3
    b1: Probability = 0.9
    b2: Probability = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    decay_on: Literal["matrices", "all"] = "matrices"


Optimizer = Annotated[Sgd | AdamW, Field(discriminator="kind")]


def _no_warmup() -> Duration:
    return Duration(steps=0)


def _tenth() -> Duration:
    return Duration(fraction=0.1)


@dataclass(frozen=True, config=_STRICT)
class Cosine:
    kind: Literal["cosine"] = "cosine"
    warmup: Duration = dataclasses.field(default_factory=_tenth)
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0


@dataclass(frozen=True, config=_STRICT)
class Linear:
    kind: Literal["linear"] = "linear"
    warmup: Duration = dataclasses.field(default_factory=_tenth)
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0


@dataclass(frozen=True, config=_STRICT)
class Constant:
    kind: Literal["constant"] = "constant"
    warmup: Duration = dataclasses.field(default_factory=_no_warmup)


Schedule = Annotated[Cosine | Linear | Constant, Field(discriminator="kind")]


def _every_epoch() -> Duration:
    return Duration(epochs=1)


@dataclass(frozen=True, config=_STRICT)
class Checkpoint:
    every: Duration = dataclasses.field(default_factory=_every_epoch)
    keep: Annotated[int, Field(ge=1)] = 2


@dataclass(frozen=True, config=_STRICT)
class Training:
    epochs: Positive = 7.0
    max_steps: Count | None = None
    batch_size: Count = 64
    grad_accumulation: Count = 1
    grad_clip: Positive | None = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    evals_per_epoch: Annotated[int, Field(ge=0)] = 3
    num_samples: Annotated[int, Field(ge=0)] = 4
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> "Training":
        if self.batch_size % self.grad_accumulation:
            raise ValueError(
                f"training.batch_size={self.batch_size} is not divisible by "
                f"training.grad_accumulation={self.grad_accumulation}"
            )
        return self


@dataclass(frozen=True, config=_STRICT)
class Tracking:
    project: Annotated[str, Field(min_length=1)] = "mainrun"
    entity: str | None = None
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    name: str | None = None
    tags: tuple[str, ...] = ()
    log_every: Count = 1


@dataclass(frozen=True, config=_STRICT)
class Config:
    """One run, whole: everything that decides its numbers, and where they are told."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1337
    data: Data = dataclasses.field(default_factory=Data)
    tokenizer: Tokenizer = dataclasses.field(default_factory=Bpe)
    model: Model = dataclasses.field(default_factory=Gpt)
    optimizer: Optimizer = dataclasses.field(default_factory=AdamW)
    schedule: Schedule = dataclasses.field(default_factory=Cosine)
    training: Training = dataclasses.field(default_factory=Training)
    tracking: Tracking = dataclasses.field(default_factory=Tracking)


_ADAPTER = TypeAdapter(Config)


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The config that the file, its `extends` parents and `key.path=value` overrides make.

    What neither states has its default. Raises UserError: one line, naming path, place and remedy.
    """
    tree, origins = _read_with_parents(path, seen=()) if path else ({}, {})
    changes, changed = _read_overrides(overrides)
    settings = _merge(_merge(as_dict(Config()), tree), changes)
    return checked(Config, settings, origins | changed)


def as_dict(config: Config) -> dict[str, Any]:
    """Plain dicts, lists and scalars: what `to_yaml` writes and W&B stores."""
    plain = _ADAPTER.dump_python(config, mode="json")
    return typing.cast(dict[str, Any], _without_unset_units(plain))


def to_yaml(config: Config) -> str:
    """A file that `load` reads back to the same config."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)


def default_config_root() -> Path:
    """The folder `config/` of a checkout, or its copy inside an installed package."""
    package = Path(__file__).resolve().parent
    beside = package.parent / "config"
    return beside if (beside / "base.yaml").is_file() else package / "_config"


# ---------------------------------------------------------------------------------------------
# Reading


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    resolved = path.resolve()
    if resolved in seen:
        chain = " → ".join(str(p.name) for p in (*seen, resolved))
        raise UserError(f"{path}: the config extends itself ({chain})")
    tree, origins = yaml12.read(path)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree, origins
    if not isinstance(parent, str):
        raise UserError(f"{path}: `extends` names one file, not {parent!r}")
    base, base_origins = _read_with_parents(path.parent / parent, (*seen, resolved))
    return _merge(base, tree), base_origins | origins


def _read_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """`a.b=1` as {a: {b: 1}}; later ones win.

    What a sweep's agent of W&B passes is taken too: leading dashes, values as Python writes them,
    and keys of W&B's own, which are no settings.
    """
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.lstrip("-").partition("=")
        if not equals or not key or not all(key.split(".")):
            raise UserError(f"{override!r} is not an override: write key.path=value")
        if key.startswith("_wandb"):
            continue
        try:
            value = _value(text)
        except ValueError as error:
            raise UserError(f"{key}={text}: {error}") from error
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = _merge(tree, value)
        origins[key] = "command line"
    return tree, origins


def _value(text: str) -> Any:
    """What the text is in YAML; `None`, alone or in a list or mapping, as Python means it.

    All else that Python writes (`False`, `[128]`, `{'b1': 0.9}`) is YAML as well.
    """
    if "None" in text:
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(text)
            if value is None or isinstance(value, (list, dict)):
                return value
    return yaml12.parse(text)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins; mappings merge, but one whose kind or unit changes is replaced."""
    merged = dict(base)
    for key, new in over.items():
        old = merged.get(key)
        if isinstance(new, Mapping) and isinstance(old, Mapping) and not _replaces(new, old):
            merged[key] = _merge(old, new)
        else:
            merged[key] = new
    return merged


def _replaces(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    units = {"steps", "epochs", "fraction"}
    return new.get("kind", old.get("kind")) != old.get("kind") or (
        bool(new) and set(new) <= units and set(old) <= units
    )


# ---------------------------------------------------------------------------------------------
# Validation


def checked(
    schema: type[Settings], tree: Mapping[str, Any], origins: Mapping[str, str]
) -> Settings:
    """The settings that `tree` states; UserError naming path, place and remedy where it cannot."""
    adapter = _ADAPTER if schema is Config else TypeAdapter(schema)
    try:
        # As JSON, because strict mode then still takes mappings for classes and lists for tuples.
        return typing.cast(Settings, adapter.validate_json(json.dumps(tree)))
    except ValidationError as error:
        raise UserError(complaints.message(error, schema, tree, origins)) from None


def _without_unset_units(value: Any) -> Any:
    """A duration as the one unit that was given."""
    if isinstance(value, dict):
        if set(value) == {"steps", "epochs", "fraction"}:
            return {unit: amount for unit, amount in value.items() if amount is not None}
        return {key: _without_unset_units(item) for key, item in value.items()}
    return value
