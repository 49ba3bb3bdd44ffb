"""The command `mainrun`: each subcommand parses its words (`words`), then makes one call (`calls`).

Exit codes: 0 done, 1 the run failed, 2 the user's mistake, 75 stopped on request and resumable.
"""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence

from mainrun import huge_pages
from mainrun.cli import calls, words
from mainrun.errors import RunFailed, Stopped, UserError, leave, reason_of

_COMPUTES = (calls.train, calls.resume, calls.sweep, calls.find_lr, calls.profile)


def main(arguments: Sequence[str] | None = None) -> int:
    typed = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options, unknown = parser.parse_known_args(typed)
    takes_words = hasattr(options, "words")
    for word in unknown:  # argparse gives up on words after an option, and knows no `--a.b=c`
        if not takes_words or (word.startswith("-") and "=" not in word):
            parser.error(f"unrecognized argument: {word}")
    options.words = [*getattr(options, "words", []), *unknown]
    options.command_line = ["mainrun", *typed]
    if arguments is None and options.call in _COMPUTES:
        huge_pages.ask()
    try:
        call: Callable[[argparse.Namespace], int | None] = options.call
        code = call(options) or 0
        sys.stdout.flush()  # here, or Python would find the full disk behind our last word
        return code
    except UserError as error:
        print(f"mainrun: {error}", file=sys.stderr)
        return 2
    except Stopped:
        return 75
    except KeyboardInterrupt:
        print("mainrun: interrupted before there was anything to save", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RunFailed, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            print(f"mainrun: {error.filename}: {error.strerror}", file=sys.stderr)
            return 2
        reason = reason_of(error)
        if reason is None:
            raise
    last_line = f"mainrun: failed: {reason}\n"
    if arguments is None:
        leave(1, last_line)
    sys.stderr.write(last_line)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mainrun",
        description="Train and tune GPT language models on your own machine.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for call, take, does in (
        (calls.train, words.train, "train a model in a new run folder"),
        (calls.resume, words.resume, "go on from a run's newest complete checkpoint"),
        (calls.evaluate, words.evaluate, "metrics of a run's best checkpoint"),
        (calls.generate, words.generate, "text from a run's best checkpoint"),
        (calls.export, words.export, "a run's model in a folder for other programs"),
        (calls.config, words.config, "print the resolved config"),
        (calls.find_lr, words.find_lr, "the learning rate at which the loss falls fastest"),
        (calls.memory, words.memory, "bytes of a training step, by part and as compiled"),
        (calls.profile, words.profile, "a trace of some steps, step time, FLOP utilisation"),
        (calls.sweep, words.sweep, "trials of a search space in W&B's format"),
        (calls.report, words.report, "curves, tables and tests of a run, a sweep or several"),
        (calls.promote, words.promote, "a finished run's config and result in config/sota/"),
        (calls.check_sota, words.check_sota, "do promoted configs still reproduce"),
        (calls.launch, words.launch, "a task in its container, cleaned up whatever happens"),
        (calls.image, words.image, "build, test, move and remove the containers' images"),
        (calls.gpu_status, words.gpu_status, "the machine's GPUs and what runs on them"),
        (calls.doctor, words.doctor, "is this machine ready, and what it lacks"),
        (calls.job, words.job, "a step of a GitHub workflow's job"),
    ):
        name = call.__name__.replace("_", "-")
        command = commands.add_parser(name, help=does, description=does, allow_abbrev=False)
        take(command)
        command.set_defaults(call=call)
    return parser
