"""What a step is reckoned to take, against the compiler's own count and against closed forms."""

import json
from pathlib import Path

import jax
import pytest

from mainrun import config as configs
from mainrun import memory
from mainrun.cli import main
from mainrun.config import Config
from mainrun.console import lines
from mainrun.memory import compiled, vocabulary
from mainrun.memory.peak import Estimate, estimate
from mainrun.parts import num_micro_batches
from mainrun.record import read_events
from tests.conftest import REPOSITORY, Mainrun
from tests.shown import shown

TOLERANCE = 0.2  # the issue's; the worst of these is off by a tenth

COMPUTES_AGAIN = jax.__version_info__ >= (0, 11)
NOT_AGAIN = "XLA:CPU of JAX 0.10 keeps what it was asked to compute again"

SMALL = ["model.d_model=96", "model.num_layers=2", "model.attention.num_heads=4"]
ONE = [*SMALL, "model.num_layers=1"]
MODERN = [
    "model.norm=rmsnorm",
    "model.position=rotary",
    "model.mlp.kind=swiglu",
    "model.bias=false",
]

# Reduced sizes, each so that another part is the largest: vocabulary, largest part, overrides.
CASES: dict[str, tuple[int, str, list[str]]] = {
    "gpt with many tokens to choose from": (6000, "logits", [*SMALL, "training.batch_size=6"]),
    "a vocabulary whose logits are never there at once": (
        100_000,
        "logits",
        ["model.d_model=64", "model.num_layers=1", "model.attention.num_heads=2",
         "training.batch_size=8"],
    ),
    "the same, read twice": (
        100_000,
        "two_passes",
        ["model.d_model=64", "model.num_layers=1", "model.attention.num_heads=2",
         "training.batch_size=4", "training.regularization.r_drop=1"],
    ),
    "gpt of characters": (
        90,
        "mlp",
        [*ONE, "data.context_length=48", "training.batch_size=16"],
    ),
    "grouped queries, rmsnorm, swiglu, rotary": (
        300,
        "mlp",
        [*ONE, *MODERN, "model.attention.num_kv_heads=1", "training.batch_size=4"],
    ),
    "long context": (
        200,
        "attention_weights",
        [*SMALL, "data.context_length=512", "training.batch_size=2"],
    ),
    "window": (
        200,
        "mlp",
        [*SMALL, "data.context_length=512", "training.batch_size=2",
         "model.attention.window_including_self=48"],
    ),
    "fixed pattern": (
        200,
        "mlp",
        [*ONE, "data.context_length=1024", "training.batch_size=1",
         "model.attention.kind=sparse", "model.attention.pattern={kind: fixed, stride: 32}"],
    ),
    "sparsek": (
        3000,
        "logits",
        ["model.d_model=64", "model.num_layers=1", "data.context_length=256",
         "training.batch_size=2",
         "model.attention={kind: sparsek, num_selected: 16, window_including_self: 16}"],
    ),
    "latent": (
        200,
        "packed_operands",
        ["model.d_model=96", "model.num_layers=1", "model.position=rotary",
         "data.context_length=256", "training.batch_size=2",
         "model.attention={kind: latent, num_heads: 4, rotary_dim: 8, kv_rank: 32}"],
    ),
    "unet": (
        4000,
        "logits",
        ["model.kind=unet_gpt", "model.d_model=64", "model.bottleneck_sizes=[64, 32]",
         "model.attention.num_heads=4", "training.batch_size=6"],
    ),
    "experts": (
        200,
        "experts",
        ["model.d_model=64", "model.num_layers=1", "model.attention.num_heads=4",
         "model.mlp={kind: moe, num_experts: 4, top_k: 2}", "training.batch_size=6"],
    ),
    "untied, bfloat16, in micro-batches": (
        6000,
        "logits",
        [*ONE, "training.precision=bfloat16", "model.tie_embeddings=false",
         "training.grad_accumulation=2", "training.batch_size=8"],
    ),
    "adapters": (
        2000,
        "logits",
        [*ONE, "training.batch_size=8", "training.init_from=runs/base",
         "model.lora={rank: 4, dropout: 0.1}"],
    ),
    "blocks computed again": (
        200,
        "attention_weights",
        [*SMALL, "model.num_layers=6", "data.context_length=256", "training.batch_size=4",
         "training.remat=blocks"],
    ),
    "the same, narrowing, in bfloat16": (
        200,
        "attention_weights",
        ["model.kind=unet_gpt", "model.d_model=64", "model.bottleneck_sizes=[64, 32, 64, 64, 32]",
         "model.attention.num_heads=4", "data.context_length=256", "training.batch_size=4",
         "training.precision=bfloat16", "training.remat=blocks"],
    ),
    "a tiny batch": (
        2000,
        "optimizer_state",
        ["model.d_model=128", "model.num_layers=1", "data.context_length=8",
         "training.batch_size=2"],
    ),
}  # fmt: skip


SHOWN = {"window", "untied, bfloat16, in micro-batches", "experts"}


def settings(*overrides: str) -> Config:
    return configs.load(None, overrides)


def reckoned(config: Config, vocab_size: int) -> Estimate:
    return estimate(config, vocab_size, num_micro_batches(config))


@shown("case", {name: name for name in CASES}, SHOWN.__contains__)
def test_the_estimate_is_within_a_fifth_of_the_compiled_step(case: str):
    vocab_size, largest, overrides = CASES[case]
    if "training.remat=blocks" in overrides and not COMPUTES_AGAIN:
        pytest.skip(NOT_AGAIN)
    config = settings(*overrides)
    found = reckoned(config, vocab_size)
    counted = compiled.step_bytes(config, vocab_size, num_micro_batches(config))
    assert found.total_bytes == pytest.approx(counted, rel=TOLERANCE)
    assert found.dominating == largest


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((REPOSITORY / "config/base").glob("*.yaml")), ids=str)
def test_the_estimate_is_within_a_fifth_for_every_config_that_we_have(path: Path):
    found = memory.examine(configs.load(path))
    assert found.ratio == pytest.approx(1, rel=TOLERANCE)


# --- parts ----------------------------------------------------------------------------------------


def test_parameters_are_counted_once_and_moments_for_each():
    """GPT by hand: 12 d² + 13 d numbers a block, a row for each token and position, a last norm."""
    d, layers, time, vocab_size = 96, 2, 128, 500
    numbers = layers * (12 * d**2 + 13 * d) + (vocab_size + time) * d + 2 * d
    config = settings(*SMALL, "training.batch_size=1")
    found = reckoned(config, vocab_size).by_part
    assert found["parameters"] == 4 * numbers
    assert 2 * found["parameters"] <= found["optimizer_state"] <= 2 * found["parameters"] + 100

    untied = reckoned(settings(*SMALL, "model.tie_embeddings=false"), vocab_size).by_part
    assert untied["parameters"] - found["parameters"] == 4 * vocab_size * d
    plain = reckoned(settings(*SMALL, "optimizer.kind=sgd"), vocab_size).by_part
    assert plain["optimizer_state"] < 100


def test_logits_are_batch_times_time_times_vocabulary_and_attention_time_squared():
    def by_part(*overrides: str) -> dict[str, int]:
        return reckoned(settings(*SMALL, "training.batch_size=4", *overrides), 8000).by_part

    found = by_part()
    assert found["logits"] == 2 * 4 * (4 * 128 * 8000)
    # Two layers, four heads, two arrays of float32.
    assert found["attention_weights"] == 2 * 2 * 4 * (4 * 4 * 128 * 128)
    shorter = by_part("data.context_length=64")
    assert shorter["logits"] * 2 == found["logits"]
    assert shorter["attention_weights"] * 4 == found["attention_weights"]


def test_a_window_holds_fewer_scores_than_time_squared():
    long = [*SMALL, "data.context_length=1024", "training.batch_size=1"]
    dense = reckoned(settings(*long), 200).by_part["attention_weights"]
    window = reckoned(settings(*long, "model.attention.window_including_self=64"), 200).by_part
    # Two layers, four heads, two arrays of float32; tiles hold up to three windows of keys.
    least = 2 * 4 * 2 * (4 * 1024 * 64)
    assert least <= window["attention_weights"] <= 3 * least < dense / 2


def test_only_one_micro_batch_is_in_memory_but_a_sum_of_gradients_is():
    def by_part(count: int) -> dict[str, int]:
        words = [*SMALL, "training.batch_size=6", f"training.grad_accumulation={count}"]
        return estimate(settings(*words), 8000, count).by_part

    whole, halves = by_part(1), by_part(2)
    for name in ("logits", "attention_weights", "mlp", "norms_and_residual"):
        assert halves[name] * 2 == whole[name]
    assert "gradient_accumulator" not in whole
    assert halves["gradient_accumulator"] == whole["parameters"]


def test_clipping_holds_two_sets_of_gradients_at_once():
    vocab_size, _, overrides = CASES["a tiny batch"]
    clipped = reckoned(settings(*overrides), vocab_size)
    assert clipped.moment == "the update"
    assert clipped.by_part["gradients"] == 2 * clipped.by_part["parameters"]
    assert clipped.activation_bytes > 0  # gone by then, but told
    free = reckoned(settings(*overrides, "training.grad_clip=null"), vocab_size)
    assert free.total_bytes < clipped.total_bytes


def test_under_adapters_the_base_has_no_moments():
    vocab_size, _, overrides = CASES["adapters"]
    found = reckoned(settings(*overrides), vocab_size).by_part
    assert found["frozen_parameters"] > 10 * found["parameters"]
    assert found["optimizer_state"] < 2 * found["parameters"] + 100


def test_every_block_is_told_with_its_own_width():
    widths = (256, 64, 128, 512)
    found = reckoned(settings("model.kind=unet_gpt", "model.bottleneck_sizes=[256, 64, 128]"), 9000)
    assert [block["mlp"] // found.blocks[1]["mlp"] for block in found.blocks] == [
        width // 64 for width in widths
    ]
    assert found.total_bytes == sum(
        map(sum, (part.values() for part in (found.parts, *found.blocks)))
    )


@pytest.mark.slow
@pytest.mark.skipif(not COMPUTES_AGAIN, reason=NOT_AGAIN)
def test_of_blocks_that_are_computed_again_one_is_in_memory():
    words = [*SMALL, "model.num_layers=6", "data.context_length=256", "training.batch_size=4"]
    plain = settings(*words)
    again = settings(*words, "training.remat=blocks")
    found = reckoned(again, 200)
    assert found.moment == "the backward pass of block 1"
    assert "block_outputs" not in found.by_part, "of the others nothing is left by then"
    assert not any(map(len, found.blocks[1:]))
    before = reckoned(plain, 200).by_part["attention_weights"]
    assert found.by_part["attention_weights"] * 6 == before
    kept, counted = (compiled.step_bytes(c, 200, num_micro_batches(c)) for c in (plain, again))
    assert counted < kept / 2


# --- vocabulary -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokenizer", "size"),
    [
        ("{kind: bpe, vocab_size: 999}", 999),
        ("{kind: unigram, vocab_size: 999}", 999),
        ("{kind: wordpiece, vocab_size: 999}", 999),
        ("{kind: tiktoken, encoding: gpt2}", 50_257 + 2),
        ("{kind: tiktoken, encoding: o200k_base}", 200_019 + 2),
    ],
)
def test_the_vocabulary_is_what_the_settings_say(tokenizer: str, size: int):
    assert vocabulary.expected(settings(f"tokenizer={tokenizer}")).size == size


def test_a_vocabulary_of_characters_is_an_assumption_and_is_called_one():
    found = vocabulary.expected(settings("tokenizer.kind=char"))
    assert "assumed" in found.reason
    assert "--vocab-size" in found.reason


# --- what is shown --------------------------------------------------------------------------------


def shown(available_bytes: int | None) -> memory.Report:
    config = settings(*SMALL, "training.batch_size=6")
    found = reckoned(config, 6000)
    return memory.Report(
        estimate=found,
        compiled_bytes=found.total_bytes * 2,
        vocabulary=vocabulary.expected(config),
        micro_batches=1,
        config=config,
        target=memory.Target("a machine", "cpu", available_bytes, None),
    )


def test_table_tells_parts_like_blocks_once_and_which_part_is_largest():
    text = memory.table(shown(2**40))
    told = [line.split("  ")[1] for line in text.splitlines() if line.startswith("  ")]
    assert "blocks 1 to 2" in told
    assert sum("attention's weights" in line for line in text.splitlines()) == 1
    assert "estimate      0.50 of the compiler's count" in text
    assert "largest part  logits and loss, 35.2 MiB" in text
    assert "1024.00 GiB: it fits" in text
    assert max(map(len, text.splitlines())) <= 100


def test_what_does_not_fit_is_told_with_the_remedy():
    found = shown(2**20)
    assert not found.fits
    assert "too little: a training step needs" in memory.table(found)
    assert "make the model or data.context_length smaller" in memory.table(found)
    assert memory.as_dict(found)["fits"] is False
    assert "unknown" in memory.table(shown(None))


def test_command_answers_in_json_for_a_step_far_too_large(capsys: pytest.CaptureFixture[str]):
    """Shapes are compiled, so 192 GiB of parameters are no more work than any."""
    words = ["model.d_model=65536", "model.mlp.hidden=262144", "model.num_layers=1"]
    assert main(["memory", *words, "--vocab-size", "300", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert found["parts_bytes"]["parameters"] > 4 * 12 * 65536**2
    assert found["estimated_bytes"] == sum(found["parts_bytes"].values())
    assert found["ratio"] == pytest.approx(1, rel=TOLERANCE)
    assert found["vocab_size"] == 300
    assert found["dominating_part"] == "optimizer_state"


def test_no_corpus_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "config.yaml"
    path.write_text("data: {source: 'file:/not/there', context_length: 32}\n"
                    "model: {d_model: 16, num_layers: 1, attention: {num_heads: 2}}\n"
                    "tokenizer: {vocab_size: 300}\ntraining: {batch_size: 4}\n")  # fmt: skip
    assert main(["memory", str(path)]) == 0
    assert "of the compiler's count" in capsys.readouterr().out


def test_a_run_tells_its_memory_by_part_when_it_starts(finished_run: Path):
    told = next(
        e for e in read_events(finished_run / "events.jsonl") if e["event"] == "run_started"
    )
    assert sum(told["memory_bytes"].values()) == told["estimated_step_bytes"]
    assert told["estimated_step_bytes"] == pytest.approx(told["step_bytes"], rel=TOLERANCE)
    _, line = lines("run_started", 0, told)
    largest = next(iter(told["memory_bytes"]))
    assert line.startswith("memory of a step: ")
    assert largest.replace("_", " ") in line


def test_dry_run_tells_it_too(mainrun: Mainrun, tiny: list[str]):
    report = mainrun("train", *tiny, "--dry-run").stdout
    row = next(line for line in report.splitlines() if line.startswith("by part"))
    assert "MiB estimated: " in row
