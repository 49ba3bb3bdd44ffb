"""How PyTorch is reached: the interpreter that has it, and a run's settings in its script's terms.

PyTorch is never importable beside JAX here; `torch_gpt.py` runs under an interpreter of its own,
made by `task oracle`.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

from mainrun import config

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "torch_gpt.py"
MISSING = "no PyTorch: `task oracle` makes .venv-torch, or name one in MAINRUN_TORCH_PYTHON"


def interpreter() -> Path | None:
    """The Python that can import PyTorch, or None."""
    named = os.environ.get("MAINRUN_TORCH_PYTHON")
    candidate = Path(named) if named else ROOT / ".venv-torch" / "bin" / "python"
    return candidate if candidate.exists() else None


def sees_gpu(python: Path) -> bool:
    """Whether that PyTorch can compute on a GPU."""
    program = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([python, "-c", program], check=False).returncode == 0


def settings(
    run: config.Config, *, vocab_size: int, total_steps: int, steps_per_epoch: int
) -> dict[str, Any]:
    """What `benchmarks/torch_gpt.py` must know to train as this run does."""
    schedule = run.schedule
    assert isinstance(schedule, config.Cosine), "the PyTorch side knows the cosine only"
    optimizer = config.as_dict(run)["optimizer"]
    warmup = schedule.warmup.in_steps(
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        tokens_per_step=run.training.batch_size * run.data.context_length,
    )
    assert isinstance(run.model, config.Gpt)
    return {
        "seed": run.seed,
        "batch_size": run.training.batch_size,
        "precision": run.training.precision,
        "grad_clip": run.training.grad_clip,
        "model": {
            "vocab_size": vocab_size,
            "context_length": run.data.context_length,
            "d_model": run.model.d_model,
            "num_layers": run.model.num_layers,
            "num_heads": run.model.attention.num_heads,
            "mlp_hidden": run.model.mlp.hidden_in(run.model.d_model),
            "dropout": run.model.dropout,
        },
        "optimizer": optimizer,
        "schedule": {
            "learning_rate": optimizer["learning_rate"],
            "warmup_steps": warmup,
            "total_steps": total_steps,
            "final_fraction": schedule.final_fraction,
        },
    }
