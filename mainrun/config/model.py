"""Settings of the network: architectures, attention kinds, adapters.

Every combination that no network can have is refused here, before anything is compiled. A width of
null follows from the block it stands in.
"""

import dataclasses
from typing import Annotated, Literal, assert_never

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from mainrun.config.kinds import STRICT, Count, NonNegative, Positive, Probability
from mainrun.config.mlp import DenseMlp, Mlp


@dataclass(frozen=True, config=STRICT)
class AllKeys:
    kind: Literal["all"] = "all"


@dataclass(frozen=True, config=STRICT)
class LocalKeys:
    kind: Literal["local"] = "local"
    window_including_self: Count = 32


@dataclass(frozen=True, config=STRICT)
class FixedKeys:
    kind: Literal["fixed"] = "fixed"
    stride: Count = 32
    num_verts: Count = 1
    vertsize: Count = 1


@dataclass(frozen=True, config=STRICT)
class StridedKeys:
    kind: Literal["strided"] = "strided"
    stride: Count = 32


Pattern = Annotated[AllKeys | LocalKeys | FixedKeys | StridedKeys, Field(discriminator="kind")]


@dataclass(frozen=True, config=STRICT)
class CausalAttention:
    kind: Literal["causal"] = "causal"
    num_heads: Count = 8
    num_kv_heads: Count | None = None
    intermediate_dim: Count | None = None
    window_including_self: Count | None = None
    qk_norm: bool = False
    output_gate: bool = False
    value_residual: bool = False


@dataclass(frozen=True, config=STRICT)
class SparseAttention:
    kind: Literal["sparse"] = "sparse"
    num_heads: Count = 8
    num_kv_heads: Count | None = None
    intermediate_dim: Count | None = None
    block_size: Count = 1
    pattern: Pattern = dataclasses.field(default_factory=FixedKeys)
    qk_norm: bool = False
    output_gate: bool = False
    value_residual: bool = False

    @model_validator(mode="after")
    def _pattern_fits_blocks_and_heads(self) -> "SparseAttention":
        match self.pattern:
            case AllKeys():
                return self
            case LocalKeys(window_including_self=window):
                self._whole_blocks("window_including_self", window)
            case StridedKeys(stride=stride):
                self._whole_blocks("stride", stride)
            case FixedKeys(stride=stride, num_verts=verts, vertsize=size):
                self._whole_blocks("stride", stride)
                self._columns_fit(stride // self.block_size, verts, size)
            case _:
                assert_never(self.pattern)
        return self

    def _whole_blocks(self, name: str, tokens: int) -> None:
        if tokens % self.block_size:
            raise ValueError(
                f"model.attention.pattern.{name}={tokens} is not divisible by "
                f"model.attention.block_size={self.block_size}"
            )

    def _columns_fit(self, blocks: int, num_verts: int, vertsize: int) -> None:
        where = "model.attention.pattern"
        if blocks % vertsize:
            raise ValueError(
                f"{where}.vertsize={vertsize} does not divide the {blocks} blocks of a stride "
                f"({where}.stride / model.attention.block_size={self.block_size})"
            )
        if num_verts * vertsize > blocks:
            raise ValueError(
                f"{where}.num_verts={num_verts} times vertsize={vertsize} is more than the "
                f"{blocks} blocks of a stride"
            )
        if self.num_heads % num_verts:
            raise ValueError(
                f"model.attention.num_heads={self.num_heads} is not divisible by "
                f"{where}.num_verts={num_verts}"
            )


@dataclass(frozen=True, config=STRICT)
class SparseKAttention:
    kind: Literal["sparsek"] = "sparsek"
    num_heads: Count = 8
    num_kv_heads: Count | None = None
    intermediate_dim: Count | None = None
    num_selected: Count = 32
    window_including_self: Count = 32
    position_slope: NonNegative = 1e-6
    qk_norm: bool = False
    output_gate: bool = False
    value_residual: bool = False


@dataclass(frozen=True, config=STRICT)
class LatentAttention:
    kind: Literal["latent"] = "latent"
    num_heads: Count = 8
    head_dim: Count | None = None
    rotary_dim: Annotated[int, Field(ge=2, multiple_of=2)] = 32
    kv_rank: Count = 256
    query_rank: Count | None = None
    output_gate: bool = False


MultiHead = CausalAttention | SparseAttention | SparseKAttention
"""The kinds that share query, key and value projections."""

Attention = Annotated[
    CausalAttention | SparseAttention | SparseKAttention | LatentAttention,
    Field(discriminator="kind"),
]


@dataclass(frozen=True, config=STRICT)
class Lora:
    rank: Count = 8
    alpha: Positive = 16.0
    dropout: Probability = 0.0
    targets: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] = (
        "all",
    )


@dataclass(frozen=True, config=STRICT)
class Network:
    """What every architecture has."""

    kind: Literal["gpt", "unet_gpt"]
    d_model: Count = 512
    dropout: Probability = 0.1
    attention_dropout: Probability | None = None
    bias: bool = True
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: Positive = 1e-5
    norm_position: Literal["pre", "post"] = "pre"
    position: Literal["learned", "sinusoidal", "rotary"] = "learned"
    rotary_base: Positive = 10_000.0
    init: Literal["normal", "xavier", "kaiming", "uniform"] = "normal"
    scale_residual_init: bool = False
    layer_scale: Positive | None = None
    tie_embeddings: bool = True
    pad_vocab_to_multiple_of: Count = 1
    logit_softcap: Positive | None = None
    mlp: Mlp = dataclasses.field(default_factory=DenseMlp)
    attention: Attention = dataclasses.field(default_factory=CausalAttention)
    lora: Lora | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the residual stream: before the first block, and after each."""
        raise NotImplementedError

    @property
    def attention_rate(self) -> float:
        """The fraction of attention weights that is dropped."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @model_validator(mode="after")
    def _attention_fits_widths(self) -> "Network":
        # What goes into the blocks, by the name of the setting that says it.
        widths = [("model.d_model", self.d_model)]
        widths += [("model.bottleneck_sizes", width) for width in self.widths[1:-1]]
        if isinstance(self.attention, LatentAttention):
            _check_latent(self.attention, self.position, widths)
        else:
            _check_multi_head(self.attention, self.position, widths)
        return self


@dataclass(frozen=True, config=STRICT)
class Gpt(Network):
    kind: Literal["gpt"] = "gpt"
    num_layers: Count = 6

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.d_model,) * (self.num_layers + 1)


def _hourglass() -> tuple[int, ...]:
    return (256, 128, 256)


@dataclass(frozen=True, config=STRICT)
class UnetGpt(Network):
    kind: Literal["unet_gpt"] = "unet_gpt"
    bottleneck_sizes: Annotated[tuple[Count, ...], Field(min_length=1)] = dataclasses.field(
        default_factory=_hourglass
    )
    skip_connections: bool = True

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.d_model, *self.bottleneck_sizes, self.d_model)


Model = Annotated[Gpt | UnetGpt, Field(discriminator="kind")]


def _check_multi_head(attention: MultiHead, position: str, widths: list[tuple[str, int]]) -> None:
    heads, kv_heads = attention.num_heads, attention.num_kv_heads
    if kv_heads is not None and heads % kv_heads:
        raise ValueError(
            f"model.attention.num_heads={heads} is not divisible by "
            f"model.attention.num_kv_heads={kv_heads}"
        )
    if attention.intermediate_dim is not None:
        widths = [("model.attention.intermediate_dim", attention.intermediate_dim)]
    for name, width in widths:
        _check_divisible(name, width, heads)
        if position == "rotary" and width // heads % 2:
            raise ValueError(
                f"{name}={width} makes {heads} heads of {width // heads} dimensions, and "
                "model.position=rotary turns pairs of them: choose an even number"
            )
    if attention.value_residual and len({width for _, width in widths}) > 1:
        raise ValueError(
            "model.attention.value_residual=true needs heads of one size in every block: set "
            "model.attention.intermediate_dim"
        )


def _check_latent(attention: LatentAttention, position: str, widths: list[tuple[str, int]]) -> None:
    if position != "rotary":
        raise ValueError(
            f"model.position={position} does not go with model.attention.kind=latent, whose keys "
            "carry their position in a rotary part: set model.position=rotary"
        )
    if attention.head_dim is None:
        for name, width in widths:
            _check_divisible(name, width, attention.num_heads)


def _check_divisible(name: str, width: int, num_heads: int) -> None:
    if width % num_heads:
        raise ValueError(
            f"{name}={width} is not divisible by model.attention.num_heads={num_heads}"
        )
