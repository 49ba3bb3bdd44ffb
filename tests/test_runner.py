"""The runner's set-up and hooks: what they refuse, and that a second set-up changes nothing.

Hooks are started as GitHub's runner starts them, with a recording `mainrun` and `docker` first on
PATH. The set-up runs for real in a fresh Debian container, with a stand-in for the runner's program
and for what would be fetched over the network.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
RUNNER = REPOSITORY / ".github" / "runner"
SETUP = RUNNER / "setup.sh"
SCRIPTS = [SETUP, *sorted((RUNNER / "hooks").glob("*"))]

DISPATCH = {
    "GITHUB_EVENT_NAME": "workflow_dispatch",
    "GITHUB_REPOSITORY": "ada/mainrun",
    "GITHUB_REF": "refs/heads/main",
    "GITHUB_RUN_ID": "1234567",
    "GITHUB_RUN_ATTEMPT": "2",
}
Hook = Callable[..., subprocess.CompletedProcess[str]]


def test_scripts_are_clean_and_can_be_run(subtests: pytest.Subtests):
    for script in SCRIPTS:
        with subtests.test(script=script):
            shellcheck = Path(sys.executable).with_name("shellcheck")
            done = subprocess.run(
                [shellcheck, "--severity=style", script], capture_output=True, text=True
            )
            assert done.stdout == ""
            assert os.access(script, os.X_OK)
            assert script.suffix == ".sh", "GitHub's runner refuses a hook with another ending"


# ---------------------------------------------------------------------------------------------
# Hooks


@pytest.fixture
def hook(tmp_path: Path) -> Hook:
    """Runs a hook as GitHub's runner does; programs it calls are recorded and end with `code`."""
    (tmp_path / "repository").write_text("ada/mainrun\n")

    def run(name: str, environment: Mapping[str, str], *, code: int = 0):
        for program in ("mainrun", "docker"):
            fake = tmp_path / "bin" / program
            fake.parent.mkdir(exist_ok=True)
            fake.write_text(f'#!/bin/sh\necho "{program} $*" >>"{tmp_path}/calls"\nexit {code}\n')
            fake.chmod(0o755)
        shell = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail"]
        arguments = [str(tmp_path / "repository")] if name == "started.sh" else []
        return subprocess.run(
            [*shell, str(RUNNER / "hooks" / name), *arguments],
            env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **environment},
            capture_output=True,
            text=True,
        )

    return run


def calls(folder: Path) -> list[str]:
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("event", ["workflow_dispatch", "schedule", "push"])
def test_what_the_owner_starts_may_run_and_strays_are_stopped_first(
    hook: Hook, tmp_path: Path, event: str
):
    done = hook("started.sh", {**DISPATCH, "GITHUB_EVENT_NAME": event})
    assert done.returncode == 0, done.stdout
    assert calls(tmp_path) == ["mainrun launch --reap"]


def test_what_others_can_start_is_refused_in_plain_words(
    hook: Hook, tmp_path: Path, subtests: pytest.Subtests
):
    cases = [
        ({"GITHUB_EVENT_NAME": "pull_request"}, "its event is pull_request"),
        ({"GITHUB_EVENT_NAME": "pull_request_target"}, "its event is pull_request_target"),
        ({"GITHUB_EVENT_NAME": "pull_request_review"}, "only workflow_dispatch"),
        ({"GITHUB_EVENT_NAME": "fork"}, "its event is fork"),
        ({"GITHUB_EVENT_NAME": "issue_comment"}, "its event is issue_comment"),
        ({"GITHUB_EVENT_NAME": "workflow_run"}, "its event is workflow_run"),
        ({"GITHUB_EVENT_NAME": ""}, "its event is unknown"),
        ({"GITHUB_REPOSITORY": "eve/mainrun"}, "it comes from eve/mainrun"),
        ({"GITHUB_REPOSITORY": "ada/mainrun-fork"}, "serves ada/mainrun only"),
        ({"GITHUB_EVENT_NAME": "push", "GITHUB_REF": "refs/heads/x"}, "only main is built here"),
        ({"GITHUB_REF": "refs/pull/7/merge"}, "is a pull request"),
    ]
    for changed, says in cases:
        with subtests.test(changed=changed):
            done = hook("started.sh", {**DISPATCH, **changed})
            assert done.returncode == 1
            assert says in done.stdout
            assert "mainrun refuses this job" in done.stdout
            assert calls(tmp_path) == []


def test_a_machine_that_serves_no_repository_refuses_all(hook: Hook, tmp_path: Path):
    (tmp_path / "repository").unlink()
    done = hook("started.sh", DISPATCH)
    assert done.returncode == 1
    assert "does not know which repository" in done.stdout
    (tmp_path / "repository").write_text("")
    assert hook("started.sh", {**DISPATCH, "GITHUB_REPOSITORY": ""}).returncode == 1


@pytest.mark.parametrize("name", ["started.sh", "completed.sh"])
def test_a_hook_in_trouble_warns_and_fails_no_job(hook: Hook, name: str):
    done = hook(name, DISPATCH, code=2)
    assert done.returncode == 0
    assert "::warning::" in done.stdout


def test_the_container_of_the_job_is_stopped_at_its_end(hook: Hook, tmp_path: Path):
    assert hook("completed.sh", DISPATCH).returncode == 0
    assert calls(tmp_path) == ["mainrun launch --stop 1234567-2"]


def test_a_label_that_is_none_is_never_passed_on(
    hook: Hook, tmp_path: Path, subtests: pytest.Subtests
):
    for run_id in ["", "1 --reap", "1;id", "../1"]:
        with subtests.test(run_id=run_id):
            assert hook("completed.sh", {**DISPATCH, "GITHUB_RUN_ID": run_id}).returncode == 0
            assert calls(tmp_path) == []


def test_files_of_another_user_are_taken_back_from_the_workspace_only(hook: Hook, tmp_path: Path):
    workspace = tmp_path / "work space"
    workspace.mkdir()
    (workspace / "ours").touch()
    environment = {**DISPATCH, "GITHUB_WORKSPACE": str(workspace)}
    hook("completed.sh", environment)
    assert [call for call in calls(tmp_path) if call.startswith("docker")] == []
    if os.getuid() != 0:
        pytest.skip("only root can make another user's file")
    os.chown(workspace / "ours", 12345, 12345)
    hook("completed.sh", environment)
    (call,) = (call for call in calls(tmp_path) if call.startswith("docker"))
    assert call.startswith("docker run --rm --network none")
    assert f"--volume {workspace}:/workspace" in call
    assert call.endswith("--recursive --no-dereference 0:0 /workspace")


# ---------------------------------------------------------------------------------------------
# Set-up


def refusal(*arguments: str) -> str:
    """What the set-up says on refusing them, having changed nothing."""
    done = subprocess.run([SETUP, "--check", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr


def test_setup_refuses_what_it_cannot_use_before_it_changes_anything(subtests: pytest.Subtests):
    cases = [
        (["--url", "https://github.com/an-organisation"], "name one repository"),
        (["--url", "http://github.com/o/n"], "name one repository"),
        (["--url", "https://github.com/o/n;id"], "name one repository"),
        (["--url"], "--url wants a value"),
        (["--runner-archive", "/nowhere.tar.gz"], "/nowhere.tar.gz is not there"),
        (["--runner-archive", __file__], "wants --runner-sha256"),
        (["--force"], "--force is no option"),
    ]
    for arguments, says in cases:
        with subtests.test(arguments=arguments):
            assert says in refusal(*arguments)


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="this is neither Debian nor Ubuntu")
def test_setup_refuses_an_archive_of_another_sum():
    assert "do not use it" in refusal("--runner-archive", __file__, "--runner-sha256", "0" * 64)


PROGRAM = {
    "config.sh": (
        'echo "$(id -un) $*" >>config.args\n'
        'echo "${#ACTIONS_RUNNER_INPUT_TOKEN}" >>config.token-length\n'
        'echo \'{"agentName": "a"}\' >.runner\n'
        "echo LANG=C.UTF-8 >>.env\n"
    ),
    "run.sh": "true\n",
}
INSTALLER = """
import pathlib, sys
assert sys.argv[1:] == ["host"]
root = pathlib.Path(__file__).resolve().parent.parent
(root / ".venv-host" / "bin").mkdir(parents=True)
(root / ".venv-host" / "bin" / "python").symlink_to(sys.executable)
(root / ".venv-host" / "installed.json").write_text("{}")
"""
TOKEN = "AREGISTRATIONTOKEN0123456789A"


@pytest.fixture
def debian() -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs a command in a fresh Debian container without a network; as root, as an admin would."""
    image = "mainrun-base:test"
    inspect = ["docker", "image", "inspect", image]
    if shutil.which("docker") is None or subprocess.run(inspect, capture_output=True).returncode:
        pytest.skip(f"no Docker Engine with the image {image}: see tests/engine.sh")
    start = ["docker", "run", "--detach", "--network", "none", image, "sleep", "600"]
    container = subprocess.run(start, check=True, capture_output=True, text=True).stdout.strip()

    def run(command: str, *, copy: Path | None = None, given: str = "", code: int = 0):
        if copy is not None:
            subprocess.run(["docker", "cp", copy, f"{container}:/"], check=True)
        done = subprocess.run(
            ["docker", "exec", "--interactive", container, "bash", "-c", command],
            input=given,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    yield run
    subprocess.run(["docker", "rm", "--force", "--volumes", container], capture_output=True)


def source_and_archive(folder: Path) -> tuple[Path, str]:
    """A folder with a checkout and a runner's archive, and the checksum of that."""
    checkout = folder / "given" / "checkout"
    shutil.copytree(RUNNER, checkout / ".github" / "runner")
    for name, text in (("requirements/install.py", INSTALLER), ("mainrun/__init__.py", "")):
        (checkout / name).parent.mkdir()
        (checkout / name).write_text(text)
    git = ["git", "-C", checkout, "-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "--all"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "t"], check=True)
    archive = folder / "given" / "runner.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        for name, body in PROGRAM.items():
            path = folder / name
            path.write_text(f"#!/bin/bash\n{body}")
            path.chmod(0o755)
            file.add(path, name)
    return folder / "given", hashlib.sha256(archive.read_bytes()).hexdigest()


@pytest.mark.docker
def test_setup_makes_a_fresh_debian_ready_and_a_second_run_changes_nothing(debian, tmp_path: Path):
    given, sha256 = source_and_archive(tmp_path)
    debian(
        "groupadd --system docker; cd /usr/local/bin; printf '#!/bin/sh\\necho 26.1.5\\n' >docker;"
        "printf '#!/bin/sh\\n' >iptables; chmod +x docker iptables",
        copy=given,
    )
    setup = (
        "/given/checkout/.github/runner/setup.sh --url https://github.com/ada/mainrun "
        f"--runner-archive /given/runner.tar.gz --runner-sha256 {sha256} --token-stdin"
    )

    checked = debian(f"{setup} --check").stdout
    assert "would: user mainrun" in checked
    assert "would: register the runner gpu-ops" in checked
    debian("ls -d /srv/mainrun /etc/mainrun /opt/mainrun; id mainrun", code=1)

    made = debian(setup, given=f"{TOKEN}\n").stdout
    assert "members of the group docker are root" in made
    assert "systemd does not run here: the services are written and not started" in made
    told = debian("cat /srv/mainrun/runners/gpu*/config.args").stdout.splitlines()
    assert [line.split(" --name ")[0] for line in told] == [
        "mainrun --unattended --url https://github.com/ada/mainrun"
    ] * 2
    assert sorted(line.split("--labels ")[1] for line in told) == [
        "gpu --work _work",
        "gpu-ops --work _work",
    ]
    # The token came by the environment, and lies nowhere.
    assert debian("cat /srv/mainrun/runners/gpu/config.token-length").stdout == f"{len(TOKEN)}\n"
    debian(f"grep -rl {TOKEN} /srv /etc /opt /var /root /tmp /home", code=1)

    # Hooks and code are root's; the account has no password, no shell, no sudo.
    hook = "/opt/mainrun/current/.github/runner/hooks/started.sh"
    assert hook in debian("cat /srv/mainrun/runners/gpu/.env").stdout
    assert "LANG=C.UTF-8" in debian("cat /srv/mainrun/runners/gpu/.env").stdout
    assert debian("find /opt/mainrun -not -user root -o -perm -o+w -not -type l").stdout == ""
    assert debian("getent shadow mainrun").stdout.split(":")[1].startswith("!")
    assert debian("getent passwd mainrun").stdout.strip().endswith("/usr/sbin/nologin")
    assert debian("id -nG mainrun").stdout.split() == ["mainrun", "docker"]
    refused = debian(f"runuser -u mainrun -- env GITHUB_EVENT_NAME=fork {hook}", code=1)
    assert "mainrun refuses this job" in refused.stdout

    again = debian(setup, given=f"{TOKEN}\n").stdout
    assert "0 changes made" in again
    assert "doing" not in again
    # What was changed by hand is put right; the admin's own settings are left alone.
    debian("echo >/etc/systemd/system/mainrun-prune.timer; echo gpus: none >/etc/mainrun/host.yaml")
    assert "1 changes made" in debian(setup, given=f"{TOKEN}\n").stdout
    assert debian("cat /etc/mainrun/host.yaml").stdout == "gpus: none\n"
