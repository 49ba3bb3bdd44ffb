"""Which class of Hugging Face's `transformers` holds a model.

A class holds a model when every one of the model's settings has a value that the class computes
alike. A setting that no table below names is held by no class: a new one is refused until somebody
has shown (`tests/test_parity.py`) that its numbers come out the same.
"""

import dataclasses
import json
from collections.abc import Container, Mapping
from typing import Any, Literal, assert_never, get_args

from mainrun import config
from mainrun.errors import UserError

Architecture = Literal[
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen3ForCausalLM",
    "MixtralForCausalLM",
    "DeepseekV3ForCausalLM",
]
"""The first that holds a model is taken."""

Accepted = Mapping[str, Container[Any]]
"""For settings by dotted path: the values that are held. What is not named is not held."""


class _Anything:
    def __contains__(self, value: object) -> bool:
        return True


_ANY = _Anything()


def architecture(model: config.Network) -> Architecture:
    """The class that holds the model. UserError: the settings that the nearest does not hold."""
    classes: tuple[Architecture, ...] = get_args(Architecture)
    obstacles = {name: _obstacles(name, model) for name in classes}
    # Of classes with as few, the one that at least has the kind of part that the model has.
    nearest = min(classes, key=lambda c: (len(obstacles[c]), ".kind=" in "".join(obstacles[c])))
    if found := obstacles[nearest]:
        raise UserError(
            f"{', '.join(found)} {'has' if len(found) == 1 else 'have'} no place in a Hugging Face "
            f"class, the nearest being {nearest}: use --format safetensors"
        )
    return nearest


def _obstacles(name: Architecture, model: config.Network) -> list[str]:
    """The settings by which the class differs from the model, as the user writes them."""
    accepted = _accepted(name, model)
    wrong = {
        path: value
        for path, value in config.leaves(dataclasses.asdict(model)).items()
        if path not in accepted or value not in accepted[path]
    }
    kinds = [path for path in wrong if path.rpartition(".")[2] == "kind"]
    return [
        f"model.{path}={json.dumps(value) if not isinstance(value, str) else value}"
        for path, value in wrong.items()
        # Of a kind that is not held, its own settings say no more.
        if not any(path != kind and path.startswith(kind.removesuffix("kind")) for kind in kinds)
    ]


def _accepted(name: Architecture, model: config.Network) -> Accepted:
    same = ("d_model", "num_layers", "dropout", "attention_dropout", "norm_eps", "tie_embeddings")
    hidden = ("mlp.hidden", "mlp.expansion")
    beginning = ("init", "scale_residual_init")
    every: Accepted = {
        **dict.fromkeys((*same, *hidden, *beginning, "attention.num_heads"), _ANY),
        "kind": ("gpt",),
        "norm_position": ("pre",),
        "layer_scale": (None,),
        "logit_softcap": (None,),
        "lora": (None,),
        "rotary_base": _ANY,
        "pad_vocab_to_multiple_of": _ANY,  # the padding is left behind
        "attention.output_gate": (False,),
    }
    decoder: Accepted = {
        **every,
        "bias": (False,),
        "norm": ("rmsnorm",),
        "position": ("rotary",),
        "mlp.kind": ("swiglu",),
        "attention.kind": ("causal",),
        "attention.num_kv_heads": _ANY,
        "attention.intermediate_dim": _ANY,
        "attention.window_including_self": (None,),
        "attention.qk_norm": (False,),
        "attention.value_residual": (False,),
    }
    heads = model.attention.num_heads
    match name:
        case "GPT2LMHeadModel":
            return {
                **decoder,
                "bias": (True,),
                "norm": ("layernorm",),
                "position": ("learned",),
                "mlp.kind": ("gelu", "relu", "relu2"),
                "attention.num_kv_heads": (None, heads),
                "attention.intermediate_dim": (None, model.d_model),
            }
        case "LlamaForCausalLM":
            # The class insists on this although it takes the size of a head as a setting.
            is_divisible = model.d_model % heads == 0
            return {
                **decoder,
                "bias": (True, False),
                "attention.intermediate_dim": _ANY if is_divisible else (),
            }
        case "MistralForCausalLM":
            return {**decoder, "attention.window_including_self": _ANY}
        case "Qwen3ForCausalLM":
            return {
                **decoder,
                "attention.window_including_self": _ANY,
                "attention.qk_norm": (True,),
            }
        case "MixtralForCausalLM":
            return {
                **decoder,
                "attention.window_including_self": _ANY,
                "mlp.kind": ("moe",),
                "mlp.activation": ("swiglu",),
                "mlp.num_experts": _ANY,
                "mlp.top_k": _ANY,
                "mlp.balance_coefficient": _ANY,
            }
        case "DeepseekV3ForCausalLM":
            own = ("head_dim", "rotary_dim", "kv_rank", "query_rank")
            return {
                **decoder,
                "attention.kind": ("latent",),
                **dict.fromkeys((f"attention.{setting}" for setting in own), _ANY),
            }
        case _:
            assert_never(name)
