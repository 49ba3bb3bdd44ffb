"""The original assessment's GPT and its training step, in PyTorch: mainrun's independent oracle.

Nothing of mainrun is imported here, and nothing of mainrun imports this: PyTorch lives in an
interpreter of its own (`.venv-torch`), so this file is run as a script, in one of two ways.

    trajectory IN.npz OUT.npz     the given weights trained on the given batches; what came of it
    bench SETTINGS.json           a contestant of the benchmark, one line in, one line out

The model is the one of the assessment: tied head, learned positions that start at zero, pre-norm
blocks, exact GELU, attention written out with dropout on its weights. One thing is added, for the
oracle's sake: a batch may carry document numbers (attention stays inside a document) and weights
(the loss is their weighted mean).
"""

import json
import math
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


class CausalSelfAttention(nn.Module):
    def __init__(self, d_model: int, num_heads: int, context_length: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, d_model // num_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.weights_dropout = nn.Dropout(dropout)
        self.residual_dropout = nn.Dropout(dropout)
        self.is_fused = False  # a benchmark may want PyTorch at its best
        causal = torch.ones(context_length, context_length, dtype=torch.bool).tril()
        self.register_buffer("causal", causal, persistent=False)

    def forward(self, x: Tensor, same_document: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, self.head_dim).transpose(1, 3)
        q, k, v = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        mixed = self._fused(q, k, v) if self.is_fused else self._mixed(q, k, v, same_document)
        y = mixed.transpose(1, 2).contiguous().view(batch, length, width)
        return self.residual_dropout(self.out(y))

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, same_document: Tensor | None) -> Tensor:
        length = q.shape[-2]
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(self.head_dim))
        visible = self.causal[:length, :length]
        if same_document is not None:
            visible = visible & same_document
        scores = scores.masked_fill(~visible, float("-inf"))
        return self.weights_dropout(functional.softmax(scores, dim=-1)) @ v

    def _fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rate = self.weights_dropout.p if self.training else 0.0
        return functional.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)


class Mlp(nn.Module):
    def __init__(self, d_model: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, hidden)
        self.down = nn.Linear(hidden, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(functional.gelu(self.up(x))))


class Block(nn.Module):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        d_model, dropout = settings["d_model"], settings["dropout"]
        self.attention_norm = nn.LayerNorm(d_model, eps=1e-5)
        self.attention = CausalSelfAttention(
            d_model, settings["num_heads"], settings["context_length"], dropout
        )
        self.mlp_norm = nn.LayerNorm(d_model, eps=1e-5)
        self.mlp = Mlp(d_model, settings["mlp_hidden"], dropout)

    def forward(self, x: Tensor, same_document: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), same_document)
        return x + self.mlp(self.mlp_norm(x))


class Gpt(nn.Module):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        d_model = settings["d_model"]
        self.token_embedding = nn.Embedding(settings["vocab_size"], d_model)
        self.position_embedding = nn.Parameter(torch.zeros(settings["context_length"], d_model))
        self.dropout = nn.Dropout(settings["dropout"])
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings["num_layers"]))
        self.final_norm = nn.LayerNorm(d_model, eps=1e-5)
        self.head = nn.Linear(d_model, settings["vocab_size"], bias=False)
        self.apply(_initialise)
        self.head.weight = self.token_embedding.weight

    def forward(self, inputs: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        same_document = None
        if segment_ids is not None:
            same_document = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
        positions = self.position_embedding[: inputs.shape[1]]
        x = self.dropout(self.token_embedding(inputs) + positions)
        for block in self.blocks:
            x = block(x, same_document)
        return self.head(self.final_norm(x))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def loss(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Mean cross entropy in nats per token; the weighted mean where weights are given."""
    if weights is None:
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
    each = functional.cross_entropy(
        logits.view(-1, logits.shape[-1]), targets.view(-1), reduction="none"
    )
    return (each * weights.view(-1)).sum() / weights.sum()


def optimizer(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """SGD or AdamW; weight decay on matrices, or on everything where `decay_on` says so."""
    kept = [p for p in model.parameters() if p.ndim < 2 and settings["decay_on"] == "matrices"]
    kept_ids = {id(p) for p in kept}
    decayed = [p for p in model.parameters() if id(p) not in kept_ids]
    groups = [
        {"params": decayed, "weight_decay": settings["weight_decay"]},
        {"params": kept, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rate = settings["learning_rate"]
    match settings["kind"]:
        case "sgd":
            return torch.optim.SGD(groups, lr=rate, momentum=settings["momentum"])
        case "adamw":
            betas = (settings["b1"], settings["b2"])
            return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=settings["eps"])
        case kind:
            raise ValueError(f"optimizer.kind={kind!r}: accepted are 'sgd', 'adamw'")


def schedule(opt: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """PyTorch's own cosine to `final_fraction` of the peak, after PyTorch's own linear warm-up.

    Warm-up's first rate is 1/(n+1) of the peak, and the peak is that of the step after it.
    """
    schedulers = torch.optim.lr_scheduler
    warmup, peak = settings["warmup_steps"], settings["learning_rate"]
    cosine = schedulers.CosineAnnealingLR(
        opt, T_max=settings["total_steps"] - warmup, eta_min=peak * settings["final_fraction"]
    )
    if not warmup:
        return cosine
    rise = schedulers.LinearLR(opt, start_factor=1 / (warmup + 1), total_iters=warmup)
    return schedulers.SequentialLR(opt, [rise, cosine], milestones=[warmup])


# ---------------------------------------------------------------------------------------------
# trajectory


def trajectory(source: str, destination: str) -> None:
    """Trains from the weights in `source` on its batches; writes what each step saw.

    `source` holds `settings` (JSON: `model`, `optimizer`, `schedule`, `grad_clip`), the weights as
    `parameters/NAME` under mainrun's names, `inputs` and `targets` [steps, batch, time], and if
    wanted `segment_ids` and `weights` of the same shape. `destination` gets `losses`, `grad_norms`
    (before clipping), `learning_rates` [steps], and the weights after the last step.
    """
    given = np.load(source)
    settings = json.loads(str(given["settings"]))
    model = Gpt(settings["model"])
    _load(model, {name: given[f"parameters/{name}"] for name, _ in _named(model)})
    opt = optimizer(model, settings["optimizer"])
    scheduler = schedule(opt, settings["schedule"])

    batches = {
        name: torch.from_numpy(given[name]).to(dtype)
        for name, dtype in (
            ("inputs", torch.int64),
            ("targets", torch.int64),
            ("segment_ids", torch.int64),
            ("weights", torch.float32),
        )
        if name in given
    }
    losses, norms, rates = [], [], []
    for step in range(len(batches["inputs"])):
        batch = {name: array[step] for name, array in batches.items()}
        logits = model(batch["inputs"], batch.get("segment_ids"))
        value = loss(logits, batch["targets"], batch.get("weights"))
        opt.zero_grad(set_to_none=True)
        value.backward()
        clip = settings["grad_clip"] if settings["grad_clip"] is not None else math.inf
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        losses.append(value.item())
        norms.append(float(norm))
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    final = {f"parameters/{name}": p.detach().numpy() for name, p in _named(model)}
    np.savez(destination, losses=losses, grad_norms=norms, learning_rates=rates, **final)


def _load(model: Gpt, weights: Mapping[str, Any]) -> None:
    with torch.no_grad():
        for name, parameter in _named(model):
            parameter.copy_(torch.from_numpy(weights[name]))


def _named(model: Gpt) -> list[tuple[str, Tensor]]:
    """Every parameter, seen in mainrun's layout, under mainrun's name. The tensors are views."""

    def norm(name: str, module: nn.LayerNorm) -> list[tuple[str, Tensor]]:
        return [(f"{name}.scale", module.weight), (f"{name}.bias", module.bias)]

    def linear(name: str, module: nn.Linear) -> list[tuple[str, Tensor]]:
        return [(f"{name}.kernel", module.weight.T), (f"{name}.bias", module.bias)]

    named: list[tuple[str, Tensor]] = [
        ("token_embedding.embedding", model.token_embedding.weight),
        ("position_embedding.embedding", model.position_embedding),
    ]
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        prefix = f"blocks.{index}"
        named += norm(f"{prefix}.attention_norm", block.attention_norm)
        named += linear(f"{prefix}.attention.qkv", block.attention.qkv)
        named += linear(f"{prefix}.attention.out", block.attention.out)
        named += norm(f"{prefix}.mlp_norm", block.mlp_norm)
        named += linear(f"{prefix}.mlp.up", block.mlp.up)
        named += linear(f"{prefix}.mlp.down", block.mlp.down)
    return named + norm("final_norm", model.final_norm)


# ---------------------------------------------------------------------------------------------
# bench


def bench(settings_path: str) -> None:
    """Answers `n` lines with `R` lines, as `worker.py` describes.

    The step is the original script's, in its order, `loss.item()` included. With `is_compiled` it
    is PyTorch at its best: model and loss compiled, attention fused, TF32 products where float32 is
    asked for, and the loss read once a round.
    """
    with open(settings_path, encoding="utf-8") as file:
        settings = json.load(file)
    torch.manual_seed(settings["seed"])
    device = settings["device"]
    windows = np.load(settings["windows"])
    all_inputs, all_targets = windows["inputs"], windows["targets"]
    model = Gpt(settings["model"])
    _load(model, np.load(settings["weights"]))
    model = model.to(device).train()
    opt = optimizer(model, settings["optimizer"])
    scheduler = schedule(opt, settings["schedule"])
    batch_size = settings["batch_size"]
    per_epoch = len(all_inputs) // batch_size
    half, is_compiled = settings["precision"] == "bfloat16", settings["is_compiled"]
    if is_compiled:
        torch.set_float32_matmul_precision("high")
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attention.is_fused = is_compiled

    def computed(inputs: Tensor, targets: Tensor) -> Tensor:
        return loss(model(inputs), targets, None)

    compute = torch.compile(computed) if is_compiled else computed

    def step(index: int) -> float | Tensor:
        start = index % per_epoch * batch_size
        rows = slice(start, start + batch_size)
        inputs = torch.from_numpy(all_inputs[rows].astype(np.int64)).to(device)
        targets = torch.from_numpy(all_targets[rows].astype(np.int64)).to(device)
        with torch.autocast(device, dtype=torch.bfloat16) if half else nullcontext():
            value = compute(inputs, targets)
        opt.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings["grad_clip"])
        opt.step()
        scheduler.step()
        return value.detach() if is_compiled else value.item()

    print("BEGIN {}", flush=True)
    facts = {
        "first_loss": float(step(0)),
        "versions": {"torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "float32_matmul": torch.get_float32_matmul_precision(),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print("READY " + json.dumps(facts), flush=True)
    done, value = 1, facts["first_loss"]
    for line in sys.stdin:
        count = int(line)
        started = time.perf_counter()
        for _ in range(count):
            value = step(done)
            done += 1
        value = float(value)  # of a GPU, waits for all steps
        seconds = (time.perf_counter() - started) / count
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        answer = {"seconds": seconds, "loss": value, "steps": done, "device_bytes": peak}
        print("R " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["trajectory", source, destination]:
            trajectory(source, destination)
        case ["bench", path]:
            bench(path)
        case _:
            sys.exit("usage: torch_gpt.py trajectory IN.npz OUT.npz | bench SETTINGS.json")
