"""Images are built from a commit, tried, named and removed; a stop or a failure leaves nothing.

With an Engine, names are moved in a repository of the test's own: other images are not touched.
"""

import io
import json
import os
import signal
import subprocess
import tarfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import pytest
from docker.errors import DockerException, ImageNotFound, NotFound

from mainrun import builder, containers, images
from mainrun.errors import RunFailed, Stopped, UserError
from mainrun.host import Host
from mainrun.request import Request, container_options
from mainrun.stop import StopSignal

BASE = "mainrun-base:test"
CPU = Host(target="cpu", base_image=BASE)


# --- the command


def command(host: Host = CPU, **changes: object) -> list[str]:
    given = {"context": Path("/src"), "name": "mainrun:abc", "target": "cpu", "commit": "abc"}
    return images.build_command(host, **{**given, **changes})


def test_command_names_target_device_commit_and_context():
    assert command(target="cuda") == [
        "docker", "build", "--force-rm", "--file=/src/docker/Dockerfile", "--target=cuda",
        "--build-arg=DEVICE=cuda12", "--build-arg=COMMIT=abc", f"--build-arg=BASE_IMAGE={BASE}",
        "--tag=mainrun:abc", "/src",
    ]  # fmt: skip


def test_without_git_or_a_base_image_of_ones_own_the_dockerfile_decides():
    words = command(Host(), commit=None)
    assert "--build-arg=COMMIT=unknown" in words
    assert not [word for word in words if "BASE_IMAGE" in word]


def test_no_variable_of_ours_gets_into_the_build(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary-0123456789")
    assert "canary" not in " ".join(command())
    assert not any(word.startswith("--build-arg=") and word.count("=") < 2 for word in command())


def test_target_is_what_the_host_says_and_else_what_the_machine_has(tmp_path: Path):
    assert images.target(Host(target="cuda")) == "cuda"
    if not Path("/dev/nvidiactl").exists():
        assert images.target(Host()) == "cpu"


def test_a_tag_names_an_image(subtests: pytest.Subtests):
    for tag, name in [
        ("trial-2", "mainrun:trial-2"),
        ("a" * 40, f"mainrun:{'a' * 40}"),
        ("x/y:Z", "x/y:Z"),
    ]:
        with subtests.test(tag=tag, name=name):
            assert images.image_name(tag) == name


def test_what_names_no_image_is_refused(subtests: pytest.Subtests):
    for tag in ["", "-x", "a b", "a\n", "x:", "--rm:x", "A:b", "a" * 129, "$(id)"]:
        with (
            subtests.test(tag=tag),
            pytest.raises(UserError, match="is no name for an image"),
        ):
            images.image_name(tag)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout with a recipe; outside a workflow."""
    monkeypatch.delenv("GITHUB_SHA", raising=False)
    root = tmp_path / "checkout"
    (root / "docker").mkdir(parents=True)
    (root / "docker" / "Dockerfile").write_text("FROM scratch AS cpu\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "x")
    return root


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, check=True)
    return done.stdout.decode().strip()


def test_commit_is_gits_with_its_dirt_and_a_workflows_goes_before(checkout: Path, monkeypatch):
    sha = git(checkout, "rev-parse", "HEAD")
    assert images.commit_of(checkout) == sha
    (checkout / "new").touch()
    assert images.commit_of(checkout) == f"{sha}-dirty"
    monkeypatch.setenv("GITHUB_SHA", "b" * 40)
    assert images.commit_of(checkout) == "b" * 40


def test_a_folder_without_git_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GITHUB_SHA", raising=False)
    assert images.commit_of(tmp_path) is None


def test_what_is_no_checkout_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="is no checkout of mainrun"):
        images.build(CPU, context=tmp_path, say=print)


def test_machine_without_dockers_program_or_engine_is_told_so(checkout: Path, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{checkout}/absent.sock")
    monkeypatch.setenv("PATH", str(checkout / "bin"))
    with pytest.raises(UserError, match="`docker` is not on PATH"):
        images.build(CPU, context=checkout, say=print)
    program = checkout / "bin" / "docker"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    with pytest.raises(UserError, match="no Docker Engine answers"):
        images.build(CPU, context=checkout, say=print)


# --- the reason


LEGACY = """
Step 9/26 : RUN python3 requirements/install.py wheels
 ---> Running in 0ae8b1a9a3f5
setup: installing cpu.txt ...
    ERROR: No matching distribution found for jax==99
setup: cpu.txt could not be installed: `pip install` ended with 1
Removing intermediate container 0ae8b1a9a3f5
The command '/bin/sh -c python3 requirements/install.py wheels' returned a non-zero code: 1
"""
BUILDKIT = """
#9 [wheels 4/4] RUN python3 requirements/install.py wheels
#9 0.412 setup: installing cpu.txt ...
#9 3.020 setup: cpu.txt could not be installed: `pip install` ended with 1
#9 ERROR: process "/bin/sh -c python3 ..." did not complete successfully: exit code: 1
------
 > [wheels 4/4] RUN python3 requirements/install.py wheels:
0.412 setup: installing cpu.txt ...
3.020 setup: cpu.txt could not be installed: `pip install` ended with 1
------
Dockerfile:33
--------------------
  32 |     # chmod
  33 | >>> RUN python3 requirements/install.py wheels
  34 |
--------------------
ERROR: failed to solve: process "/bin/sh -c ..." did not complete successfully: exit code: 1
"""


def test_reason_is_what_the_failing_step_said_last(subtests: pytest.Subtests):
    for output in [LEGACY, BUILDKIT]:
        with subtests.test(output=output):
            said = builder.reason(output.splitlines())
            assert said == "setup: cpu.txt could not be installed: `pip install` ended with 1"


def test_reason_of_a_missing_base_image_is_the_engines():
    refusal = "Error response from daemon: manifest for python:absent not found"
    assert builder.reason(["Step 1/26 : FROM python:absent", refusal]) == refusal


def test_full_disk_is_said_with_the_remedy(subtests: pytest.Subtests):
    for case in ["No space left on device", "no space left on device"]:
        with subtests.test(case=case):
            lines = [f"OSError: [Errno 28] {case}", "setup: cpu.txt could not be installed: …"]
            assert builder.reason(lines).startswith(
                "the disk of Docker is full: `docker system df`"
            )


def test_silent_builder_gave_no_reason():
    assert builder.reason([]) == "the builder gave no reason"


# --- the smoke test


def test_smoke_test_has_the_rights_of_a_job_and_no_network_or_folder():
    asked = Request(task="train", words=(), label="1", image="mainrun:abc")
    job = container_options(asked, Host())
    smoke = images.smoke_options("mainrun:abc")
    for right in ("user", "read_only", "cap_drop", "security_opt", "init", "pids_limit"):
        assert smoke[right] == job[right], right
    assert smoke["network_mode"] == "none"
    assert not {"mounts", "volumes", "device_requests", "privileged"} & smoke.keys()
    assert containers.JOB not in smoke["labels"], "the reaper would take it for a stray"


# --- with an Engine


@pytest.fixture(scope="session")
def engine() -> docker.DockerClient:
    try:
        client = docker.from_env()
        client.ping()
    except (DockerException, OSError) as error:
        pytest.skip(f"no Docker Engine answers: {error}")
    return client


@pytest.fixture
def base(engine: docker.DockerClient) -> str:
    try:
        engine.images.get(BASE)
    except ImageNotFound:
        pytest.skip(f"the Engine has no {BASE}: see tests/engine.sh")
    return BASE


@pytest.fixture
def repository(engine: docker.DockerClient) -> Iterator[str]:
    """The name of a repository of images that is gone after the test."""
    name = f"mainrun-test-{uuid.uuid4().hex[:8]}"
    yield name
    for image in engine.images.list(name):
        for tag in image.tags:
            if tag.startswith(f"{name}:"):
                remove(tag)


def remove(image: str) -> None:
    """By the command line, which no test changes; one that is not there is no trouble."""
    subprocess.run(["docker", "rmi", "--force", image], capture_output=True)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the code asks the Engine to remove. Only names of a test's repository are removed.

    Whatever is broken, a machine's true images outlive these tests.
    """
    names: list[str] = []
    remove = docker.APIClient.remove_image

    def guarded(client: docker.APIClient, name: str, **options: object) -> None:
        names.append(name)
        if not name.startswith("mainrun-test-"):
            raise NotFound("not the test's to remove")
        remove(client, name, **options)

    monkeypatch.setattr(docker.APIClient, "remove_image", guarded)
    return names


Make = Callable[..., str]


@pytest.fixture
def make(engine: docker.DockerClient, repository: str) -> Make:
    """Makes an image of nothing but a label; returns its name."""

    def make(tag: str) -> str:
        engine.api.import_image_from_data(
            archive({"tag": tag + repository}), repository=repository, tag=tag,
            changes=[f'LABEL {images.SHA}="sha-of-{tag}"', 'CMD ["x"]'],
        )  # fmt: skip
        return f"{repository}:{tag}"

    return make


def archive(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    return buffer.getvalue()


def named(engine: docker.DockerClient, repository: str) -> dict[str, str]:
    """Tag to the commit of its image."""
    return {
        tag.rpartition(":")[2]: image.labels[images.SHA].removeprefix("sha-of-")
        for image in engine.images.list(repository)
        for tag in image.tags
        if tag.startswith(f"{repository}:")
    }


@pytest.mark.docker
def test_promotion_moves_both_names_and_a_second_one_nothing(engine, repository: str, make: Make):
    first, second = make("a"), make("b")
    images.promote(engine, first, repository=repository)
    assert named(engine, repository) == {"a": "a", "b": "b", "current": "a"}
    said = images.promote(engine, second, repository=repository)
    moved = {"a": "a", "b": "b", "current": "b", "previous": "a"}
    assert named(engine, repository) == moved
    assert said == f"{repository}:current is now {second}, after sha-of-a"
    said = images.promote(engine, second, repository=repository)
    assert (named(engine, repository), said) == (
        moved,
        f"{repository}:current is {second} already",
    )


@pytest.mark.docker
def test_rollback_swaps_the_names_and_again_swaps_them_back(engine, repository: str, make: Make):
    for tag in "abc":
        images.promote(engine, make(tag), repository=repository)
    said = images.rollback(engine, repository=repository)
    tags = {"a": "a", "b": "b", "c": "c"}
    assert named(engine, repository) == {**tags, "current": "b", "previous": "c"}
    assert said == f"{repository}:current is back at sha-of-b"
    images.rollback(engine, repository=repository)
    assert named(engine, repository) == {**tags, "current": "c", "previous": "b"}


@pytest.mark.docker
def test_there_must_be_something_to_promote_and_to_go_back_to(engine, repository: str, make: Make):
    with pytest.raises(UserError, match=f"{repository}:absent is not on this machine"):
        images.promote(engine, f"{repository}:absent", repository=repository)
    images.promote(engine, make("a"), repository=repository)
    with pytest.raises(UserError, match=r"no image to go back to: .*:previous is not there"):
        images.rollback(engine, repository=repository)
    assert named(engine, repository) == {"a": "a", "current": "a"}


@pytest.mark.docker
def test_pruning_keeps_what_is_named_used_young_or_somebody_elses(
    engine, repository: str, make: Make, asked: list[str]
):
    for tag in ("previous-one", "current-one"):
        images.promote(engine, make(tag), repository=repository)
    for tag in ("used", "old", "shared"):
        make(tag)
    engine.images.get(f"{repository}:used").tag(repository, "used-too")
    elsewhere = f"{repository}-elsewhere"
    engine.images.get(f"{repository}:shared").tag(elsewhere, "kept")
    user = engine.containers.create(f"{repository}:used", labels={"mainrun.test": "images"})
    try:
        before = named(engine, repository)
        images.prune(engine, 7, repository=repository)
        assert named(engine, repository) == before
        removed = images.prune(engine, 0, repository=repository)
        assert sorted(removed) == [f"{repository}:old", f"{repository}:shared"]
        assert named(engine, repository).keys() == {
            "current", "previous", "current-one", "previous-one", "used", "used-too",
        }  # fmt: skip
        assert [name for name in asked if not name.startswith("sha256:")] == removed
        assert named(engine, elsewhere) == {"kept": "shared"}
    finally:
        user.remove(force=True)
        remove(f"{elsewhere}:kept")


def nameless(engine: docker.DockerClient, labels: dict[str, str], created: str) -> str:
    """The id of a loaded image without a name, made at any time."""
    config = {
        "architecture": "amd64", "os": "linux", "created": created,
        "config": {"Labels": labels, "Cmd": ["x"]},
        "rootfs": {"type": "layers", "diff_ids": []}, "history": [],
    }  # fmt: skip
    manifest = [{"Config": "config.json", "RepoTags": None, "Layers": []}]
    texts = {"config.json": json.dumps(config), "manifest.json": json.dumps(manifest)}
    (image,) = engine.images.load(archive(texts))
    return str(image.id)


@pytest.mark.docker
def test_pruning_takes_nameless_images_of_ours_unless_a_build_may_be_making_them(
    engine, asked: list[str]
):
    sha = uuid.uuid4().hex
    old = nameless(engine, {images.SHA: sha}, "2020-01-01T00:00:00Z")
    young = nameless(engine, {images.SHA: sha}, "2120-01-01T00:00:00Z")
    foreign = nameless(engine, {"a": sha}, "2020-01-01T00:00:00Z")
    try:
        images.prune(engine, 10_000, repository=f"mainrun-test-{sha}")
        assert old in asked
        assert not {young, foreign} & set(asked)
    finally:
        for image in (old, young, foreign):
            remove(image)


def recipe(checkout: Path, *lines: str) -> None:
    text = "\n".join([f"FROM {BASE} AS cpu", *lines])
    (checkout / "docker" / "Dockerfile").write_text(f"{text}\nLABEL {images.SHA}=x\n")


@pytest.mark.docker
def test_build_that_fails_says_why_and_leaves_no_container(
    engine, base: str, checkout: Path, repository: str
):
    recipe(checkout, "RUN echo 'setup: it broke' >&2 && exit 3")
    lines: list[str] = []
    with pytest.raises(RunFailed, match=r"could not be built: setup: it broke$"):
        images.build(CPU, context=checkout, tag=f"{repository}:x", say=lines.append)
    assert steps_left(engine, lines) == []


@pytest.mark.docker
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_build_leaves_no_container_and_no_client(
    engine, base: str, checkout: Path, repository: str, number: signal.Signals
):
    marker = uuid.uuid4().hex
    recipe(checkout, f"RUN echo {marker} && sleep 1000")
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if line.endswith(marker):  # the step runs
            os.kill(os.getpid(), number)

    with pytest.raises(Stopped):
        images.build(CPU, context=checkout, tag=f"{repository}:x", say=say)
    assert steps_left(engine, lines) == []
    assert str(checkout) not in subprocess.run(["ps", "ax"], capture_output=True, text=True).stdout
    assert engine.images.list(repository) == []


# A stand-in for the command line client leaves no step in an Engine: this one is never asked.
NO_ENGINE = docker.DockerClient(base_url="unix:///absent.sock", version="1.41")


def lines_of(script: str) -> list[str]:
    """What a stand-in for the command line client prints."""
    lines: list[str] = []
    builder.run(NO_ENGINE, ["sh", "-c", script], StopSignal(), lines.append)
    return lines


def test_client_that_ends_a_moment_after_its_output_has_not_failed():
    assert lines_of("echo built; exec >&- 2>&-; sleep 0.1") == ["built"]


def test_ctrl_c_of_a_terminal_does_not_reach_the_client_by_itself():
    session, pid = lines_of("cut -d' ' -f6 /proc/$$/stat; echo $$")
    assert session == pid


def test_stop_before_the_build_starts_none(checkout: Path):
    stop = StopSignal()
    stop.received = signal.SIGTERM
    with pytest.raises(Stopped):
        builder.run(NO_ENGINE, ["/absent"], stop, print)


def steps_left(engine: docker.DockerClient, lines: list[str]) -> list[str]:
    """Containers of a build's steps that are still there."""
    left = []
    ids = [line.split()[-1] for line in lines if "Running in" in line]
    assert ids or any(line.startswith("#") for line in lines), lines  # BuildKit has none
    for step in ids:
        try:
            engine.containers.get(step)
            left.append(step)
        except NotFound:
            pass
    return left


@pytest.mark.docker
def test_smoke_test_trains_in_the_image_of_this_tree(engine, job_image: str):
    images.smoke_test(engine, job_image)
    assert engine.containers.list(all=True, filters={"label": images.SMOKE}) == []


@pytest.mark.docker
def test_smoke_test_of_a_missing_image_is_refused(engine):
    with pytest.raises(UserError, match="the image mainrun:absent is not on this machine"):
        images.smoke_test(engine, "mainrun:absent")


@pytest.fixture
def names_kept(engine: docker.DockerClient) -> Iterator[None]:
    """`mainrun:current` and `mainrun:previous` stand where they stood when the test is over."""
    before = {tag: engine.images.list(f"mainrun:{tag}") for tag in ("current", "previous")}
    yield
    for tag, found in before.items():
        if found:
            found[0].tag("mainrun", tag)
        elif engine.images.list(f"mainrun:{tag}"):
            remove(f"mainrun:{tag}")


@pytest.mark.docker
def test_update_promotes_what_passes_its_smoke_test_and_nothing_else(
    engine,
    base: str,
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    names_kept: None,
    asked: list[str],
):
    host = Host(target="cpu", base_image=base, keep_images=10_000)
    good, bad = uuid.uuid4().hex + "0" * 8, uuid.uuid4().hex + "1" * 8
    try:
        monkeypatch.setenv("GITHUB_SHA", good)
        recipe(checkout, f'ENTRYPOINT ["sh", "-c", "exit 0", "{good}"]')
        done = images.update(host, context=checkout, say=lambda _: None)
        assert done[0] == f"built and tried mainrun:{good}"
        assert done[1].startswith(f"mainrun:current is now mainrun:{good}")
        promoted = engine.images.get("mainrun:current").id
        assert promoted == engine.images.get(f"mainrun:{good}").id

        monkeypatch.setenv("GITHUB_SHA", bad)
        recipe(checkout, 'ENTRYPOINT ["sh", "-c", "echo it broke; exit 3", "x"]')
        with pytest.raises(RunFailed, match=f"mainrun:{bad} failed .* exit code 3: it broke$"):
            images.update(host, context=checkout, say=lambda _: None)
        assert engine.images.get("mainrun:current").id == promoted
        assert engine.containers.list(all=True, filters={"label": images.SMOKE}) == []
    finally:
        for sha in (good, bad):
            remove(f"mainrun:{sha}")
