"""The image: what its recipe must never do, and what containers of it can and cannot.

The recipe is read as text, as hadolint does, for what hadolint does not know. With an Engine the
image of this tree is built and used as jobs use it: any uid, read-only, without rights or network.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import docker
import pytest
from docker.utils.build import exclude_paths

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"
IGNORED = (ROOT / ".dockerignore").read_text().splitlines()

HARD = {
    "user": "12345:12345", "read_only": True, "tmpfs": {"/tmp": ""}, "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges:true"], "network_mode": "none", "init": True,
    "labels": {"mainrun.test": "dockerfile"},
}  # fmt: skip


def instructions() -> list[tuple[str, str]]:
    """Each instruction and its arguments, in order, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(word.upper(), " ".join(rest.split())) for word, _, rest in
            (line.strip().partition(" ") for line in lines if line.strip())]  # fmt: skip


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions by the name of their stage."""
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            found[rest.split(" AS ")[1]] = []
        elif found:
            list(found.values())[-1].append((word, rest))
    return found


def of(word: str, stage: str | None = None) -> list[str]:
    listed = instructions() if stage is None else stages()[stage]
    return [rest for name, rest in listed if name == word]


# --- the recipe


def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_base_image_is_a_python_by_digest_and_the_callers_choice():
    (default,) = [rest for rest in of("ARG") if rest.startswith("BASE_IMAGE=")]
    assert re.fullmatch(r"BASE_IMAGE=python:3\.1[2-9]-slim[a-z-]*@sha256:[0-9a-f]{64}", default)
    bases = [rest.split(" AS ")[0] for rest in of("FROM")]
    assert bases[0] == "${BASE_IMAGE}"
    assert set(bases[1:]) <= stages().keys(), "every other stage stands on one of ours"


def test_targets_are_cpu_and_cuda_and_the_builder_before_buildkit_can_make_them():
    assert list(stages())[-2:] == ["cpu", "cuda"]
    assert "syntax=" not in DOCKERFILE.read_text()
    beyond = r"--(mount|network|security|chmod|link|parents|exclude)\b|<<"
    assert [pair for pair in instructions() if re.search(beyond, pair[1])] == []


def test_nothing_is_fetched_by_url_and_nothing_secret_is_asked_for():
    assert of("ADD") == []
    names = [re.split(r"[= ]", item)[0] for item in of("ARG") + of("ENV")]
    assert [name for name in names if re.search("KEY|TOKEN|SECRET|PASSWORD", name)] == []
    assert not re.search(r"https?:|curl|wget|apt-get", DOCKERFILE.read_text())


def test_wheels_come_before_the_code_and_the_commit_after_it():
    copied = " ".join(of("COPY", "wheels")).split()
    assert copied == ["requirements/install.py", "requirements/${DEVICE}.txt", "requirements/"]
    code = [word for word, _ in stages()["app"]]
    commit = stages()["app"].index(("ARG", "COMMIT=unknown"))
    assert not {"COPY", "RUN"} & set(code[commit:]), "a commit would build these again"
    assert not {"COPY", "ADD"} & {word for name in ("cpu", "cuda") for word, _ in stages()[name]}


def test_user_is_a_number_and_not_root_and_the_library_path_stays_unset():
    assert [re.fullmatch(r"[1-9]\d*:[1-9]\d*", user) is not None for user in of("USER")] == [True]
    assert "LD_LIBRARY_PATH" not in DOCKERFILE.read_text(), "JAX warns of it"


def test_cuda_target_tells_the_nvidia_runtime_what_it_needs():
    (said,) = of("ENV", "cuda")
    assert said.split() == [
        "NVIDIA_VISIBLE_DEVICES=all",
        "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
    ]


# --- what the build gets to see


def planted(folder: Path) -> set[str]:
    """A checkout with everything in it that must not get into an image; what may."""
    wanted = {
        "LICENSE", "pyproject.toml", "taskfile.yml", "config/base/a.yaml", "mainrun/cli/calls.py",
        "mainrun/data/sources.py", "docker/entrypoint.py", "requirements/cpu.txt",
        "requirements/cuda12.txt", "requirements/install.py",
    }  # fmt: skip
    unwanted = {
        ".git/config", ".env", ".env.local", "mainrun/.env", "config/.env.gpu", "runs/a/x",
        ".venv/bin/python", ".venv-host/x", ".venv-torch/x", "wandb/x", ".netrc", "mainrun/.netrc",
        "mainrun/__pycache__/cli.pyc", "out/job.json", "in/x", "tests/test_cli.py", "id_rsa",
        "config/.git/config", "requirements/dev.txt", "docker/Dockerfile", "data/titles.txt",
    }  # fmt: skip
    for name in wanted | unwanted:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return wanted


def test_context_is_the_code_and_nothing_else(tmp_path: Path):
    wanted = planted(tmp_path)
    sent = exclude_paths(str(tmp_path), [line for line in IGNORED if not line.startswith("#")])
    assert {name for name in sent if (tmp_path / name).is_file()} == wanted


def test_everything_that_is_copied_is_in_the_context(tmp_path: Path):
    planted(tmp_path)
    sent = exclude_paths(str(tmp_path), [line for line in IGNORED if not line.startswith("#")])
    for instruction in of("COPY"):
        for source in instruction.replace("${DEVICE}", "cuda12").split()[:-1]:
            assert source in sent


@pytest.fixture(scope="session")
def engine() -> docker.DockerClient:
    try:
        client = docker.from_env()
        client.ping()
    except (docker.errors.DockerException, OSError) as error:
        pytest.skip(f"no Docker Engine answers: {error}")
    return client


@pytest.mark.docker
def test_the_engine_is_sent_the_code_and_nothing_else(tmp_path: Path, engine):
    wanted = planted(tmp_path)
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    recipe = tmp_path / "docker" / "Dockerfile"
    recipe.write_text('FROM scratch\nCOPY . /\nCMD ["/none"]\n')
    name = "mainrun-test:context"
    command = ["docker", "build", "-q", "-f", recipe, "-t", name, tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    try:
        assert wanted <= files_of(engine, name)
        assert files_of(engine, name) - wanted <= {".dockerenv", "dev/console", "etc/hostname",
            "etc/hosts", "etc/mtab", "etc/resolv.conf"}  # fmt: skip
    finally:
        engine.images.remove(name, force=True)


def files_of(engine: docker.DockerClient, image: str) -> set[str]:
    container = engine.containers.create(image, labels=HARD["labels"])
    try:
        command = f"docker export {container.id} | tar -t"
        listed = subprocess.run(["sh", "-c", command], check=True, capture_output=True, text=True)
        return {name for name in listed.stdout.splitlines() if not name.endswith("/")}
    finally:
        container.remove(force=True)


# --- containers of it


def said(engine: docker.DockerClient, image: str, *command: str, **options: object) -> str:
    """What a command says in a container with a job's rights; it must end well."""
    output: bytes = engine.containers.run(
        image, list(command), remove=True, stderr=True, **{**HARD, **options}
    )
    return output.decode()


@pytest.mark.docker
def test_a_job_trains_as_any_uid_with_nothing_writable_but_its_runs(
    job_image: str, engine, tmp_path: Path, tiny: list[str], corpus: Path
):
    runs = tmp_path / "runs"
    runs.mkdir(mode=0o777)
    runs.chmod(0o777)
    words = [word for word in tiny if not word.startswith("data.source")]
    words += ["data.num_documents=200", "training.max_steps=6", "--run-dir", "runs/a"]
    mounts = {str(runs): {"bind": "/app/runs"}}
    environment = {"JAX_PLATFORMS": "cpu", "MAINRUN_GPUS": "none"}
    text = said(
        engine, job_image, "task", "-x", "train", "--", *words,
        volumes=mounts, environment=environment,
    )  # fmt: skip
    assert "setup:" not in text, "the image has all that `task train` needs"
    assert not re.search("Traceback|Permission denied|Read-only", text)
    owners = {path.stat().st_uid for path in runs.rglob("*")}
    assert owners == {12345}
    assert json.loads((runs / "a" / "summary.json").read_text())["status"] == "finished"
    record = json.loads((runs / "a" / "environment.json").read_text())
    labels = engine.images.get(job_image).labels
    assert record["commit"] is not None
    assert labels["mainrun.sha"] == record["commit"] + "-dirty" * record["dirty"]


LEFT = """
import json, os, pathlib
app = pathlib.Path("/app")
caches = [str(path) for path in app.rglob(".cache")] + [str(path) for path in app.rglob("*.whl")]
bare = [str(p) for p in app.joinpath("mainrun").rglob("*.py")
        if not list(p.parent.glob(f"__pycache__/{p.stem}.*.pyc"))]
closed = [str(p) for p in app.rglob("*") if not os.access(p, os.R_OK)]
writable = [str(p) for p in app.rglob("*") if not p.is_symlink() and p.stat().st_mode & 2]
print(json.dumps([caches, bare, closed, writable, "LD_LIBRARY_PATH" in os.environ]))
"""


@pytest.mark.docker
def test_image_holds_no_cache_all_bytecode_and_nothing_that_a_stranger_may_write(job_image, engine):
    found = json.loads(said(engine, job_image, "python", "-c", LEFT))
    assert found == [[], [], [], ["/app/runs"], False]


@pytest.mark.docker
def test_gpu_asked_of_an_image_without_cuda_is_refused_before_training(job_image: str, engine):
    with pytest.raises(docker.errors.ContainerError) as refused:
        said(engine, job_image, "echo", "started", environment={"MAINRUN_GPUS": "1"})
    assert refused.value.exit_status == 2
    assert refused.value.stderr.decode().startswith("mainrun: 1 GPU was asked for, but this image")


@pytest.mark.docker
def test_health_check_is_the_entrypoints_and_answers(job_image: str, engine):
    check = engine.images.get(job_image).attrs["Config"]["Healthcheck"]["Test"]
    assert check[0] == "CMD"
    words = HARD | {"entrypoint": check[1:2]}
    with pytest.raises(docker.errors.ContainerError) as old:
        engine.containers.run(
            job_image, check[2:], remove=True, environment={"MAINRUN_HEALTH_SECONDS": "0"}, **words
        )
    assert old.value.exit_status == 1
    assert engine.containers.run(job_image, check[2:], remove=True, **words) == b""


@pytest.fixture
def changed_tree(tmp_path: Path) -> Path:
    """The tree as the Engine would be sent it, with another line in one module."""
    for name in exclude_paths(str(ROOT), [x for x in IGNORED if x[:1] != "#"]) | {
        ".dockerignore", "docker/Dockerfile",
    }:  # fmt: skip
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    with (tmp_path / "mainrun" / "errors.py").open("a") as module:
        module.write(f"\n# {tmp_path}\n")
    return tmp_path


@pytest.mark.docker
def test_a_change_of_code_builds_no_wheels_again(job_image: str, engine, changed_tree: Path):
    name = "mainrun-test:changed"
    command = [
        "docker", "build", "-q", "--force-rm", "-f", changed_tree / "docker" / "Dockerfile",
        "--target", "cpu", "--build-arg", "BASE_IMAGE=mainrun-base:test", "-t", name, changed_tree,
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    try:
        before, after = (
            engine.images.get(image).attrs["RootFS"]["Layers"] for image in (job_image, name)
        )
        sizes = [layer["Size"] for layer in engine.images.get(name).history()]
    finally:
        engine.images.remove(name, force=True)
    shared = [old for old, new in zip(before, after, strict=True) if old == new]
    new = len(after) - len(shared)
    assert 0 < new <= 2, "one layer of code, one of its bytecode"
    assert sum([size for size in sizes if size][:new]) < 5e6
