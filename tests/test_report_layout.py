"""Files in the mainrun report's own layout: what they become here, and what is said about it."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from mainrun import cli, config
from mainrun.config import report_names
from mainrun.errors import UserError
from mainrun.sweep import search_space, sweep_file
from mainrun.sweep.distribution import Choices, Fixed

ROOT = config.default_config_root()

# Appendix N of the report; without what a PDF did to its indentation and underscores.
SAMPLE = """
hyperparams:
  # FIXED hyperparameters
  seed: 1337
  epochs: 7
  val_frac: 0.10
  num_titles: 100000
  vocab_size: 16000 # Vocabulary size of the tokenizer
  context_length: 256
  # CHANGEABLE hyperparameters
  model_architecture: "gpt" # gpt, unet_gpt
  log_file: "./logs/mainrun.log"
  # Training hyperparameters
  batch_size: 256
  lr: 0.02
  weight_decay: 0.5
  optimizer: "adamw"
  evals_per_epoch: 3
  amp_bool: True
model_configs:
  gpt:
    d_model: 128
    hidden_layer: 128
    n_layer: 8
    dropout: 0.1
    init_method: 'xavier'
    attention_layer: 'sparse'
  unet_gpt:
    d_model: 512
    hidden_layer: 128
    n_layer: 6
    dropout: 0.1
    init_method: 'normal'
    attention_layer: 'causal'
    bottleneck_sizes: [512, 256, 256, 128, 128, 256]
attn_configs:
  causal:
    n_head: 8
    intermediate_dim : 0 # if 0 , normal , elif > 0 , bottleneck
  sparse:
    attn_type: 'fixed' # 'all', 'fixed', 'local'. 'strided'
    n_head: 8
    num_verts: 16
    local_attn_ctx: 32
    sparseblocksize: 128
    vertsize: 128
    n_bctx: 4
    intermediate_dim : 64 # if 0 , normal , elif > 0 , bottleneck
  sparsek:
    n_head: 8
    intermediate_dim : 0
    epilson: 1e-6
    k: 10
"""

SWEEP = """
program: train.py
method: random # or grid, or bayes
metric:
  name: val/loss
  goal: minimize
parameters:
  hyperparams.lr:
    values: [ 0.02 , 0.017, 0.012]
  hyperparams.batch_size:
    values: [ 64, 128 , 256]
  hyperparams.context length:
    values: [256]
  hyperparams.optimizer:
    values: ["adamw", "adagrad"]
  hyperparams.weight_decay:
    values: [ 0.1 , 0.15, 0.3, 0.5]
  model_configs.gpt.dropout:
    values: [0.1, 0.3, 0.4]
  model_configs.gpt.d_model:
    values: [ 128, 256]
  model_configs.gpt.n_layer:
    values: [ 6, 8]
  model_configs.gpt.init_method:
    values: ['xavier' , 'normal' , 'kaiming', 'uniform']
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def old(tmp_path: Path):
    """A file of the sample's, each of the pairs of words changed for the other."""

    def made(*changes: tuple[str, str]) -> Path:
        text = SAMPLE
        for before, after in changes:
            assert before in text
            text = text.replace(before, after)
        return write(tmp_path / "old.yaml", text)

    return made


def notes(path: Path) -> str:
    lines = config.notes(path)
    assert all(line.startswith(str(path)) and "\n" not in line for line in lines)
    return "\n".join(lines)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        config.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


UNET = ('model_architecture: "gpt"', "model_architecture: unet_gpt")
CAUSAL = ("attention_layer: 'sparse'", "attention_layer: causal")
SPARSEK = ("attention_layer: 'sparse'", "attention_layer: sparsek")


# ---------------------------------------------------------------------------------------------
# Files


def test_the_report_s_sample_is_the_same_run_here(old):
    loaded = config.load(old())
    assert loaded == config.Config(
        seed=1337,
        data=config.Data(
            num_documents=100_000, validation_fraction=0.1, context_length=256, packing="stream"
        ),
        tokenizer=config.Bpe(vocab_size=16_000, fit_on="all"),
        model=config.Gpt(
            d_model=128,
            num_layers=8,
            dropout=0.1,
            init="xavier",
            attention=config.SparseAttention(
                num_heads=8,
                intermediate_dim=64,
                block_size=1,
                pattern=config.FixedKeys(stride=32, num_verts=8, vertsize=4),
            ),
        ),
        # PyTorch's AdamW, but for the settings that the file has.
        optimizer=config.AdamW(
            learning_rate=0.02, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.5, decay_on="all"
        ),
        schedule=config.Cosine(warmup=config.Duration(steps=0), final_fraction=0.0),
        training=config.Training(
            epochs=7, batch_size=256, grad_clip=1.0, precision="bfloat16", evals_per_epoch=3
        ),
    )


def test_the_shipped_sparse_gpt_is_the_sample_s_model(old):
    assert config.load(old()).model == config.load(ROOT / "base" / "gpt_sparse.yaml").model


def test_spaces_for_underscores_are_read_as_a_pdf_gives_them(old):
    loaded = config.load(old())
    names = ("val_frac", "context_length", "model_architecture", "evals_per_epoch", "d_model")
    spaced = [(f"{name}:", f"{name.replace('_', ' ')}:") for name in names]
    assert config.load(old(*spaced)) == loaded


def test_what_the_translation_assumes_and_changes_is_said_with_its_line(old):
    path = old()
    told = notes(path)
    for said in (
        f"{path}:12: hyperparams.log_file is left out",
        "hyperparams.scheduler is missing: cosine is taken",
        "hyperparams.amp_bool: bfloat16 is taken for float16",
        "attn_configs.sparse was dense causal attention in the public code",
        "attn_configs.sparse.n_bctx=4 is left out: 256 / 128 decides",
        "attn_configs.sparse.sparseblocksize=128 must divide local_attn_ctx=32",
        "attn_configs.sparse.num_verts=16 must divide n_head=8 and be at most 32: 8 is taken",
        "attn_configs.sparse.vertsize=128 must divide 32 columns and fit in them 8 times: 4 is",
        "tokenizer fitted on all titles",
    ):
        assert said in told


def test_a_file_of_ours_has_no_notes():
    assert config.notes(ROOT / "base" / "quickstart.yaml") == ()


def test_numbers_that_such_a_pattern_can_have_are_kept(old):
    path = old(
        ("num_verts: 16", "num_verts: 4"),
        ("sparseblocksize: 128", "sparseblocksize: 8"),
        ("vertsize: 128", "vertsize: 1"),
        ("n_bctx: 4", "n_bctx: 32"),
    )
    attention = config.load(path).model.attention
    assert isinstance(attention, config.SparseAttention)
    assert attention.block_size == 8
    assert attention.pattern == config.FixedKeys(stride=32, num_verts=4, vertsize=1)
    assert "is taken" not in notes(path).replace("cosine is taken", "").replace("bfloat16 is", "")
    assert "n_bctx" not in notes(path)


def test_tiles_that_divide_the_stride_but_not_the_context_cannot_be(old):
    path = old(
        ("local_attn_ctx: 32", "local_attn_ctx: 96"),
        ("sparseblocksize: 128", "sparseblocksize: 96"),
    )
    attention = config.load(path).model.attention
    assert isinstance(attention, config.SparseAttention)
    assert attention.block_size == 1


def test_every_pattern_is_translated(old, subtests: pytest.Subtests):
    cases = [
        ("all", config.AllKeys()),
        ("local", config.LocalKeys(window_including_self=32)),
        ("strided", config.StridedKeys(stride=32)),
    ]
    for kind, pattern in cases:
        with subtests.test(kind=kind, pattern=pattern):
            path = old(("attn_type: 'fixed'", f"attn_type: {kind}"))
            attention = config.load(path).model.attention
            assert isinstance(attention, config.SparseAttention)
            assert attention.pattern == pattern
            assert attention.block_size == (128 if kind == "all" else 1)
            assert f"attn_configs.sparse.num_verts is left out: {kind} has none" in notes(path)


def test_causal_attention_of_intermediate_dim_0_is_as_wide_as_its_block(old):
    loaded = config.load(old(CAUSAL))
    assert loaded.model.attention == config.CausalAttention(num_heads=8, intermediate_dim=None)
    narrow = config.load(old(CAUSAL, ("intermediate_dim : 0", "intermediate_dim : 64")))
    assert narrow.model.attention == config.CausalAttention(num_heads=8, intermediate_dim=64)


def test_sparsek_has_no_window_beside_the_query_itself(old):
    path = old(SPARSEK)
    assert config.load(path).model.attention == config.SparseKAttention(
        num_heads=8, num_selected=10, position_slope=1e-6, window_including_self=1
    )
    assert "attn_configs.sparsek had no window: window_including_self is 1" in notes(path)


def test_a_unet_has_the_listed_widths_and_no_skip_connections(old, subtests: pytest.Subtests):
    for name in ["bottleneck_sizes", "hidden_layer_list"]:
        with subtests.test(name=name):
            path = old(UNET, ("bottleneck_sizes", name))
            assert config.load(path).model == config.UnetGpt(
                d_model=512,
                bottleneck_sizes=(512, 256, 256, 128, 128, 256),
                skip_connections=False,
                init="normal",
            )
            assert "model_configs.unet_gpt had no skip connections" in notes(path)
            assert "n_layer and hidden_layer are left out" in notes(path)


def test_sgd_without_a_schedule_in_float32(old):
    loaded = config.load(
        old(
            ('optimizer: "adamw"', "optimizer: sgd\n  scheduler: none"),
            ("amp_bool: True", "amp_bool: false"),
        )
    )
    assert loaded.optimizer == config.Sgd(learning_rate=0.02, weight_decay=0.5, decay_on="all")
    assert loaded.schedule == config.NoSchedule()
    assert loaded.training.precision == "float32"


# PyTorch's own defaults, which the report's code took.
ADAM = config.Adam(b1=0.9, b2=0.999, eps=1e-8)
ADAGRAD = config.Adagrad(initial_accumulator=0.0, eps=1e-10)
RMSPROP = config.RmsProp(b2=0.99, eps=1e-8, momentum=0.0)


def test_the_report_s_other_optimizers_are_pytorchs(old, subtests: pytest.Subtests):
    rules = {"adam": ADAM, "adagrad": ADAGRAD, "RMSprop": RMSPROP, "rmsprop": RMSPROP}
    for name, rule in rules.items():
        with subtests.test(name=name):
            loaded = config.load(old(('optimizer: "adamw"', f"optimizer: {name}")))
            chosen = {"learning_rate": 0.02, "weight_decay": 0.5, "decay_on": "all"}
            assert loaded.optimizer == dataclasses.replace(rule, **chosen)


def test_what_is_not_chosen_is_not_looked_at(old):
    path = old(CAUSAL, ("attn_type: 'fixed'", "attn_type: nonsense"), ("n_layer: 6", "layers: x"))
    assert config.load(path).model.kind == "gpt"


def test_missing_keys_have_the_defaults_and_are_named(old):
    path = old(("  batch_size: 256\n", ""), ("  lr: 0.02\n", ""))
    assert config.load(path).training.batch_size == config.Training().batch_size
    assert "hyperparams: lr, batch_size missing: the defaults here are taken" in notes(path)


def test_what_cannot_be_had_is_refused_under_its_old_name_or_line(old, subtests: pytest.Subtests):
    cases = [
        ('optimizer: "adamw"', "optimizer: adadelta",
         "old.yaml:17: hyperparams.optimizer='adadelta' cannot be had here: accepted are sgd, "
         "adamw, adam, adagrad, rmsprop"),
        ('optimizer: "adamw"', "scheduler: step",
         "hyperparams.scheduler='step' cannot be had here: accepted are cosine, linear, none"),
        ("amp_bool: True", "amp_bool: fp16", "hyperparams.amp_bool='fp16' cannot be had here: "
         "accepted are true, false"),
        ("lr: 0.02", "learning_rate: 1", "hyperparams.learning_rate is no key of the report's"),
        ("batch_size: 256", "batchsize: 1", "did you mean `batch_size`?"),
        ("lr: 0.02", "lr: fast", "optimizer.learning_rate='fast': a number is expected ("),
        ('architecture: "gpt"', "architecture: bottleneck_gpt",
         "hyperparams.model_architecture='bottleneck_gpt' cannot be had here: accepted are gpt,"),
        ('  model_architecture: "gpt" # gpt, unet_gpt\n', "",
         "hyperparams.model_architecture is missing: accepted are gpt, unet_gpt"),
        ("  gpt:\n", "  GPT:\n", "model_configs.gpt is missing"),
        ("attention_layer: 'sparse'", "attention_layer: flash",
         "model_configs.gpt.attention_layer='flash' cannot be had here: accepted are causal,"),
        ("  sparse:\n", "  sparser:\n", "attn_configs.sparse is missing"),
        ("attn_type: 'fixed'", "attn_type: diagonal", "attn_configs.sparse.attn_type is diagonal"),
        ("hidden_layer: 128\n    n_layer: 8", "hidden_layer: 256\n    n_layer: 8",
         "model_configs.gpt.hidden_layer is 256: only d_model, 128, can be"),
        ("num_verts: 16", "num_verts: 0", "attn_configs.sparse.num_verts is 0: a whole number"),
        ("    num_verts: 16\n", "", "attn_configs.sparse.num_verts is None: a whole number"),
        ("local_attn_ctx: 32", "local_attn_ctx: 512",
         "model.attention.pattern.stride=512 is more than data.context_length=256 ("),
        ("n_head: 8\n    num_verts", "n_head: 7\n    num_verts",
         "model.attention.intermediate_dim=64 is not divisible by model.attention.num_heads=7 ("),
        ("attn_configs:", "training: {}\nattn_configs:", "training does not go with the report's"),
        ("d_model: 128", "d_model: 128\n    activation_function: gelu",
         "model_configs.gpt.activation_function is no key of the report's layout"),
    ]  # fmt: skip
    for before, after, said in cases:
        with subtests.test(before=before, after=after):
            path = old((before, after))
            told = refusal(path)
            assert said in told
            assert str(path) in told


def test_both_names_of_the_widths_are_one_too_many(old):
    path = old(UNET, ("bottleneck_sizes: [", "hidden_layer_list: [8]\n    bottleneck_sizes: ["))
    assert "bottleneck_sizes says again what model.bottleneck_sizes is" in refusal(path)


def test_the_new_form_is_printed_and_reads_back_as_the_same(old, tmp_path: Path, capsys):
    path = old()
    assert cli.main(["config", str(path)]) == 0
    told = capsys.readouterr()
    assert told.err.splitlines() == list(config.notes(path))
    new = write(tmp_path / "new.yaml", told.out)
    assert config.load(new) == config.load(path)
    assert config.notes(new) == ()


def test_training_with_an_old_file_says_how_to_get_the_new_form(old, tmp_path: Path, capsys):
    path = old()
    assert cli.main(["train", str(path), "--run-dir", str(tmp_path)]) == 2  # which exists
    told = capsys.readouterr().err
    said = f"{path} is in the report's layout; its new form: mainrun config {path} > new.yaml"
    assert said in told.splitlines()
    assert told.splitlines()[: len(config.notes(path))] == list(config.notes(path))


def test_a_file_of_ours_may_extend_an_old_one(old, tmp_path: Path):
    path = old()
    child = write(tmp_path / "child.yaml", "extends: old.yaml\ntraining: {epochs: 1}\n")
    assert config.load(child).training.epochs == 1
    assert config.load(child).model == config.load(path).model
    assert config.notes(child)


def test_an_override_under_an_old_name_is_told_the_new_one(subtests: pytest.Subtests):
    cases = [
        ("hyperparams.lr=1", "hyperparams.lr is a name of the report's layout: write "
         "optimizer.learning_rate"),
        ("--model_configs.gpt.n_layer=1", "write model.num_layers"),
        ("attn_configs.sparse.n_bctx=4", "leave it out: it is context_length / sparseblocksize"),
        ("hyperparams.foo=4", "leave it out: it is no key there"),
    ]  # fmt: skip
    for override, said in cases:
        with subtests.test(override=override):
            with pytest.raises(UserError, match="report's layout") as caught:
                config.load(None, [override])
            assert said in str(caught.value)


def test_every_new_name_is_a_setting():
    from mainrun import complaints

    known = set(complaints.all_paths(config.Config))
    assert set(report_names.NAMES.values()) <= known


# ---------------------------------------------------------------------------------------------
# Sweeps


def test_the_report_s_sweep_searches_the_same_settings_here(tmp_path: Path):
    space = sweep_file.read(write(tmp_path / "sweep.yaml", SWEEP))
    assert space.parameters == {
        "optimizer.learning_rate": Choices((0.02, 0.017, 0.012)),
        "training.batch_size": Choices((64, 128, 256)),
        "data.context_length": Choices((256,)),
        "optimizer": Choices(
            (
                {"kind": "adamw", "b2": 0.999, "decay_on": "all"},
                {"kind": "adagrad", "decay_on": "all"},
            )
        ),
        "optimizer.weight_decay": Choices((0.1, 0.15, 0.3, 0.5)),
        "model.dropout": Choices((0.1, 0.3, 0.4)),
        "model.d_model": Choices((128, 256)),
        "model.num_layers": Choices((6, 8)),
        "model.init": Choices(("xavier", "normal", "kaiming", "uniform")),
    }
    assert space.config == ROOT / "base" / "gpt.yaml"
    search_space.check(space)
    told = "\n".join(space.notes)
    assert f"{tmp_path}/sweep.yaml:8: hyperparams.lr is optimizer.learning_rate here" in told
    assert "cannot be had" not in told
    assert f"a trial is a `mainrun train` of {space.config}; `command` names another" in told


def test_a_choice_that_cannot_be_had_is_left_out_of_a_sweep_with_its_line(tmp_path: Path):
    text = SWEEP.replace('"adagrad"', '"adadelta"')
    space = sweep_file.read(write(tmp_path / "sweep.yaml", text))
    left = {"kind": "adamw", "b2": 0.999, "decay_on": "all"}
    assert space.parameters["optimizer"] == Choices((left,))
    told = "\n".join(space.notes)
    said = "hyperparams.optimizer='adadelta' cannot be had here: accepted are sgd, adamw, adam, ad"
    assert f"{tmp_path}/sweep.yaml:14: {said}" in told
    search_space.check(space)


def test_a_trial_of_a_translated_sweep_has_all_that_was_drawn(tmp_path: Path):
    """The optimizer, a whole mapping, stands behind the rate that belongs into it."""
    space = sweep_file.read(write(tmp_path / "sweep.yaml", SWEEP.replace("adagrad", "sgd")))
    for point in ({"kind": "sgd", "decay_on": "all"}, space.parameters["optimizer"].values[0]):
        drawn = {name: d.values[-1] for name, d in space.parameters.items()} | {"optimizer": point}
        loaded = config.load(space.config, search_space.as_overrides(drawn))
        assert loaded.optimizer.kind == point["kind"]
        assert (loaded.optimizer.learning_rate, loaded.optimizer.weight_decay) == (0.012, 0.5)


def test_a_translated_sweep_is_stored_in_the_new_form(tmp_path: Path):
    space = sweep_file.read(write(tmp_path / "sweep.yaml", SWEEP))
    stored = write(tmp_path / "stored.yaml", yaml.safe_dump(sweep_file.definition(space)))
    again = sweep_file.read(stored)
    assert again.notes == ()
    assert (again.parameters, again.config) == (space.parameters, space.config)


def test_a_sweep_of_one_attention_or_architecture_starts_from_its_config(tmp_path: Path):
    for key, file in (
        ("model_configs.unet_gpt.dropout", "unet"),
        ("attn_configs.sparse.n_head", "gpt_sparse"),
        ("attn_configs.sparsek.k", "sparsek"),
        ("attn_configs.causal.n_head", "gpt"),
    ):
        text = f"method: grid\nparameters:\n  {key}: {{value: {0 if 'dropout' in key else 8}}}\n"
        space = sweep_file.read(write(tmp_path / "sweep.yaml", text))
        assert space.config == ROOT / "base" / f"{file}.yaml"
        search_space.check(space)


def test_a_sweep_that_names_its_config_keeps_it(tmp_path: Path):
    head = 'command: [mainrun, train, mine.yaml, "${args_no_hyphens}"]'
    text = SWEEP.replace("program: train.py", head)
    space = sweep_file.read(write(tmp_path / "sweep.yaml", text))
    assert space.config == Path("mine.yaml")
    assert "names another" not in "".join(space.notes)


def test_values_are_translated_with_their_names(tmp_path: Path, subtests: pytest.Subtests):
    cases = [
        ("hyperparams.scheduler: {value: none}", Fixed({"kind": "none"})),
        ("hyperparams.amp_bool: {values: [true, false]}", Choices(("bfloat16", "float32"))),
        ("attn_configs.causal.intermediate_dim: {values: [0, 64]}", Choices((None, 64))),
        ("hyperparams: {parameters: {epochs: {values: [1, 2]}}}", Choices((1, 2))),
    ]  # fmt: skip
    for parameter, expected in cases:
        with subtests.test(parameter=parameter):
            text = f"method: grid\nparameters:\n  {parameter}\n"
            space = sweep_file.read(write(tmp_path / "sweep.yaml", text))
            assert list(space.parameters.values()) == [expected]
            search_space.check(space)


def test_a_parameter_that_cannot_be_had_is_refused_with_its_line(
    tmp_path: Path, subtests: pytest.Subtests
):
    cases = [
        ("hyperparams.optimizer: {values: [adadelta, nadam]}",
         "sweep.yaml:3: hyperparams.optimizer='adadelta' cannot be had here: accepted are sgd, "
         "adamw, adam, adagrad, rmsprop"),
        ("hyperparams.scheduler: {value: step}", "3: hyperparams.scheduler='step' cannot be had"),
        ("hyperparams.learning_rate: {value: 1}", "3: `hyperparams.learning_rate` is no key of"),
        ("hyperparams.lr: {value: 1}\n  optimizer.learning_rate: {value: 1}",
         "4: `optimizer.learning_rate` is given twice"),
        ("attn_configs.sparse.num_verts: {values: [3]}",
         "3: model.attention.num_heads=8 is not divisible by model.attention.pattern.num_verts=3"),
    ]  # fmt: skip
    for parameter, said in cases:
        with subtests.test(parameter=parameter):
            text = f"method: grid\nparameters:\n  {parameter}\n"
            with pytest.raises(UserError) as caught:
                search_space.check(sweep_file.read(write(tmp_path / "sweep.yaml", text)))
            assert said in str(caught.value)


def test_a_parameter_that_decides_nothing_is_left_out_with_a_note(tmp_path: Path):
    text = (
        "method: grid\nparameters:\n  attn_configs.sparse.n_bctx: {values: [1, 2]}\n"
        "  attn_configs.sparse.num_verts: {values: [4, 8]}\n"
    )
    space = sweep_file.read(write(tmp_path / "sweep.yaml", text))
    assert list(space.parameters) == ["model.attention.pattern.num_verts"]
    assert "attn_configs.sparse.n_bctx is left out: it is context_length" in space.notes[0]
