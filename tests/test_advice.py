"""A step that does not fit is refused before it starts, with the settings that would fit."""

import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mainrun import config as configs
from mainrun import memory, run
from mainrun.cli import main
from mainrun.config import Config
from mainrun.errors import RunFailed, UserError, is_out_of_memory
from mainrun.memory import advice
from mainrun.parts import num_micro_batches
from mainrun.record import read_events
from mainrun.training import backend

VOCAB = 300
# 960 tokens a batch: one of more than 1,024 a CPU cuts further by itself.
SETTINGS = [
    "model.d_model=48",
    "model.num_layers=6",
    "model.attention.num_heads=4",
    "data.context_length=80",
    "training.batch_size=12",
]
FULL = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")


def settings(*overrides: str) -> Config:
    return configs.load(None, [*SETTINGS, *overrides])


def needed(config: Config) -> int:
    return memory.estimate(config, VOCAB, num_micro_batches(config)).total_bytes


def told(text: str) -> list[str]:
    """The settings of the lines behind the first."""
    return [line.strip().split(": ")[0] for line in text.splitlines()[1:]]


def test_every_remedy_that_is_told_would_fit_and_less_of_it_would_not() -> None:
    room = needed(settings()) // 2
    text = memory.advice.too_large(needed(settings()), int(room / 0.95) + 1, settings(), VOCAB)
    remedies = told(text)
    assert [word.split("=")[0] for word in remedies] == [
        "training.grad_accumulation", "training.batch_size", "training.remat",
    ], "bfloat16 alone halves less than all"  # fmt: skip
    assert all(needed(settings(*words.split())) <= room for words in remedies)
    count = int(remedies[0].split("=")[1])
    fewer = max(n for n in range(1, count) if 12 % n == 0)
    assert needed(settings(f"training.grad_accumulation={fewer}")) > room
    assert needed(settings("training.precision=bfloat16")) > room
    size = int(remedies[1].split("=")[1])
    larger = min(n for n in range(size + 1, 13) if 12 % n == 0)
    assert needed(settings(f"training.batch_size={larger}")) > room


def test_where_no_remedy_is_enough_alone_all_are_told_together() -> None:
    words = "training.grad_accumulation=12 training.precision=bfloat16 training.remat=blocks"
    room = needed(settings(*words.split()))
    alone = advice.remedies(settings(), VOCAB, room)
    assert [remedy.setting for remedy in alone] == [words]
    assert alone[0].needed_bytes == room
    assert advice.remedies(settings(), VOCAB, room - 1) == []


def test_where_nothing_helps_the_model_is_to_be_smaller() -> None:
    with pytest.raises(UserError) as refused:
        memory.check_fits(3 * 2**30, 2**10, settings(), VOCAB)
    assert str(refused.value) == (
        "a training step needs 3.00 GiB, the device has 0.00 GiB: "
        "make the model or data.context_length smaller"
    )


def test_what_fits_and_what_nobody_knows_are_let_go() -> None:
    memory.check_fits(90, 100, settings(), VOCAB)
    memory.check_fits(2**60, None, settings(), VOCAB)


@pytest.mark.parametrize("mesh", [configs.Mesh(data=4), configs.Mesh(data=2, fsdp=2)], ids=str)
def test_on_a_mesh_no_remedy_leaves_devices_without_their_share(mesh: configs.Mesh) -> None:
    on_mesh = replace(settings(), mesh=mesh)
    room = needed(settings()) // 2
    remedies = [remedy.setting for remedy in advice.remedies(on_mesh, VOCAB, room)]
    assert "training.grad_accumulation=3" in remedies, "12 examples, 4 at a time"
    alone = advice.remedies(on_mesh, VOCAB, needed(settings("training.grad_accumulation=12")))
    assert not any("grad_accumulation" in r.setting or "batch_size" in r.setting for r in alone)


def test_remedies_are_told_by_how_far_the_estimate_was_off() -> None:
    room, whole = needed(settings()) // 2, needed(settings())
    plain = advice.remedies(settings(), VOCAB, room)
    double = advice.remedies(settings(), VOCAB, 2 * room, factor=2.0)
    assert [r.setting for r in double] == [r.setting for r in plain]
    assert [r.needed_bytes for r in double] == pytest.approx(
        [2 * r.needed_bytes for r in plain], abs=2
    )
    text = advice.too_large(2 * whole, int(2 * room / 0.95) + 1, settings(), VOCAB)
    assert told(text) == [r.setting for r in plain]


def test_a_step_far_too_large_by_estimate_is_refused_without_compiling(
    capsys: pytest.CaptureFixture, tiny: list[str]
) -> None:
    compilations: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **about: compilations.append(f"{event} {about}")
    )
    huge = ["model.d_model=65536", "model.mlp.hidden=400000", "model.num_layers=1"]
    try:
        assert main(["train", *tiny, *huge]) == 2
    finally:
        jax.monitoring.clear_event_listeners()
    done = [event for event in compilations if "backend_compile" in event]
    assert all("jit(stage)" in event for event in done), "only the text's way to the device"
    assert re.search(
        r"a training step needs \d+\.\d\d GiB, the device has", capsys.readouterr().err
    )


def test_an_estimate_is_believed_only_as_far_as_it_may_be_off() -> None:
    found = memory.estimate(settings(), VOCAB, 1)
    memory.check_possible(found, int(found.total_bytes / 1.29), settings(), VOCAB)
    memory.check_possible(found, None, settings(), VOCAB)
    with pytest.raises(UserError, match=r"training\.grad_accumulation="):
        memory.check_possible(found, int(found.total_bytes / 1.31), settings(), VOCAB)


# --- at run time ----------------------------------------------------------------------------------


def test_the_error_of_a_device_that_is_full_is_known_from_others() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError) as full:
        jnp.zeros(2**58, jnp.int8).block_until_ready()
    assert is_out_of_memory(full.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: something else"))


def test_running_out_of_memory_is_told_with_what_takes_clearly_less() -> None:
    whole = needed(settings())
    with pytest.raises(RunFailed) as failed, memory.explained(whole, settings(), VOCAB):
        raise FULL
    text = str(failed.value)
    assert text.startswith("out of memory, a training step needs 0.0")
    assert "(RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes)" in text
    assert told(text)
    assert all(needed(settings(*words.split())) <= 0.75 * whole for words in told(text))


def test_other_errors_stay_what_they_are(subtests: pytest.Subtests) -> None:
    for error in [ValueError("a bug"), UserError("no RESOURCE_EXHAUSTED")]:
        with subtests.test(error=error):
            with pytest.raises(type(error)) as raised, memory.explained(1, settings(), VOCAB):
                raise error
            assert raised.value is error


@pytest.mark.slow
def test_a_run_that_is_out_of_memory_has_failed_and_its_record_says_why(
    tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The device's error is made up; all else is as it is."""

    def full(*_: object) -> None:
        raise FULL

    monkeypatch.setattr(run, "drive", full)
    assert main(["train", *tiny, "--run-dir", str(tmp_path / "run")]) == 1
    last = list(read_events(tmp_path / "run" / "events.jsonl"))[-1]
    assert last["event"] == "failed"
    assert "training.batch_size=" in last["reason"]
    said = capsys.readouterr().err
    assert "mainrun: failed: out of memory, a training step needs" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_the_limit_is_this_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "memory_limit_bytes", lambda: 24 * 2**20)
    report = memory.examine(settings(), VOCAB)
    assert not report.fits
    assert "by estimate it would need with" in memory.table(report)
