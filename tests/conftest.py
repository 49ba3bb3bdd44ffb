"""A small true world: a corpus of made sentences, a tiny model, the real command.

Everything here goes the path that users go; only sizes are small.
"""

import fcntl
import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mainrun.data import cache

REPOSITORY = Path(__file__).resolve().parent.parent
HN_TITLES = REPOSITORY.parent / "shared" / "data" / "hn_titles.txt"

COMMAND_FIXTURES = {"mainrun", "finished_run"}

_CACHE = "MAINRUN_CACHE_DIR"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Of all sessions: finding the fonts takes 3 s. Nor is there to be a folder in the user's ~/.config.
os.environ.setdefault("MPLCONFIGDIR", str(cache.folder() / "matplotlib"))
for name in [n for n in os.environ if n.startswith("WANDB_")]:
    del os.environ[name]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`task check` leaves out what compiles or starts processes, and few tests need say so.

    That is, every test of a module that has JAX or `subprocess`, or that runs the command.
    """
    for item in items:
        names = vars(getattr(item, "module", None) or object)
        if {"jax", "subprocess"} & set(names) or COMMAND_FIXTURES & set(
            getattr(item, "fixturenames", ())
        ):
            item.add_marker(pytest.mark.medium)


def parquet(**columns: list) -> bytes:
    """A Parquet file of these columns."""
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compilations and corpora are cached for this session only, not in the user's folder."""
    from mainrun.training import backend

    before = os.environ.get(_CACHE)
    # The workers of one session share it: what one has compiled, the other need not.
    os.environ[_CACHE] = str(_of_all_workers(tmp_path_factory) / "mainrun-cache")
    backend.prepare()
    yield
    os.environ.pop(_CACHE)
    if before is not None:
        os.environ[_CACHE] = before


@pytest.fixture(scope="session")
def hn_titles() -> Path:
    """Real Hacker News titles, where the file lies beside the checkout."""
    if not HN_TITLES.is_file():
        pytest.skip("../shared/data/hn_titles.txt is not there")
    return HN_TITLES


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 sentences that a grammar makes: learnable, and nobody's text."""
    draw = random.Random(0)
    nouns = ["parser", "socket", "kernel", "editor", "compiler", "browser", "garden", "theorem"]
    verbs = ["explains", "rewrites", "breaks", "measures", "forgets", "outgrows"]
    lines = [
        f"{draw.choice(['A', 'The', 'Every'])} {draw.choice(nouns)} {draw.choice(verbs)} "
        f"{draw.choice(['a', 'its', 'the'])} {draw.choice(nouns)} in {draw.randint(1, 2030)}"
        for _ in range(300)
    ]
    path = tmp_path_factory.mktemp("corpus") / "sentences.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny(corpus: Path) -> list[str]:
    """Overrides that make any config small: a second of training."""
    return [
        f"data.source=file:{corpus}",
        "data.num_documents=null",
        "data.context_length=16",
        "data.order=shuffled",
        "tokenizer.vocab_size=320",
        "model.d_model=16",
        "model.num_layers=2",
        "model.mlp.hidden=32",
        "model.attention.num_heads=2",
        "optimizer.learning_rate=3e-3",
        "training.batch_size=8",
        "training.max_steps=40",
        "training.evals_per_epoch=4",
        "training.checkpoint.every.steps=6",
        "training.num_samples=1",
        "tracking.wandb=disabled",
    ]


def _of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The temporary folder of this session, whichever worker asks."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


Mainrun = Callable[..., subprocess.CompletedProcess[str]]

COMMAND = [str(Path(sys.executable).with_name("mainrun"))]


@pytest.fixture(scope="session")
def mainrun() -> Mainrun:
    """The real command in a process of its own; `code` is the exit code that is expected."""

    def run(*arguments: object, code: int = 0, **options: object) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [*COMMAND, *map(str, arguments)], capture_output=True, text=True, **options
        )
        assert done.returncode == code, done.stderr[-3000:]
        return done

    return run


class Disk:
    """A small file system of its own, in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def remount(self, options: str) -> None:
        """With other options, such as `ro`."""
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    """Its options are the fixture's parameter, such as `size=20m`."""
    path = tmp_path / "disk"
    path.mkdir()
    options = getattr(request, "param", "size=50m")
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a small file system here")
    yield Disk(path)
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, tiny: list[str], mainrun: Mainrun
) -> Path:
    """A run folder of a tiny run that was never interrupted. Read it, do not change it."""
    run_dir = _of_all_workers(tmp_path_factory) / "uninterrupted"
    with run_dir.with_name("uninterrupted.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker trains it, and the others wait
        if not (run_dir / "summary.json").exists():
            mainrun("train", *tiny, "--run-dir", run_dir)
    return run_dir


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The steps of a job run in it: an empty checkout, GitHub's variables, a machine of its own."""
    for name in [n for n in os.environ if n.startswith(("GITHUB_", "INPUT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    settings = {
        "runs": str(tmp_path / "disk"), "locks": str(tmp_path / "locks"), "gpus": "none",
        "free_disk": "1m",
    }  # fmt: skip
    (tmp_path / "host.yaml").write_text(json.dumps(settings))
    for name, value in {
        "MAINRUN_HOST_CONFIG": str(tmp_path / "host.yaml"),
        "GITHUB_RUN_ID": "77",
        "GITHUB_RUN_ATTEMPT": "1",
        "GITHUB_SHA": "b" * 40,
        "GITHUB_ACTOR": "ada",
        "GITHUB_STEP_SUMMARY": str(tmp_path / "page.md"),
        "DOCKER_HOST": "unix:///nonexistent",
    }.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.fixture(scope="session")
def base_image() -> str:
    """`mainrun-base:test`, a Debian with Python that tests/engine.sh makes."""
    docker = ["docker", "image", "inspect", "mainrun-base:test"]
    if shutil.which("docker") is None or subprocess.run(docker, capture_output=True).returncode:
        pytest.skip("no Docker Engine with the image mainrun-base:test: see tests/engine.sh")
    return "mainrun-base:test"


@pytest.fixture(scope="session")
def job_image(base_image: str) -> str:
    """`mainrun:test`, the CPU image of this tree."""
    from mainrun import images, stop
    from mainrun.host import Host

    machine = Host(base_image=base_image, target="cpu")
    lines: list[str] = []
    with stop.listening() as stopping:
        return images.build(
            machine, context=REPOSITORY, tag="mainrun:test", stopping=stopping, say=lines.append
        )
