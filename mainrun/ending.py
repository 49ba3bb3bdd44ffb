"""How a job ended, from its container's exit code and last lines: for programs and for people."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["finished", "failed", "stopped", "refused", "out_of_memory", "killed", "lost"]


@dataclass(frozen=True)
class Ending:
    """How a job ended: for programs (`kind`, `exit_code`) and for people."""

    kind: Kind
    exit_code: int
    sentence: str
    remedy: str = ""


def ending_of(
    exit_code: int, tail: Sequence[str], *, out_of_memory: bool = False, memory_bytes: int = 0
) -> Ending:
    """What an exit code means, with the reason that the last lines give."""
    said = _last_word(tail)
    if out_of_memory and exit_code not in (0, 75):
        return Ending(
            "out_of_memory",
            exit_code,
            f"the job took more than its {memory_bytes / 2**30:.1f} GiB of memory and was killed",
            "give it more (`memory` in the host's settings), or make training.batch_size, "
            "data.context_length or the model smaller",
        )
    match exit_code:
        case 0:
            return Ending("finished", 0, "the task is done")
        case 75:
            return Ending(
                "stopped", 75, "it was stopped on request and saved a complete checkpoint",
                "resume it: nothing is lost",
            )  # fmt: skip
        case 130 | 143:
            return Ending(
                "stopped", exit_code, "it was stopped before there was anything to save",
                "start it again",
            )  # fmt: skip
        case 2:
            return Ending("refused", 2, said or "the command was refused", "mend it and try again")
        case 137:
            return Ending(
                "killed", 137, "it was killed before it could save its last steps",
                "resume it: at most the steps since its last checkpoint are lost",
            )  # fmt: skip
        case _:
            return Ending(
                "failed",
                exit_code,
                said.removeprefix("failed: ") or f"the task ended with exit code {exit_code}",
                "the log says more; what was saved can be resumed",
            )


def _last_word(tail: Sequence[str]) -> str:
    """The reason a command of ours gave on its last line; what `task` says after it is none."""
    said = [line.removeprefix("mainrun: ") for line in tail if line.startswith("mainrun: ")]
    return said[-1] if said else ""
