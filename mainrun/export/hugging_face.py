"""What a Hugging Face folder says of a model: its class's settings, its tensors, its tokenizer."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders

from mainrun import config as configs
from mainrun.config import Config
from mainrun.data import tokenizers
from mainrun.export import weights
from mainrun.export.architectures import Architecture, architecture


def tensors(
    model: configs.Network, params: Mapping[str, np.ndarray], vocab_size: int
) -> dict[str, np.ndarray]:
    """The parameters as the class of this model names, shapes and orders them."""
    name = architecture(model)
    assert isinstance(model, configs.Gpt)
    if name == "GPT2LMHeadModel":
        return dict(weights.gpt2(model, params, vocab_size))
    return dict(weights.llama(model, params, vocab_size))


def files(config: Config, tokenizer: Tokenizer) -> dict[str, str]:
    """Name and text of each file beside the tensors.

    As GPT-2's, the tokenizer puts nothing before a document; with `add_bos_token=True` it puts
    <eos> there, which in training every document has before it.
    """
    pad, eos, unk = tokenizers.PAD, tokenizers.EOS, tokenizers.UNK
    ids = {
        "bos_token_id": tokenizers.special_id(tokenizer, eos),  # <eos> stands before a document
        "eos_token_id": tokenizers.special_id(tokenizer, eos),
        "pad_token_id": tokenizers.special_id(tokenizer, pad),
    }
    special = {"bos_token": eos, "eos_token": eos, "pad_token": pad, "unk_token": unk}
    name = architecture(config.model)
    settings = {
        "architectures": [name],
        **_settings(name, config),
        "vocab_size": tokenizer.get_vocab_size(),
        **ids,
        "dtype": "float32",
    }
    handling = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "split_special_tokens": True,  # a text with the word <eos> in it does not end there
        "clean_up_tokenization_spaces": False,
        # As in tokenizer.json, which transformers 4 changes to what stands here.
        "add_prefix_space": _adds_a_space(tokenizer),
        "model_max_length": config.data.context_length,
    }
    return {
        "config.json": _json(settings),
        "generation_config.json": _json(ids),
        "tokenizer.json": _decoding_alone(tokenizer).to_str(pretty=True),
        "tokenizer_config.json": _json(handling),
        "special_tokens_map.json": _json(special),
    }


# ---------------------------------------------------------------------------------------------
# The model in the class's own settings


def _settings(name: Architecture, config: Config) -> dict[str, Any]:
    model = config.model
    assert isinstance(model, configs.Gpt)
    if name == "GPT2LMHeadModel":
        assert isinstance(model.mlp, configs.DenseMlp)
        return {
            "model_type": "gpt2",
            "n_positions": config.data.context_length,
            "n_embd": model.d_model,
            "n_layer": model.num_layers,
            "n_head": model.attention.num_heads,
            "n_inner": model.mlp.hidden_in(model.d_model),
            "activation_function": model.mlp.kind,  # its "gelu" is the exact one
            "layer_norm_epsilon": model.norm_eps,
            **dict.fromkeys(("embd_pdrop", "resid_pdrop"), model.dropout),
            "attn_pdrop": model.attention_rate,
            "tie_word_embeddings": model.tie_embeddings,
        }
    settings = {
        "max_position_embeddings": config.data.context_length,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.attention.num_heads,
        "intermediate_size": model.mlp.hidden_in(model.d_model),
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rotary_base,  # where transformers 4 reads it, and 5 below
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "attention_dropout": model.attention_rate,  # the class has no other
        "tie_word_embeddings": model.tie_embeddings,
    }
    return settings | _own_settings(name, model)


def _own_settings(name: Architecture, model: configs.Gpt) -> dict[str, Any]:
    """Those that a class of Llama's kin does not share with all."""
    attention, mlp = model.attention, model.mlp
    if isinstance(attention, configs.LatentAttention):
        head_dim = attention.head_dim or model.d_model // attention.num_heads
        return {
            "model_type": "deepseek_v3",
            "num_key_value_heads": attention.num_heads,
            "qk_nope_head_dim": head_dim,
            "v_head_dim": head_dim,
            "qk_rope_head_dim": attention.rotary_dim,
            "rope_interleave": False,
            "kv_lora_rank": attention.kv_rank,
            "q_lora_rank": attention.query_rank,
            "attention_bias": False,
            "first_k_dense_replace": model.num_layers,  # no layer of experts
            "num_nextn_predict_layers": 0,
        }
    assert isinstance(attention, configs.CausalAttention)
    inner, window = attention.intermediate_dim or model.d_model, attention.window_including_self
    grouped = {
        "num_key_value_heads": attention.num_kv_heads or attention.num_heads,
        "head_dim": inner // attention.num_heads,
    }
    match name:
        case "LlamaForCausalLM":
            biases = {"attention_bias": model.bias, "mlp_bias": model.bias}
            return {"model_type": "llama", **grouped, **biases}
        case "MistralForCausalLM":
            return {"model_type": "mistral", **grouped, "sliding_window": window}
        case "Qwen3ForCausalLM":
            sliding = {
                "use_sliding_window": window is not None,
                "sliding_window": window,
                "max_window_layers": 0,  # so that all layers have the window
            }
            return {"model_type": "qwen3", **grouped, **sliding}
        case "MixtralForCausalLM":
            assert isinstance(mlp, configs.MixtureOfExperts)
            return {
                "model_type": "mixtral",
                **grouped,
                "sliding_window": window,
                "num_local_experts": mlp.num_experts,
                "num_experts_per_tok": mlp.top_k,
                # Balanced experts have the loss 1 here and top_k there.
                "router_aux_loss_coef": mlp.balance_coefficient / mlp.top_k,
            }
        case _:
            raise AssertionError(name)


# ---------------------------------------------------------------------------------------------
# The tokenizer


def _decoding_alone(tokenizer: Tokenizer) -> Tokenizer:
    """The same, whose own decoder gives what `tokenizers.decode` gives."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    if _adds_a_space(tokenizer):
        without = decoders.Strip(" ", left=1, right=0)
        copy.decoder = decoders.Sequence([copy.decoder, without])
    return copy


def _adds_a_space(tokenizer: Tokenizer) -> bool:
    """Whether it puts a space before a document; `tokenizers.decode` takes it away again."""
    ids = tokenizers.encode(tokenizer, ["x"])[0]
    return tokenizer.decode(ids.tolist()).startswith(" ")


def _json(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=2) + "\n"
