"""What one sees of a run while it trains: a progress bar on a terminal, else plain lines.

All of it goes to stderr, so that stdout is free for the result. On a terminal one bar shows step,
loss, speed and time left, and what happens stands above it; elsewhere (a workflow's log, a file)
the same lines come without a bar and without escape codes. Text from the data, such as samples,
is shown with its control characters spelt out: a corpus cannot drive the terminal.
"""

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

_PLAIN_SECONDS = 5.0  # between plain training lines, unless a twentieth of the run comes first
_REFRESH_SECONDS = 0.1
_OF_ITS_OWN = ("tracking_started", "run_started", "samples", "checkpoint")
"""Events that matter to the watcher of this run alone."""

_SHOWN_CHARACTERS = 200  # of a sample; the record has all of it


class Console:
    """A terminal that goes away (a closed ssh session) ends the showing, not the run.

    With a `label` one of several runs speaks: there is no bar, each line begins with it, and only
    what matters to the others' watcher is said.
    """

    def __init__(self, *, total_steps: int, first_step: int = 0, label: str | None = None) -> None:
        self.is_one_of_several = label is not None
        self._prefix = "" if label is None else f"{label}: "
        self._total_steps = total_steps
        self._first_step = first_step
        self._last_time = 0.0
        self._last_step: int | None = None
        self._origin: tuple[int, float] | None = None  # the first step told, and when
        self._progress: Any = None
        if (
            label is None
            and sys.stderr.isatty()
            and os.environ.get("TERM") not in (None, "", "dumb")
        ):
            self._progress = _progress_bar(total_steps, first_step)

    def show(self, event: str, step: int | None, fields: Mapping[str, Any]) -> None:
        if self.is_one_of_several and event in _OF_ITS_OWN:
            return
        if event == "train_step" and step is not None:
            self._show_training(step, fields)
        else:
            for line in lines(event, step, fields):
                self.line(line)

    def line(self, text: str) -> None:
        """One line above the bar."""
        with contextlib.suppress(OSError):
            if self._progress is not None:
                self._progress.console.print(printable(text), markup=False, highlight=False)
                self._progress.refresh()
            else:
                sys.stderr.write(printable(self._prefix + text) + "\n")
                sys.stderr.flush()

    def close(self) -> None:
        """Takes the bar's hands off the terminal; the bar's last state stays in sight."""
        if self._progress is not None:
            with contextlib.suppress(OSError):
                self._progress.stop()
            self._progress = None

    def _show_training(self, step: int, fields: Mapping[str, Any]) -> None:
        now = time.monotonic()
        self._origin = self._origin or (step, now)
        last = step >= self._total_steps
        if self._progress is not None:
            if last or now - self._last_time >= _REFRESH_SECONDS:
                self._last_time = now
                head, tail = _head(step, self._total_steps), self._tail(step, fields, now)
                with contextlib.suppress(OSError):
                    self._progress.update(0, completed=step, head=head, tail=tail, refresh=True)
        elif self._is_due(step, now, last):
            self._last_time, self._last_step = now, step
            self.line(f"{_head(step, self._total_steps)}  {self._tail(step, fields, now)}")

    def _is_due(self, step: int, now: float, last: bool) -> bool:
        """Whether a plain line is to be written for this step."""
        if self._last_step is None:
            return not self.is_one_of_several
        if now - self._last_time >= _PLAIN_SECONDS:
            return True
        of_the_run = (step - self._last_step) * 20 >= self._total_steps
        return (last or of_the_run) and not self.is_one_of_several

    def _tail(self, step: int, fields: Mapping[str, Any], now: float) -> str:
        parts = [
            template.format(fields[name])
            for name, template in (
                ("train/loss", "loss {:.3f}"),
                ("perf/tokens_per_second", "{:,.0f} tokens/s"),
            )
            if name in fields
        ]
        # Evaluations and checkpoints count as time spent: they will be spent again. The first
        # step does not: it waits for the device to warm up.
        origin_step, origin = self._origin or (step, now)
        if origin_step < step < self._total_steps:
            left = (now - origin) / (step - origin_step) * (self._total_steps - step)
            parts.append(f"{clock(left)} left")
        return "  ".join(parts)


_is_quiet = False


def be_quiet() -> None:
    """From now on this process leaves the telling to another."""
    global _is_quiet
    _is_quiet = True


def say(text: str) -> None:
    """A line for whoever waits, before there is a run to tell of."""
    if _is_quiet:
        return
    with contextlib.suppress(OSError):  # the terminal went away
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def lines(event: str, step: int | None, fields: Mapping[str, Any]) -> list[str]:
    """The event as a person wants to read it; nothing for what the end of the run tells better."""
    at = "" if step is None else f" at step {step}"
    match event:
        case "run_started":
            return [_run_started(fields), *_memory(fields)]
        case "tracking_started":
            return _tracking_started(fields)
        case "evaluation":
            return [f"evaluation{at}: {evaluation(fields)}"]
        case "samples":
            texts = fields["texts"]
            return [f"sample{at}: {_shortened(text)}" for text in texts]
        case "checkpoint":
            best = " (the best so far)" if fields.get("best") else ""
            return [f"checkpoint{at}: {fields.get('path', 'saved')}{best}"]
        case "warning":
            return [f"warning{at}: {fields['message']}"]
        case "resumed":
            return [", ".join([f"resumed{at}", *fields.get("overrides", [])])]
        case "finished" | "stopped" | "failed":
            return []
        case _:
            told = ", ".join(f"{name} {value}" for name, value in fields.items())
            return [f"{event.replace('_', ' ')}{at}" + (f": {told}" if told else "")]


def evaluation(fields: Mapping[str, Any]) -> str:
    """`val/loss 1.934 nats/char ± 0.012 (2.71 nats/token, 1.98 bits/byte)`."""
    text = f"val/loss {fields['val/loss']:.3f} nats/char"
    if "val/loss_stderr" in fields:
        text += f" ± {fields['val/loss_stderr']:.3f}"
    others = [
        template.format(fields[name])
        for name, template in (
            ("val/nats_per_token", "{:.2f} nats/token"),
            ("val/bits_per_byte", "{:.2f} bits/byte"),
        )
        if name in fields
    ]
    return text + (f" ({', '.join(others)})" if others else "")


def clock(seconds: float) -> str:
    """`00:41`, `1:02:03`, `2 d 03:04:05`."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours:02}:{minutes:02}:{whole % 60:02}"
    return (f"{hours}:" if hours else "") + f"{minutes:02}:{whole % 60:02}"


def printable(text: str) -> str:
    """The text with control characters, line ends and the like spelt out: `\\x1b`, `\\n`."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in text
    )


def _run_started(fields: Mapping[str, Any]) -> str:
    if fields.get("trained_parameters") == fields.get("parameters"):  # needs no saying
        fields = {**fields, "trained_parameters": None}
    parts = [
        template.format(fields[name])
        for name, template in (
            ("parameters", "{:,} parameters"),
            ("trained_parameters", "{:,} of them trained"),
            ("vocab_size", "vocabulary {:,}"),
            ("total_steps", "{:,} steps"),
            ("train_documents", "{:,} training documents"),
            ("val_documents", "{:,} validation documents"),
            ("device", "{}"),
            ("precision", "{}"),
            ("attention", "attention {}"),
            ("compile_seconds", "compiled in {:.1f} s"),
        )
        if fields.get(name) is not None
    ]
    return f"{fields.get('name', 'run')}: {', '.join(parts)}"


def _memory(fields: Mapping[str, Any]) -> list[str]:
    """`memory of a step: 460 MiB, 459 estimated: attention weights 42 %, logits 27 %, mlp 7 %`."""
    if not {"step_bytes", "estimated_step_bytes", "memory_bytes"} <= fields.keys():
        return []
    whole = fields["estimated_step_bytes"]
    largest = sorted(fields["memory_bytes"].items(), key=lambda part: -part[1])[:3]
    parts = [f"{name.replace('_', ' ')} {100 * size / whole:.0f} %" for name, size in largest]
    sizes = f"{fields['step_bytes'] / 2**20:,.0f} MiB, {whole / 2**20:,.0f} estimated"
    return [f"memory of a step: {sizes}: {', '.join(parts)}"]


def _tracking_started(fields: Mapping[str, Any]) -> list[str]:
    match fields["wandb"]:
        case "online":
            return [f"Weights & Biases: {fields['wandb_url']}"]
        case "offline":
            return [f"Weights & Biases: offline; to upload: {fields['sync_command']}"]
        case _:
            return []


def _shortened(text: str) -> str:
    shown = printable(text)
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[: _SHOWN_CHARACTERS - 1] + "…"


def _head(step: int, total_steps: int) -> str:
    return f"step {step}/{total_steps}"


def _progress_bar(total_steps: int, first_step: int) -> Any:
    import rich.console
    from rich.progress import BarColumn, Progress, TextColumn

    # No refreshing thread: it would take the interpreter from the loop that feeds the device.
    progress = Progress(
        TextColumn("{task.fields[head]}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[tail]}", markup=False),
        console=rich.console.Console(stderr=True, force_terminal=True, soft_wrap=False),
        auto_refresh=False,
        expand=True,
        redirect_stdout=sys.stdout.isatty(),  # else what goes to a file would land on the terminal
    )
    progress.add_task(
        "", total=total_steps, completed=first_step, head=_head(first_step, total_steps), tail=""
    )
    progress.start()
    progress.refresh()
    return progress
