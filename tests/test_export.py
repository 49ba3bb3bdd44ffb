"""`mainrun export`: what is written, what is refused, and that nothing is left of what failed.

What `transformers` makes of the folders is held in `test_parity.py`.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import mainrun as package
from mainrun import cli, config, export, trained
from mainrun.data import tokenizers
from mainrun.errors import UserError
from mainrun.export.architectures import architecture
from mainrun.model.gpt import Network
from mainrun.trained import Trained
from tests.conftest import Mainrun

CONFIGS = sorted((config.default_config_root() / "base").glob("*.yaml"))
HELD = {
    "baseline": "GPT2LMHeadModel",
    "quickstart": "GPT2LMHeadModel",
    "gqa": "LlamaForCausalLM",
    "window": "MistralForCausalLM",
    "moe": "MixtralForCausalLM",
    "mla": "DeepseekV3ForCausalLM",
}
LLAMA = ("model={norm: rmsnorm, position: rotary, bias: false}", "model.mlp.kind=swiglu")
LATENT = "model.attention={kind: latent, rotary_dim: 8, kv_rank: 16}"
REFUSED = {
    "model.position=sinusoidal": ("model.position=sinusoidal",),
    "model.kind=unet_gpt": ("model.kind=unet_gpt", "model.skip_connections=false"),
    "model.norm_position=post": ("model.norm_position=post",),
    "model.layer_scale=0.5": ("model.layer_scale=0.5",),
    "model.logit_softcap=30.0": ("model.logit_softcap=30",),
    "model.bias=false": ("model.bias=false",),
    "model.position=rotary": ("model.position=rotary",),
    "model.mlp.kind=swiglu": ("model.mlp.kind=swiglu",),
    "model.mlp.kind=relu2": (*LLAMA, "model.mlp.kind=relu2"),
    "model.mlp.activation=gelu": (*LLAMA, "model.mlp={kind: moe, activation: gelu}"),
    "model.attention.kind=sparse": ("model.attention={kind: sparse, block_size: 2}",),
    "model.attention.kind=sparsek": ("model.attention={kind: sparsek}",),
    "model.attention.num_kv_heads=4": ("model.attention.num_kv_heads=4",),
    "model.attention.intermediate_dim=64": ("model.attention.intermediate_dim=64",),
    "model.attention.window_including_self=9": ("model.attention.window_including_self=9",),
    "model.attention.value_residual=true": (*LLAMA, "model.attention.value_residual=true"),
    "model.attention.output_gate=true": (*LLAMA, LATENT, "model.attention.output_gate=true"),
    "model.norm=rmsnorm, model.attention.qk_norm=true": (
        "model.norm=rmsnorm",
        "model.attention.qk_norm=true",
    ),
}


def test_what_no_class_holds_is_refused_by_the_settings_that_stand_in_the_way(
    subtests: pytest.Subtests,
) -> None:
    for named, overrides in REFUSED.items():
        with subtests.test(named=named):
            with pytest.raises(UserError) as caught:
                architecture(config.load(None, overrides).model)
            said, _, rest = str(caught.value).partition(" ha")
            assert said == named
            assert rest.endswith(": use --format safetensors")


def test_configs_of_ours_are_held_by_the_class_of_their_family(subtests: pytest.Subtests) -> None:
    for path in CONFIGS:
        with subtests.test(path.stem):
            model = config.load(path).model
            if path.stem in HELD:
                assert architecture(model) == HELD[path.stem]
            else:
                with pytest.raises(UserError, match="model\\."):
                    architecture(model)


# ---------------------------------------------------------------------------------------------
# The command


@pytest.mark.slow
def test_safetensors_hold_the_parameters_bit_for_bit(
    finished_run: Path, mainrun: Mainrun, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "model"
    done = mainrun("export", finished_run, "--format", "safetensors", "--output", output)
    found = package.load(finished_run)
    assert f"checkpoint of step {found.step}" in done.stdout

    assert sorted(path.name for path in output.iterdir()) == [
        "config.yaml",
        "model.safetensors",
        "tokenizer.json",
    ]
    tensors = load_file(output / "model.safetensors")
    assert tensors.keys() == found.params.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(array, np.asarray(found.params[name]), strict=True)
    assert config.load(output / "config.yaml") == found.config
    tokenizer = tokenizers.load(output / "tokenizer.json")
    assert tokenizer.to_str() == found.tokenizer.to_str()


def test_huggingface_folder_has_what_transformers_reads(
    finished_run: Path, mainrun: Mainrun, tmp_path: Path
) -> None:
    output = tmp_path / "model"
    done = mainrun("export", finished_run, "--format", "huggingface", "--output", output)
    assert "GPT2LMHeadModel" in done.stdout
    assert sorted(path.name for path in output.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    found = package.load(finished_run)
    settings = json.loads((output / "config.json").read_text(encoding="utf-8"))
    assert settings["vocab_size"] == found.tokenizer.get_vocab_size()
    tensors = load_file(output / "model.safetensors")
    assert sum(array.size for array in tensors.values()) == sum(
        array.size for array in found.params.values()
    )
    np.testing.assert_array_equal(
        tensors["transformer.h.1.attn.c_attn.weight"], found.params["blocks.1.attention.qkv.kernel"]
    )


def test_newest_checkpoint_on_request(finished_run: Path, tmp_path: Path) -> None:
    # As if the last evaluation had been of the checkpoint before the last.
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    before, last = sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir())[-2:]
    events = run_dir / "events.jsonl"
    text = events.read_text(encoding="utf-8")
    moved = text.replace(f'"step": {last}, "val/loss"', f'"step": {before}, "val/loss"')
    events.write_text(moved, encoding="utf-8")
    for words, step in ((["--checkpoint", "newest"], last), ([], before)):
        output = tmp_path / str(step)
        words = ["--format", "safetensors", "--output", str(output), *words]
        assert cli.main(["export", str(run_dir), *words]) == 0
        with safe_open(output / "model.safetensors", "np") as file:
            assert file.metadata()["mainrun_step"] == str(step)


@pytest.fixture
def sinusoidal(finished_run: Path, tmp_path: Path) -> Path:
    """A run that says so of itself, with nothing left that would contradict it."""
    ignored = shutil.ignore_patterns("checkpoints", "environment.json")
    run_dir = shutil.copytree(finished_run, tmp_path / "sinusoidal", ignore=ignored)
    path = run_dir / "config.yaml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("position: learned", "position: sinusoidal"), encoding="utf-8")
    return run_dir


def test_mistakes_of_the_user_end_with_2_and_one_line(
    finished_run: Path, sinusoidal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    file = tmp_path / "file"
    file.touch()
    untrained = tmp_path / "untrained"
    untrained.mkdir()
    for name in ("config.yaml", "tokenizer.json"):
        shutil.copy(finished_run / name, untrained)
    for run_dir, output, said in (
        (sinusoidal, tmp_path / "new", "model.position=sinusoidal has no place"),
        (finished_run, taken, f"{taken} exists: choose another --output"),
        (finished_run, file / "new", "cannot be made"),
        (tmp_path / "no-run", tmp_path / "new", "is no run folder"),
        (untrained, tmp_path / "new", "has no checkpoint yet"),
    ):
        words = ["--format", "huggingface", "--output", str(output)]
        assert cli.main(["export", str(run_dir), *words]) == 2
        printed = capsys.readouterr()
        assert said in printed.err
        assert len(printed.err.splitlines()) == 1
        assert printed.out == ""
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"taken", "file", "sinusoidal", "untrained"}
    assert list(taken.iterdir()) == []


def test_the_format_is_asked_for(finished_run: Path, mainrun: Mainrun, tmp_path: Path) -> None:
    done = mainrun("export", finished_run, "--output", tmp_path / "new", code=2)
    assert "--format" in done.stderr


# ---------------------------------------------------------------------------------------------
# Python


def test_adapters_are_merged(finished_run: Path, tmp_path: Path) -> None:
    base = package.load(finished_run)
    changes = [
        "model.lora={rank: 2, alpha: 8, targets: [qkv]}",
        f"training.init_from={finished_run}",
    ]
    run = config.load(finished_run / "config.yaml", changes)
    network = Network(
        run.model,
        vocab_size=base.network.vocab_size,
        context_length=run.data.context_length,
        precision="float32",
    )
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = {n: jnp.asarray(rng.standard_normal(s.shape), "f4") for n, s in shapes.items()}
    adapted = Trained(run, base.tokenizer, network, params, step=3)

    export.write(adapted, tmp_path / "plain", format="safetensors")
    merged = load_file(tmp_path / "plain" / "model.safetensors")
    assert merged.keys() == base.params.keys()
    layer = "blocks.1.attention.qkv"
    difference = np.asarray(params[f"{layer}.adapter.down"] @ params[f"{layer}.adapter.up"])
    expected = params[f"{layer}.kernel"] + 8 / 2 * difference
    np.testing.assert_allclose(merged[f"{layer}.kernel"], expected, rtol=0, atol=1e-5)
    assert config.load(tmp_path / "plain" / "config.yaml") == base.config
    assert "GPT2LMHeadModel" in export.write(adapted, tmp_path / "theirs", format="huggingface")


def test_a_full_disk_leaves_nothing_and_is_said(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trained.load(finished_run)

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(UserError, match="No space left on device"):
        export.write(found, tmp_path / "new", format="safetensors")
    assert list(tmp_path.iterdir()) == []
