"""Several devices train what one would: every mesh, every model, on from one mesh to another."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as Spec

from mainrun import config
from mainrun.errors import UserError
from mainrun.record import read_events
from mainrun.training import mesh
from mainrun.training.mesh import Layout
from tests import variants
from tests.conftest import REPOSITORY, Mainrun
from tests.sharded import OPTIMIZERS

EIGHT: dict[str, Any] = {
    "env": os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
}
DEVICES = jax.devices() * 8  # nothing is asked of them but how many there are


def sharded(sizes: str, *names: str) -> list[dict]:
    """What `tests.sharded` tells of these variants."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.sharded", sizes, *names],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        **EIGHT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rematerialization" not in done.stderr  # XLA's word for giving up and copying all
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_same(told: list[dict], names: tuple[str, ...]) -> None:
    assert [one["name"] for one in told] == list(names)
    for one in told:
        assert one["loss"] < 1e-5, one
        assert one["nll"] < 1e-4, one
        assert one["params"] < 1e-4, one


def curve(run_dir: Path, event: str, name: str) -> np.ndarray:
    found = [e for e in read_events(run_dir / "events.jsonl") if e["event"] == event]
    return np.array([e[name] for e in found])


def test_a_step_on_eight_devices_is_that_of_one() -> None:
    told = sharded("2,2,2", "gpt")
    check_same(told, ("gpt",))
    assert 0.2 < told[0]["held"] < 0.4  # of the state, by one of them: vectors are held whole


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_kind_of_model_and_of_optimizer() -> None:
    names = ("gpt", "gpt-sparse", "gpt-sparsek", "gpt-latent", "gpt-swiglu", "gpt-moe", "unet_gpt")
    kinds = [name for name in variants.networks() if name in names]
    check_same(sharded("1,2,4", *kinds, *OPTIMIZERS), (*kinds, *OPTIMIZERS))


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes",
    [
        pytest.param("{data: 4, fsdp: 1, model: 2}", id="4·2"),
        pytest.param("{data: 8, fsdp: 1, model: 1}", id="8·1"),
        pytest.param("{data: 2, fsdp: 1, model: 4}", id="2·4"),
        pytest.param("{data: 1, fsdp: 8, model: 1}", id="fully sharded"),
        pytest.param("{data: 2, fsdp: -1, model: 2}", id="all"),
    ],
)
def test_a_run_on_a_mesh_has_the_curve_of_one_device_and_goes_on_there(
    axes: str, tmp_path: Path, tiny: list[str], finished_run: Path, mainrun: Mainrun
) -> None:
    run_dir = tmp_path / "run"
    mainrun("train", *tiny, f"mesh={axes}", "--run-dir", run_dir, **EIGHT)
    started = next(e for e in read_events(run_dir / "events.jsonl") if e["event"] == "run_started")
    assert started["mesh"].startswith("data ")
    for name, atol in (("train/loss", 1e-4), ("val/loss", 1e-6)):
        event = "train_step" if name == "train/loss" else "evaluation"
        np.testing.assert_allclose(
            curve(run_dir, event, name), curve(finished_run, event, name), rtol=0, atol=atol
        )
    alone = "mesh={data: 1, fsdp: 1, model: 1}"
    mainrun("resume", run_dir, "training.max_steps=44", alone)  # on the one device that there is
    losses = curve(run_dir, "evaluation", "val/loss")
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_run_of_one_device_goes_on_on_eight(
    tmp_path: Path, tiny: list[str], mainrun: Mainrun
) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    for run_dir in (whole, moved):
        mainrun("train", *tiny, "training.max_steps=12", "--run-dir", run_dir)
    mainrun("resume", whole, "training.max_steps=18")
    mainrun("resume", moved, "training.max_steps=18", "mesh.fsdp=2", **EIGHT)
    ours, theirs = (curve(run_dir, "train_step", "train/loss") for run_dir in (moved, whole))
    np.testing.assert_array_equal(ours[:12], theirs[:12])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_where_parameters_lie() -> None:
    layout = Layout(1, 2, 4, DEVICES)
    shapes = {
        "blocks.0.attention.qkv.kernel": ((16, 48), Spec("fsdp", "model")),
        "blocks.0.attention.kv_down.kernel": ((16, 12), Spec("fsdp", None)),
        "blocks.0.mlp.down.kernel": ((64, 16), Spec("model", "fsdp")),
        "blocks.0.mlp.up": ((4, 16, 48), Spec("model", "fsdp", None)),
        "blocks.0.mlp.up.bias": ((64,), Spec("model")),
        "token_embedding.embedding": ((50, 16), Spec(None, "fsdp")),  # 50 rows, of four none
        "head.embedding": ((48, 16), Spec("model", "fsdp")),
        "final_norm.scale": ((16,), Spec()),
        "blocks.0.attention.out.adapter.down": ((16, 3), Spec("model", None)),
    }
    for name, (shape, expected) in shapes.items():
        assert layout.spec(name, shape) == expected, name


@pytest.mark.parametrize("name", variants.networks())
def test_every_matrix_is_shared(name: str) -> None:
    layout = Layout(1, 2, 1, DEVICES[:2])
    for path, array in variants.params(variants.networks()[name]).items():
        if array.ndim > 1:
            assert "fsdp" in layout.spec(path, array.shape), path


@pytest.mark.parametrize(
    ("axes", "examples", "expected"),
    [
        ((-1, 1, 1), 64, (8, 1, 1)),
        ((-1, 1, 2), 64, (4, 1, 2)),
        ((-1, 1, 1), 12, (6, 1, 1)),  # two devices are left out
        ((-1, 2, 1), 12, (3, 2, 1)),
        ((-1, 1, 1), 7, (7, 1, 1)),
        ((2, -1, 1), 64, (2, 4, 1)),
        ((2, 1, -1), 64, (2, 1, 4)),
        ((1, 1, 1), 64, (1, 1, 1)),
    ],
)
def test_the_mesh_that_is_asked_for(axes: tuple, examples: int, expected: tuple) -> None:
    made = mesh.layout(config.Mesh(*axes), examples, DEVICES)
    assert tuple(made.sizes.values()) == expected


@pytest.mark.parametrize(
    ("axes", "examples", "processes", "message"),
    [
        ((16, 1, 1), 64, 1, "mesh.data=16, mesh.fsdp=1, mesh.model=1 takes 16 devices, and"),
        ((8, 1, 1), 12, 1, r"8 devices .* cannot share 12 examples evenly"),
        ((-1, 1, 1), 12, 2, r"8 devices .* cannot share 12 examples evenly"),
        ((4, 1, 1), 64, 2, "takes 4 of 8 devices, and every process must take part"),
    ],
)
def test_a_mesh_that_cannot_be(axes: tuple, examples: int, processes: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mesh.layout(config.Mesh(*axes), examples, DEVICES, processes=processes)


def test_only_one_axis_takes_the_rest(mainrun: Mainrun, tiny: list[str]) -> None:
    told = mainrun("train", *tiny, "mesh.fsdp=-1", code=2).stderr
    assert "only one of them can be -1" in told
