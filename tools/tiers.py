"""All tests of this machine, tier after tier, and one table of what became of them: `.ci/run`.

It is green when every case that a tier collected came to an end, none failed, and each skip has a
reason that stands in `.ci/allowed-skips.txt`. So it is red when time runs out before the last test,
when something that tests need is missing, and when nothing ran. A test that costs more than its
tier allows is named, and no failure: seconds of a shared machine prove nothing.

Any Python >= 3.8 runs it, with nothing installed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple, Sequence

from tools import results
from tools.results import NOT_BEGUN, STOPPED, TIME_IS_UP, Result

ROOT = Path(__file__).resolve().parent.parent

# From SIGINT, on which pytest says what failed so far and removes its containers, to SIGKILL.
GRACE_SECONDS = 30
GRACE_SECONDS_OF_A_CANCEL = 5  # GitHub itself kills ten seconds after it asks


class Step(NamedTuple):
    """A command; that of a tier passes further arguments on to pytest."""

    name: str
    minutes: float
    command: Sequence[str]
    is_tier: bool = True


# Minutes of two cores, a quarter to spare; what one step leaves, the next may take. PyTorch or an
# Engine that cannot be had skips the tests that need it, and the allowed reasons judge that.
PLAN = (
    Step("environment", 6, ["./task", "-x", "dev"], is_tier=False),
    Step("PyTorch", 5, ["./task", "-x", "oracle"], is_tier=False),
    Step("test", 12, ["./task", "-x", "test", "--"]),
    Step("test-all", 42, ["./task", "-x", "test-all", "--"]),
    Step("Docker Engine", 5, ["tests/engine.sh"], is_tier=False),
    Step("test-docker", 14, ["./task", "-x", "test-docker", "--"]),
)
WITH_GPU = (*PLAN, Step("test-gpu", 10, ["./task", "-x", "test-gpu", "--"]))


def main(
    steps: Sequence[Step], out: Path = ROOT / "build" / "ci", kept: Path = ROOT / ".ci"
) -> int:
    """Runs the steps and prints the table; 0 where all is green.

    `out` is for the outcomes and, after a green run, for `durations.tsv`; `kept` has those that
    were committed, and the reasons that are allowed.
    """
    # Whom GitHub cancels, or somebody's `timeout` ends, gets a table too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    allowed = results.patterns(kept / "allowed-skips.txt")
    out.mkdir(parents=True, exist_ok=True)
    for path in out.iterdir():
        path.unlink()
    done: list[Result] = []
    deadline = time.monotonic()
    for step in steps:
        deadline += 60 * step.minutes
        begin, outcomes = time.monotonic(), out / f"{step.name}.jsonl"
        command = [*step.command]
        if step.is_tier:
            command += ["-p", "tools.outcomes", "--outcomes", str(outcomes)]
        is_stopped = any(result.ending == STOPPED for result in done)
        ending = NOT_BEGUN if is_stopped or begin > deadline else run(command, deadline)
        minutes = (time.monotonic() - begin) / 60
        read = results.read(outcomes)
        done.append(Result(step.name, minutes, step.minutes, ending, step.is_tier, *read))

    is_green = not any(results.faults(result, allowed) for result in done if result.is_tier)
    text = results.markdown(done, allowed, results.read_durations(kept / "durations.tsv"))
    text = f"\n{text}\n\n{'Green.' if is_green else 'Red.'}\n"
    print(text, results.closing_line(done), sep="\n", flush=True)
    page = os.environ.get("GITHUB_STEP_SUMMARY")
    if page:
        with open(page, "a", encoding="utf-8") as file:
            file.write(text)
    if is_green:
        results.write_durations(done, out / "durations.tsv")
    return int(not is_green)


def plan() -> Sequence[Step]:
    """All that this machine can run."""
    has_gpu = shutil.which("nvidia-smi") and not subprocess.call(["nvidia-smi", "-L"])
    return WITH_GPU if has_gpu else PLAN


def run(command: Sequence[str], deadline: float) -> str:
    """How the command ended; nothing where all went well."""
    print(f"\n$ {' '.join(command)}", flush=True)
    # In a session of its own, so that a signal reaches everything that it starts.
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        code = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        end(process, GRACE_SECONDS)
        return TIME_IS_UP
    except KeyboardInterrupt:
        end(process, GRACE_SECONDS_OF_A_CANCEL)
        return STOPPED
    return f"ended with code {code}" if code else ""


def end(process: subprocess.Popen[bytes], grace: float) -> None:
    """Asks the whole group to end, and kills what does not."""
    try:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(grace)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # none is left; it is root's
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    sys.exit(main(plan()))
