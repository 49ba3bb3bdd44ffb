"""The keys of the mainrun report's own YAML files: what each is called here, and its values.

A key is a dotted path there: `hyperparams.lr`, `model_configs.gpt.n_layer`. Meanings are taken from
the report's code (appendices N to Q), whose own defaults are PyTorch's. How a whole file is read is
`report_layout`'s.
"""

from typing import Any

from mainrun.errors import UserError

SECTIONS = ("hyperparams", "model_configs", "attn_configs")

NAMES = {
    "hyperparams.seed": "seed",
    "hyperparams.num_titles": "data.num_documents",
    "hyperparams.val_frac": "data.validation_fraction",
    "hyperparams.context_length": "data.context_length",
    "hyperparams.vocab_size": "tokenizer.vocab_size",
    "hyperparams.model_architecture": "model.kind",
    "hyperparams.optimizer": "optimizer",
    "hyperparams.lr": "optimizer.learning_rate",
    "hyperparams.weight_decay": "optimizer.weight_decay",
    "hyperparams.scheduler": "schedule",
    "hyperparams.epochs": "training.epochs",
    "hyperparams.batch_size": "training.batch_size",
    "hyperparams.evals_per_epoch": "training.evals_per_epoch",
    "hyperparams.amp_bool": "training.precision",
    "model_configs.d_model": "model.d_model",
    "model_configs.n_layer": "model.num_layers",
    "model_configs.bottleneck_sizes": "model.bottleneck_sizes",
    "model_configs.hidden_layer_list": "model.bottleneck_sizes",
    "model_configs.dropout": "model.dropout",
    "model_configs.norm_type": "model.norm_position",
    "model_configs.init_method": "model.init",
    "model_configs.attention_layer": "model.attention.kind",
    "attn_configs.n_head": "model.attention.num_heads",
    "attn_configs.intermediate_dim": "model.attention.intermediate_dim",
    "attn_configs.sparseblocksize": "model.attention.block_size",
    "attn_configs.attn_type": "model.attention.pattern.kind",
    "attn_configs.local_attn_ctx": "model.attention.pattern.stride",
    "attn_configs.num_verts": "model.attention.pattern.num_verts",
    "attn_configs.vertsize": "model.attention.pattern.vertsize",
    "attn_configs.k": "model.attention.num_selected",
    "attn_configs.epilson": "model.attention.position_slope",
}
"""The keys, the name of the architecture or attention left out, and where they stand here."""

WITHOUT_NAME = {
    "hyperparams.log_file": "the record is events.jsonl in the run folder",
    "model_configs.hidden_layer": "a block is as wide as what goes into it",
    "attn_configs.n_bctx": "it is context_length / sparseblocksize",
}
"""Keys that decide nothing here, and why."""

WORDS: dict[str, dict[Any, Any]] = {
    "hyperparams.model_architecture": {"gpt": "gpt", "unet_gpt": "unet_gpt"},
    "hyperparams.optimizer": {
        "sgd": {"kind": "sgd", "decay_on": "all"},
        "adamw": {"kind": "adamw", "b2": 0.999, "decay_on": "all"},
        "adam": {"kind": "adam", "decay_on": "all"},
        "adagrad": {"kind": "adagrad", "decay_on": "all"},
        "RMSprop": {"kind": "rmsprop", "decay_on": "all"},
        "rmsprop": {"kind": "rmsprop", "decay_on": "all"},
    },
    "hyperparams.scheduler": {
        "cosine": {"kind": "cosine", "warmup": {"steps": 0}},
        "linear": {"kind": "linear", "warmup": {"steps": 0}},
        "none": {"kind": "none"},
    },
    "hyperparams.amp_bool": {True: "bfloat16", False: "float32"},
    "model_configs.attention_layer": {"causal": "causal", "sparse": "sparse", "sparsek": "sparsek"},
}
"""What the words that a key accepts are here. Elsewhere a value is taken as it is."""


def is_old_name(dotted: str) -> bool:
    """Whether a dotted path is one into a file of the report's layout."""
    return underscored(dotted.partition(".")[0]) in SECTIONS


def renamed(dotted: str) -> str | None:
    """Our path for the report's; None where nothing here has that meaning."""
    return NAMES.get(general(dotted))


def why_left_out(dotted: str) -> str | None:
    """Why a key of the report's decides nothing here; None where it does, or is no key."""
    return WITHOUT_NAME.get(general(dotted))


def value_of(dotted: str, value: Any) -> Any:
    """The value of the report's key in our terms. ValueError says what is accepted."""
    key = general(dotted)
    if key == "attn_configs.intermediate_dim" and value == 0:
        return None
    if key not in WORDS:
        return value
    for word, ours in WORDS[key].items():
        if value == word and isinstance(value, type(word)):
            return ours
    accepted = ", ".join(dict.fromkeys(str(word).lower() for word in WORDS[key]))
    raise ValueError(f"{dotted}={value!r} cannot be had here: accepted are {accepted}")


def refuse_old_name(dotted: str) -> None:
    """UserError with the new name, where an override is given under the report's."""
    if is_old_name(dotted):
        name, reason = renamed(dotted), why_left_out(dotted)
        remedy = f"write {name}" if name else f"leave it out: {reason or 'it is no key there'}"
        raise UserError(f"{dotted} is a name of the report's layout: {remedy}")


def general(dotted: str) -> str:
    """The key without the name of its architecture or attention."""
    section, *names = underscored(dotted).split(".")
    return f"{section}.{names[-1]}" if names else section


def underscored(key: str) -> str:
    """As it was before a PDF made spaces of the underscores."""
    return key.strip().replace(" ", "_")
