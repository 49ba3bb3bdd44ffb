"""Does a promoted config still come to what it came to? A small training, run again.

The whole run takes minutes or a GPU; the check takes the same settings through a few steps on a
small text that every machine has. It fails when code changes numbers, and not when only the machine
does: always float32, always on the CPU, and so few steps that rounding is not yet amplified. So
far did changes move `val/loss` of 60 steps of python-docs, on two cores of an AMD EPYC:

    gradients summed in four micro-batches        0.0000000
    one thread, SSE4.2 without fused multiply     0.0000000
    JAX 0.11.0 instead of 0.12.0.1                0.0000000
    learning rate 5 % higher                      0.00016
    no weight decay, instead of 0.1               0.0012
    b2 of 0.99 instead of 0.95                    0.0088
    no clipping of gradients                      0.019
    dropout of 0.25 instead of 0.2                0.024
    the text of Python 3.11 or 3.12, not of 3.13  0.033 to 0.038
    another seed                                  0.015 to 0.028
"""

import contextlib
import io
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from mainrun import config as configs
from mainrun import promoted, run, yaml12
from mainrun.config import Config
from mainrun.environment import environment
from mainrun.errors import RunFailed, UserError
from mainrun.promoted import Check
from mainrun.record import metrics, read_events

STEPS, DOCUMENTS, BATCH, VOCAB = 60, 2000, 16, 1024

LEAST_TOLERANCE = 1e-4
"""A thousand times what another order of sums moved, less than any change of numbers did."""
ROUNDINGS = 10.0
"""Times what another order of sums moves this very check, where that is more: some settings, such
as a rate near divergence, amplify rounding sooner."""
TOLERANCE_OTHER_TEXT = 0.1
"""Three times what another Python's docstrings moved: only what is badly broken is seen by it."""

_MOST_FLOPS = 2e13
"""About two minutes of two CPU cores."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Verdict:
    name: str
    check: Check
    value: float
    has_same_text: bool

    @property
    def tolerance(self) -> float:
        return self.check.tolerance if self.has_same_text else self.check.tolerance_other_text

    @property
    def is_reproduced(self) -> bool:
        return abs(self.value - self.check.value) <= self.tolerance


def overrides(config: Config, parameters: int) -> tuple[str, ...]:
    """What makes the config a check: small, offline, on text that every machine has.

    UserError where no batch is small enough for so large a model.
    """
    batch, context = min(config.training.batch_size, BATCH), config.data.context_length
    while batch > 1 and 6.0 * parameters * batch * context * STEPS > _MOST_FLOPS:
        batch //= 2
    if 6.0 * parameters * batch * context * STEPS > _MOST_FLOPS:
        raise UserError(
            f"{parameters:,} parameters are too many for a check of {STEPS} steps on a CPU: say a "
            "smaller one behind the name, such as model.num_layers=2 training.max_steps=20"
        )
    words = ["data.source=python-docs", "data.revision=null", f"data.num_documents={DOCUMENTS}"]
    match config.tokenizer:
        case configs.Char():
            pass
        case configs.Tiktoken():  # it would be downloaded
            words += ["tokenizer.kind=bpe", f"tokenizer.vocab_size={VOCAB}"]
        case fitted:
            words.append(f"tokenizer.vocab_size={min(fitted.vocab_size, VOCAB)}")
    return (
        *words,
        f"training.max_steps={STEPS}", f"training.batch_size={batch}",
        "training.grad_accumulation=1", "training.precision=float32", "training.evals_per_epoch=0",
        "training.num_samples=0", "training.patience=null", "tracking.wandb=disabled",
    )  # fmt: skip


def made(config: Config, words: Sequence[str]) -> Check:
    """The check of this config, which already has the overrides, as it comes out now.

    It is trained twice, once with the gradients summed in another order, as another machine would:
    how far that moves it decides the tolerance.
    """
    value, fingerprint = _trained(config)
    rounded, _ = _trained(_summed_otherwise(config))
    used = environment((), (), None)
    packages = (f"{name} {used['packages'][name]}" for name in ("jax", "optax", "tokenizers"))
    return Check(
        overrides=tuple(words),
        value=value,
        tolerance=max(LEAST_TOLERANCE, ROUNDINGS * abs(rounded - value)),
        tolerance_other_text=TOLERANCE_OTHER_TEXT,
        data_fingerprint=fingerprint,
        made_with=", ".join([f"Python {used['python']}", *packages]),
    )


def again(names: Sequence[str], root: Path, tell: Tell) -> list[Verdict]:
    """The checks of the named files of `root`, or of all, run again. UserError for no such name."""
    return [_verdict(path, tell) for path in _files(names, root)]


def told(verdict: Verdict) -> str:
    """One line."""
    check = verdict.check
    text = "" if verdict.has_same_text else (
        f"; python-docs is another text than that of {check.made_with.partition(',')[0]}"
    )  # fmt: skip
    return (
        f"{verdict.name}: {'reproduced' if verdict.is_reproduced else 'NOT REPRODUCED'}: val/loss "
        f"{verdict.value:.5f}, at promotion {check.value:.5f}, a difference of "
        f"{verdict.value - check.value:+.5f} where {verdict.tolerance:.2g} is tolerated{text}"
    )


def read(path: Path) -> promoted.Result:
    """What the file says of itself. UserError where it says nothing, or is no promoted config."""
    configs.load(path)
    tree, origins = yaml12.read(path)
    if "result" not in tree:
        raise UserError(f"{path} has no result: promote a run with `mainrun promote`")
    return configs.checked(promoted.Section, {"result": tree["result"]}, origins).result


def _files(names: Sequence[str], root: Path) -> list[Path]:
    there = sorted((root / "sota").glob("*.yaml"))
    by_name = {path.stem: path for path in there}
    for name in names:
        if name not in by_name:
            known = ", ".join(by_name) or "none yet"
            raise UserError(f"{name!r} is no promoted config; in {root / 'sota'}: {known}")
    return [by_name[name] for name in names] if names else there


def _verdict(path: Path, tell: Tell) -> Verdict:
    check = read(path).check
    config = configs.load(path, check.overrides)
    tell(f"{path.stem}: training again {config.training.max_steps} steps on the CPU")
    value, fingerprint = _trained(config)
    return Verdict(path.stem, check, value, fingerprint == check.data_fingerprint)


def _summed_otherwise(config: Config) -> Config:
    """The same in micro-batches of one sequence each, or as it is where there is but one."""
    training = replace(config.training, grad_accumulation=config.training.batch_size)
    return replace(config, training=training)


def _trained(config: Config) -> tuple[float, str]:
    """`val/loss` after the last step, and the fingerprint of the text, on the CPU."""
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory(prefix="mainrun-check-") as parent:
        run_dir = Path(parent) / "check"
        with contextlib.redirect_stdout(io.StringIO()):  # it tells of a folder that will be gone
            run.train(config, run_dir, "check", command=("mainrun", "check-sota"))
        rows = metrics(read_events(run_dir / "events.jsonl"))
        value = float(rows[-1].get("val/loss", math.nan))
        if not math.isfinite(value):
            raise RunFailed("the check's loss is no number")
        return value, str(
            json.loads((run_dir / "environment.json").read_text())["data_fingerprint"]
        )
