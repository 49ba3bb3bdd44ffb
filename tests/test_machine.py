"""The machine's state: what is seen, what is judged a fault, and that it is shown safely."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from markdown_it import MarkdownIt

from mainrun import locks, machine, machine_report, runners
from mainrun.containers import Container
from mainrun.gpu import GpuProcess, Gpus, GpuStatus
from mainrun.host import Host
from mainrun.machine import Disk, Engine, Image, Machine, Process
from mainrun.runners import Runner, Unit
from tests import fake_nvml

NOW = datetime(2026, 11, 23, 5, 30, tzinfo=UTC)
RUN_URL = "https://github.com/ada/mainrun/actions/runs/1234567/attempts/1"

CARD = GpuStatus(
    index=0,
    uuid="GPU-0",
    name="NVIDIA H200",
    used_bytes=61 * 2**30,
    total_bytes=141 * 2**30,
    utilisation_percent=97,
    temperature_celsius=61,
    power_watts=512.5,
    power_limit_watts=700.0,
    ecc_uncorrected=0,
    throttling=("power limit",),
    processes=(GpuProcess(4123, 2**30),),
)
CONTAINER = Container(
    id="a" * 64,
    name="mainrun-1234567-1",
    job="1234567-1",
    task="train",
    gpus=(0,),
    run="20261123-052000-baseline",
    url=RUN_URL,
    by="ada",
    locks="/run/lock/mainrun",
    image="mainrun:abc",
    created=NOW - timedelta(minutes=125),
    state="running",
    health="healthy",
)
BUSY = Machine(
    read_at=NOW,
    gpus=Gpus(cards=(CARD,), driver_version="580.95.05", cuda_version="13.0"),
    gpus_expected=True,
    toolkit="1.18.0",
    processes=(Process(0, 4123, 2**30, "python", "mainrun", CONTAINER.name, "ada", RUN_URL),),
    engine=Engine("28.5.1", "/var/lib/docker", False, True, True),
    engine_missing="",
    containers=(CONTAINER,),
    strays=(),
    images=(Image("sha256:1", "c" * 40, ("mainrun:current", "mainrun:" + "c" * 40), NOW),),
    images_bytes=7 * 2**30,
    disks=(Disk(("runs", "cache", "Docker"), "/srv", 10**11, 10**12, 89.0),),
    runners=(Runner("gpu", "/srv/r/gpu", "box-gpu", "https://github.com/ada/mainrun", True, True),),
    units=(Unit("mainrun-prune.timer", "active"),),
)
"""A healthy machine at work."""

PROGRAM = """
import json, sys
from mainrun import host, machine, machine_report
found = machine_report.as_dict(machine.read(host.load()))
found["heavy"] = sorted(sys.modules.keys() & {"jax", "numpy", "wandb", "flax", "tokenizers"})
print(json.dumps(found))
"""


def read(environment: dict[str, str], **settings: str) -> dict[str, Any]:
    """The state as a process of its own sees it, with these settings of the host."""
    path = Path(settings.pop("folder")) / "host.yaml"
    path.write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**environment, "MAINRUN_HOST_CONFIG": str(path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---------------------------------------------------------------------------------------------
# Looking


def test_without_gpu_and_docker_all_is_calm_and_nothing_heavy_is_loaded(tmp_path: Path):
    found = read({**os.environ, "DOCKER_HOST": "unix:///nowhere"}, folder=str(tmp_path))
    assert found["heavy"] == []
    assert found["engine"] is None
    assert "no Docker Engine answers" in found["engine_missing"]
    if not found["gpus"]["cards"] and not any(runner["is_ours"] for runner in found["runners"]):
        assert [p for p in found["problems"] if "disk" not in p] == []


def test_the_container_of_a_process_is_read_from_every_form_of_cgroup(subtests: pytest.Subtests):
    cases = [
        "12:pids:/docker/{id}\n4:memory:/docker/{id}\n0::/docker/{id}\n",  # version 1, cgroupfs
        "4:memory:/system.slice/docker-{id}.scope\n1:name=systemd:/system.slice/docker-{id}.scope",
        "0::/system.slice/docker-{id}.scope\n",  # version 2, systemd
        "0::/docker/{id}\n",  # version 2, cgroupfs
        "0::/docker/{id}/init\n",  # of a container that makes groups of its own
        "0::/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{id}.scope\n",
        "0::/../docker-{id}.scope\n",  # seen from a group of one's own
    ]
    for text in cases:
        with subtests.test(text=text):
            wanted = "0123456789abcdef" * 4
            assert machine.container_ids(text.format(id=wanted)) == [wanted]


def test_a_process_outside_containers_has_none_and_a_nested_one_both():
    assert machine.container_ids("0::/user.slice/user-1000.slice/session-1.scope\n") == []
    assert machine.container_ids("0::/" + "a" * 65) == []  # longer than an id
    outer, inner = "a" * 64, "b" * 64
    assert machine.container_ids(f"0::/docker/{outer}/docker/{inner}") == [outer, inner]


def test_a_process_on_the_gpu_is_named_with_its_user(tmp_path: Path):
    driver = fake_nvml.build(tmp_path / "driver")
    with subprocess.Popen(["sleep", "600"]) as process:
        processes = f"{process.pid}:1024,4194304:5"  # the second cannot be: pid_max
        environment = dict(fake_nvml.environment(driver, "healthy", FAKE_NVML_PROCESSES=processes))
        environment["DOCKER_HOST"] = "unix:///nowhere"
        found = read(environment, folder=str(tmp_path))
        process.kill()
    ours, gone = found["processes"]
    assert (ours["name"], ours["used_bytes"], ours["container"]) == ("sleep", 1024, "")
    assert ours["user"]
    assert (gone["name"], gone["user"]) == ("", "")


def test_each_disk_is_told_once_and_a_folder_not_made_yet_counts(tmp_path: Path):
    host = Host(runs=str(tmp_path / "not" / "yet"), cache=str(tmp_path / "cache"))
    (disk,) = machine.disks(host, None)
    assert disk.holds == ("runs", "cache")
    assert disk.total_bytes == shutil.disk_usage(tmp_path).total
    assert 0 <= disk.used_percent <= 100


class Engine28(BaseHTTPRequestHandler):
    """A Docker Engine's answers; `container` is gone when it is listed for the second time."""

    container: ClassVar[dict[str, Any]] = {
        "Id": "a" * 64, "Names": ["/mainrun-9-1"], "Image": "mainrun:abc", "Created": 1_700_000_000,
        "State": "running", "Status": "Up 2 hours (healthy)", "Labels": {"mainrun.job": "9-1"},
    }  # fmt: skip
    layers: ClassVar[list[dict[str, Any]]] = [
        {"Created": 1, "CreatedBy": "ADD base", "Size": 1000},
        {"Created": 2, "CreatedBy": "RUN pip", "Size": 5000},
    ]
    listed = 0

    def do_GET(self) -> None:
        path = self.path.split("?")[0].rpartition("/")[2]
        answers = {
            "version": {"ApiVersion": "1.47"},
            "info": {
                "ServerVersion": "28.5.1", "DockerRootDir": "/nowhere/docker",
                "SecurityOptions": ["name=seccomp,profile=builtin", "name=rootless"],
                "Runtimes": {"runc": {}}, "DiscoveredDevices": [{"ID": "nvidia.com/gpu=all"}],
            },
            "images": None,
            "history": [*self.layers, {"Created": 3, "CreatedBy": self.path, "Size": 7}],
        }  # fmt: skip
        answer = answers.get(path, [])
        if self.path.endswith("/containers/json") or "/containers/json?" in self.path:
            answer = [self.container] if type(self).listed == 0 else []
            type(self).listed += 1
        elif "/images/json" in self.path:
            answer = [
                {"Id": f"sha256:{n}", "Labels": {"mainrun.sha": "c" * 40}, "RepoTags": tags,
                 "Created": 1_700_000_000 + n}
                for n, tags in enumerate([["mainrun:previous"], ["mainrun:current"], None])
            ]  # fmt: skip
        body = b"OK" if path == "_ping" else json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def test_an_engine_tells_images_and_containers_and_one_that_just_ended_is_no_stray(tmp_path: Path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Engine28)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Engine28.listed = 0
    environment = {**os.environ, "DOCKER_HOST": f"tcp://127.0.0.1:{server.server_port}"}
    found = read(environment, folder=str(tmp_path))
    server.shutdown()
    server.server_close()
    assert Engine28.listed == 2
    assert [container["name"] for container in found["containers"]] == ["mainrun-9-1"]
    assert found["containers"][0]["health"] == "healthy"
    assert found["strays"] == []
    assert found["engine"] == {
        "version": "28.5.1",
        "root": "/nowhere/docker",
        "is_rootless": True,
        "gives_gpus": True,
        "limits_memory": True,
    }
    assert [image["tags"] for image in found["images"]] == [
        [], ["mainrun:current"], ["mainrun:previous"],
    ]  # fmt: skip
    assert found["images_bytes"] == 6000 + 3 * 7  # layers that all share are counted once


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Path]:
    """The folder of a registered runner whose program listens: `sleep` under its name."""
    folder = tmp_path / "runners" / "gpu"
    (folder / "bin").mkdir(parents=True)
    program = folder / "bin" / "Runner.Listener"
    shutil.copy(shutil.which("sleep") or "", program)
    registered = {"agentName": "box-gpu", "agentId": 3, "gitHubUrl": "https://github.com/ada/m"}
    (folder / ".runner").write_text(json.dumps(registered), encoding="utf-8-sig")
    (folder / ".env").write_text("LANG=C\nACTIONS_RUNNER_HOOK_JOB_STARTED=/hooks/started.sh\n")
    with subprocess.Popen([program, "600"]) as process:
        yield folder
        process.kill()


def test_a_runner_is_found_by_its_folder_and_by_its_process(listener: Path):
    (listener.parent / "gpu-ops").mkdir()
    jobs, ops = runners.read(listener.parent)
    assert jobs == Runner(
        label="gpu",
        folder=str(listener),
        name="box-gpu",
        repository="https://github.com/ada/m",
        is_listening=True,
        is_busy=False,
        hooks=("/hooks/started.sh",),
    )
    assert (ops.label, ops.name, ops.is_listening) == ("gpu-ops", "", False)
    elsewhere = runners.read(listener / "nowhere")
    assert replace(jobs, is_ours=False) in elsewhere, (
        "a runner that runs from another folder is seen too"
    )


def test_units_are_systemds_word_and_none_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fake = tmp_path / "systemctl"
    fake.write_text(
        "#!/bin/sh\n"
        "echo actions.runner.mainrun.gpu.service loaded active running GitHub runner gpu\n"
        "echo mainrun-prune.service loaded failed failed Remove old images\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert runners.units() == (
        Unit("actions.runner.mainrun.gpu.service", "active"),
        Unit("mainrun-prune.service", "failed"),
    )
    fake.write_text("#!/bin/sh\necho 'System has not been booted with systemd' >&2; exit 1\n")
    assert runners.units() is None


# ---------------------------------------------------------------------------------------------
# Judging


def test_a_machine_at_work_is_healthy():
    assert BUSY.problems == ()


def test_each_fault_is_one_sentence(subtests: pytest.Subtests):
    cases = [
        ({"gpus": Gpus(reason="no NVIDIA driver is installed")}, "should have one: no NVIDIA"),
        ({"gpus": Gpus()}, "the driver sees none"),
        ({"gpus": Gpus(cards=(replace(CARD, ecc_uncorrected=3),))}, "3 memory errors"),
        ({"gpus": Gpus(cards=(replace(CARD, throttling=("too hot",)),))}, "slows itself down"),
        ({"gpus": Gpus(cards=(GpuStatus(index=1, fault="off the bus"),))}, "GPU 1 does not answer"),
        (
            {"disks": (replace(BUSY.disks[0], used_percent=90.4),)},
            "runs and cache and Docker is 90",
        ),
        ({"containers": (replace(CONTAINER, health="unhealthy"),)}, "is unhealthy"),
        ({"strays": (CONTAINER.name,)}, "is a stray"),
        ({"engine": None, "engine_missing": "no Docker"}, "jobs cannot run: no Docker"),
        ({"runners": (replace(BUSY.runners[0], is_listening=False),)}, "box-gpu does not listen"),
        ({"units": (Unit("mainrun-prune.service", "failed"),)}, "mainrun-prune.service failed"),
    ]
    for changes, says in cases:
        with subtests.test(changes=changes):
            (problem,) = replace(BUSY, **changes).problems
            assert says in problem
            assert "\n" not in problem


def test_what_is_merely_absent_or_ordinary_is_no_fault(subtests: pytest.Subtests):
    cases = [
        {"gpus": Gpus(reason="no NVIDIA driver is installed"), "gpus_expected": False},
        {"engine": None, "engine_missing": "no Docker", "runners": ()},
        {"engine": None, "engine_missing": "no Docker",
         "runners": (replace(BUSY.runners[0], is_ours=False),)},
        {"gpus": Gpus(cards=(replace(CARD, throttling=None, ecc_uncorrected=None),))},
        {"gpus": Gpus(cards=(replace(CARD, throttling=("idle", "too warm")),))},
        {"disks": (replace(BUSY.disks[0], used_percent=90.0),)},
        {"units": None},
        {"runners": (Runner("gpu", "/srv/r/gpu"),)},
    ]  # fmt: skip
    for changes in cases:
        with subtests.test(changes=changes):
            assert replace(BUSY, **changes).problems == ()


# ---------------------------------------------------------------------------------------------
# Showing


def test_the_table_tells_the_whole_state():
    text = machine_report.table(BUSY)
    for fact in (
        "healthy", "NVIDIA H200", "61.0 of 141.0 GiB", "97 %", "61 °C", "512 of 700 W",
        "power limit", "580.95.05", "1.18.0", "4123", "mainrun-1234567-1", "2 h 05 min", "ada",
        "20261123-052000-baseline", "28.5.1", "mainrun:current", "7.0 GiB", "89 %", "box-gpu",
        "working", RUN_URL,
    ):  # fmt: skip
        assert fact in text, fact


HOSTILE = "x\x1b[31m\n|<img src=x> [a](http://b) `c` @d ::error::e www.f.org " + "long " * 40


@pytest.fixture
def hostile() -> Machine:
    container = replace(
        CONTAINER, name=HOSTILE, task=HOSTILE, by=HOSTILE, run=HOSTILE, url=f"javascript:{HOSTILE}"
    )
    return replace(
        BUSY,
        gpus=replace(BUSY.gpus, cards=(replace(CARD, name=HOSTILE),), driver_version=HOSTILE),
        processes=(replace(BUSY.processes[0], name=HOSTILE, user=HOSTILE, container=HOSTILE),),
        containers=(container,),
        strays=(HOSTILE,),
        images=(replace(BUSY.images[0], tags=(HOSTILE,), sha=HOSTILE),),
        runners=(replace(BUSY.runners[0], name=HOSTILE, is_listening=False),),
        units=(Unit(HOSTILE, "failed"),),
    )


def test_the_table_fits_100_columns_and_never_drives_the_terminal(hostile: Machine):
    lines = machine_report.table(replace(hostile, containers=(CONTAINER,))).splitlines()
    assert max(map(len, lines)) == 100
    assert not [c for line in lines for c in line if ord(c) < 32]
    assert max(map(len, machine_report.table(BUSY).splitlines())) <= 100


def markdown_kinds(markdown: str) -> set[str]:
    """What a reader of Markdown finds in it: headings, tables, links, …"""
    parsed = MarkdownIt("commonmark").enable("table").parse(markdown)
    return {token.type for block in parsed for token in [block, *(block.children or [])]}


def test_markdown_shows_data_as_it_is(hostile: Machine):
    text = machine_report.markdown(hostile)
    active = {"html_block", "html_inline", "link_open", "image", "em_open", "code_inline", "fence"}
    assert markdown_kinds(text) & active == set()
    assert "table_open" in markdown_kinds(text)
    for mark in (" @d", "www.f", "\x1b", "::error::"):
        assert mark not in text
    assert "link_open" in markdown_kinds(machine_report.markdown(BUSY))  # to the workflow's run


def test_json_holds_the_verdict_and_plain_values():
    found = json.loads(json.dumps(machine_report.as_dict(BUSY)))
    assert found["healthy"] is True
    assert found["read_at"] == "2026-11-23T05:30:00+00:00"
    assert found["processes"][0]["url"] == RUN_URL
    sick = machine_report.as_dict(replace(BUSY, strays=(CONTAINER.name,)))
    assert sick["healthy"] is False
    assert len(sick["problems"]) == 1


# ---------------------------------------------------------------------------------------------
# With a Docker Engine


@pytest.fixture
def container(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """A container of ours that sleeps: its name, and its process on this machine."""
    if shutil.which("docker") is None:
        pytest.skip("no docker command")
    name = f"mainrun-test-machine-{os.getpid()}"
    labels = {
        "job": f"m-{os.getpid()}", "task": "train", "gpus": "0", "url": RUN_URL, "by": "ada",
        "locks": tmp_path / "locks",
    }  # fmt: skip
    words = [f"--label=mainrun.{key}={value}" for key, value in labels.items()]
    start = ["docker", "run", "--detach", "--init", f"--name={name}", *words, "mainrun-base:test"]
    started = subprocess.run([*start, "sleep", "600"], capture_output=True, text=True)
    if started.returncode:
        pytest.skip(f"no Docker Engine with mainrun-base:test: {started.stderr.strip()}")
    ask = ["docker", "inspect", "--format", "{{.State.Pid}}", name]
    yield name, int(subprocess.check_output(ask))
    subprocess.run(["docker", "rm", "--force", name], check=True, capture_output=True)


@pytest.mark.docker
def test_a_gpu_process_is_followed_to_its_container_and_workflow_run(
    container: tuple[str, int], tmp_path: Path
):
    name, pid = container
    driver = fake_nvml.build(tmp_path / "driver")
    processes = f"{pid}:1024,{os.getpid()}:1"
    environment = dict(fake_nvml.environment(driver, "healthy", FAKE_NVML_PROCESSES=processes))
    with locks.held(tmp_path / "locks", [locks.job(f"m-{os.getpid()}")], who="a test"):
        found = read(environment, folder=str(tmp_path))
        assert name not in found["strays"]
    inside, outside = found["processes"]
    assert (inside["container"], inside["by"], inside["url"]) == (name, "ada", RUN_URL)
    assert outside["container"] in ("", "another container")  # the tests may be in one
    assert found["engine"]["version"]
    assert "Docker" in [held for disk in found["disks"] for held in disk["holds"]]

    found = read(environment, folder=str(tmp_path))
    assert name in found["strays"], "nobody holds the lock of its job any more"
    assert not found["healthy"]
