"""Saved and restored bit for bit; damage is noticed; the newest and the best stay."""

import errno
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mainrun.errors import RunFailed, one_line
from mainrun.training.checkpoint import Checkpoints, Damaged, Progress
from mainrun.training.divergence import Guard
from mainrun.training.noise import Noise
from mainrun.training.precision import LossScale
from mainrun.training.step import TrainState
from tests.conftest import Disk


def state(step: int) -> TrainState:
    draw = np.random.default_rng(step)

    def count() -> jax.Array:
        return jnp.asarray(draw.integers(1000), jnp.int32)

    def number() -> jax.Array:
        return jnp.asarray(draw.normal(), jnp.float32)

    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        updates=count(),
        params={"a.kernel": jnp.asarray(draw.normal(size=(3, 4)), jnp.float32)},
        opt_state=({"mu": jnp.asarray(draw.normal(size=5), jnp.bfloat16)}, jnp.asarray(step)),
        key=jnp.array([step, 2**31 + step], jnp.uint32),
        frozen={},
        average={"a.kernel": jnp.asarray(draw.normal(size=(3, 4)), jnp.float32)},
        loss_scale=LossScale(number(), count(), count(), count()),
        guard=Guard(count(), count(), count(), number(), number()),
        noise=Noise(number(), number()),
    )


ABSTRACT = jax.eval_shape(lambda: state(0))


def assert_same(one: TrainState, other: TrainState) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def save(folder: Path, steps: range, best: int = -1, keep: int = 2) -> None:
    with Checkpoints(folder, keep=keep) as saved:
        for step in steps:
            progress = Progress(best_step=best if step >= best else -1, train_seconds=step / 3)
            saved.save(step, state(step), progress)


def test_a_restored_state_is_the_saved_one_bit_for_bit(tmp_path: Path) -> None:
    save(tmp_path, range(3, 5))
    with Checkpoints(tmp_path, keep=2) as saved:
        restored, damaged = saved.restore_newest(ABSTRACT)
    assert restored is not None
    assert (restored.step, damaged) == (4, [])
    assert_same(restored.state, state(4))
    assert restored.progress.train_seconds == 4 / 3


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    save(tmp_path, range(1, 8), best=3)
    with Checkpoints(tmp_path, keep=2) as saved:
        assert saved.steps() == [3, 6, 7]


def test_parameters_and_their_average_can_be_read_alone(tmp_path: Path) -> None:
    save(tmp_path, range(1, 2))
    with Checkpoints(tmp_path, keep=2) as saved:
        params = saved.restore_params(1, ABSTRACT.params)
        average = saved.restore_params(1, ABSTRACT.params, average=True)
    np.testing.assert_array_equal(params["a.kernel"], state(1).params["a.kernel"])
    np.testing.assert_array_equal(average["a.kernel"], state(1).average["a.kernel"])


def test_the_state_may_change_while_it_is_being_written(tmp_path: Path) -> None:
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + x.dtype.type(1), s), donate_argnums=0)
    with Checkpoints(tmp_path, keep=2) as saved:
        saved.save(1, state(1), Progress())
        step(state(1))
        restored, _ = saved.restore_newest(ABSTRACT)
    assert restored is not None
    assert_same(restored.state, state(1))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "record"])
def test_a_damaged_checkpoint_is_left_out_and_the_one_before_is_used(
    tmp_path: Path, damage: str
) -> None:
    save(tmp_path, range(1, 3))
    files = [path for path in (tmp_path / "2").rglob("*") if path.is_file()]
    if damage == "record":
        (tmp_path / "2" / "record" / "metadata").write_text("{")
    for path in files:
        if damage == "remove" and "params" in path.parts and path.name == "manifest.ocdbt":
            path.unlink()
        if path.parent.name == "d":
            content = bytearray(path.read_bytes())
            if damage == "flip":
                content[len(content) // 2] ^= 1
            path.write_bytes(content[: len(content) // 2] if damage == "truncate" else content)
    with Checkpoints(tmp_path, keep=2) as saved:
        restored, damaged = saved.restore_newest(ABSTRACT)
        assert restored is not None
        assert restored.step == 1
        assert_same(restored.state, state(1))
        assert len(damaged) == 1
        assert damaged[0].startswith("step 2: ")
        saved.set_aside_after(1)
        assert saved.steps() == [1]
        saved.save(2, state(2), Progress())  # its place is free again
        saved.set_aside_after(1)
    # Nothing was deleted, and who opens the folder next sees neither.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.set-aside", "2.set-aside-2"]
    with Checkpoints(tmp_path, keep=2) as saved:
        assert saved.steps() == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.set-aside", "2.set-aside-2"]


def test_a_single_flipped_bit_in_a_large_array_is_noticed(tmp_path: Path) -> None:
    """Orbax restores it without a word; small arrays lie in pages that it does check."""
    large = state(1)._replace(params={"a.kernel": jax.random.normal(jax.random.key(0), (500, 500))})
    with Checkpoints(tmp_path) as saved:
        saved.save(1, large, Progress())
    files = [path for path in (tmp_path / "1" / "params").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with (
        Checkpoints(tmp_path, read_only=True) as reader,
        pytest.raises(Damaged, match=re.escape("params|a.kernel does not match its checksum")),
    ):
        reader.restore(1, jax.eval_shape(lambda: large))


def test_where_all_are_damaged_nothing_is_set_aside(tmp_path: Path) -> None:
    save(tmp_path, range(1, 3))
    for step in (1, 2):
        next((tmp_path / str(step)).rglob("d/*")).unlink()
    with (
        Checkpoints(tmp_path, keep=2) as saved,
        pytest.raises(RunFailed, match=r"no checkpoint in .* is whole \(step 2: .*; step 1: "),
    ):
        saved.restore_newest(ABSTRACT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


UNREADABLE = [
    MemoryError(),
    OSError(errno.ESTALE, "Stale file handle"),
    PermissionError(errno.EACCES, "Permission denied"),
    OSError(errno.EMFILE, "Too many open files"),
    ValueError("INTERNAL: of any other kind"),
]


@pytest.mark.parametrize("sealed", [True, False])
def test_what_cannot_be_read_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sealed: bool
) -> None:
    save(tmp_path, range(1, 3))
    if not sealed:
        for path in tmp_path.glob("*/seal.json"):
            path.unlink()
    for error in UNREADABLE:
        with Checkpoints(tmp_path, keep=2) as saved, monkeypatch.context() as patched:

            def fail(*_: object, raised: Exception = error, **__: object) -> None:
                raise raised

            patched.setattr(ocp.CheckpointManager, "restore", fail)
            with pytest.raises(RunFailed, match=re.escape(f"2 cannot be read: {one_line(error)}")):
                saved.restore_newest(ABSTRACT)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_state_of_another_shape_is_not_damaged(tmp_path: Path) -> None:
    save(tmp_path, range(1, 3))
    other = ABSTRACT._replace(params={"b.kernel": jax.ShapeDtypeStruct((7,), jnp.float32)})
    with (
        Checkpoints(tmp_path, keep=2) as saved,
        pytest.raises(RunFailed, match=f"{tmp_path}/2 cannot be read"),
    ):
        saved.restore_newest(other)


def test_without_a_whole_checkpoint_there_is_none(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as saved:
        assert saved.restore_newest(ABSTRACT) == (None, [])


def leftover(folder: Path, committed: bool) -> Path:
    """What a save leaves that was killed before, or just after, Orbax marked it complete."""
    path = shutil.copytree(folder / "1", folder / "2.orbax-checkpoint-tmp")
    for mark in path.rglob("commit_success.txt"):
        if not committed:
            mark.unlink()
    return path


@pytest.mark.parametrize("committed", [False, True])
def test_reading_leaves_a_save_in_progress_alone(tmp_path: Path, committed: bool) -> None:
    save(tmp_path, range(1, 2))
    unfinished = leftover(tmp_path, committed)
    with Checkpoints(tmp_path, read_only=True) as reader:
        assert reader.steps() == [1]
        assert reader.restore_newest(ABSTRACT)[0] is not None
    assert unfinished.is_dir()


@pytest.mark.parametrize("committed", [False, True])
def test_what_a_killed_save_left_does_not_hinder_the_next(tmp_path: Path, committed: bool) -> None:
    save(tmp_path, range(1, 2))
    leftover(tmp_path, committed)
    with Checkpoints(tmp_path, keep=2) as saved:
        saved.save(2, state(2), Progress())
        saved.wait()
        assert saved.steps() == [1, 2]
        restored, damaged = saved.restore_newest(ABSTRACT)
        assert (restored.step if restored else None, damaged) == (2, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.parametrize("disk", ["size=512k"], indirect=True)
def test_a_folder_that_cannot_take_it_is_told_in_one_line(disk: Disk) -> None:
    with (
        Checkpoints(disk.path, keep=2) as saved,
        pytest.raises(RunFailed, match="no space left for the checkpoint of step 1"),
    ):
        saved.save(1, state(1), Progress())


def test_a_folder_that_is_gone_is_told_in_one_line(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "checkpoints") as saved:
        (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
        with pytest.raises(RunFailed, match=r"step 1 cannot be written: .*No such"):
            saved.save(1, state(1), Progress())
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_a_base_is_not_saved_and_comes_back_as_it_was_given(tmp_path: Path) -> None:
    frozen = {"base.kernel": jnp.ones((256, 256))}
    with Checkpoints(tmp_path) as saved:
        saved.save(1, state(1)._replace(frozen=frozen), Progress())
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size < 256 * 256 * 4
    with Checkpoints(tmp_path, read_only=True) as saved:
        restored, _ = saved.restore_newest(ABSTRACT._replace(frozen=frozen))
    assert restored is not None
    assert restored.state.frozen is frozen
    assert_same(restored.state._replace(frozen={}), state(1))
