"""Files, parents and overrides become one config; what does not fit is said in one line."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from mainrun import complaints, config, yaml12
from mainrun.errors import UserError

ROOT = config.default_config_root()


def complaint(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        config.load(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_base_yaml_states_the_defaults_of_the_schema() -> None:
    assert config.load(ROOT / "base.yaml") == config.Config()


def test_base_yaml_names_every_setting_of_every_kind() -> None:
    text = (ROOT / "base.yaml").read_text()
    words = set(text.replace("#", " ").replace("{", " ").replace(":", " : ").split())
    names = {path.rpartition(".")[2] for path in complaints.all_paths(config.Config)}
    assert names - words == set()


def test_base_yaml_gives_other_kinds_their_true_defaults() -> None:
    """The commented settings under a kind, read as YAML, are that kind's defaults."""
    blocks: list[dict] = []
    for line in (ROOT / "base.yaml").read_text().splitlines():
        text = line.strip()
        if text.startswith("# kind:"):
            blocks.append({})
        if text.startswith("# ") and blocks and text[2:].partition(":")[0].isidentifier():
            blocks[-1] |= yaml.load(text[2:], Loader=yaml12._Loader)
    kinds = {c.kind: c for c in (config.Char, config.Sgd, config.Linear, config.Constant)}
    assert {block["kind"] for block in blocks} == set(kinds)
    for block in blocks:
        stated = config.as_dict(_with_kind(kinds[block["kind"]]()))
        section = next(
            s for s in stated.values() if isinstance(s, dict) and s.get("kind") == block["kind"]
        )
        assert section == block


def _with_kind(settings: object) -> config.Config:
    name = {config.Char: "tokenizer", config.Sgd: "optimizer"}.get(type(settings), "schedule")
    return dataclasses.replace(config.Config(), **{name: settings})


@pytest.mark.parametrize(
    "path", [ROOT / "base.yaml", *sorted((ROOT / "base").glob("*.yaml"))], ids=lambda p: p.stem
)
def test_every_shipped_config_loads_and_survives_printing(path: Path, tmp_path: Path) -> None:
    loaded = config.load(path)
    assert config.load(write(tmp_path / "again.yaml", config.to_yaml(loaded))) == loaded


def test_overrides_win_and_take_leading_dashes() -> None:
    loaded = config.load(None, ["training.batch_size=32", "--training.batch_size=16", "seed=7"])
    assert (loaded.training.batch_size, loaded.seed) == (16, 7)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("6E-3", 6e-3),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("True", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("012", 12),
        ("0x10", 16),
        ("0o17", 15),
        ("-3", -3),
        (".5", 0.5),
        ("1.", 1.0),
        ("1:30", "1:30"),
        ("2026-11-22", "2026-11-22"),
        ("'1'", "1"),
        ("[a, 2]", ["a", 2]),
        ("{a: 1e2}", {"a": 100.0}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    parsed = yaml12.parse(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_overrides_are_taken_as_an_agent_of_wandb_passes_them() -> None:
    """Recorded from wandb 0.31: `${args_no_hyphens}` prints values as Python does."""
    loaded = config.load(
        None,
        [
            "model.tie_embeddings=False",
            "data.num_documents=None",
            "tracking.tags=['one', \"two's\"]",
            "optimizer={'kind': 'sgd', 'learning_rate': 1e-06}",
            "training={'max_steps': 5, 'grad_clip': None}",
            "_wandb={'resume': None}",
        ],
    )
    assert loaded.model.tie_embeddings is False
    assert loaded.data.num_documents is None
    assert loaded.tracking.tags == ("one", "two's")
    assert loaded.optimizer == config.Sgd(learning_rate=1e-6)
    assert (loaded.training.max_steps, loaded.training.grad_clip) == (5, None)


@pytest.mark.parametrize("text", ["None of it", "'None'", "Nonesuch"])
def test_none_inside_a_text_is_text(text: str) -> None:
    assert config.load(None, [f"tracking.project={text}"]).tracking.project == text.strip("'")


def test_changing_a_kind_leaves_nothing_of_the_old_one() -> None:
    loaded = config.load(None, ["optimizer.learning_rate=6e-3", "optimizer.kind=sgd"])
    assert loaded.optimizer == config.Sgd(learning_rate=6e-3)


def test_a_new_unit_replaces_the_old_duration() -> None:
    assert config.load(None, ["schedule.warmup.steps=3"]).schedule.warmup.steps == 3


def test_children_state_differences_and_parents_may_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "parent.yaml", "training: {batch_size: 8, epochs: 2}\n")
    child = write(tmp_path / "deep/child.yaml", "extends: ../parent.yaml\ntraining: {epochs: 3}\n")
    loaded = config.load(child)
    assert (loaded.training.batch_size, loaded.training.epochs) == (8, 3)


def test_durations_are_steps_whatever_their_unit() -> None:
    lengths = {"total_steps": 200, "steps_per_epoch": 30}
    assert config.Duration(steps=5).in_steps(**lengths) == 5
    assert config.Duration(epochs=1.5).in_steps(**lengths) == 45
    assert config.Duration(fraction=0.1).in_steps(**lengths) == 20


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.dmodel=64", "did you mean `model.d_model`?"),
        ("d_model=64", "did you mean `model.d_model`?"),
        ("optimiser.kind=sgd", "did you mean `optimizer`"),
        ("optimizer.momentum=0.9", "unknown setting `optimizer.momentum`"),
        ("training.checkpoint.every={steps:7}", "write `steps: 7` with a space"),
        ("zzz=1", "the top level has seed, data"),
        ("model.d_model=abc", "model.d_model='abc': a whole number is expected"),
        ("training.batch_size=1.5", "a whole number is expected"),
        ("training.batch_size=true", "a whole number is expected"),
        ("training.batch_size=0", "must be at least 1"),
        ("model.dropout=1", "must be less than 1"),
        ("optimizer.learning_rate=.nan", "a finite number is expected"),
        ("data.packing=bins", "accepted are 'stream' or 'documents'"),
        ("optimizer.kind=adamax", "accepted are 'sgd', 'adamw'"),
        ("training=3", "a mapping of settings is expected"),
        ("tracking.tags=x", "a list is expected"),
        ("schedule.warmup={steps: 1, epochs: 2}", "exactly one of"),
        ("model.d_model=100", "model.d_model=100 is not divisible by model.attention.num_heads=8"),
        ("training.grad_accumulation=5", "not divisible by training.grad_accumulation=5"),
        ("seed", "write key.path=value"),
        ("=1", "write key.path=value"),
        ("seed={", "not a YAML value"),
        ("tracking.name=[1]", "tracking.name=[1]: text is expected"),
    ],
)
def test_what_does_not_fit_is_named_with_the_remedy(override: str, said: str) -> None:
    assert said in complaint(override)


def test_a_complaint_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "my.yaml", "seed: 1\ntraining:\n  batch_size: -4\n")
    assert f"{path}:3" in complaint(path=path)


def test_the_place_is_where_the_setting_was_last_written(tmp_path: Path) -> None:
    path = write(tmp_path / "my.yaml", "training:\n  batch_size: 4\n")
    assert "command line" in complaint("training.batch_size=0", path=path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("extends: my.yaml\n", "extends itself"),
        ("extends: [a]\n", "names one file"),
        ("extends: gone.yaml\n", "cannot read"),
        ("seed: 1\nseed: 2\n", "`seed` is set twice"),
        ("- 1\n", "a mapping of settings"),
        ("seed: [1\n", "not valid YAML"),
        ("seed: 1\n\tdata: 2\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_is_said_so(tmp_path: Path, content: str, said: str) -> None:
    assert said in complaint(path=write(tmp_path / "my.yaml", content))


def test_two_files_that_extend_each_other_are_found(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    assert "a.yaml → b.yaml → a.yaml" in complaint(
        path=write(tmp_path / "b.yaml", "extends: a.yaml\n").with_name("a.yaml")
    )


def test_binary_files_and_folders_are_no_configs(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in complaint(path=tmp_path / "x.yaml")
    assert "cannot read" in complaint(path=tmp_path)
