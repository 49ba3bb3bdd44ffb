"""Files, parents and overrides become one config; what does not fit is said in one line."""

import dataclasses
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import TypeAdapter

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
    assert {kind for cls in variants() for kind in complaints.kinds_of(cls)} - words == set()


def test_base_yaml_gives_other_kinds_their_true_defaults() -> None:
    """A commented mapping, read as YAML, states what its kind declares, and all it states is true.

    A class of several kinds (the dense MLPs) is stated once.
    """
    text = (ROOT / "base.yaml").read_text()
    stated = list(mappings(yaml12.parse(text)))
    for block in commented(text):
        stated += mappings(yaml12.parse(block))
    for cls in variants():
        of_kind = [s for s in stated if s.get("kind") in (complaints.kinds_of(cls) or (None,))]
        names = {field.name for field in dataclasses.fields(cls)}
        found = [s for s in of_kind if set(cls.__annotations__) <= set(s) <= names]
        assert len(found) == 1, f"{cls.__name__} is stated {len(found)} times"
        assert TypeAdapter(cls).validate_json(json.dumps(found[0])) == cls()


def variants() -> list[type]:
    """Every class of settings that stands in a union or may be left out."""
    found: list[type] = []

    def visit(annotation: object) -> None:
        classes = complaints.dataclasses_in(annotation)
        for cls in classes:
            if cls not in found:
                if complaints.kinds_of(cls) or cls is config.Lora:
                    found.append(cls)
                for hint in typing.get_type_hints(cls, include_extras=True).values():
                    visit(hint)

    visit(config.Config)
    return found


def commented(text: str) -> Iterator[str]:
    """The mappings in comments, from a `kind` or a name to the next at the same depth."""
    blocks: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        begins = re.match(r"( *)# (?:kind: \w+|lora:|weight_average:)", line)
        if begins:
            blocks.append((f"{begins[1]}# ", []))
        if blocks and line.startswith(blocks[-1][0]):
            blocks[-1][1].append(line.removeprefix(blocks[-1][0]))
        elif blocks and blocks[-1][1]:
            blocks.append((chr(0), []))  # ended: what follows is no part of it
    for _, lines in blocks:
        yield "\n".join(lines)
        yield from commented("\n".join(lines)) if lines else ()


def mappings(value: object) -> Iterator[dict]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from mappings(item)


def test_every_shipped_config_loads_and_survives_printing(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    paths = sorted((ROOT / "base").glob("*.yaml"))
    assert paths
    for path in [ROOT / "base.yaml", *paths]:
        with subtests.test(path.stem):
            loaded = config.load(path)
            assert config.load(write(tmp_path / "again.yaml", config.to_yaml(loaded))) == loaded


def test_overrides_win_and_take_leading_dashes() -> None:
    loaded = config.load(None, ["training.batch_size=32", "--training.batch_size=16", "seed=7"])
    assert (loaded.training.batch_size, loaded.seed) == (16, 7)


def test_scalars_are_those_of_yaml_1_2(subtests: pytest.Subtests) -> None:
    cases = [
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
    ]
    for text, value in cases:
        with subtests.test(text=text, value=value):
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


def test_none_inside_a_text_is_text(subtests: pytest.Subtests) -> None:
    for text in ["None of it", "'None'", "Nonesuch"]:
        with subtests.test(text=text):
            project = config.load(None, [f"tracking.project={text}"]).tracking.project
            assert project == text.strip("'")


def test_changing_a_kind_leaves_nothing_of_the_old_one() -> None:
    loaded = config.load(None, ["optimizer.learning_rate=6e-3", "optimizer.kind=sgd"])
    assert loaded.optimizer == config.Sgd(learning_rate=6e-3)


def test_a_kind_may_stand_behind_its_settings() -> None:
    """W&B passes a trial's parameters in the order of the sweep's file."""
    loaded = config.load(None, ["optimizer.momentum=0.9", "optimizer.kind=sgd"])
    assert loaded.optimizer == config.Sgd(momentum=0.9)


def test_a_file_that_changes_a_kind_leaves_nothing_of_its_parents(tmp_path: Path) -> None:
    """Although the parent does not say that its optimizer is the default one."""
    write(tmp_path / "parent.yaml", "optimizer: {learning_rate: 0.5}\n")
    child = write(tmp_path / "child.yaml", "extends: parent.yaml\noptimizer: {kind: sgd}\n")
    assert config.load(child).optimizer == config.Sgd()


def test_a_mapping_inside_a_new_kind_has_the_default_kind(subtests: pytest.Subtests) -> None:
    cases = [
        (
            ["model.attention.kind=sparse", "model.attention.pattern.num_verts=4"],
            "model.attention",
            config.SparseAttention(pattern=config.FixedKeys(num_verts=4)),
        ),
        (
            ["model.kind=unet_gpt", "model.mlp.hidden=8", "model.attention.num_heads=4"],
            "model",
            config.UnetGpt(
                mlp=config.DenseMlp(hidden=8), attention=config.CausalAttention(num_heads=4)
            ),
        ),
        (
            ["model.attention={kind: sparse, pattern: {kind: strided, stride: 8}}"],
            "model.attention.pattern",
            config.StridedKeys(stride=8),
        ),
    ]
    for overrides, path, expected in cases:
        with subtests.test(overrides=overrides, path=path):
            found: object = config.load(None, overrides)
            for name in path.split("."):
                found = getattr(found, name)
            assert found == expected


def test_what_an_architecture_adds_is_printed_beside_its_width() -> None:
    for kind, own in (("gpt", ["num_layers"]), ("unet_gpt", ["bottleneck_sizes"])):
        model = config.as_dict(config.load(None, [f"model.kind={kind}"]))["model"]
        assert list(model)[: 2 + len(own)] == ["kind", "d_model", *own]


def test_a_new_unit_replaces_the_old_duration(subtests: pytest.Subtests) -> None:
    for unit in ["steps", "epochs", "tokens", "fraction"]:
        with subtests.test(unit=unit):
            loaded = config.load(None, [f"schedule.warmup.{unit}=1"])
            assert loaded.schedule.warmup == config.Duration(**{unit: 1})
            assert config.as_dict(loaded)["schedule"]["warmup"] == {unit: 1}


def test_groups_of_parameters_are_read_printed_and_read_again(tmp_path: Path) -> None:
    text = "optimizer: {groups: [{parameters: '*embedding*', learning_rate_factor: 0.5}]}\n"
    loaded = config.load(
        write(tmp_path / "my.yaml", text), ["optimizer.kind=lion", "optimizer.weight_decay=0"]
    )
    assert loaded.optimizer == config.Lion(weight_decay=0.0)  # of another kind, nothing is left
    loaded = config.load(tmp_path / "my.yaml")
    assert loaded.optimizer.groups == (
        config.Group(parameters="*embedding*", learning_rate_factor=0.5, weight_decay=None),
    )
    again = write(tmp_path / "again.yaml", config.to_yaml(loaded))
    assert config.load(again) == loaded


def test_r_drop_goes_with_dropout() -> None:
    loaded = config.load(None, ["training.regularization.r_drop=0.5", "model.dropout=0.2"])
    assert loaded.training.regularization == config.Regularization(r_drop=0.5)


def test_children_state_differences_and_parents_may_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "parent.yaml", "training: {batch_size: 8, epochs: 2}\n")
    child = write(tmp_path / "deep/child.yaml", "extends: ../parent.yaml\ntraining: {epochs: 3}\n")
    loaded = config.load(child)
    assert (loaded.training.batch_size, loaded.training.epochs) == (8, 3)


def test_durations_are_steps_whatever_their_unit() -> None:
    lengths = {"total_steps": 200, "steps_per_epoch": 30, "tokens_per_step": 4096}
    assert config.Duration(steps=5).in_steps(**lengths) == 5
    assert config.Duration(epochs=1.5).in_steps(**lengths) == 45
    assert config.Duration(tokens=28_672).in_steps(**lengths) == 7
    assert config.Duration(fraction=0.1).in_steps(**lengths) == 20


def test_tokens_are_rounded_to_the_nearest_step(subtests: pytest.Subtests) -> None:
    for tokens, steps in [(0, 0), (149, 1), (151, 2), (249, 2), (251, 3)]:
        with subtests.test(tokens=tokens, steps=steps):
            lengths = {"total_steps": 9, "steps_per_epoch": 9, "tokens_per_step": 100}
            assert config.Duration(tokens=tokens).in_steps(**lengths) == steps


OPTIMIZERS = (
    "'sgd', 'adam', 'adamw', 'adagrad', 'rmsprop', 'adafactor', 'lion', 'muon', "
    "'schedule_free_adamw'"
)


def test_what_does_not_fit_is_named_with_the_remedy(subtests: pytest.Subtests) -> None:
    cases = [
        ("model.dmodel=64", "did you mean `model.d_model`?"),
        ("d_model=64", "did you mean `model.d_model`?"),
        ("optimiser.kind=sgd", "did you mean `optimizer`"),
        ("training.checkpoint.every={steps:7}", "write `steps: 7` with a space"),
        ("zzz=1", "the top level has seed, data"),
        ("model.d_model=abc", "model.d_model='abc': a whole number is expected"),
        ("training.batch_size=1.5", "a whole number is expected"),
        ("training.batch_size=true", "a whole number is expected"),
        ("training.batch_size=0", "must be at least 1"),
        ("model.dropout=1", "must be less than 1"),
        ("optimizer.learning_rate=.nan", "a finite number is expected"),
        ("data.packing=bins", "accepted are 'stream' or 'documents'"),
        ("optimizer.kind=adamax", f"optimizer.kind='adamax': accepted are {OPTIMIZERS} (command"),
        ("training=3", "a mapping of settings is expected"),
        ("tracking.tags=x", "a list is expected"),
        ("schedule.warmup={steps: 1, epochs: 2}", "exactly one of"),
        ("model.d_model=100", "model.d_model=100 is not divisible by model.attention.num_heads=8"),
        ("training.grad_accumulation=5", "not divisible by training.grad_accumulation=5"),
        ("seed", "write key.path=value"),
        ("=1", "write key.path=value"),
        ("seed={", "not a YAML value"),
        ("tracking.name=[1]", "tracking.name=[1]: text is expected"),
        ("optimizer=sgd", "optimizer='sgd': a mapping of settings is expected, whose `kind` is "
         f"one of {OPTIMIZERS} (command line)"),
        ("optimizer.kind=null", f"optimizer.kind=None: accepted are {OPTIMIZERS} (command line)"),
        ("model.mlp.kind=silu", "accepted are 'gelu', 'relu', 'relu2', 'swiglu', 'moe'"),
        ("optimizer.momentum=0.9", "unknown setting `optimizer.momentum`: it belongs to "
         "optimizer.kind=sgd, rmsprop, muon (command line)"),
        ("optimizer.clip_update_rms=1", "it belongs to optimizer.kind=adafactor (command line)"),
        ("model.attention.pattern.stride=3", "unknown setting `model.attention.pattern`: it "
         "belongs to model.attention.kind=sparse (command line)"),
        ("model.mlp.top_k=3", "`model.mlp.top_k`: it belongs to model.mlp.kind=moe"),
        ("model.bottleneck_sizes=[8]", "it belongs to model.kind=unet_gpt"),
        ("model.attention.kv_heads=2", "did you mean `model.attention.num_kv_heads`?"),
        ("model.lora.rank=4", "model.lora trains adapters beside a trained model: name its run "
         "folder in training.init_from (command line)"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate=-1: must be at least 0.0"),
        ("optimizer.moment_dtype=float16", "accepted are 'float32' or 'bfloat16'"),
        ("optimizer={kind: muon, learning_rate: 0}", "learning_rate=0: must be greater than 0.0"),
        ("optimizer={kind: adafactor, decay_exponent: 1}", "decay_exponent=1: must be less than"),
        ("optimizer={kind: schedule_free_adamw, b1: 0}", "optimizer.b1=0: must be greater than"),
        ("optimizer.groups=3", "optimizer.groups=3: a list is expected"),
        ("optimizer.groups=[embeddings]", "optimizer.groups.0='embeddings': a mapping of settings"),
        ("optimizer.groups=[{weight_decay: 1}]", "optimizer.groups.0.parameters is missing (comm"),
        ("optimizer.groups=[{params: a}]", "unknown setting `optimizer.groups.0.params`; did you "
         "mean `optimizer.groups.0.parameters`? (command line)"),
        ("optimizer.groups=[{parameters: '', weight_decay: 1}]", "parameters='': must not be emp"),
        ("optimizer.groups=[{parameters: a, weight_decay: 1}, {parameters: '*bias'}]",
         "optimizer.groups.1: the group *bias has neither a learning_rate_factor nor a "
         "weight_decay of its own: say one, or leave it out (command line)"),
        ("optimizer.groups=[{parameters: a, learning_rate_factor: 1.0}]", "the group a has nei"),
        ("schedule.kind=exponential", "schedule.kind='exponential': accepted are 'cosine', "
         "'linear', 'wsd', 'step', 'constant', 'none' (command line)"),
        ("schedule={kind: none, warmup: {steps: 1}}", "unknown setting `schedule.warmup`"),
        ("schedule={kind: wsd, shape: sqrt}", "'linear', 'cosine' or 'one_minus_sqrt'"),
        ("schedule={kind: step, factor: 0}", "schedule.factor=0: must be greater than 0.0"),
        ("schedule.final_fraction=1.1", "schedule.final_fraction=1.1: must be at most 1.0"),
        ("schedule.warmup.tokens=0.5", "schedule.warmup.tokens=0.5: a whole number is expected"),
        ("schedule.warmup.tokens=-1", "schedule.warmup.tokens=-1: must be at least 0"),
        ("schedule.warmup={steps: 1, tokens: 2}", "exactly one of {steps: n}, {epochs: x}, "
         "{tokens: n}, {fraction: x}"),
        ("training.grad_accumulation=oto", "training.grad_accumulation='oto': a whole number or "
         "'auto' is expected (command line)"),
        ("training.grad_accumulation=1.5", "=1.5: a whole number or 'auto' is expected"),
        ("training.grad_accumulation={a: 1}", "a whole number or 'auto' is expected (command"),
        ("training.grad_accumulation=null", "=None: a whole number or 'auto' is expected"),
        ("training.grad_accumulation=0", "=0: must be at least 1 or 'auto' (command line)"),
        ("training.precision=float8", "accepted are 'float32', 'bfloat16' or 'float16'"),
        ("training.loss_scale.initial=0.5", "training.loss_scale.initial=0.5 is not between "
         "training.loss_scale.min=1.0 and training.loss_scale.max=16777216.0 (command line)"),
        ("training.loss_scale.max=1024", "training.loss_scale.initial=32768.0 is not between"),
        ("training.loss_scale.growth_factor=1", "growth_factor=1: must be greater than 1.0"),
        ("training.loss_scale.backoff_factor=1", "backoff_factor=1: must be less than 1.0"),
        ("training.regularization.label_smoothing=1", "label_smoothing=1: must be less than 1.0"),
        ("training.regularization.z_loss=-1e-4", "z_loss=-0.0001: must be at least 0.0"),
        ("training.divergence.action=retry", "accepted are 'skip', 'stop' or 'go_back'"),
        ("training.divergence.spike_window=1", "spike_window=1: must be at least 2"),
        ("training.divergence.spike_deviations=0", "spike_deviations=0: must be greater than"),
        ("training.weight_average=ema", "a mapping of settings is expected, whose `kind` is one "
         "of 'ema', 'swa'"),
        ("training.weight_average={kind: ema, decay: 1}", "weight_average.decay=1: must be less"),
        ("training.weight_average={kind: ema, every: {steps: 2}}", "unknown setting "
         "`training.weight_average.every`: it belongs to training.weight_average.kind=swa"),
    ]  # fmt: skip
    for override, said in cases:
        with subtests.test(override=override):
            assert said in complaint(override)


HEADS = "is not divisible by model.attention.num_heads="
SPARSE = "model.attention.kind=sparse"
ROTARY = "model.position=rotary"
UNET = "model.kind=unet_gpt"


def test_a_combination_that_no_network_can_have_is_refused(subtests: pytest.Subtests) -> None:
    cases = [
        (["model.d_model=12"], f"model.d_model=12 {HEADS}8 (command line)"),
        (
            ["model.attention.num_kv_heads=3"],
            "model.attention.num_heads=8 is not divisible by model.attention.num_kv_heads=3",
        ),
        (
            ["model.attention.intermediate_dim=20"],
            f"model.attention.intermediate_dim=20 {HEADS}8",
        ),
        ([ROTARY, "model.d_model=72"], "makes 8 heads of 9 dimensions"),
        ([UNET, "model.bottleneck_sizes=[64, 20]"], f"model.bottleneck_sizes=20 {HEADS}8"),
        ([UNET, "model.bottleneck_sizes=[]"], "model.bottleneck_sizes=[]"),
        ([UNET, "model.bottleneck_sizes=[8, 0]"], "must be at least 1"),
        (
            [UNET, "model.attention.value_residual=true"],
            "model.attention.value_residual=true needs heads of one size in every block",
        ),
        (["model.attention.kind=latent"], "model.position=learned does not go with "
         "model.attention.kind=latent"),
        (
            ["model.attention.kind=latent", ROTARY, "model.d_model=12"],
            f"model.d_model=12 {HEADS}8",
        ),
        (
            ["model.attention={kind: latent, rotary_dim: 7}", ROTARY],
            "model.attention.rotary_dim=7",
        ),
        (
            ["model.mlp={kind: moe, top_k: 5}"],
            "model.mlp.top_k=5 is more than model.mlp.num_experts=4",
        ),
        (["model.mlp={kind: moe, num_experts: 1}"], "must be at least 2"),
        (
            [SPARSE, "model.attention.block_size=5"],
            "model.attention.pattern.stride=32 is not divisible by model.attention.block_size=5",
        ),
        (
            [SPARSE, "model.attention.pattern={kind: local, window_including_self: 20}",
             "model.attention.block_size=8"],
            "model.attention.pattern.window_including_self=20 is not divisible by",
        ),
        (
            [SPARSE, "model.attention.pattern={kind: strided, stride: 20}",
             "model.attention.block_size=8"],
            "model.attention.pattern.stride=20 is not divisible by",
        ),
        (
            [SPARSE, "model.attention.pattern.vertsize=5"],
            "model.attention.pattern.vertsize=5 does not divide the 32 blocks",
        ),
        (
            [SPARSE, "model.attention.pattern={num_verts: 8, vertsize: 8}"],
            "model.attention.pattern.num_verts=8 times vertsize=8 is more than the 32 blocks",
        ),
        (
            [SPARSE, "model.attention.pattern.num_verts=3"],
            "model.attention.num_heads=8 is not divisible by model.attention.pattern.num_verts=3",
        ),
        (
            [SPARSE, "model.attention.pattern={kind: all}", "model.attention.block_size=48"],
            "data.context_length=128 is not divisible by model.attention.block_size=48",
        ),
        (
            [SPARSE, "data.context_length=16"],
            "model.attention.pattern.stride=32 is more than data.context_length=16",
        ),
        (
            [SPARSE, "model.attention.pattern={kind: local, window_including_self: 200}"],
            "model.attention.pattern.window_including_self=200 is more than data.context_length",
        ),
        (
            ["model.attention.window_including_self=129"],
            "model.attention.window_including_self=129 is more than data.context_length=128",
        ),
        (
            ["model.attention={kind: sparsek, num_selected: 129}"],
            "model.attention.num_selected=129 is more than data.context_length=128",
        ),
        (
            ["model.attention={kind: sparsek, window_including_self: 129}"],
            "model.attention.window_including_self=129 is more than data.context_length=128",
        ),
        (["model.lora={targets: []}", "training.init_from=runs/x"], "model.lora.targets=[]"),
        (["model.lora={rank: 0}", "training.init_from=runs/x"], "model.lora.rank=0"),
        (["model.pad_vocab_to_multiple_of=0"], "must be at least 1"),
        (["model.logit_softcap=0"], "must be greater than 0"),
        (
            ["training.regularization.r_drop=0.5", "model.dropout=0"],
            "training.regularization.r_drop compares two passes that dropout makes differ, and "
            "model.dropout=0.0: set both, or neither",
        ),
    ]  # fmt: skip
    for overrides, said in cases:
        with subtests.test(overrides=overrides):
            told = complaint(*overrides)
            assert told.startswith(said) or said in told
            assert told.endswith("(command line)")


def test_a_combination_written_in_two_places_names_both(tmp_path: Path) -> None:
    write(tmp_path / "parent.yaml", "model:\n  d_model: 100\n")
    child = write(
        tmp_path / "child.yaml", "extends: parent.yaml\nmodel: {attention: {num_heads: 3}}\n"
    )
    said = complaint(path=child)
    assert said.endswith(f"({tmp_path}/parent.yaml:2, {tmp_path}/child.yaml:2)")


def test_a_complaint_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "my.yaml", "seed: 1\ntraining:\n  batch_size: -4\n")
    assert f"{path}:3" in complaint(path=path)


def test_the_place_is_where_the_setting_was_last_written(tmp_path: Path) -> None:
    path = write(tmp_path / "my.yaml", "training:\n  batch_size: 4\n")
    assert "command line" in complaint("training.batch_size=0", path=path)


def test_a_file_that_is_no_config_is_said_so(tmp_path: Path, subtests: pytest.Subtests) -> None:
    cases = [
        ("extends: my.yaml\n", "extends itself"),
        ("extends: [a]\n", "names one file"),
        ("extends: gone.yaml\n", "cannot read"),
        ("seed: 1\nseed: 2\n", "`seed` is set twice"),
        ("- 1\n", "a mapping of settings"),
        ("seed: [1\n", "not valid YAML"),
        ("seed: &a [*a]\n", "aliases stand for too much"),
        ("seed: &a {b: *a}\n", "aliases stand for too much"),
        (
            "a0: &a0 [x, x]\n"
            + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
            "aliases stand for too much",
        ),
        ("seed: " + "[" * 5000, "nested too deeply"),
        ("seed: 1\n\tdata: 2\n", "not valid YAML"),
    ]
    for content, said in cases:
        with subtests.test(content=content):
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
