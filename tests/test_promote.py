"""Runs become a file of config/sota, or are refused in one line; and the file is checked again."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import pytest
import yaml

from mainrun import cli, config
from mainrun.errors import UserError
from mainrun.sota import check, difference, evidence
from tests.conftest import COMMAND, REPOSITORY, Mainrun

FILES = sorted((config.default_config_root() / "sota").glob("*.yaml"))

SMALL = [
    "data.num_documents=400", "data.context_length=16", "tokenizer.vocab_size=300",
    "model.d_model=16", "model.num_layers=1", "model.attention.num_heads=2",
    "training.batch_size=8", "training.max_steps=6", "training.evals_per_epoch=0",
    "training.num_samples=0", "tracking.wandb=disabled",
]  # fmt: skip
CHECK = ["data.num_documents=300", "training.max_steps=4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, mainrun: Mainrun) -> list[Path]:
    """Two finished runs of one config with different seeds. Read them, do not change them."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        mainrun("train", *SMALL, f"seed={seed}", "--run-dir", folder / f"seed-{seed}")
    return [folder / "seed-1", folder / "seed-2"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config folder of this test's own, which the command takes for the checkout's."""
    return own_root(tmp_path, monkeypatch)


def own_root(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = folder / "config"
    shutil.copytree(REPOSITORY / "config", path, ignore=lambda *_: ["sota"])
    monkeypatch.setattr(config, "default_config_root", lambda: path)
    return path


@pytest.fixture(scope="module")
def made(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that both runs were promoted to."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        root = own_root(tmp_path_factory.mktemp("made"), monkeypatch)
        assert cli.main(["promote", *map(str, runs), "small", *CHECK]) == 0
    return root / "sota" / "small.yaml"


@pytest.fixture
def promoted(made: Path, root: Path) -> Path:
    """The same file in this test's own folder."""
    path = root / "sota" / made.name
    path.parent.mkdir()
    return Path(shutil.copy(made, path))


def copied(run: Path, folder: Path, change: Callable[[list[dict]], list[dict]]) -> Path:
    """A run folder whose record says something else."""
    copy = folder / run.name
    shutil.copytree(run, copy)
    record = copy / "events.jsonl"
    events = [json.loads(line) for line in record.read_text().splitlines()]
    record.write_text("".join(f"{json.dumps(event)}\n" for event in change(events)))
    return copy


@pytest.fixture
def refusal(root: Path, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """The one line that a promotion is refused with; nothing is written."""

    def said(*words: object) -> str:
        before = sorted(root.rglob("*"))
        assert cli.main(["promote", *map(str, words)]) == 2
        assert sorted(root.rglob("*")) == before
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return said


@pytest.mark.slow
def test_the_file_loads_to_what_was_trained(promoted: Path, runs: list[Path]):
    loaded, trained = (
        config.as_dict(config.load(path)) for path in (promoted, runs[0] / "config.yaml")
    )
    assert loaded | {"tracking": None} == trained | {"tracking": None}
    stated = yaml.safe_load(promoted.read_text())
    assert stated["extends"] == "../base/quickstart.yaml"
    assert stated["model"] == {"d_model": 16, "num_layers": 1, "attention": {"num_heads": 2}}
    assert "tracking" not in stated


@pytest.mark.slow
def test_the_result_is_that_of_the_runs(promoted: Path, runs: list[Path]):
    told = [json.loads((run / "summary.json").read_text()) for run in runs]
    values = [summary["val/loss"]["best"]["value"] for summary in told]
    result = check.read(promoted)
    assert [run.value for run in result.runs] == values
    assert [run.seed for run in result.runs] == [1, 2]
    assert result.mean == pytest.approx(mean(values))
    assert result.standard_error == pytest.approx(stdev(values) / 2**0.5)
    assert result.standard_error_over == "seeds"
    assert result.coverage == 1
    assert result.tokens_seen == told[0]["tokens_seen"]
    assert result.runs[0].commit == json.loads(
        (runs[0] / "environment.json").read_text()
    )["commit"]  # fmt: skip


@pytest.mark.slow
def test_one_run_has_its_evaluations_own_error_and_says_so(runs: list[Path], root: Path):
    assert cli.main(["promote", str(runs[1]), "one", *CHECK]) == 0
    result = check.read(root / "sota" / "one.yaml")
    told = json.loads((runs[1] / "summary.json").read_text())
    assert result.standard_error_over == "documents"
    assert result.standard_error == told["val/loss"]["best"]["stderr"]
    assert config.load(root / "sota" / "one.yaml").seed == 2


@pytest.mark.slow
def test_no_path_of_this_machine_is_published(promoted: Path, runs: list[Path]):
    text = promoted.read_text()
    assert str(Path.home()) not in text
    assert str(runs[0].parent) not in text
    assert "run-dir" not in text


@pytest.mark.slow
def test_a_file_elsewhere_is_published_by_its_name(
    corpus: Path, tiny: list[str], root: Path, tmp_path: Path, mainrun: Mainrun
):
    short = [word for word in tiny if not word.startswith("training.max_steps")]
    mainrun("train", *short, "training.max_steps=4", "--run-dir", tmp_path / "run")
    words = ["data.source=python-docs", *CHECK]
    assert cli.main(["promote", str(tmp_path / "run"), "mine", *words]) == 0
    path = root / "sota" / "mine.yaml"
    assert config.load(path).data.source == f"file:{corpus.name}"
    assert "is not in this repository" in str(check.read(path).data)
    assert str(corpus.parent) not in path.read_text()


@pytest.mark.slow
def test_the_same_again_is_left_alone_and_another_is_refused(
    promoted: Path, runs: list[Path], refusal: Callable[..., str], capsys: pytest.CaptureFixture
):
    before = promoted.read_bytes()
    assert cli.main(["promote", *map(str, runs), "small", *CHECK]) == 0
    assert "is of these runs already" in capsys.readouterr().err
    assert "exists: choose another name" in refusal(runs[0], "small", *CHECK)
    assert promoted.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a/b", "../x", "", "-x", "x.yaml"])
def test_a_bad_name_is_refused(name: str, runs: list[Path], refusal: Callable[..., str]):
    assert "is no name for a config" in refusal("--", runs[0], name)


@pytest.mark.slow
def test_runs_that_are_no_evidence_are_refused(
    runs: list[Path], tmp_path: Path, refusal: Callable[..., str]
):
    def without_end(events: list[dict]) -> list[dict]:
        return [event for event in events if event["event"] != "finished"]

    def with_losses(*losses: object) -> Callable[[list[dict]], list[dict]]:
        def change(events: list[dict]) -> list[dict]:
            values = iter(losses)
            return [
                event | {"val/loss": next(values)} if event["event"] == "evaluation" else event
                for event in events
            ]

        return change

    def half(events: list[dict]) -> list[dict]:
        return [e | {"val/tokens": 7} if e["event"] == "evaluation" else e for e in events]

    for number, (change, reason) in enumerate(
        [
            (without_end, "only a finished run"),
            (with_losses(2.0, "NaN"), "is no number"),
            (with_losses(2.0, 2.5), "diverged: val/loss went from 2.000 to 2.500"),
            (half, "scored 7 of"),
        ]
    ):
        run = copied(runs[0], tmp_path / str(number), change)
        assert reason in refusal(run, "x"), reason
    assert "is no run folder" in refusal(tmp_path, "x")


@pytest.mark.slow
def test_a_run_that_was_changed_on_the_way_is_refused_by_the_setting(
    runs: list[Path], tmp_path: Path, root: Path, refusal: Callable[..., str]
):
    def resumed(*overrides: str) -> Callable[[list[dict]], list[dict]]:
        event = {"event": "resumed", "step": 3, "overrides": overrides}
        return lambda events: [*events[:2], events[1] | event, *events[2:]]

    changed = copied(runs[0], tmp_path / "changed", resumed("training.max_steps=6", "seed=1"))
    copied(runs[0], tmp_path / "same", resumed("tracking.name=x", "training.max_steps=6"))
    text = (changed / "config.yaml").read_text()
    (changed / "config.yaml").write_text(text.replace("max_steps: 6", "max_steps: 2"))
    assert "was resumed with training.max_steps=6 from step 3" in refusal(changed, "x")
    assert cli.main(["promote", str(tmp_path / "same" / "seed-1"), "y", *CHECK]) == 0


@pytest.mark.slow
def test_a_run_whose_name_looks_like_a_number_keeps_it(runs: list[Path], root: Path):
    run = copied(runs[0], root.parent, lambda events: events)
    run = run.rename(run.with_name("1e5"))
    assert cli.main(["promote", str(run), "number", *CHECK]) == 0
    assert check.read(root / "sota" / "number.yaml").runs[0].run == "1e5"


@pytest.mark.slow
def test_runs_of_different_configs_are_refused_by_the_setting(
    runs: list[Path], tmp_path: Path, refusal: Callable[..., str]
):
    other = copied(runs[1], tmp_path, lambda events: events)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("grad_clip: 1.0", "grad_clip: 2.0"))
    assert "`training.grad_clip` is 1.0 and 2.0" in refusal(runs[0], other, "x")


@pytest.mark.slow
def test_runs_of_one_seed_are_refused(
    runs: list[Path], tmp_path: Path, refusal: Callable[..., str]
):
    again = copied(runs[0], tmp_path, lambda events: events)
    assert "both have seed=1" in refusal(runs[0], again, "x")


@pytest.mark.slow
def test_runs_on_other_data_are_refused(
    runs: list[Path], tmp_path: Path, refusal: Callable[..., str]
):
    other = copied(runs[1], tmp_path, lambda events: events)
    stored = json.loads((other / "environment.json").read_text())
    (other / "environment.json").write_text(json.dumps(stored | {"data_fingerprint": "f" * 64}))
    assert "is not what seed-2 was trained on" in refusal(runs[0], other, "x")


@pytest.mark.parametrize("text", ["", "{", "null", "5", "{}", '{"best": null}'])
def test_a_sweep_whose_summary_is_damaged_has_no_finished_trial(tmp_path: Path, text: str):
    (tmp_path / "sweep.yaml").write_text("method: grid\n")
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(UserError, match="has no finished trial yet: go on with"):
        evidence.read([tmp_path])


@pytest.mark.slow
def test_the_best_trial_of_a_sweep_is_promoted(runs: list[Path], tmp_path: Path):
    sweep = tmp_path / "sweep"
    shutil.copytree(runs[0], sweep / "trials" / "trial-002")
    (sweep / "sweep.yaml").write_text("method: grid\n")
    summary = {"best": {"trial": 2, "run_dir": "elsewhere/trials/trial-002"}}
    (sweep / "summary.json").write_text(json.dumps(summary))
    assert [run.measured.run for run in evidence.read([sweep])] == ["trial-002"]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["train", "--run-dir", "/home/me/x", "seed=1"], ["train", "seed=1"]),
        (["train", "--run-dir=/home/me/x"], ["train"]),
        (["train", "/home/me/a.yaml"], ["train", "a.yaml"]),
        (["data.source=file:/home/me/t.txt"], ["data.source=file:t.txt"]),
        (["data.source=file:~/t.txt"], ["data.source=file:t.txt"]),
        (["data.source=file:data/t.txt"], ["data.source=file:data/t.txt"]),
        (["config/base/gpt.yaml", "a.b=1e-3"], ["config/base/gpt.yaml", "a.b=1e-3"]),
        ([str(REPOSITORY / "config/base.yaml")], ["config/base.yaml"]),
    ],
)
def test_a_command_is_published_without_the_machine(words: list[str], shown: list[str]):
    assert evidence.public_command(words) == shown


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.mlp.kind=moe", "training.weight_average.kind=swa"],
        ["schedule.kind=wsd", "schedule.warmup.steps=3", "optimizer.kind=muon"],
        ["model.attention.kind=sparse", "model.attention.pattern.kind=local", "seed=9"],
        ["training.grad_clip=null", "model.attention.num_kv_heads=2"],
    ],
)
def test_a_difference_is_the_settings_that_were_changed(overrides: list[str]):
    root = config.default_config_root()
    wanted = config.load(root / "base.yaml", overrides)
    file, found = difference.nearest(wanted, root)
    assert file == root / "base.yaml"
    assert set(config.leaves(found)) == {word.partition("=")[0] for word in overrides}


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((REPOSITORY / "config/base").glob("*.yaml")))
def test_a_shipped_config_differs_in_nothing_from_its_own_file(path: Path):
    assert difference.nearest(config.load(path), REPOSITORY / "config") == (path, {})


@pytest.mark.slow
def test_a_changed_value_is_not_reproduced(promoted: Path, capsys: pytest.CaptureFixture):
    assert cli.main(["check-sota", "small"]) == 0
    assert capsys.readouterr().out.startswith("small: reproduced: ")
    value = check.read(promoted).check.value
    text = promoted.read_text()
    assert str(value) in text
    promoted.write_text(text.replace(str(value), str(value + 0.001)))
    assert cli.main(["check-sota"]) == 1
    assert "NOT REPRODUCED" in capsys.readouterr().out


@pytest.mark.slow
def test_changed_numbers_are_not_reproduced(promoted: Path, capsys: pytest.CaptureFixture):
    text = promoted.read_text()
    promoted.write_text(text.replace("model:", "optimizer: {b2: 0.9}\nmodel:", 1))
    assert cli.main(["check-sota"]) == 1
    assert "NOT REPRODUCED" in capsys.readouterr().out


@pytest.mark.slow
def test_another_text_is_said_and_tolerated_more(promoted: Path, capsys: pytest.CaptureFixture):
    stored = check.read(promoted).check
    changed = promoted.read_text().replace(stored.data_fingerprint, "f" * 64)
    promoted.write_text(changed.replace(str(stored.value), str(stored.value + 0.01)))
    assert cli.main(["check-sota"]) == 0
    assert "is another text than that of Python" in capsys.readouterr().out


def test_check_sota_refuses_a_name_that_is_none(root: Path, capsys: pytest.CaptureFixture):
    assert cli.main(["check-sota", "gone"]) == 2
    assert "'gone' is no promoted config" in capsys.readouterr().err


@pytest.mark.slow
def test_a_result_is_information_and_an_unknown_part_of_it_is_refused(promoted: Path):
    without = yaml.safe_load(promoted.read_text())
    result = without.pop("result")
    bare = promoted.with_name("bare.yaml")
    bare.write_text(yaml.safe_dump(without))
    assert config.load(bare) == config.load(promoted)
    bare.write_text(yaml.safe_dump({**without, "result": result | {"colour": "blue"}}))
    with pytest.raises(ValueError, match=r"unknown setting `result\.colour`.*bare\.yaml"):
        config.load(bare)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_promoted_config_loads_and_its_check_too(path: Path):
    result = check.read(path)
    small = config.load(path, result.check.overrides)
    assert small.data.source == "python-docs", "every machine has it"
    assert small.training.precision == "float32"
    evidence.check_public(path.read_text())


def test_a_config_was_promoted():
    assert FILES


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_promoted_config_is_reproduced(path: Path):
    done = subprocess.run(
        [*COMMAND, "check-sota", path.stem], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
