"""What no linter sees in a workflow: our rules, each a function from parsed YAML to findings.

A finding is one line: rule, place, what is wrong. The rules carry the numbers of the list that the
project decided on (S1 to S16); the others have names. `findings` applies all that fit the file;
`container_findings` looks at what Docker's Engine is asked for, `sweep_findings` at a search space.
"""

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mainrun import yaml12
from mainrun.sweep.metric import METRICS

ACTIONS = {"actions/checkout", "actions/upload-artifact", "actions/download-artifact"}
SERVER_PATIENCE_MINUTES = 5
"""What GitHub leaves to a job that was cancelled before it ends it by force."""

_OWN_COMMANDS = (["python3", "requirements/install.py"], [".venv-host/bin/mainrun"], [".ci/run"])
_SHELL = re.compile(r"[|&;<>`\n*?~#\\]|\$")
_VERSION_COMMENT = re.compile(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$")
_AFTERWARDS = ("mainrun job stop", "mainrun job summary", "actions/upload-artifact")

Tree = Mapping[str, Any]


@dataclass(frozen=True)
class Workflow:
    name: str
    """The file's, without `.yml`."""
    text: str
    tree: Tree

    @property
    def triggers(self) -> Mapping[str, Any]:
        return mapping_of_triggers(self.tree["on"])

    @property
    def values(self) -> str:
        """All that is said in it, without the comments."""
        return "\n".join(texts_in(self.tree))

    def jobs(self) -> Iterator[tuple[str, Tree]]:
        for name, job in self.tree["jobs"].items():
            yield f"{self.name}.yml: {name}", job


@dataclass(frozen=True)
class Step:
    place: str
    tree: Tree

    @property
    def run(self) -> str:
        return str(self.tree.get("run", ""))

    @property
    def action(self) -> str:
        return str(self.tree.get("uses", "")).partition("@")[0]

    @property
    def does(self) -> str:
        """The call without `exec` and the path of the command, or the action."""
        return self.run.strip().removeprefix("exec ").replace(".venv-host/bin/", "") or self.action

    @property
    def always(self) -> bool:
        return bool(re.match(r"always\(\)( &&|$)", str(self.tree.get("if", ""))))


def read(path: Path) -> Workflow:
    tree, _ = yaml12.read(path)
    return Workflow(path.stem, path.read_text(encoding="utf-8"), tree)


def texts_in(tree: Any) -> Iterator[str]:
    """Every key and value, and `key: value` where the value is plain."""
    match tree:
        case Mapping():
            for key, value in tree.items():
                yield f"{key}: {value}" if not isinstance(value, Mapping | list) else str(key)
                yield from texts_in(value)
        case list():
            for value in tree:
                yield from texts_in(value)
        case _:
            yield str(tree)


def mapping_of_triggers(on: Any) -> Mapping[str, Any]:
    match on:
        case str():
            return {on: None}
        case list():
            return dict.fromkeys(on)
        case _:
            return on


def steps_of(place: str, job: Tree) -> list[Step]:
    return [
        Step(f"{place}: {step.get('name') or step.get('uses') or number}", step)
        for number, step in enumerate(job["steps"], start=1)
    ]


def findings(workflow: Workflow) -> list[str]:
    """All that is wrong with one file; empty: nothing."""
    return [finding for rule in RULES for finding in rule(workflow)]


# ---------------------------------------------------------------------------------------------
# Rights


def least_permissions(workflow: Workflow) -> Iterator[str]:
    if workflow.tree.get("permissions") != {}:
        yield f"S1 {workflow.name}.yml: no `permissions: {{}}` at the top"
    for place, job in workflow.jobs():
        permissions = job.get("permissions")
        if not isinstance(permissions, Mapping):
            yield f"S1 {place}: no permissions of its own"
            continue
        fetches = any("run-id" in step.tree.get("with", {}) for step in steps_of(place, job))
        allowed = {"contents": "read"} | ({"actions": "read"} if fetches else {})
        for name, level in permissions.items():
            if allowed.get(name) != level:
                yield f"S1 {place}: {name}: {level} is more than it needs"


def inputs_through_the_environment(workflow: Workflow) -> Iterator[str]:
    for place, job in workflow.jobs():
        for step in steps_of(place, job):
            if "${{" in step.run:
                yield f"S2 {step.place}: an expression inside `run`"


def every_input_is_read(workflow: Workflow) -> Iterator[str]:
    """An input is INPUT_<NAME> in the job's environment, as `mainrun job` wants it."""
    inputs = (workflow.triggers.get("workflow_dispatch") or {}).get("inputs", {})
    if len(inputs) > 10:
        yield f"inputs {workflow.name}.yml: {len(inputs)} inputs, and GitHub takes 10"
    for place, job in workflow.jobs():
        environment = job.get("env", {})
        for name, properties in inputs.items():
            value = environment.get(f"INPUT_{name.upper()}")
            wanted = (f"${{{{ inputs.{name} }}}}", f"${{{{ inputs.{name} || false }}}}")
            if value not in wanted:
                yield f"inputs {place}: the input {name} is not INPUT_{name.upper()} in its env"
            if not properties.get("description") or "default" not in properties:
                yield f"inputs {workflow.name}.yml: {name} has no description, or no default"


def pinned_actions(workflow: Workflow) -> Iterator[str]:
    for line in workflow.text.splitlines():
        found = re.match(r"\s*(?:- )?uses:\s*(\S+)", line)
        if found and found[1].partition("@")[0] not in ACTIONS:
            yield f"S3 {workflow.name}.yml: {found[1]} is not among the actions that we use"
        if found and not _VERSION_COMMENT.search(line):
            yield f"S3 {workflow.name}.yml: {found[1]} is not a commit with its version behind it"
    if re.search(r"^\s*image:", workflow.values, re.MULTILINE):
        yield f"S3 {workflow.name}.yml: a job inside somebody else's image"


def no_token_is_kept(workflow: Workflow) -> Iterator[str]:
    for place, job in workflow.jobs():
        for step in steps_of(place, job):
            options = step.tree.get("with", {})
            if (
                step.action == "actions/checkout"
                and options.get("persist-credentials") is not False
            ):
                yield f"S4 {step.place}: the token stays in .git/config"
            if step.action == "actions/checkout" and set(options) - {"persist-credentials"}:
                yield f"S4 {step.place}: it takes something else than the commit dispatched"
    for pattern, what in (
        (r"https?://[^\s/\"']*@", "an address with credentials in it"),
        (r"x-access-token", "a token in an address"),
        (r"set-url", "it rewrites where git pushes to"),
        (r"secrets\.\w*(PAT|GITHUB)\w*", "a personal access token"),
    ):
        if re.search(pattern, workflow.values):
            yield f"S11 {workflow.name}.yml: {what}"


def trusted_triggers_on_our_machines(workflow: Workflow) -> Iterator[str]:
    for place, job in workflow.jobs():
        if not is_ours(job):
            continue
        for trigger, options in workflow.triggers.items():
            branches = (options or {}).get("branches") if isinstance(options, Mapping) else None
            if trigger == "push" and branches != ["main"]:
                yield f"S5 {place}: pushes to any branch run on our machine"
            elif trigger not in ("workflow_dispatch", "schedule", "push"):
                yield f"S5 {place}: {trigger} runs on our machine"


def secrets_where_they_are_needed(workflow: Workflow) -> Iterator[str]:
    if re.search(r"secrets:\s*inherit", workflow.values):
        yield f"S6 {workflow.name}.yml: it hands all secrets on"
    for place, job in workflow.jobs():
        for step in steps_of(place, job):
            if "secrets." not in str(step.tree):
                continue
            if job.get("environment") != "gpu":
                yield f"S6 {step.place}: a secret outside of the environment gpu"
            if step.does != "mainrun job run" or "secrets." in str({**step.tree, "env": {}}):
                yield f"S7 {step.place}: a secret anywhere but in the environment of the run"
        if "secrets." in str({**job, "steps": []}):
            yield f"S7 {place}: every step can read the secret"
    if re.search(r"--env-file|\.env\b(?!:)|\s-e\s+\w+=|--env\s+\w+=|--build-arg", workflow.values):
        yield f"S7 {workflow.name}.yml: values by file or argument: a secret would lie there"


def artifacts_hold_what_is_meant_for_others(workflow: Workflow) -> Iterator[str]:
    for place, job in workflow.jobs():
        for step in steps_of(place, job):
            if step.action != "actions/upload-artifact":
                continue
            options = step.tree.get("with", {})
            if options.get("path") != "out":
                yield f"S15 {step.place}: {options.get('path')} is uploaded, and not out"
            if options.get("include-hidden-files"):
                yield f"S15 {step.place}: hidden files are uploaded"
            if "retention-days" not in options:
                yield f"S15 {step.place}: kept for as long as the repository's default"


# ---------------------------------------------------------------------------------------------
# Shape


def one_call_per_step(workflow: Workflow) -> Iterator[str]:
    """No shell logic: a step names a command of ours and nothing else."""
    for place, job in workflow.jobs():
        for step in steps_of(place, job):
            call = step.run.strip().removeprefix("exec ")
            if not call:
                continue
            words = [] if _SHELL.search(call) else shlex.split(call)
            if not any(words[: len(own)] == own for own in _OWN_COMMANDS):
                yield f"call {step.place}: not one call of a command of ours"
            elif not step.run.startswith("exec "):
                yield f"call {step.place}: without exec a stop signal ends the shell alone"


def time_is_limited(workflow: Workflow) -> Iterator[str]:
    if not workflow.tree.get("concurrency"):
        yield f"S16 {workflow.name}.yml: any number of it at a time"
    for place, job in workflow.jobs():
        steps = steps_of(place, job)
        limit = job.get("timeout-minutes")
        if limit is None:
            yield f"S16 {place}: no timeout, so GitHub's of six hours"
            continue
        if not is_ours(job):
            continue
        if limit > 7200:
            yield f"S16 {place}: GitHub ends it after 7200 minutes"
        minutes = [timeouts(step) for step in steps]
        for step, (longest, _) in zip(steps, minutes, strict=True):
            if longest is None:
                yield f"S16 {step.place}: no timeout"
        if sum(longest or 0 for longest, _ in minutes) > limit:
            yield f"S16 {place}: its steps may take longer than it, and nothing would tidy up"
        after = [shortest or 0 for step, (_, shortest) in zip(steps, minutes, strict=True)
                 if step.always]  # fmt: skip
        if sum(after) > SERVER_PATIENCE_MINUTES:
            yield f"S16 {place}: what always runs may take longer than GitHub waits"


def line_of_gpu_jobs(workflow: Workflow) -> Iterator[str]:
    """Whatever takes the GPUs waits in one line, in which nobody is dropped or cancelled."""
    wanted = {"group": "gpu-${{ github.repository }}", "queue": "max"}
    if any("gpu" in labels(job) for _, job in workflow.jobs()):
        if workflow.tree.get("concurrency") != wanted:
            yield f"S16 {workflow.name}.yml: not in the line of those that take the GPUs"
        if workflow.tree.get("run-name") is None:
            yield f"S16 {workflow.name}.yml: nothing tells one that waits from another"


def tidied_up_whatever_happens(workflow: Workflow) -> Iterator[str]:
    """A job that starts a container stops it, tells how it ended and uploads, in that order."""
    for place, job in workflow.jobs():
        if "gpu" not in labels(job):
            continue
        steps = steps_of(place, job)
        order = [step.does for step in steps]
        wanted = ["mainrun job check", "mainrun job image", "mainrun job run", *_AFTERWARDS]
        for call in wanted:
            if call not in order:
                yield f"order {place}: no step does `{call}`"
        if [call for call in order if call in wanted] != [call for call in wanted if call in order]:
            yield f"order {place}: its steps are in another order than {', '.join(wanted)}"
        if order[-1] != _AFTERWARDS[-1]:
            yield f"order {place}: what comes after the upload is not in it"
        for step in steps:
            if step.does in _AFTERWARDS and not step.always:
                yield f"order {step.place}: not done after a failure or a cancel"
            if step.does not in _AFTERWARDS and "if" in step.tree and "always" in step.tree["if"]:
                yield f"order {step.place}: done even after a cancel"


def does_what_its_name_says(workflow: Workflow) -> Iterator[str]:
    """A sweep that trains, a status that looks from inside a container, an update in place."""
    for place, job in workflow.jobs():
        calls = [step.does for step in steps_of(place, job)]
        task = job.get("env", {}).get("INPUT_TASK")
        if workflow.name in ("train", "sweep") and task != workflow.name:
            yield f"name {place}: {workflow.name}.yml does not run the task {workflow.name}"
        for name, call in (("gpu-status", "mainrun job status"), ("update", "mainrun job update")):
            if workflow.name == name and (call not in calls or "gpu-ops" not in labels(job)):
                yield f"name {place}: no `{call}` on the machine's second runner"


def nothing_but_the_checkout(workflow: Workflow) -> Iterator[str]:
    """The commit dispatched is the commit run: in no shared tree, in no image made elsewhere."""
    for pattern, what in (
        (r"\bgit (reset|pull|clean|checkout|fetch|remote|config)\b", "git in a step"),
        (r"\bcd /|(?<![\w.$-])/(home|opt|srv|root|usr)/", "a place outside of the checkout"),
        (r"\bdocker (run|exec|build|compose|create)\b", "docker without what `mainrun` sees to: "
         "user, limits, labels, GPUs that are there, a stop that arrives"),
    ):  # fmt: skip
        if re.search(pattern, workflow.values):
            yield f"checkout {workflow.name}.yml: {what}"
    for place, job in workflow.jobs():
        if not steps_of(place, job) or steps_of(place, job)[0].action != "actions/checkout":
            yield f"checkout {place}: it does not begin with a checkout"


RULES: Sequence[Callable[[Workflow], Iterator[str]]] = (
    least_permissions,
    inputs_through_the_environment,
    every_input_is_read,
    pinned_actions,
    no_token_is_kept,
    trusted_triggers_on_our_machines,
    secrets_where_they_are_needed,
    artifacts_hold_what_is_meant_for_others,
    one_call_per_step,
    time_is_limited,
    line_of_gpu_jobs,
    tidied_up_whatever_happens,
    does_what_its_name_says,
    nothing_but_the_checkout,
)


def labels(job: Tree) -> list[str]:
    wanted = job["runs-on"]
    return [wanted] if isinstance(wanted, str) else list(wanted)


def is_ours(job: Tree) -> bool:
    return "self-hosted" in labels(job)


def timeouts(step: Step) -> tuple[int | None, int | None]:
    """Minutes that the step may take: at most, and after a cancel."""
    value = step.tree.get("timeout-minutes")
    if isinstance(value, int) or value is None:
        return value, value
    found = re.fullmatch(r"\$\{\{ job\.status == 'cancelled' && (\d+) \|\| (\d+) \}\}", str(value))
    if found is None:
        return None, None
    return int(found[2]), int(found[1])


# ---------------------------------------------------------------------------------------------
# What the workflows lead to


def container_findings(body: Tree, *, secrets: Sequence[str] = (), uid: int = 10001) -> list[str]:
    """What is wrong with a container as the Engine's API is asked for it (S7, S8, the GPU)."""
    host = body["HostConfig"]
    environment = dict(entry.partition("=")[::2] for entry in body.get("Env") or [])
    labels_ = body.get("Labels") or {}
    found = []

    def expect(is_right: object, finding: str) -> None:
        if not is_right:
            found.append(finding)

    mounts = {mount["Target"]: mount for mount in host.get("Mounts") or []}
    expect(not any(secret in str(body) for secret in secrets), "S7 a secret's value is in it")
    expect(not host.get("Binds"), "S8 mounts in the old form, which are not looked at")
    expect(str(body.get("User")).partition(":")[0] == str(uid), "S8 not the runner's user")
    expect(host.get("CapDrop") == ["ALL"] and not host.get("CapAdd"), "S8 capabilities")
    expect(
        any(option.startswith("no-new-privileges") for option in host.get("SecurityOpt") or [])
        and not any("unconfined" in option for option in host.get("SecurityOpt") or []),
        "S8 new privileges",
    )
    expect(host.get("ReadonlyRootfs"), "S8 the root file system can be written")
    expect("/tmp" in (host.get("Tmpfs") or {}), "S8 no /tmp in memory")
    expect(environment.get("HOME") == "/tmp", "S8 no home")
    expect(not host.get("Privileged"), "S8 privileged")
    expect(host.get("Memory"), "S8 no limit on memory")
    expect((host.get("PidsLimit") or 0) > 0, "S8 no limit on processes")
    expect(host.get("ShmSize"), "S8 no size of shared memory")
    expect(not host.get("Devices"), "S8 devices of the host")
    for space in ("IpcMode", "PidMode", "UTSMode", "UsernsMode", "NetworkMode"):
        expect(host.get(space) != "host", f"S8 the host's {space}")
    expect(
        set(mounts) <= {"/app/runs", "/app/data", "/cache"}
        and not any("docker.sock" in mount["Source"] for mount in mounts.values()),
        "S8 mounts beside runs, data and caches",
    )
    expect(mounts.get("/app/data", {"ReadOnly": True}).get("ReadOnly"), "S8 data can be written")
    expect((host.get("LogConfig") or {}).get("Config", {}).get("max-size"), "S8 a log without end")
    expect(host.get("Init"), "signals: no init, so a signal may be lost")
    expect(labels_.get("mainrun.job"), "label: nobody could find it again")
    requests = host.get("DeviceRequests") or []
    if requests:
        expect(environment.get("JAX_PLATFORMS") == "cuda", "gpu: it may run on the CPU unnoticed")
        num_devices = sum(len(request.get("DeviceIDs") or []) for request in requests)
        expect(num_devices, "gpu: all there are, also those of others")
        expect(environment.get("MAINRUN_GPUS") == str(num_devices), "gpu: nobody counts them")
    else:
        expect(environment.get("JAX_PLATFORMS") == "cpu", "gpu: not said that there is none")
    return found


LARGEST_GRID = 64


def sweep_findings(tree: Tree) -> list[str]:
    """What is wrong with a search space, read as W&B reads it (YAML 1.1)."""
    found = []
    if (metric := tree.get("metric", {}).get("name")) not in METRICS:
        found.append(f"sweep: no run logs {metric}")
    points = 1
    for name, parameter in tree.get("parameters", {}).items():
        numbers = [parameter.get(key) for key in ("min", "max", "value")]
        numbers += parameter.get("values", [])
        points *= len(parameter.get("values", [None]))
        found += [
            f"sweep: {name}: {text} is a word to W&B, and no number; write it with a point"
            for text in numbers
            if isinstance(text, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text)
        ]
    if tree.get("method") == "grid" and points > LARGEST_GRID:
        found.append(f"sweep: a grid of {points} points is never finished")
    return found
