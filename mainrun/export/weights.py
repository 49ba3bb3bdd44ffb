"""mainrun's parameters under the names, in the shapes and orders of classes of `transformers`.

Kernels here are [inputs, outputs], as GPT-2's Conv1D has them; PyTorch's Linear is transposed.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mainrun import config

Params = Mapping[str, np.ndarray]
Named = Iterator[tuple[str, np.ndarray]]


def gpt2(model: config.Gpt, params: Params, vocab_size: int) -> Named:
    """Of GPT2LMHeadModel."""
    yield "transformer.wte.weight", params["token_embedding.embedding"][:vocab_size]
    yield "transformer.wpe.weight", params["position_embedding.embedding"]
    for number in range(model.num_layers):
        ours, theirs = f"blocks.{number}", f"transformer.h.{number}"
        for our_part, their_part in (
            ("attention_norm", "ln_1"),
            ("mlp_norm", "ln_2"),
        ):
            yield from _layer_norm(params, f"{ours}.{our_part}", f"{theirs}.{their_part}")
        for our_part, their_part in (
            ("attention.qkv", "attn.c_attn"),
            ("attention.out", "attn.c_proj"),
            ("mlp.up", "mlp.c_fc"),
            ("mlp.down", "mlp.c_proj"),
        ):
            yield f"{theirs}.{their_part}.weight", params[f"{ours}.{our_part}.kernel"]
            yield f"{theirs}.{their_part}.bias", params[f"{ours}.{our_part}.bias"]
    yield from _layer_norm(params, "final_norm", "transformer.ln_f")
    yield from _head(model, params, vocab_size)


def llama(model: config.Gpt, params: Params, vocab_size: int) -> Named:
    """Of LlamaForCausalLM and its kin; what the attention and the MLP are decides the rest."""
    yield "model.embed_tokens.weight", params["token_embedding.embedding"][:vocab_size]
    for number in range(model.num_layers):
        ours, theirs = f"blocks.{number}", f"model.layers.{number}"
        yield f"{theirs}.input_layernorm.weight", params[f"{ours}.attention_norm.scale"]
        yield f"{theirs}.post_attention_layernorm.weight", params[f"{ours}.mlp_norm.scale"]
        attention = (f"{ours}.attention", f"{theirs}.self_attn")
        if isinstance(model.attention, config.LatentAttention):
            yield from _latent(model.attention, model.norm_eps, params, *attention)
        else:
            assert isinstance(model.attention, config.CausalAttention)
            yield from _grouped(model, model.attention, params, *attention)
        if isinstance(model.mlp, config.MixtureOfExperts):
            yield from _experts(params, f"{ours}.mlp", f"{theirs}.block_sparse_moe")
        else:
            up, names = f"{ours}.mlp.up", ("gate_proj", "up_proj")
            yield from _linears(params, up, [f"{theirs}.mlp.{name}" for name in names])
            yield from _linears(params, f"{ours}.mlp.down", [f"{theirs}.mlp.down_proj"])
    yield "model.norm.weight", params["final_norm.scale"]
    yield from _head(model, params, vocab_size)


def _grouped(
    model: config.Gpt,
    attention: config.CausalAttention,
    params: Params,
    ours: str,
    theirs: str,
) -> Named:
    inner = attention.intermediate_dim or model.d_model
    shared = inner // attention.num_heads * (attention.num_kv_heads or attention.num_heads)
    names = [f"{theirs}.{name}_proj" for name in "qkv"]
    yield from _linears(params, f"{ours}.qkv", names, [inner, inner + shared])
    yield from _linears(params, f"{ours}.out", [f"{theirs}.o_proj"])
    if attention.qk_norm:
        yield f"{theirs}.q_norm.weight", params[f"{ours}.q_norm.scale"]
        yield f"{theirs}.k_norm.weight", params[f"{ours}.k_norm.scale"]


def _latent(
    attention: config.LatentAttention, norm_eps: float, params: Params, ours: str, theirs: str
) -> Named:
    # The class norms its latents with 1e-6, whatever rms_norm_eps says. Latents that are smaller by
    # this factor come out of that norm as ours do: x / √(mean x² + eps).
    factor = np.float32((1e-6 / norm_eps) ** 0.5)
    if attention.query_rank is None:
        yield from _linears(params, f"{ours}.q_up", [f"{theirs}.q_proj"])
    else:
        yield f"{theirs}.q_a_proj.weight", params[f"{ours}.q_down.kernel"].T * factor
        yield f"{theirs}.q_a_layernorm.weight", params[f"{ours}.q_norm.scale"]
        yield from _linears(params, f"{ours}.q_up", [f"{theirs}.q_b_proj"])
    columns = params[f"{ours}.kv_down.kernel"]  # latent | rotary; the latter is not normed
    latent, rotary = np.split(columns, [attention.kv_rank], axis=1)
    down = np.concatenate([latent * factor, rotary], axis=1)
    yield f"{theirs}.kv_a_proj_with_mqa.weight", down.T
    yield f"{theirs}.kv_a_layernorm.weight", params[f"{ours}.kv_norm.scale"]
    yield from _linears(params, f"{ours}.kv_up", [f"{theirs}.kv_b_proj"])
    yield from _linears(params, f"{ours}.out", [f"{theirs}.o_proj"])


def _experts(params: Params, ours: str, theirs: str) -> Named:
    """Each expert apart, as Mixtral's files have them; transformers 5 joins them as it reads."""
    yield f"{theirs}.gate.weight", params[f"{ours}.router.kernel"].T
    experts = zip(params[f"{ours}.up"], params[f"{ours}.down"], strict=True)
    for number, (up, down) in enumerate(experts):
        gate, up = np.split(up, 2, axis=1)
        yield f"{theirs}.experts.{number}.w1.weight", gate.T
        yield f"{theirs}.experts.{number}.w2.weight", down.T
        yield f"{theirs}.experts.{number}.w3.weight", up.T


def _linears(
    params: Params, ours: str, theirs: Sequence[str], edges: Sequence[int] | None = None
) -> Named:
    """The columns of a layer of ours as several of theirs: equally many each, or up to `edges`."""
    cuts = len(theirs) if edges is None else list(edges)
    kernels = np.split(params[f"{ours}.kernel"], cuts, axis=1)
    for name, kernel in zip(theirs, kernels, strict=True):
        yield f"{name}.weight", kernel.T
    if f"{ours}.bias" in params:
        for name, bias in zip(theirs, np.split(params[f"{ours}.bias"], cuts), strict=True):
            yield f"{name}.bias", bias


def _layer_norm(params: Params, ours: str, theirs: str) -> Named:
    yield f"{theirs}.weight", params[f"{ours}.scale"]
    yield f"{theirs}.bias", params[f"{ours}.bias"]


def _head(model: config.Gpt, params: Params, vocab_size: int) -> Named:
    if not model.tie_embeddings:
        yield "lm_head.weight", params["head.embedding"][:vocab_size]
