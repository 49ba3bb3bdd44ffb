"""PyTorch's own optimizers and gradient scaler on given numbers: what mainrun's are compared with.

Run as a script by the interpreter that has PyTorch, like `torch_gpt.py`:

    torch_optimizers.py optimizers IN.npz OUT.npz   given gradients, one update each; all parameters
    torch_optimizers.py scaler IN.npz OUT.npz       given gradients, scaled; the scale after each
"""

import json
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

ACCEPTED = "'sgd', 'adam', 'adamw', 'adagrad', 'rmsprop'"


def made(parameters: list[Tensor], settings: dict[str, Any]) -> torch.optim.Optimizer:
    """PyTorch's optimizer of that kind; its learning rate is set before each update."""
    decayed = [p for p in parameters if p.ndim >= 2 or settings["decay_on"] == "all"]
    rest = [p for p in parameters if p.ndim < 2 and settings["decay_on"] != "all"]
    groups = [
        {"params": decayed, "weight_decay": settings["weight_decay"]},
        {"params": rest, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    match settings["kind"]:
        case "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=settings["momentum"])
        case "adam":
            betas = (settings["b1"], settings["b2"])
            return torch.optim.Adam(groups, lr=0.0, betas=betas, eps=settings["eps"])
        case "adamw":
            betas = (settings["b1"], settings["b2"])
            return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=settings["eps"])
        case "adagrad":
            initial = settings["initial_accumulator"]
            return torch.optim.Adagrad(
                groups, lr=0.0, eps=settings["eps"], initial_accumulator_value=initial
            )
        case "rmsprop":
            return torch.optim.RMSprop(
                groups,
                lr=0.0,
                alpha=settings["b2"],
                eps=settings["eps"],
                momentum=settings["momentum"],
            )
        case kind:
            raise ValueError(f"kind={kind!r}: accepted are {ACCEPTED}")


def optimizers(source: str, destination: str) -> None:
    """`source` holds `cases` (JSON: settings by name), `rates` [steps], `parameters/NAME` and
    `gradients/NAME` [steps, …]; `destination` gets `CASE/NAME` [steps, …], after each update."""
    given = np.load(source)
    names = [name.partition("/")[2] for name in given if name.startswith("parameters/")]
    gradients = {name: torch.from_numpy(given[f"gradients/{name}"]) for name in names}
    found = {}
    for case, settings in json.loads(str(given["cases"])).items():
        parameters = {name: torch.from_numpy(given[f"parameters/{name}"].copy()) for name in names}
        optimizer = made(list(parameters.values()), settings)
        after: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for step, rate in enumerate(given["rates"]):
            for group in optimizer.param_groups:
                group["lr"] = float(rate)
            for name, parameter in parameters.items():
                parameter.grad = gradients[name][step].clone()
            optimizer.step()
            for name, parameter in parameters.items():
                after[name].append(parameter.detach().numpy().copy())
        found |= {f"{case}/{name}": np.stack(arrays) for name, arrays in after.items()}
    np.savez(destination, **found)


def scaler(source: str, destination: str) -> None:
    """`source` holds `cases` (JSON: settings by name) and `gradients` [steps], each of which is
    scaled and rounded to float16; `destination` gets `CASE/scales` and `CASE/skipped` [steps]."""
    given = np.load(source)
    gradients = torch.from_numpy(given["gradients"])
    found = {}
    for case, settings in json.loads(str(given["cases"])).items():
        scales, skipped = _scaled(settings, gradients)
        found |= {f"{case}/scales": scales, f"{case}/skipped": skipped}
    np.savez(destination, **found)


def _scaled(settings: dict[str, Any], gradients: Tensor) -> tuple[list[float], list[bool]]:
    scaling = torch.amp.GradScaler(
        "cpu",
        init_scale=settings["initial"],
        growth_factor=settings["growth_factor"],
        backoff_factor=settings["backoff_factor"],
        growth_interval=settings["growth_interval"],
    )
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    taken: list[object] = []
    optimizer.register_step_post_hook(lambda *_: taken.append(None))
    scales, skipped = [], []
    for gradient in gradients:
        parameter.grad = scaling.scale(gradient).half().float().reshape(1)
        before = len(taken)
        scaling.step(optimizer)
        scaling.update()
        scales.append(scaling.get_scale())
        skipped.append(len(taken) == before)
    return scales, skipped


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["optimizers", source, destination]:
            optimizers(source, destination)
        case ["scaler", source, destination]:
            scaler(source, destination)
        case _:
            sys.exit("usage: torch_optimizers.py optimizers|scaler IN.npz OUT.npz")
