"""Which settings lower the loss, and by how much more than chance: `python -m benchmarks.recipes`.

Each recipe differs from the first in what its line says, and is trained with several seeds by the
real command. A seed decides the split as well as the weights, so recipes are compared seed by seed:
the table has the mean difference to the first recipe, and its standard error over seeds. A
difference smaller than two of these is called none. Runs that are finished are not made again.
"""

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import report

BASE = (
    "config/base.yaml",
    "data.num_documents=6000",
    "tokenizer.vocab_size=4000",
    "model.d_model=128", "model.num_layers=4", "model.attention.num_heads=4",
    "model.scale_residual_init=true",
    "optimizer.learning_rate=3e-3",
    "training.batch_size=16", "training.epochs=7", "training.evals_per_epoch=1",
    "training.num_samples=0", "training.checkpoint.keep=1",
    "tracking.wandb=disabled",
)  # fmt: skip

MUON = ("optimizer.kind=muon", "optimizer.adamw_learning_rate=3e-3")
WSD = ("schedule.kind=wsd",)
ROTARY = ("model.position=rotary",)
MASKS = ("data.mask_documents=true",)
R_DROP = ("training.regularization.r_drop=2",)

RECIPES: dict[str, Sequence[str]] = {
    "AdamW 3e-3, cosine, learned positions": (),
    "AdamW 1.5e-3": ("optimizer.learning_rate=1.5e-3",),
    "AdamW 6e-3": ("optimizer.learning_rate=6e-3",),
    "Muon 0.01, AdamW 3e-3 for the rest": (*MUON, "optimizer.learning_rate=0.01"),
    "Muon 0.02": (*MUON, "optimizer.learning_rate=0.02"),
    "Muon 0.04": (*MUON, "optimizer.learning_rate=0.04"),
    "wsd, 1-sqrt over the last fifth": WSD,
    "rotary positions": ROTARY,
    "document masks": MASKS,
    "R-Drop 2 (twice the computation)": R_DROP,
    "weight average, EMA 0.99": ("training.weight_average.kind=ema",
                                 "training.weight_average.decay=0.99"),
    "bfloat16": ("training.precision=bfloat16",),
    "rotary, masks, Muon 0.02, R-Drop 2": (*ROTARY, *MASKS, *MUON, *R_DROP,
                                           "optimizer.learning_rate=0.02"),
}  # fmt: skip


def command(source: str, recipe: str, seed: int) -> list[str]:
    """The words after `mainrun train` that train this recipe."""
    return [*BASE, f"data.source={source}", f"seed={seed}", *RECIPES[recipe]]


def train(words: Sequence[str], run_dir: Path) -> dict:
    """The summary of the run in this folder, which is made if it is not there."""
    summary = run_dir / "summary.json"
    if not summary.is_file() or json.loads(summary.read_text())["status"] != "finished":
        start = ["resume", str(run_dir)] if run_dir.exists() else [
            "train", *words, "--run-dir", str(run_dir)
        ]  # fmt: skip
        mainrun = str(Path(sys.executable).with_name("mainrun"))
        subprocess.run([mainrun, *start], check=True, stdout=subprocess.DEVNULL)
    return json.loads(summary.read_text())


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown: mean `val/loss` of each recipe, and what it gains on the first."""
    lines = [
        "| recipe | seeds | val/loss | difference | ± | by two standard errors | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    reference = next(iter(found.values()))
    for name, runs in found.items():
        losses = [run["loss"] for run in runs]
        cells = [name, str(len(runs)), f"{statistics.mean(losses):.4f}"]
        pairs = [run["loss"] - base["loss"] for run, base in zip(runs, reference, strict=False)]
        if runs is reference:
            cells += ["", "", ""]
        else:
            mean, error = statistics.mean(pairs), standard_error(pairs)
            verdict = (
                "not told apart" if abs(mean) < 2 * error else "lower" if mean < 0 else "higher"
            )
            cells += [f"{mean:+.4f}", f"{error:.4f}", verdict]
        seconds = statistics.mean(run["seconds"] for run in runs)
        lines.append("| " + " | ".join([*cells, f"{seconds:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def standard_error(values: Sequence[float]) -> float:
    """Of their mean; infinite for one value, which says nothing of chance."""
    if len(values) < 2:
        return math.inf
    return statistics.stdev(values) / math.sqrt(len(values))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__)
    parser.add_argument("--source", default="file:../shared/data/hn_titles.txt")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--runs", type=Path, default=Path("build/recipes"))
    options = parser.parse_args(arguments)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    for seed in range(1, options.seeds + 1):
        for number, name in enumerate(RECIPES):
            if name not in options.only:
                continue
            words = command(options.source, name, seed)
            summary = train(words, options.runs / f"{number:02}-{seed}")
            last = summary["last"]
            loss = last.get("val_average/loss", last["val/loss"])
            found[name].append({"loss": loss, "seconds": summary["training_seconds"]})
            print(f"{name}, seed {seed}: {loss:.4f}", file=sys.stderr, flush=True)
    example = shlex.join(["mainrun", "train", *command(options.source, next(iter(RECIPES)), 1)])
    record = {**report.machine(["recipes", *arguments], ""), "found": found, "command": example}
    options.runs.mkdir(parents=True, exist_ok=True)
    (options.runs / "recipes.json").write_text(json.dumps(record, indent=2) + "\n")
    print(table(found))
    print(example)


if __name__ == "__main__":
    main(sys.argv[1:])
