"""Our workflows keep every rule, and every fault of the original breaks one.

The linters are run too, where they are installed; what they do not see, tests/workflows/policy.py
does. Each file in tests/workflows/negatives/ is one way in which jobs went wrong.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mainrun import cli, launch, request
from tests.workflows import policy

BESIDE = Path(sys.executable).parent
REPOSITORY = Path(__file__).resolve().parent.parent
GITHUB = REPOSITORY / ".github"
NEGATIVES = Path(__file__).parent / "workflows" / "negatives"
WORKFLOWS = {path.stem: policy.read(path) for path in sorted(GITHUB.glob("workflows/*.yml"))}


def test_workflows_are_those_that_the_project_promises():
    assert set(WORKFLOWS) == {"train", "sweep", "gpu-status", "update", "ci"}


def test_workflow_keeps_all_rules(subtests: pytest.Subtests):
    for name, workflow in WORKFLOWS.items():
        with subtests.test(name):
            assert policy.findings(workflow) == []


def test_fault_of_the_original_is_found(subtests: pytest.Subtests):
    cases = [
        ("01-sweep", ["name .* does not run the task sweep", "call "]),
        ("02-update", ["checkout .*: git in a step", "checkout .*: a place outside", "call "]),
        ("03-update", ["S11 .*: a token in an address", "S11 .* git pushes to", "S1 .*write",
                       "S11 .* personal access token", "S6 |S7 .*every step", "S5 .*any branch"]),
        ("04-train", ["checkout .*: docker without .*user", "checkout .*: a place outside"]),
        ("05-train", ["S7 .*: values by file", "S6 .*outside of the environment", "S7 .*anywhere"]),
        ("06-train", ["S3 .*somebody else's image", "order .*: no step does `mainrun job image`",
                      "checkout .*does not begin with a checkout"]),
        ("07-train", ["S16 .*: any number", "S16 .*: no timeout", "order .*`mainrun job stop`",
                      "order .*`mainrun job summary`", "order .*`actions/upload-artifact`"]),
        ("08-gpu-status", ["name .*: no `mainrun job status` on the machine's second runner",
                           "checkout .*: docker without"]),
        ("09-train", ["call .*: not one call", "S2 .*: an expression", "inputs .*: the input"]),
        ("12-train", ["S1 .*at the top", "S3 .*checkout@v7 is not a commit", "S3 .*not among",
                      "S4 .*token stays", "S4 .*something else", "S5 .*pull_request_target",
                      "S15 .*: . is uploaded", "S15 .*hidden", "S16 .*7200", "S16 .*not in the",
                      "order .*another order", "order .*: not done after a failure"]),
    ]  # fmt: skip
    for file, expected in cases:
        with subtests.test(file=file):
            workflow = policy.read(NEGATIVES / f"{file}.yml")
            found = policy.findings(replace(workflow, name=workflow.name.partition("-")[2]))
            for pattern in expected:
                assert any(re.match(pattern, finding) for finding in found), (pattern, found)


def test_every_negative_is_there():
    assert {path.stem[:2] for path in NEGATIVES.iterdir()} == {f"{n:02}" for n in range(1, 13)}


def test_rule_finds_something_in_the_negatives(subtests: pytest.Subtests):
    """A rule that never finds anything may be one that looks at nothing."""
    for rule in policy.RULES:
        with subtests.test(rule.__name__):
            negatives = [policy.read(path) for path in NEGATIVES.glob("*.yml")]
            named = [replace(found, name=found.name.partition("-")[2]) for found in negatives]
            assert [finding for workflow in named for finding in rule(workflow)]


def test_one_changed_word_is_found(tmp_path: Path, subtests: pytest.Subtests):
    cases = [
        ("permissions: {}", "permissions: {contents: read}", "S1 .*at the top"),
        ("contents: read", "contents: write", "S1 .*contents: write"),
        ("mainrun job check", 'mainrun job check "${{ inputs.config }}"', "S2 "),
        ("      INPUT_CONFIG: ${{ inputs.config }}\n", "", "inputs .*INPUT_CONFIG"),
        ("        default: config/base/quickstart.yaml\n", "", "inputs .*no default"),
        ("@3d3c42e5aac5ba805825da76410c181273ba90b1 # v7.0.1", "@v7", "S3 .*not a commit"),
        ("90b1 # v7.0.1", "90b1", "S3 .*not a commit"),
        ("persist-credentials: false", "persist-credentials: true", "S4 .*token stays"),
        ("persist-credentials: false", "persist-credentials: false\n          ref: main",
         "S4 .*something else than the commit"),
        ("on:\n", "on:\n  pull_request:\n", "S5 .*pull_request"),
        ("on:\n", "on:\n  push: {}\n", "S5 .*any branch"),
        ("    environment: gpu\n", "", "S6 .*outside of the environment"),
        ("      INPUT_TASK: train\n", "      INPUT_TASK: train\n      KEY: ${{ secrets.KEY }}\n",
         "S7 .*every step"),
        ("path: out", "path: .", "S15 "),
        ("          retention-days: 30\n", "", "S15 .*kept"),
        ("    timeout-minutes: 7190", "    timeout-minutes: 7100", "S16 .*longer than it"),
        ("        timeout-minutes: 3\n", "", "S16 .*Stop: no timeout"),
        ("timeout-minutes: 3", "timeout-minutes: 4", "S16 .*longer than GitHub waits"),
        ("  queue: max\n", "", "S16 .*not in the line"),
        ("if: always() && steps", "if: steps", "order .*not done after a failure"),
        ("exec .venv-host/bin/mainrun job run", ".venv-host/bin/mainrun job run", "call .*exec"),
        ("exec .venv-host/bin/mainrun job stop", "exec .venv-host/bin/mainrun job summary",
         "order .*`mainrun job stop`"),
        ("job check", "job check && true", "call .*not one call"),
        ("job check", "job check || git reset --hard", "checkout .*git in a step"),
        ("INPUT_TASK: train", "INPUT_TASK: sweep", "name .*does not run the task train"),
    ]  # fmt: skip
    text, path = WORKFLOWS["train"].text, tmp_path / "train.yml"
    for before, after, expected in cases:
        with subtests.test(before=before, after=after):
            assert before in text
            path.write_text(text.replace(before, after))
            findings = policy.findings(policy.read(path))
            assert any(re.match(expected, finding) for finding in findings), findings


def test_faults_of_a_search_space_are_found():
    """Read as W&B does, with YAML 1.1: that is the fault."""
    found = policy.sweep_findings(yaml.safe_load((NEGATIVES / "10-space.yaml").read_text()))
    assert [finding for finding in found if "no run logs val_loss" in finding]
    assert [finding for finding in found if "1e-6 is a word" in finding]
    assert [finding for finding in found if "864 points" in finding]


def test_search_space_means_to_wandb_what_it_means_to_us(subtests: pytest.Subtests):
    paths = sorted((REPOSITORY / "config" / "sweep").glob("*.yaml"))
    assert paths
    for path in paths:
        with subtests.test(path.stem):
            assert policy.sweep_findings(yaml.safe_load(path.read_text())) == []


def test_faults_of_a_container_are_found():
    body = json.loads((NEGATIVES / "11-container.json").read_text())
    found = " · ".join(policy.container_findings(body, secrets=["planted-canary"]))
    for fault in ("S7 a secret's value", "mounts in the old form", "not the runner's user",
                  "capabilities", "privileged", "IpcMode", "no limit on memory",
                  "may run on the CPU unnoticed", "nobody counts them"):  # fmt: skip
        assert fault in found


def test_train_and_sweep_are_the_same_steps():
    train, sweep = (WORKFLOWS[name].tree["jobs"][name] for name in ("train", "sweep"))
    # Names of artifacts begin with the workflow's; what is fetched is a run or a sweep.
    ours = json.dumps(train["steps"]).replace("Fetch the run", "Fetch the sweep")
    theirs = json.dumps(sweep["steps"]).replace("sweep-", "train-")
    assert ours == theirs
    for key in ("runs-on", "environment", "permissions", "timeout-minutes"):
        assert train[key] == sweep[key]
    assert WORKFLOWS["train"].tree["concurrency"] == WORKFLOWS["sweep"].tree["concurrency"]


def calls() -> list[tuple[str, list[str]]]:
    return [
        (step.place, shlex.split(step.run.removeprefix("exec ")))
        for workflow in WORKFLOWS.values()
        for place, job in workflow.jobs()
        for step in policy.steps_of(place, job)
        if step.run
    ]


def test_command_of_a_step_exists(subtests: pytest.Subtests):
    for place, words in calls():
        with subtests.test(place):
            match words:
                case [".venv-host/bin/mainrun", *arguments]:
                    options, unknown = cli._parser().parse_known_args(arguments)
                    assert unknown == []
                    assert callable(options.call)
                case ["python3", script, what]:
                    done = subprocess.run(
                        [sys.executable, REPOSITORY / script, "no such thing"],
                        capture_output=True, text=True,
                    )  # fmt: skip
                    assert done.returncode == 2
                    assert what in done.stderr.replace(",", " ").split()
                case [script]:
                    assert (REPOSITORY / script).stat().st_mode & 0o111
                case _:
                    pytest.fail(f"{place}: {words}")


def test_every_call_of_a_task_names_one_that_there_is():
    tasks = set(yaml.safe_load((REPOSITORY / "taskfile.yml").read_text())["tasks"])
    for task in request.TASKS:  # the container's command is `task -x TASK`
        assert task in tasks


def test_stop_is_given_the_time_that_it_takes():
    """The runner ends a step that outlasts its limit, and the container would outlive the job."""
    for name in ("train", "sweep"):
        ((place, job),) = WORKFLOWS[name].jobs()
        (step,) = [s for s in policy.steps_of(place, job) if s.does == "mainrun job stop"]
        assert step.tree["timeout-minutes"] * 60 - launch.STOP_SECONDS >= 10


def test_inputs_are_no_inputs_of_an_action():
    """The runner hands an action its inputs as INPUT_<NAME>: a job's own could be taken for one."""
    taken = {
        name.upper().replace(" ", "_")
        for action in policy.ACTIONS
        for name in ACTION_INPUTS[action]
    }
    for workflow in WORKFLOWS.values():
        for _, job in workflow.jobs():
            ours = {n.removeprefix("INPUT_") for n in job.get("env", {}) if n.startswith("INPUT_")}
            assert not ours & taken


ACTION_INPUTS = {
    "actions/checkout": [
        "repository", "ref", "token", "ssh-key", "ssh-known-hosts", "ssh-strict", "ssh-user",
        "persist-credentials", "path", "clean", "filter", "sparse-checkout",
        "sparse-checkout-cone-mode", "fetch-depth", "fetch-tags", "show-progress", "lfs",
        "submodules", "set-safe-directory", "github-server-url", "allow-unsafe-pr-checkout",
    ],
    "actions/upload-artifact": [
        "name", "path", "if-no-files-found", "retention-days", "compression-level", "overwrite",
        "include-hidden-files", "archive",
    ],
    "actions/download-artifact": [
        "name", "artifact-ids", "path", "pattern", "merge-multiple", "github-token", "repository",
        "run-id", "skip-decompress", "digest-mismatch",
    ],
}  # fmt: skip


def test_options_of_an_action_are_among_its_inputs():
    for workflow in WORKFLOWS.values():
        for place, job in workflow.jobs():
            for step in policy.steps_of(place, job):
                known = ACTION_INPUTS.get(step.action, [])
                assert set(step.tree.get("with", {})) <= set(known), step.place


@pytest.mark.parametrize(
    ("binary", "arguments"),
    [
        ("actionlint", ["-shellcheck", shutil.which("shellcheck", path=BESIDE) or "shellcheck"]),
        ("zizmor", ["--offline", "--persona=auditor", "--collect=all", "--strict-collection",
                    "--quiet", str(GITHUB)]),
    ],
    ids=["actionlint", "zizmor"],
)  # fmt: skip
def test_linter_finds_nothing(binary: str, arguments: list[str]):
    done = subprocess.run(
        [tool(binary), *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_linter_sees_faults_at_all(tmp_path: Path):
    """A linter that reads nothing finds nothing: it must stumble over a bad file."""
    bad = tmp_path / ".github" / "workflows" / "bad.yml"
    bad.parent.mkdir(parents=True)
    bad.write_text((NEGATIVES / "12-train.yml").read_text())
    done = subprocess.run(
        [tool("zizmor"), "--offline", "--persona=auditor", "--format=json", "--no-exit-codes",
         "--quiet", str(bad)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert {"dangerous-triggers", "unpinned-uses"} <= {f["ident"] for f in json.loads(done.stdout)}


def test_ignored_findings_say_why():
    for path in GITHUB.rglob("*.yml"):
        for line in path.read_text().splitlines():
            if "zizmor: ignore" in line:
                assert re.search(r"zizmor: ignore\[[\w-]+\] \w+ \w+ \w+", line), f"{path}: {line}"


def tool(name: str) -> str:
    """The linter beside this Python, or on PATH."""
    found = shutil.which(name, path=BESIDE) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: `task dev`")
    return found
