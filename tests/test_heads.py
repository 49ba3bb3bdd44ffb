"""`num_heads: auto`, against every number of heads tried by the schema itself."""

import itertools
import math
from pathlib import Path

import pytest

from mainrun import config
from mainrun.config import heads
from mainrun.errors import UserError

AUTO = "model.attention.num_heads=auto"
KINDS = {
    "causal": ["model.attention.kind=causal"],
    "grouped": ["model.attention.num_kv_heads=3"],
    "narrow": ["model.attention.intermediate_dim=96"],
    "rotary": ["model.position=rotary"],
    "sparse": ["model.attention.kind=sparse", "model.attention.pattern.num_verts=4"],
    "local": ["model.attention.kind=sparse", "model.attention.pattern.kind=local"],
    "sparsek": ["model.attention.kind=sparsek", "model.attention.num_kv_heads=2"],
    "latent": ["model.attention.kind=latent", "model.position=rotary"],
}


def accepted(overrides: list[str], largest: int) -> list[int]:
    """Every number of heads that the schema takes."""
    defaults, found = config.read(None), []
    for number in range(1, largest + 1):
        try:
            defaults.load([*overrides, f"model.attention.num_heads={number}"])
        except UserError:
            continue
        found.append(number)
    return found


def distance(widths: list[int], number: int) -> float:
    return sum(math.log(width / number / 64) ** 2 for width in widths)


@pytest.mark.slow
def test_auto_is_the_accepted_number_whose_heads_are_nearest_64(subtests: pytest.Subtests) -> None:
    for width, kind in itertools.product([64, 96, 100, 35], KINDS):
        with subtests.test(width=width, kind=kind):
            overrides = [*KINDS[kind], f"model.d_model={width}"]
            inner = 96 if kind == "narrow" else width
            possible = accepted(overrides, inner)
            if not possible:
                with pytest.raises(UserError, match=f"num_heads=auto: no number .*{inner}"):
                    config.load(None, [*overrides, AUTO])
                continue
            chosen = config.load(None, [*overrides, AUTO]).model.attention.num_heads
            assert chosen in possible
            best = min(distance([inner], number) for number in possible)
            assert distance([inner], chosen) == pytest.approx(best)


def test_heads_fit_every_width_of_an_hourglass() -> None:
    for sizes in itertools.product([64, 96, 192], [48, 128]):
        widths = [384, *sizes]
        overrides = ["model.kind=unet_gpt", "model.d_model=384"]
        overrides.append(f"model.bottleneck_sizes={list(sizes)}")
        possible = accepted(overrides, min(widths))
        chosen = config.load(None, [*overrides, AUTO]).model.attention.num_heads
        best = min(distance(widths, number) for number in possible)
        assert chosen in possible
        assert distance(widths, chosen) == pytest.approx(best)


def test_of_two_numbers_as_near_the_fewer_heads_are_taken() -> None:
    widths = [64, 128]  # one head: of 64 and 128; two: of 32 and 64
    assert distance(widths, 1) == pytest.approx(distance(widths, 2))
    assert heads.best(widths, 1, even=False) == 1


def test_blocks_of_several_widths_meet_in_the_middle() -> None:
    assert heads.best([64, 256], 1, even=False) == 2  # heads of 32 and of 128


def test_the_resolved_config_states_the_number(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("model: {d_model: 256, attention: {num_heads: auto}}\n", encoding="utf-8")
    loaded = config.load(path)
    assert config.as_dict(loaded)["model"]["attention"]["num_heads"] == 4
    # It follows from what the overrides say, wherever it was written.
    assert config.load(path, ["model.d_model=512"]).model.attention.num_heads == 8


def test_what_no_number_can_mend_is_said(subtests: pytest.Subtests) -> None:
    cases = [
        (
            ["model.d_model=35", "model.position=rotary"],
            "model.attention.num_heads=auto: no number divides model.d_model=35 into heads of an "
            "even dimension (model.position=rotary): change one of them (command line)",
        ),
        (
            ["model.attention.num_kv_heads=3"],
            "no number is a multiple of model.attention.num_kv_heads=3 and divides "
            "model.d_model=512: change one of them",
        ),
        (
            ["model.kind=unet_gpt", "model.attention.num_kv_heads=2", "model.d_model=64",
             "model.bottleneck_sizes=[33]"],
            "divides model.d_model=64 and model.bottleneck_sizes=[33]: change",
        ),
        (
            ["model.attention.kind=latent", "model.position=rotary", "model.attention.head_dim=32"],
            "num_heads=auto chooses the heads' dimension, which model.attention.head_dim=32 says",
        ),
        # What is wrong besides is said as ever.
        (["model.d_model=abc"], "model.d_model='abc': a whole number is expected"),
        (["model.attention.num_kv_heads=x"], "model.attention.num_kv_heads='x': a whole number"),
        (["model.attention.kind=dense"], "model.attention.kind='dense': accepted are"),
        (["model.kind=bert"], "model.kind='bert': accepted are"),
        (["model.attention.pattern.stride=3"], "unknown setting `model.attention.pattern`"),
        (["model.kind=unet_gpt", "model.bottleneck_sizes=8"], "a list is expected"),
        (["model.kind=unet_gpt", "model.bottleneck_sizes=[x]"], "a whole number is expected"),
    ]  # fmt: skip
    for overrides, said in cases:
        with subtests.test(overrides=overrides):
            with pytest.raises(UserError) as caught:
                config.load(None, [AUTO, *overrides])
            assert said in str(caught.value)
            assert "\n" not in str(caught.value)


def test_another_word_is_no_number_of_heads(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("model:\n  attention:\n    num_heads: many\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        config.load(path)
    assert str(caught.value) == (
        f"model.attention.num_heads='many': a whole number or 'auto' is expected ({path}:3)"
    )
