"""Overrides that are said of one kind: taken where it is chosen, without a word where it is not."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest

from mainrun import complaints, config
from mainrun.config import carried, effects
from mainrun.errors import UserError


def loaded(*overrides: str, path: Path | None = None) -> config.Config:
    return config.load(path, overrides)


def complaint(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        config.load(None, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


MOE = ["model.mlp.kind=moe", "model.mlp.moe.top_k=1"]


def test_it_is_taken_where_the_kind_is_chosen(subtests: pytest.Subtests) -> None:
    for words in [MOE, MOE[::-1]]:
        with subtests.test(words=words):
            assert loaded(*words).model.mlp == config.MixtureOfExperts(top_k=1)


def test_it_is_left_out_where_another_kind_is() -> None:
    assert loaded(MOE[1]) == config.Config()
    assert loaded("model.mlp.kind=relu", MOE[1]).model.mlp == config.DenseMlp(kind="relu")


def test_the_kind_may_be_that_of_the_file_or_the_default(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("model: {mlp: {kind: moe}}\noptimizer: {kind: sgd}\n", encoding="utf-8")
    words = [MOE[1], "optimizer.adamw.b1=0.5", "optimizer.sgd.momentum=0.5"]
    assert loaded(*words, path=path).model.mlp == config.MixtureOfExperts(top_k=1)
    assert loaded(*words, path=path).optimizer == config.Sgd(momentum=0.5)
    assert loaded(*words).optimizer == config.AdamW(b1=0.5)


def test_every_kind_may_be_told_apart_in_one_list() -> None:
    """As a sweep over kinds passes it: all parameters to every trial."""
    classes = complaints.dataclasses_in(config.Optimizer)
    kinds = [kind for cls in classes for kind in complaints.kinds_of(cls)]
    words = [f"optimizer.{kind}.learning_rate={i + 1}e-3" for i, kind in enumerate(kinds)]
    for i, kind in enumerate(kinds):
        found = loaded(f"optimizer.kind={kind}", *words).optimizer
        assert (found.kind, found.learning_rate) == (kind, pytest.approx((i + 1) * 1e-3))


def test_kinds_inside_kinds() -> None:
    words = [
        "model.attention.sparse.pattern.fixed.num_verts=4",
        "model.attention.sparse.pattern.strided.stride=16",
    ]
    attention = "model.attention.kind=sparse"
    pattern = "model.attention.pattern.kind=strided"
    assert loaded(*words).model.attention == config.CausalAttention()
    found = loaded(attention, *words).model.attention
    assert found == config.SparseAttention(pattern=config.FixedKeys(num_verts=4))
    found = loaded(attention, pattern, *words).model.attention
    assert found == config.SparseAttention(pattern=config.StridedKeys(stride=16))


def test_a_kind_may_itself_be_said_of_one_kind_and_takes_what_is_said_of_it() -> None:
    words = [
        "model.unet_gpt.attention.kind=sparsek",
        "model.attention.num_heads=4",
        "model.attention.sparsek.num_selected=7",
    ]
    assert loaded(*words).model.attention == config.CausalAttention(num_heads=4)
    found = loaded("model.kind=unet_gpt", *words).model.attention
    assert found == config.SparseKAttention(num_heads=4, num_selected=7)


def test_a_new_kind_around_it_has_its_own_kinds(tmp_path: Path) -> None:
    """What the file said inside the old one is gone."""
    path = tmp_path / "my.yaml"
    path.write_text("model: {attention: {kind: sparsek}}\n", encoding="utf-8")
    words = ["model.attention.sparsek.num_selected=7", "model.attention.causal.qk_norm=true"]
    found = loaded(*words, path=path).model.attention
    assert found == config.SparseKAttention(num_selected=7)
    found = loaded("model.kind=unet_gpt", *words, path=path).model.attention
    assert found == config.CausalAttention(qk_norm=True)


def test_said_both_ways_the_condition_counts() -> None:
    for words in ([MOE[1], "model.mlp.top_k=3"], ["model.mlp.top_k=3", MOE[1]]):
        assert loaded("model.mlp.kind=moe", *words).model.mlp == config.MixtureOfExperts(top_k=1)


def test_nested_mappings_of_an_agent_of_wandb_are_taken() -> None:
    passed = "model={'mlp': {'kind': 'moe', 'moe': {'top_k': 1}, 'gelu': {'hidden': 8}}}"
    assert loaded(passed).model.mlp == config.MixtureOfExperts(top_k=1)


def test_what_may_be_absent_stays_absent() -> None:
    assert loaded("training.weight_average.ema.decay=0.9").training.weight_average is None
    found = loaded("training.weight_average.kind=ema", "training.weight_average.ema.decay=0.9")
    assert found.training.weight_average == config.Ema(decay=0.9)


def test_no_setting_is_called_like_a_kind_beside_it() -> None:
    """Or its path would have two meanings."""

    def visit(annotation: Any) -> None:
        classes = complaints.dataclasses_in(annotation)
        kinds = {kind for cls in classes for kind in complaints.kinds_of(cls)}
        for cls in classes:
            assert not kinds & {field.name for field in dataclasses.fields(cls)}
            for hint in complaints.hints_of(cls).values():
                visit(hint)

    visit(config.Config)


def test_what_no_kind_has_is_refused_whichever_is_chosen(subtests: pytest.Subtests) -> None:
    cases = [
        ("model.mlp.gelu.top_k=1", "unknown setting `model.mlp.gelu.top_k`: it belongs to "
         "model.mlp.kind=moe (command line)"),
        ("model.mlp.moe.topk=1", "unknown setting `model.mlp.moe.topk`; did you mean "
         "`model.mlp.moe.top_k`? (command line)"),
        ("model.mlp.mo.top_k=1", "unknown setting `model.mlp.mo`; did you mean"),
        ("model.mlp.moe=1", "unknown setting `model.mlp.moe`: it is a kind, written "
         "model.mlp.kind=moe; an override model.mlp.moe.SETTING=… changes what only that kind has"),
        ("model.mlp.moe.kind=gelu", "unknown setting `model.mlp.moe.kind`"),
        ("model={mlp: {moe: {topk: 1}}}", "unknown setting `model.mlp.moe.topk`"),
    ]  # fmt: skip
    for chosen, (override, said) in itertools.product([[], ["model.mlp.kind=moe"]], cases):
        with subtests.test(chosen=chosen, override=override):
            assert said in complaint(*chosen, override)


def test_a_value_that_is_taken_is_checked() -> None:
    said = complaint("model.mlp.kind=moe", "model.mlp.moe.top_k=9")
    assert said == "model.mlp.top_k=9 is more than model.mlp.num_experts=4 (command line)"


def test_a_file_says_its_kind_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("model: {mlp: {moe: {top_k: 1}}}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"unknown setting `model.mlp.moe`: it is a kind"):
        config.load(path)


def test_what_is_left_out_is_known() -> None:
    source = config.read(None)
    words = [MOE[1], "schedule.wsd.warmup={steps: 5}", "schedule.cosine.warmup.steps=3"]
    assert source.left_out(words) == ("model.mlp.moe.top_k", "schedule.wsd.warmup.steps")
    inner = "model.attention.sparse.pattern.strided.stride"
    assert source.left_out([f"{inner}=8"]) == (inner,)
    assert source.left_out([f"{inner}=8", "model.attention.kind=sparse"]) == (inner,)
    chosen = ["model.attention.kind=sparse", "model.attention.pattern.kind=strided"]
    assert source.left_out([f"{inner}=8", *chosen]) == ()


# ---------------------------------------------------------------------------------------------
# The width of an MLP, said as a number or in widths of its block


def test_the_mlp_is_as_wide_as_is_said(subtests: pytest.Subtests) -> None:
    cases = [
        ([], 48, 192),
        (["model.mlp.expansion=2"], 48, 96),
        (["model.mlp.expansion=2.6666666666666665"], 100, 267),
        (["model.mlp.expansion=0.001"], 48, 1),
        (["model.mlp.hidden=70"], 48, 70),
    ]
    for kind, (words, width, hidden) in itertools.product(["gelu", "moe"], cases):
        with subtests.test(kind=kind, words=words, width=width, hidden=hidden):
            assert loaded(f"model.mlp.kind={kind}", *words).model.mlp.hidden_in(width) == hidden


def test_the_mlps_width_is_said_once(subtests: pytest.Subtests) -> None:
    for kind in ["gelu", "moe"]:
        with subtests.test(kind=kind):
            width = ["model.mlp.expansion=2", "model.mlp.hidden=64"]
            assert complaint(f"model.mlp.kind={kind}", *width) == (
                "model.mlp.expansion=2 and model.mlp.hidden=64 both say how wide the MLP is: set "
                "one, and the other to null (command line)"
            )


def test_every_list_of_settings_names_settings() -> None:
    """A setting that is renamed, and not there too, would be none of its kind in silence."""
    lists = {name: value for name, value in vars(effects).items() if name.isupper()}
    lists |= {"CARRIED": carried.CARRIED, "_APART": carried._APART}
    assert len(lists) == 7
    for name, paths in lists.items():
        assert {path.removesuffix(".") for path in paths} <= config.known_paths(), name
