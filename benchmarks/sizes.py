"""What is timed: sizes of the model, each with the devices it is for."""

from benchmarks.contestants import Device

SIZES: dict[str, tuple[tuple[Device, ...], tuple[str, ...]]] = {
    # Everything real but small: whether the harness works, not how fast anything is.
    "tiny": (
        ("cpu", "gpu"),
        (
            "tokenizer.vocab_size=512",
            "data.num_documents=2000",
            "data.context_length=32",
            "model.d_model=32",
            "model.num_layers=2",
            "model.mlp.hidden=64",
            "model.attention.num_heads=4",
            "training.batch_size=16",
        ),
    ),
    # 7 million parameters, 2,048 tokens a step.
    "small": (
        ("cpu",),
        (
            "model.d_model=256",
            "model.num_layers=4",
            "model.mlp.hidden=1024",
            "model.attention.num_heads=4",
            "training.batch_size=16",
        ),
    ),
    # The original assessment's run: 27 million parameters, 64 windows of 128 tokens.
    "baseline": (("cpu", "gpu"), ()),
    # 98 million parameters, 2,048 tokens a step: as much arithmetic as the baseline's.
    "large": (
        ("cpu",),
        (
            "data.context_length=256",
            "model.d_model=768",
            "model.num_layers=12",
            "model.mlp.hidden=3072",
            "model.attention.num_heads=12",
            "training.batch_size=8",
        ),
    ),
    # GPT-2 small. 16 windows: unfused attention in float32 keeps some 5 GB of each layer.
    "gpt124m": (
        ("gpu",),
        (
            "tokenizer.vocab_size=50257",
            "data.context_length=1024",
            "model.d_model=768",
            "model.num_layers=12",
            "model.mlp.hidden=3072",
            "model.attention.num_heads=12",
            "model.pad_vocab_to_multiple_of=128",
            "training.batch_size=16",
        ),
    ),
}


def bytes_per_step(state_bytes: int, parameters: int) -> float:
    """Memory traffic that a step cannot do without, of state and gradient alone: all of the state
    read and written once, the float32 gradient written and read once."""
    return 2.0 * state_bytes + 2 * 4 * parameters
