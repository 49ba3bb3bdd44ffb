"""How a command can end other than well.

Three ways, and the command line knows no other: the user asked for something impossible, the user
asked to stop, or the run failed. Everything else that is raised is a defect of ours and keeps its
traceback.
"""


def one_line(error: BaseException) -> str:
    """What the error says, without line breaks, for a message of ours; its type if it is mute."""
    return " ".join(str(error).split()) or type(error).__name__


def named(error: BaseException) -> str:
    """`ValueError: what it says`, of an error not ours; its type alone if it is mute."""
    text = one_line(error)
    return text if text == type(error).__name__ else f"{type(error).__name__}: {text}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory, or the machine's, has run out. XLA says it in words alone."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


class UserError(ValueError):
    """The user's mistake, found before any work: value, place, remedy in one line. Exit code 2."""


class RunFailed(RuntimeError):
    """The run cannot go on; the reason is the message and the last line printed. Exit code 1."""


class Stopped(Exception):
    """SIGINT or SIGTERM was obeyed: a complete checkpoint is saved. Exit code 75 (EX_TEMPFAIL)."""
