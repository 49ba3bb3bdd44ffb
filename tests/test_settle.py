"""`grad_accumulation: auto` becomes a number: as few micro-batches as the memory allows."""

from pathlib import Path

import pytest

from mainrun import config as configs
from mainrun import memory
from mainrun.config import Config
from mainrun.errors import UserError
from mainrun.training import backend
from tests.conftest import Mainrun

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


def needed(count: int) -> int:
    """Bytes of a step in so many micro-batches, by the estimate."""
    return memory.estimate(settings(count), VOCAB, count).total_bytes


def limited(monkeypatch: pytest.MonkeyPatch, limit: int | None) -> None:
    """A device of that size: the runtime keeps a twentieth of it."""
    monkeypatch.setattr(backend, "memory_limit_bytes", lambda: limit)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_auto_takes_the_fewest_micro_batches_that_fit(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    limited(monkeypatch, int(needed(count) / 0.95) + 1)
    assert memory.settled(settings("auto"), VOCAB) == settings(count)
    following = {1: 2, 2: 3, 3: 4, 4: 6, 6: 12}[count]
    limited(monkeypatch, int(needed(count) / 0.95) - 1)
    assert memory.settled(settings("auto"), VOCAB) == settings(following)


def test_auto_is_one_where_the_memory_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, None)
    assert memory.settled(settings("auto"), VOCAB) == settings(1)


def test_where_one_sequence_at_a_time_does_not_fit_it_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limited(monkeypatch, int(needed(12) / 0.95) - 1)
    with pytest.raises(UserError) as refused:
        memory.settled(settings("auto"), VOCAB)
    said = str(refused.value)
    assert "\n" not in said
    assert said.startswith("a training step of one sequence at a time needs 0.00 GiB by estimate")
    assert said.endswith("make the model or data.context_length smaller")


@pytest.mark.parametrize("count", [1, 4])
def test_a_number_is_left_alone_however_little_memory_there_is(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    limited(monkeypatch, 1)
    assert memory.settled(settings(count), VOCAB) == settings(count)


def test_a_run_writes_down_the_number_that_it_found(
    tmp_path: Path, tiny: list[str], mainrun: Mainrun
) -> None:
    run_dir = tmp_path / "run"
    few = [*tiny, "training.max_steps=2", "training.evals_per_epoch=0"]
    mainrun("train", *few, "training.grad_accumulation=auto", "--run-dir", run_dir)
    assert configs.load(run_dir / "config.yaml").training.grad_accumulation == 1
