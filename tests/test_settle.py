"""`grad_accumulation: auto` becomes a number: as few micro-batches as the memory allows."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mainrun import config as configs
from mainrun import memory
from mainrun.config import Config
from mainrun.errors import UserError
from mainrun.memory import compiled, settle
from mainrun.training import backend
from tests.conftest import Mainrun
from tests.shown import shown

pytestmark = pytest.mark.medium

VOCAB = 4000
# 768 tokens a batch: one of more than 1,024 a CPU cuts further by itself.
SETTINGS = [
    "model.d_model=32",
    "model.num_layers=1",
    "model.attention.num_heads=2",
    "data.context_length=64",
    "training.batch_size=12",
]


def settings(accumulation: int | str) -> Config:
    return configs.load(None, [*SETTINGS, f"training.grad_accumulation={accumulation}"])


@cache
def needed(count: int) -> int:
    """Bytes of a step in so many micro-batches, by the compiler's count."""
    return compiled.step_bytes(settings(count), VOCAB, count)


def limited(monkeypatch: pytest.MonkeyPatch, limit: int | None) -> None:
    """A device of that size: the runtime keeps a twentieth of it."""
    monkeypatch.setattr(backend, "memory_limit_bytes", lambda: limit)


@shown("count, off", {"1": (1, 1.25), "3": (3, 0.8), "6": (6, 1.0)}, {"3"}.__contains__)
def test_auto_takes_the_fewest_micro_batches_that_fit_however_far_off_the_estimate_is(
    monkeypatch: pytest.MonkeyPatch, count: int, off: float
) -> None:
    """The compiler is asked: the estimate is made wrong by a factor, as for another device."""
    reckoned = memory.estimate

    def wrong(*words: Any, **named: Any) -> memory.Estimate:
        found = reckoned(*words, **named)
        return replace(found, parts={**found.parts, "off": int((off - 1) * found.total_bytes)})

    monkeypatch.setattr(settle, "estimate", wrong)
    limited(monkeypatch, int(needed(count) / 0.95) + 1)
    assert memory.settled(settings("auto"), VOCAB) == settings(count)
    following = {1: 2, 3: 4, 6: 12}[count]
    limited(monkeypatch, int(needed(count) / 0.95) - 1)
    assert memory.settled(settings("auto"), VOCAB) == settings(following)


def test_auto_is_one_where_the_memory_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, None)
    assert memory.settled(settings("auto"), VOCAB) == settings(1)


def test_where_one_sequence_at_a_time_does_not_fit_it_is_refused_with_what_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limited(monkeypatch, int(needed(12) / 0.95) - 1)
    with pytest.raises(UserError) as refused:
        memory.settled(settings("auto"), VOCAB)
    assert str(refused.value).startswith("a training step needs 0.01 GiB, the device has 0.01 GiB")


@pytest.mark.parametrize("count", [1, 4])
def test_a_number_is_left_alone_however_little_memory_there_is(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    limited(monkeypatch, 1)
    assert memory.settled(settings(count), VOCAB) == settings(count)


@pytest.mark.slow
def test_a_run_writes_down_the_number_that_it_found(
    tmp_path: Path, tiny: list[str], mainrun: Mainrun
) -> None:
    run_dir = tmp_path / "run"
    few = [*tiny, "training.max_steps=2", "training.evals_per_epoch=0"]
    mainrun("train", *few, "training.grad_accumulation=auto", "--run-dir", run_dir)
    assert configs.load(run_dir / "config.yaml").training.grad_accumulation == 1
