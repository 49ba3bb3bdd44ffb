"""mainrun: train and tune GPT language models on one's own machine.

The command `mainrun` is the way in (`mainrun.cli`); DESIGN of the package: imports go down only,
cli → run → training → model, data → config, tracking, errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mainrun.trained import Trained, Which

__version__ = "0.1.0"


def load(run_dir: str | Path, *, checkpoint: Which = "best", average: bool = False) -> Trained:
    """A trained run: its `model`, `tokenizer`, `config`, `network` and `params`.

    `checkpoint` is the best by `val/loss` or the newest; `average` takes the running average of
    the weights (`training.weight_average`). Raises `mainrun.errors.UserError` where there is none.
    """
    from mainrun import trained  # JAX takes a second to import, and the command need not wait

    return trained.load(Path(run_dir), checkpoint=checkpoint, average=average)
