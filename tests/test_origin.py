"""Fine-tuning through the real command: adapters and whole, resumed, moved, and refused."""

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import mainrun
from mainrun import cli, config, folder, origin, trained
from mainrun.errors import UserError
from mainrun.model import lora
from mainrun.record import metrics
from tests.conftest import Mainrun
from tests.test_run import _after, arrays, assert_same_end, events, start

# A base that knows its corpus; else its embeddings, which adapters leave alone, say nothing.
BASE = [
    "optimizer.learning_rate=1e-2",
    "training.max_steps=150",
    "training.evals_per_epoch=1",
    "training.checkpoint.every.steps=50",
]
TUNED = ["training.max_steps=24", "training.checkpoint.keep=3"]
ADAPTERS = ["model.lora.rank=4", "model.lora.dropout=0.05", "optimizer.learning_rate=3e-2"]


def call(*words: object, code: int = 0) -> str:
    """What the command says, in this process, which has JAX already."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        assert cli.main([str(word) for word in words]) == code, told.getvalue()
    return told.getvalue()


def refusal(*words: object) -> str:
    """The one line that a user's mistake is answered with; nothing is compiled before."""
    told = [x for x in call(*words, code=2).splitlines() if not x.startswith("reading ")]
    assert len(told) == 1, told
    assert told[0].startswith("mainrun: ")
    return told[0]


def losses(run_dir: Path) -> list[float]:
    return [row["val/loss"] for row in metrics(events(run_dir)) if "val/loss" in row]


def contents(run_dir: Path) -> dict[str, str]:
    files = (path for path in sorted(run_dir.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def parameters(run_dir: Path) -> dict[str, np.ndarray]:
    """Of the newest checkpoint, those that were trained."""
    return {name: a for name, a in arrays(run_dir).items() if name.startswith("params|")}


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def other_corpus(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The words of the base's corpus, in small letters and another order."""
    lines = corpus.read_text().lower().splitlines()
    path = tmp_path_factory.mktemp("other") / "backwards.txt"
    path.write_text("".join(" ".join(reversed(line.split())) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def base_run(runs: Path, tiny: list[str]) -> Iterator[Path]:
    """Whatever is built on it, nothing in it changes."""
    run_dir = runs / "first"
    call("train", *tiny, *BASE, "training.num_samples=0", "--run-dir", run_dir)
    before = contents(run_dir)
    yield run_dir
    assert contents(run_dir) == before


@pytest.fixture(scope="module")
def on_other(tiny: list[str], other_corpus: Path, base_run: Path) -> list[str]:
    """Settings that train the base on the other corpus."""
    source = f"data.source=file:{other_corpus}"
    return [*tiny, source, *TUNED, "training.num_samples=0", f"training.init_from={base_run}"]


@pytest.fixture(scope="module")
def adapted(runs: Path, on_other: list[str]) -> Path:
    """A run of adapters on the base."""
    call("train", *on_other, *ADAPTERS, "--run-dir", runs / "adapted")
    return runs / "adapted"


@pytest.fixture(scope="module")
def whole(runs: Path, on_other: list[str]) -> Path:
    """A run that trains all of the base."""
    call("train", *on_other, "--run-dir", runs / "whole")
    return runs / "whole"


@pytest.fixture(scope="module")
def loss_of_base(base_run: Path, adapted: Path) -> float:
    """On the validation text of the runs that start from it."""
    base, data = mainrun.load(base_run), config.load(adapted / "config.yaml").data
    there = dataclasses.replace(base, config=dataclasses.replace(base.config, data=data))
    return trained.evaluate_run(adapted, there, None)[1]["val/loss"]


@pytest.fixture
def moved(tmp_path: Path, base_run: Path, adapted: Path) -> Callable[..., Path]:
    """A copy of the adapters' run, and of its base if it is said where to."""

    def move(base_to: str | None = None, run: Path = adapted) -> Path:
        if base_to is not None:
            shutil.copytree(base_run, tmp_path / base_to)
        run_dir = shutil.copytree(run, tmp_path / "moved" / run.name)
        told = json.loads((run_dir / "base.json").read_text())
        told["run_dir"] = str(tmp_path / "gone" / base_run.name)
        (run_dir / "base.json").write_text(json.dumps(told))
        stored = (run_dir / "config.yaml").read_text()
        (run_dir / "config.yaml").write_text(stored.replace(str(base_run), "gone"))
        return run_dir

    return move


def cut_short(run_dir: Path, *, leaving: int) -> int:
    """As if killed when so many checkpoints had been written; the last step of these."""
    path = run_dir / "events.jsonl"
    kept = [line for line in path.read_text().splitlines() if '"event": "finished"' not in line]
    path.write_text("\n".join(kept) + "\n")
    steps = sorted(int(checkpoint.name) for checkpoint in (run_dir / "checkpoints").iterdir())
    for step in steps[leaving:]:
        shutil.rmtree(run_dir / "checkpoints" / str(step))
    return max(steps[:leaving], default=0)


# ---------------------------------------------------------------------------------------------
# What comes of it


@pytest.mark.parametrize("kind", ["adapted", "whole"])
def test_fine_tuning_begins_at_the_loss_of_the_base_and_lowers_it(
    kind: str, loss_of_base: float, request: pytest.FixtureRequest
) -> None:
    first, *_, last = losses(request.getfixturevalue(kind))
    assert first == pytest.approx(loss_of_base, abs=1e-6)
    assert last < 0.9 * first


def test_checkpoints_hold_adapters_only(adapted: Path) -> None:
    """And moments of these alone; what else there is are counters and a key."""
    names = set(parameters(adapted))
    assert names
    assert all(".adapter." in name for name in names)
    others = {name: a for name, a in arrays(adapted).items() if ".adapter." not in name}
    assert all(array.size <= 2 for array in others.values()), others.keys()


def test_the_base_is_what_it_was_and_merging_keeps_the_logits(
    adapted: Path, base_run: Path
) -> None:
    found, plain = mainrun.load(adapted), mainrun.load(base_run)
    _, beneath = lora.split(found.params)
    assert beneath.keys() == plain.params.keys()
    for name, array in plain.params.items():
        np.testing.assert_array_equal(beneath[name], array, err_msg=name)
    merged = found.merged()
    assert merged.params.keys() == plain.params.keys()
    assert (merged.config.model.lora, merged.config.training.init_from) == (None, None)
    tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, found.network.vocab_size)
    logits, same, before = (
        jax.jit(lambda params, network=run.network: network.bind(params)(tokens))(run.params)
        for run in (found, merged, plain)
    )
    np.testing.assert_allclose(logits, same, atol=1e-5)
    assert np.abs(logits - before).max() > 0.1


def test_the_run_folder_says_what_was_trained(adapted: Path, whole: Path, base_run: Path) -> None:
    told = json.loads((adapted / "base.json").read_text())
    assert told["run_dir"] == str(base_run.resolve())
    assert told["step"] == mainrun.load(base_run).step
    count = sum(array.size for array in parameters(adapted).values())
    result = json.loads((adapted / "summary.json").read_text())
    assert result["trained_parameters"] == count
    assert result["parameters"] == count + sum(a.size for a in parameters(base_run).values())
    assert (
        f"{result['parameters']:,}, {count:,} of them trained"
        in (adapted / "summary.md").read_text()
    )
    assert "of them trained" not in (whole / "summary.md").read_text()
    for run_dir in (adapted, whole):
        stored = config.load(run_dir / "config.yaml")
        assert stored.training.init_from == str(base_run)
        assert f"init_from: {base_run}" in call("config", run_dir / "config.yaml")
        assert (run_dir / "tokenizer.json").read_bytes() == (
            base_run / "tokenizer.json"
        ).read_bytes()


def test_the_console_says_how_many_are_trained(adapted: Path, whole: Path) -> None:
    from mainrun.console import lines

    for run_dir, expected in ((adapted, True), (whole, False)):
        told = next(e for e in events(run_dir) if e["event"] == "run_started")
        line = lines("run_started", 0, told)[0]
        assert (f"{told['trained_parameters']:,} of them trained" in line) == expected


def test_a_run_of_adapters_is_evaluated_and_writes(adapted: Path, mainrun: Mainrun) -> None:
    """From another folder, in a process of its own."""
    found = json.loads(mainrun("evaluate", adapted, "--json", cwd="/").stdout)
    assert found["val/loss"] == pytest.approx(min(losses(adapted)), abs=1e-6)
    told = call("generate", adapted, "--num", 3, "--max-tokens", 8)
    assert len(told.splitlines()) == 3


# ---------------------------------------------------------------------------------------------
# Resuming


def test_adapters_resumed_end_as_if_never_interrupted(adapted: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(adapted, tmp_path / "run")
    step = cut_short(run_dir, leaving=1)
    assert 0 < step < 24
    assert f"resumed at step {step}" in call("resume", run_dir)
    assert_same_end(run_dir, adapted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapted", "whole"])
def test_killed_before_the_first_checkpoint_it_begins_at_the_base_again(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    expected = request.getfixturevalue(kind)
    run_dir = shutil.copytree(expected, tmp_path / "run")
    cut_short(run_dir, leaving=0)
    assert "resumed at step 0" in call("resume", run_dir)
    assert_same_end(run_dir, expected)


@pytest.mark.slow
def test_what_was_trained_whole_is_resumed_without_its_base(
    moved: Callable[..., Path], whole: Path
) -> None:
    run_dir = moved(run=whole)
    cut_short(run_dir, leaving=1)
    call("resume", run_dir)
    assert_same_end(run_dir, whole)
    assert mainrun.load(run_dir).step == 24


def test_resuming_does_not_change_the_base(
    base_run: Path, adapted: Path, whole: Path, tmp_path: Path
) -> None:
    plain = shutil.copytree(base_run, tmp_path / "run")
    said = refusal("resume", plain, "training.max_steps=44", f"training.init_from={base_run}")
    assert "did not start from another run" in said
    for run in (adapted, whole):
        copied = shutil.copytree(run, tmp_path / run.name)
        for wrong, reason in ((adapted, "has no checkpoint of step"), (tmp_path, "is not at")):
            said = refusal("resume", copied, "training.max_steps=30", f"training.init_from={wrong}")
            assert reason in said, said


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quickstart_learns_titles_and_is_stopped_and_moved_meanwhile(
    tmp_path: Path, hn_titles: Path, mainrun: Mainrun
) -> None:
    """The real sizes, processes of their own, and a signal."""
    first = tmp_path / "first"
    mainrun("train", "training.epochs=2", "--run-dir", first)
    before = contents(first)
    titles = [f"data.source=file:{hn_titles}", "data.num_documents=5000", "training.max_steps=100"]
    command = ["train", *titles, "model.lora.rank=8", f"training.init_from={first}", "--run-dir"]
    mainrun(*command, tmp_path / "whole")
    begun, *_, ended = losses(tmp_path / "whole")
    assert ended < 0.95 * begun
    assert contents(first) == before
    sizes = [bytes_of(tmp_path / run / "checkpoints") for run in ("whole", "first")]
    assert sizes[0] < 0.3 * sizes[1]

    process = start(*command, tmp_path / "stopped")
    assert _after("train_step", 20)(process, tmp_path / "stopped")
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 75, told
    first.rename(tmp_path / "moved")
    mainrun("resume", tmp_path / "stopped", f"training.init_from={tmp_path / 'moved'}")
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")


# ---------------------------------------------------------------------------------------------
# Where the base is


def test_a_base_beside_the_run_is_found(moved: Callable[..., Path], base_run: Path) -> None:
    run_dir = moved(base_to=f"moved/{base_run.name}")
    assert mainrun.load(run_dir).step == 24


@pytest.mark.slow
def test_a_base_elsewhere_is_found_by_the_setting(moved: Callable[..., Path]) -> None:
    run_dir = moved(base_to="elsewhere")
    said = refusal("evaluate", run_dir)
    assert "training.init_from=RUN_DIR" in said
    assert str(run_dir.parent.parent / "gone") in said
    elsewhere = run_dir.parent.parent / "elsewhere"
    assert trained.load(run_dir, [f"training.init_from={elsewhere}"]).step == 24
    call("resume", run_dir, "training.max_steps=25", f"training.init_from={elsewhere}")
    assert mainrun.load(run_dir, checkpoint="newest").step == 25


def test_a_stored_relative_path_leads_to_it_from_the_same_folder(
    moved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container, where the same tree stands at another path."""
    run_dir = moved(base_to="gone")
    monkeypatch.chdir(run_dir.parent.parent)
    assert trained.load(Path("moved") / run_dir.name).step == 24


def test_a_run_at_the_place_of_its_own_base_is_not_its_base(
    tmp_path: Path, moved: Callable[..., Path], base_run: Path
) -> None:
    run_dir = moved()
    run_dir.rename(run_dir.with_name(base_run.name))
    assert "is not at" in refusal("generate", run_dir.with_name(base_run.name))


def test_a_base_that_changed_is_told(moved: Callable[..., Path], base_run: Path) -> None:
    run_dir = moved(base_to=f"moved/{base_run.name}")
    beside = run_dir.with_name(base_run.name)
    told = json.loads((run_dir / "base.json").read_text())
    steps = {int(path.name) for path in (base_run / "checkpoints").iterdir()}
    other = max(steps - {told["step"]})
    (run_dir / "base.json").write_text(json.dumps({**told, "step": other}))
    assert "its parameters differ" in refusal("generate", run_dir)
    (run_dir / "base.json").write_text(json.dumps(told))

    shutil.rmtree(beside / "checkpoints" / str(told["step"]))
    said = refusal("generate", run_dir)
    assert f"has no checkpoint of step {told['step']}" in said
    shutil.rmtree(beside / "checkpoints")
    assert f"{beside} has no checkpoint" in refusal("generate", run_dir)

    for content in ("{", "[]", '{"step": 1}'):
        (run_dir / "base.json").write_text(content)
        assert "base.json cannot be read" in refusal("generate", run_dir)
    (run_dir / "base.json").unlink()
    assert "has no base.json" in refusal("generate", run_dir)


def test_a_damaged_base_is_told(moved: Callable[..., Path], base_run: Path) -> None:
    run_dir = moved(base_to=f"moved/{base_run.name}")
    step = json.loads((run_dir / "base.json").read_text())["step"]
    damaged = run_dir.with_name(base_run.name) / "checkpoints" / str(step)
    (damaged / "record" / "metadata").write_text("{")
    assert f"checkpoints/{step} is damaged" in refusal("generate", run_dir)


# ---------------------------------------------------------------------------------------------
# A base that has adapters itself


@pytest.mark.slow
def test_adapters_on_adapters(
    adapted: Path, tmp_path: Path, on_other: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named by a relative path. The base is known by what it stores, not by what it computes."""
    monkeypatch.chdir(adapted.parent)
    second = ["model.lora.rank=2", "training.max_steps=1", f"training.init_from={adapted.name}"]
    call("train", *on_other, *second, "--run-dir", tmp_path / "second")
    monkeypatch.chdir("/")
    assert losses(tmp_path / "second")[0] == pytest.approx(min(losses(adapted)), abs=1e-6)
    ours, theirs = (folder.base_reference(path) for path in (tmp_path / "second", adapted))
    assert ours["run_dir"] == str(adapted)
    assert ours["step"] == 24
    stored = {name.removeprefix("params|"): a for name, a in parameters(adapted).items()}
    assert ours["fingerprint"] == origin.fingerprint(stored, theirs["fingerprint"])
    assert mainrun.load(tmp_path / "second").merged().step == 1


# ---------------------------------------------------------------------------------------------
# What does not fit


@pytest.fixture
def wrong(
    on_other: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., str]]:
    """What `train` says to these overrides of a fine-tuning that would go."""
    monkeypatch.chdir(tmp_path)

    def said(*overrides: str, dry: bool = False) -> str:
        return refusal("train", *on_other, *overrides, *(["--dry-run"] if dry else []))

    yield said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("dry", [False, True])
def test_every_setting_that_differs_is_named(wrong: Callable[..., str], dry: bool) -> None:
    said = wrong(
        "model.d_model=32",
        "model.norm=rmsnorm",
        "model.mlp.kind=swiglu",
        "data.context_length=8",
        "tokenizer.vocab_size=400",
        "model.layer_scale=0.1",
        dry=dry,
    )
    listed = said.partition("do not fit this model: ")[2].partition("; set what the run has")[0]
    assert listed.split(", ") == [
        "model.d_model=32 (the run has 16)",
        "model.norm=rmsnorm (the run has layernorm)",
        "model.layer_scale=0.1 (the run has null)",
        "model.mlp.kind=swiglu (the run has gelu)",
        "tokenizer.vocab_size=400 (the run has 320)",
        "data.context_length=8 (the run has 16)",
    ]


def test_another_kind_is_named_without_the_settings_that_come_with_it(
    wrong: Callable[..., str],
) -> None:
    said = wrong(
        "model.attention={kind: sparse, num_heads: 2, pattern: {kind: local, "
        "window_including_self: 4}}"
    )
    assert re.findall(r"[\w.]+=\S+ \(the run has \w+\)", said) == [
        "model.attention.kind=sparse (the run has causal)"
    ]


def test_what_matters_to_training_alone_may_differ() -> None:
    theirs = config.Config()
    changes = ["model.dropout=0.3", "model.init=xavier", "model.scale_residual_init=true"]
    changes += ["training.precision=bfloat16", "optimizer.kind=sgd", "data.packing=documents"]
    origin.check_same_architecture(config.load(None, changes), theirs)
    scaled = config.load(None, ["model.layer_scale=0.1"])
    origin.check_same_architecture(config.load(None, ["model.layer_scale=0.2"]), scaled)
    experts = config.load(None, ["model.mlp={kind: moe, balance_coefficient: 0.5}"])
    origin.check_same_architecture(config.load(None, ["model.mlp.kind=moe"]), experts)
    rotary = config.load(None, ["model.position=rotary"])
    longer = config.load(None, ["model.position=rotary", "data.context_length=512"])
    origin.check_same_architecture(longer, rotary)
    with pytest.raises(UserError, match=r"data\.context_length=512 \(the run has 128\)"):
        origin.check_same_architecture(config.load(None, ["data.context_length=512"]), theirs)


def test_adapters_that_fit_nowhere_are_told_before_the_data_are_read(
    wrong: Callable[..., str],
) -> None:
    said = wrong("model.lora.targets=[attention, mpl]", "data.source=file:gone.txt")
    assert "model.lora.targets=mpl names no linear layer" in said


@pytest.mark.parametrize("place", ["gone", "file", "empty"])
def test_init_from_that_is_no_run_is_told(
    wrong: Callable[..., str], tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    said = wrong(f"training.init_from={tmp_path / place}")
    assert f"training.init_from={tmp_path / place} is no run folder" in said


def test_a_base_without_a_checkpoint_is_told(
    wrong: Callable[..., str], base_run: Path, tmp_path: Path
) -> None:
    early = shutil.copytree(base_run, tmp_path / "early")
    shutil.rmtree(early / "checkpoints")
    assert f"{early} has no checkpoint yet" in wrong(f"training.init_from={early}")


def test_adapters_without_a_base_are_told(tiny: list[str]) -> None:
    assert "training.init_from" in refusal("train", *tiny, "model.lora.rank=4")


def test_dry_run_counts_what_is_trained(on_other: list[str]) -> None:
    told = call("train", *on_other, *ADAPTERS, "--dry-run")
    assert re.search(r"parameters +[\d,]+, [\d,]+ of them trained", told)


def test_a_fingerprint_knows_names_shapes_numbers_and_what_is_beneath() -> None:
    array = np.arange(6, dtype=np.float32)
    params = {"a": array, "b": array.reshape(2, 3)}
    same = {"b": array.reshape(2, 3), "a": jax.numpy.asarray(array)}
    assert origin.fingerprint(params) == origin.fingerprint(same)
    others: list[Any] = [
        {"a": array, "c": params["b"]},
        {"a": array, "b": array.reshape(3, 2)},
        {"a": array, "b": np.nextafter(params["b"], 9)},
    ]
    found = [origin.fingerprint(other) for other in (params, *others)]
    found.append(origin.fingerprint(params, "beneath"))
    assert len(set(found)) == 5
