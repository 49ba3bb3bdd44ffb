"""How the state of the machine is shown: as plain text, as Markdown, as JSON.

Plain text fits 100 columns, without colours, the same on a terminal and in a file. Names of
containers, processes and people are data from anywhere: they show as they are and do nothing.
"""

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from mainrun import markdown as md
from mainrun.console import printable
from mainrun.containers import Container
from mainrun.gpu import GpuStatus
from mainrun.machine import Disk, Image, Machine, Process
from mainrun.runners import Runner

Rows = list[list[str]]

_WIDTH = 100
_RUN_URL = re.compile(r"https://[\w.:-]+/[\w.-]+/[\w.-]+/actions/runs/\d+(/attempts/\d+)?")


def table(machine: Machine) -> str:
    """The machine for a terminal, at most 100 columns wide; addresses are never cut."""
    lines = [f"{_verdict(machine)} · {machine.read_at:%Y-%m-%d %H:%M} UTC"]
    for problem in machine.problems:
        lines += _wrapped(f"  ! {problem}")
    for title, fact, header, rows in _sections(machine):
        lines += ["", *_wrapped(f"{title}: {fact}" if fact else title)]
        lines += [f"  {line}" for line in _aligned([header, *rows], _WIDTH - 2)] if rows else []
    if urls := [(c.name, c.url) for c in machine.containers if c.url]:
        lines += ["", "Workflow runs", *(f"  {printable(name)}  {url}" for name, url in urls)]
    return "\n".join(lines)


def markdown(machine: Machine) -> str:
    """The machine as a page, for a workflow's summary."""
    parts = [f"# This machine: {_verdict(machine)}"]
    if found := machine.problems:
        parts.append("\n".join(f"- {md.escaped(problem)}" for problem in found))
    for title, fact, header, rows in _sections(machine):
        parts.append(f"## {title}")
        if fact:
            parts.append(f"{md.escaped(fact)}.")
        if rows:
            parts.append(md.table(header, [list(map(md.escaped, row)) for row in rows]))
    if urls := [(c.name, c.url) for c in machine.containers if c.url]:
        lines = [f"- {md.escaped(name)}: {_link(url)}" for name, url in urls]
        parts += ["## Workflow runs", "\n".join(lines)]
    parts.append(f"Read at {machine.read_at:%Y-%m-%d %H:%M} UTC.")
    return "\n\n".join(parts) + "\n"


def as_dict(machine: Machine) -> dict[str, Any]:
    """The machine as JSON has it; times are ISO 8601 in UTC, sizes bytes."""
    facts = asdict(machine, dict_factory=_plain)
    return {
        "healthy": not machine.problems,
        "problems": list(machine.problems),
        **facts,
    }


def gib(num_bytes: int | None) -> str:
    """The bytes in GiB; a dash for none."""
    return "–" if num_bytes is None else f"{num_bytes / 2**30:,.1f} GiB"


def _plain(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    return {
        name: value.isoformat() if isinstance(value, datetime) else value for name, value in items
    }


def _verdict(machine: Machine) -> str:
    count = len(machine.problems)
    return "healthy" if not count else f"{count} problem{'s' * (count > 1)}"


def _sections(machine: Machine) -> Iterable[tuple[str, str, list[str], Rows]]:
    """Title, a fact in words, and a table, of each part."""
    gpu_header = ["GPU", "name", "memory", "busy", "temp", "power", "ECC", "held back by"]
    yield "GPUs", _driver(machine), gpu_header, [_gpu(card) for card in machine.gpus.cards]
    if machine.processes:
        header = ["GPU", "process", "memory", "program", "user", "container", "by"]
        yield "Processes on GPUs", "", header, [_process(found) for found in machine.processes]
    header = ["container", "task", "by", "age", "state", "GPUs", "run"]
    rows = [_container(found, machine) for found in machine.containers]
    yield "Our containers", "" if rows else "none", header, rows
    yield "Docker", _docker(machine), ["image", "commit", "age"], _images(machine)
    yield "Disks", "", ["holds", "free", "of", "full"], [_disk(disk) for disk in machine.disks]
    header = ["runner", "name", "state"]
    yield "GitHub runners", _units(machine), header, [_runner(found) for found in machine.runners]


def _driver(machine: Machine) -> str:
    gpus = machine.gpus
    if gpus.reason:
        return f"none ({gpus.reason})"
    words = [f"driver {gpus.driver_version}, CUDA up to {gpus.cuda_version}"]
    toolkit = f"Container Toolkit {machine.toolkit}" if machine.toolkit else "no Container Toolkit"
    return ", ".join([*words, toolkit])


def _gpu(card: GpuStatus) -> list[str]:
    if card.fault:
        return [str(card.index), card.fault, *[""] * 6]
    held_back = card.throttling
    return [
        str(card.index),
        card.name or "–",
        f"{gib(card.used_bytes).removesuffix(' GiB')} of {gib(card.total_bytes)}",
        _with_unit(card.utilisation_percent, "%"),
        _with_unit(card.temperature_celsius, "°C"),
        f"{_with_unit(card.power_watts, '').strip()} of {_with_unit(card.power_limit_watts, 'W')}",
        _with_unit(card.ecc_uncorrected, "").strip(),
        "–" if held_back is None else ", ".join(held_back) or "nothing",
    ]


def _with_unit(value: int | float | None, unit: str) -> str:
    return "–" if value is None else f"{value:.0f} {unit}"


def _process(process: Process) -> list[str]:
    return [
        str(process.gpu),
        str(process.pid),
        gib(process.used_bytes),
        process.name or "gone",
        process.user,
        process.container or "none",
        process.by,
    ]


def _container(container: Container, machine: Machine) -> list[str]:
    state = [container.state, container.health, "stray" * (container.name in machine.strays)]
    return [
        container.name,
        container.task,
        container.by,
        _age(container.created, machine.read_at),
        ", ".join(filter(None, state)),
        ",".join(map(str, container.gpus)) or "none",
        container.run or "–",
    ]


def _docker(machine: Machine) -> str:
    if machine.engine is None:
        return machine.engine_missing
    count = len(machine.images)
    images = f"{count} image{'s' * (count != 1)} of ours"
    size = f" in {gib(machine.images_bytes)}" if count else ""
    return f"Engine {machine.engine.version}, {images}{size}"


def _images(machine: Machine) -> Rows:
    """Those with a name: the current one, the previous one, and the newest of commits."""
    named = sorted(
        (image for image in machine.images if image.tags),
        key=lambda image: not any(t.endswith((":current", ":previous")) for t in image.tags),
    )
    return [
        [", ".join(_names(image)), image.sha[:12], _age(image.created, machine.read_at)]
        for image in named[:5]
    ]


def _names(image: Image) -> list[str]:
    """Its tags; that of its commit only where it has no other."""
    names = [tag for tag in image.tags if not tag.endswith(f":{image.sha}")]
    return names or [f"mainrun:{image.sha[:12]}…"]


def _disk(disk: Disk) -> list[str]:
    percent = f"{disk.used_percent:.0f} %"
    return [", ".join(disk.holds), gib(disk.free_bytes), gib(disk.total_bytes), percent]


def _units(machine: Machine) -> str:
    if not machine.runners and not machine.units:
        return "none on this machine"
    units = machine.units
    if units is None:
        return "systemd does not run"
    return ", ".join(f"{unit.name} {unit.state}" for unit in units) or "no units of systemd"


def _runner(runner: Runner) -> list[str]:
    state = "working" if runner.is_busy else "listening" if runner.is_listening else "not running"
    return [runner.label, runner.name or "–", state]


def _age(since: datetime, now: datetime) -> str:
    minutes = max(int((now - since).total_seconds()) // 60, 0)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // (24 * 60)} days"


def _link(url: str) -> str:
    """The address of a workflow run as a link; anything else as the text that it is."""
    return f"<{url}>" if _RUN_URL.fullmatch(url) else md.escaped(url)


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(printable(line), _WIDTH, subsequent_indent="    ")


def _aligned(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """The rows in columns two blanks apart, the widest column cut until all fit."""
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > width:
        widths[widths.index(max(widths))] -= 1
    return [
        "  ".join(_cut(cell, size).ljust(size) for cell, size in zip(row, widths, strict=True))
        .rstrip()
        for row in shown
    ]  # fmt: skip


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 1] + "…"
