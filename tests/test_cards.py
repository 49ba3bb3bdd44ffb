"""`mainrun memory --device CARD`: what a step takes on a card that is not here."""

import json
from dataclasses import replace
from functools import cache

import jax
import pytest

from mainrun import config as configs
from mainrun import memory
from mainrun.cli import main
from mainrun.config import Config
from mainrun.errors import UserError
from mainrun.memory import cards, compiled, target
from mainrun.memory.settle import settled

SETTINGS = [
    "model.d_model=64",
    "model.num_layers=2",
    "model.attention.num_heads=4",
    "training.batch_size=64",
]
VOCAB = 5000
every_card = pytest.mark.parametrize("name", cards.CARDS)


def settings(*overrides: str) -> Config:
    return configs.load(None, [*SETTINGS, *overrides])


@cache
def of(name: str) -> target.Target:
    return target.of_card(cards.named(name))


def compiling(name: str) -> target.Target:
    found = of(name)
    if not found.can_compile:
        pytest.skip("needs the CUDA wheels (the extra cuda12), no GPU")
    return found


def test_a_card_that_is_unknown_is_refused_with_those_that_are_known(
    capsys: pytest.CaptureFixture,
) -> None:
    assert main(["memory", *SETTINGS, "--device", "abacus"]) == 2
    assert "--device abacus is none of a100-40gb, " in capsys.readouterr().err
    with pytest.raises(UserError):
        cards.named("")
    assert cards.named("H200") == cards.CARDS["h200"]


@every_card
def test_a_job_is_given_most_of_the_cards_memory(name: str) -> None:
    card = cards.CARDS[name]
    assert 0.9 * card.memory_bytes < (of(name).limit_bytes or 0) < card.memory_bytes
    assert f"{card.memory_bytes / 2**30:.1f} GiB" in of(name).title


def test_the_command_answers_for_a_card_with_or_without_its_compiler(
    capsys: pytest.CaptureFixture,
) -> None:
    words = [*SETTINGS, "--vocab-size", str(VOCAB), "--device", "h200"]
    assert main(["memory", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["micro_batches"] == 1, "a GPU takes the batch whole, whatever is best on this CPU"
    assert found["available_bytes"] == int(0.92 * 151_397_597_184)
    if of("h200").can_compile:
        # Fused further than on a CPU, for which the estimate is made.
        assert 1 / 3 < found["compiled_bytes"] / found["estimated_bytes"] < 1.1
    else:
        assert found["compiled_bytes"] is None
        assert found["ratio"] is None


def test_without_a_compiler_the_estimate_decides_and_the_table_says_so() -> None:
    there = replace(of("h200"), can_compile=False)
    whole = memory.estimate(settings(), VOCAB, 1, platform="gpu").total_bytes
    auto = settings("training.grad_accumulation=auto")
    assert settled(auto, VOCAB, there) == settings()
    half = replace(there, limit_bytes=int(0.6 * whole))
    count = settled(auto, VOCAB, half).training.grad_accumulation
    assert count == min(
        n
        for n in (1, 2, 4, 8, 16, 32, 64)
        if memory.estimate(
            settings(f"training.grad_accumulation={n}"), VOCAB, n, platform="gpu"
        ).total_bytes
        <= 0.95 * 0.6 * whole
    )
    with pytest.raises(UserError, match="a training step needs"):
        settled(auto, VOCAB, replace(there, limit_bytes=2**20))
    report = memory.examine(settings(), VOCAB, cards.CARDS["h200"])
    text = memory.table(replace(report, compiled_bytes=None))
    assert "no compiler for that card here" in text
    assert max(map(len, text.splitlines())) <= 100


@every_card
@pytest.mark.slow
def test_every_card_can_be_compiled_for(name: str) -> None:
    """What the compiler says of a product of matrices is what its operands take."""
    device = compiling(name).device
    matrix = jax.ShapeDtypeStruct(
        (1024, 1024), "bfloat16", sharding=jax.sharding.SingleDeviceSharding(device)
    )
    executable = jax.jit(lambda x: x @ x).lower(matrix).compile()
    operands = 2 * 2 * 1024**2
    # And, where the product is left to cuBLAS, its workspace.
    assert operands <= compiled.executable_bytes(executable) <= operands + (64 << 20)


@pytest.mark.slow
def test_a_step_is_compiled_for_the_card_and_not_for_this_machine() -> None:
    device = compiling("h200").device
    there = compiled.step_bytes(settings(), VOCAB, 1, device)
    reckoned = memory.estimate(settings(), VOCAB, 1, platform="gpu").total_bytes
    assert there != compiled.step_bytes(settings(), VOCAB, 1)
    assert reckoned / 3 < there < 1.1 * reckoned
