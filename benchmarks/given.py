"""What every contestant is given: the same tokens and the same initial weights, made once.

Weights are given because two draws of them part the loss of the same 1,024 tokens by 0.05
(measured), which is as much as a few steps of SGD change it. Each side draws its own first, as in
a run, and then takes these.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from mainrun.data import tokenizers
from mainrun.data.batches import Windows
from mainrun.model.gpt import Network
from mainrun.parts import Texts
from mainrun.training.evaluate import Text


def save_windows(texts: Texts, folder: Path) -> Path:
    """The training windows as .npz, which PyTorch's side reads with nothing of ours, and the
    tokenizer beside them."""
    path = folder / "windows.npz"
    train = texts.train
    np.savez(path, inputs=train.inputs, targets=train.targets, positions=train.positions)
    tokenizers.save(texts.tokenizer, path.with_name("tokenizer.json"))
    return path


def load_windows(path: Path) -> Texts:
    """What `save_windows` wrote. The validation text is empty: nobody is evaluated here."""
    saved = np.load(path)
    tokenizer = tokenizers.load(path.with_name("tokenizer.json"))
    eos_id = tokenizers.special_id(tokenizer, tokenizers.EOS)
    windows = Windows(saved["inputs"], saved["targets"], saved["positions"], eos_id)
    return Texts(
        tokenizer=tokenizer,
        train=windows,
        validation=Text.of([], [], windows),
        num_train_documents=0,
        num_train_tokens=int((windows.positions >= 0).sum()),
        fingerprint="",
    )


def save_weights(network: Network, seed: int, folder: Path) -> Path:
    """Weights as the original draws them: matrices normal with deviation 0.02, positions and
    biases zero, scales one. Flat names of mainrun, one array each, .npz."""
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0)))
    rng = np.random.default_rng(seed)
    weights: dict[str, Any] = {}
    for name, shape in sorted(shapes.items()):
        if name.endswith(".scale"):
            weights[name] = np.ones(shape.shape, np.float32)
        elif name.endswith(".bias") or name.startswith("position_embedding"):
            weights[name] = np.zeros(shape.shape, np.float32)
        else:
            weights[name] = 0.02 * rng.standard_normal(shape.shape, np.float32)
    path = folder / "weights.npz"
    np.savez(path, **weights)
    return path
