"""What `transformers` makes of exported folders: the independent side of `test_parity.py`.

Runs in an interpreter of its own (`.venv-torch`), as a script:

    transformers_models.py FOLDER REQUEST.json OUT.npz OUT.json

REQUEST.json has `models`, by folder below FOLDER: a batch's `inputs` and `targets`, and whether
the case `is_whole`; and `tokenizers`, by folder: texts. OUT.npz receives `<folder>/logits`, and of
whole cases `<folder>/loss` and `<folder>/gradients/<name as in the file>`; OUT.json other facts.
Nothing of mainrun is imported here, nothing is downloaded.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import numpy as np
import torch
import transformers
from torch import nn


def model_case(folder: Path, case: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Logits of the batch; in a whole case also the mean cross-entropy, its gradients, and greedy
    continuations of the batch's beginnings."""
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    model.eval()  # from_pretrained does so, too
    inputs, targets = (torch.tensor(case[name]) for name in ("inputs", "targets"))
    logits = model(inputs, use_cache=False).logits
    arrays = {"logits": logits.detach().numpy()}
    facts = {
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "ids": [model.config.eos_token_id, model.config.pad_token_id],
        "not as in the file": [str(value) for value in loading.values() if value],
    }
    if case["is_whole"]:
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        arrays["loss"] = loss.detach().numpy()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            for part, gradient in as_in_file(name, parameter.grad.numpy()):
                arrays[f"gradients/{part}"] = gradient
        facts["generated"] = model.generate(
            inputs[:, :2], do_sample=False, max_length=inputs.shape[1], eos_token_id=None
        ).tolist()
    return arrays, facts


def as_in_file(name: str, array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Mixtral's file keeps experts apart: w1 (gate), w2 (down), w3 (up). Its class joins them."""
    name = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
    prefix, experts, which = name.partition(".mlp.experts.")
    if not experts:
        return [(name, array)]
    numbered = [(f"{prefix}.block_sparse_moe.experts.{n}", part) for n, part in enumerate(array)]
    if which == "down_proj":
        return [(f"{expert}.w2.weight", part) for expert, part in numbered]
    assert which == "gate_up_proj", name
    halves = [(expert, *np.split(part, 2)) for expert, part in numbered]
    gates = [(f"{expert}.w1.weight", gate) for expert, gate, _ in halves]
    return gates + [(f"{expert}.w3.weight", up) for expert, _, up in halves]


def tokenizer_case(folder: Path, texts: list[str]) -> dict[str, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    with_start = transformers.AutoTokenizer.from_pretrained(folder, add_bos_token=True)
    return {
        "ids": ids,
        "texts": [tokenizer.decode(row) for row in ids],
        "ended": [
            tokenizer.decode([*row, tokenizer.eos_token_id], skip_special_tokens=True)
            for row in ids
        ],
        "with_start": [with_start(text)["input_ids"] for text in texts],
        "special": {
            "eos": tokenizer.eos_token_id,
            "bos": tokenizer.bos_token_id,
            "pad": tokenizer.pad_token_id,
            "unk": tokenizer.unk_token_id,
        },
        "size": len(tokenizer),
    }


def main(folder: Path, request: Path, out_arrays: Path, out_facts: Path) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    asked = json.loads(request.read_text(encoding="utf-8"))
    arrays: dict[str, np.ndarray] = {}
    facts: dict[str, Any] = {"transformers": transformers.__version__, "models": {}}
    for name, case in asked["models"].items():
        found, facts["models"][name] = model_case(folder / name, case)
        arrays |= {f"{name}/{key}": array for key, array in found.items()}
    facts["tokenizers"] = {
        name: tokenizer_case(folder / name, texts) for name, texts in asked["tokenizers"].items()
    }
    np.savez(out_arrays, **arrays)
    out_facts.write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
