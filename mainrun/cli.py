"""The command `mainrun`: each subcommand parses its words, then makes one call.

Exit codes: 0 done, 1 the run failed, 2 the user's mistake, 75 stopped on request and resumable.
Heavy imports happen inside the subcommands, so that `mainrun --help` answers at once.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from mainrun.errors import RunFailed, Stopped, UserError

Number = TypeVar("Number", int, float)

_OVERRIDES = "key.path=value: settings that differ from the config, in YAML's notation"


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options, unknown = parser.parse_known_args(words)
    takes_words = hasattr(options, "words")
    for word in unknown:  # argparse gives up on words after an option, and knows no `--a.b=c`
        if not takes_words or (word.startswith("-") and "=" not in word):
            parser.error(f"unrecognized argument: {word}")
    options.words = [*getattr(options, "words", []), *unknown]
    options.command_line = ["mainrun", *words]
    try:
        call: Callable[[argparse.Namespace], None] = options.call
        call(options)
    except UserError as error:
        print(f"mainrun: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"mainrun: failed: {error}", file=sys.stderr)
        return 1
    except Stopped:
        return 75
    except KeyboardInterrupt:
        print("mainrun: interrupted before there was anything to save", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _train(options: argparse.Namespace) -> None:
    from mainrun import config

    path, overrides = _config_and_overrides(options.words)
    path = path or config.default_config_root() / "base" / "quickstart.yaml"
    settings = config.load(path, overrides)
    if options.run_dir is not None and options.run_dir.exists():
        raise UserError(f"{options.run_dir} exists: choose another --run-dir, or resume it")
    from mainrun import run

    if options.dry_run:
        print(run.dry_run(settings))
        return
    run.train(settings, options.run_dir, path.stem, command=options.command_line)


def _resume(options: argparse.Namespace) -> None:
    from mainrun import run

    run.resume(options.run_dir, _overrides(options.words), command=options.command_line)


def _evaluate(options: argparse.Namespace) -> None:
    from mainrun import trained

    found = trained.load(options.run_dir, _overrides(options.words))
    metrics = trained.evaluate_run(found, options.data)
    if options.json:
        print(json.dumps({"step": found.step, **metrics}))
        return
    print(f"{'checkpoint':22} step {found.step}")
    for name, value in metrics.items():
        print(f"{name:22} {value:,}" if isinstance(value, int) else f"{name:22} {value:.6f}")


def _generate(options: argparse.Namespace) -> None:
    from mainrun import trained

    found = trained.load(options.run_dir)
    texts = trained.generate_texts(
        found,
        prompt=options.prompt,
        num=options.num,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    from mainrun.console import printable

    print("\n".join(map(printable, texts)))


def _config(options: argparse.Namespace) -> None:
    from mainrun import config

    path, overrides = _config_and_overrides(options.words)
    print(config.to_yaml(config.load(path, overrides)), end="")


def _config_and_overrides(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """At most one word is a file; all with a `=` are overrides."""
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise UserError(f"one config file at a time, not {' and '.join(files)}")
    return (Path(files[0]) if files else None), [word for word in words if "=" in word]


def _overrides(words: Sequence[str]) -> list[str]:
    for word in words:
        if "=" not in word:
            raise UserError(f"{word!r} is not an override: write key.path=value")
    return list(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mainrun",
        description="Train and tune GPT language models on your own machine.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, call, words, does in (
        ("train", _train, _train_words, "train a model in a new run folder"),
        ("resume", _resume, _resume_words, "go on from a run's newest complete checkpoint"),
        ("evaluate", _evaluate, _evaluate_words, "metrics of a run's best checkpoint"),
        ("generate", _generate, _generate_words, "text from a run's best checkpoint"),
        ("config", _config, _config_words, "print the resolved config"),
    ):
        command = commands.add_parser(name, help=does, description=does, allow_abbrev=False)
        words(command)
        command.set_defaults(call=call)
    return parser


def _train_words(command: argparse.ArgumentParser) -> None:
    _config_words(command, default="quickstart")
    command.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/<date>-<name>")
    command.add_argument("--dry-run", action="store_true", help="report instead of the first step")


def _resume_words(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    command.add_argument("words", nargs="*", metavar="k=v", help=_OVERRIDES)


def _evaluate_words(command: argparse.ArgumentParser) -> None:
    _resume_words(command)
    command.add_argument("--data", metavar="SOURCE", help="another source, all of its documents")
    command.add_argument("--json", action="store_true", help="one JSON object")


def _generate_words(command: argparse.ArgumentParser) -> None:
    def option(name: str, kind: Callable, default: object, metavar: str, does: str) -> None:
        does = f"{does} (default {default})" if default != "" else does
        command.add_argument(name, type=kind, default=default, metavar=metavar, help=does)

    command.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    option("--prompt", str, "", "TEXT", "how each text begins")
    option("--num", _count, 5, "N", "texts")
    option("--max-tokens", _count, 64, "N", "new tokens at most, each")
    option("--temperature", _temperature, 0.8, "X", "0 takes the likeliest token")
    option("--top-k", _whole, 0, "K", "draw from the K likeliest; 0: from all")
    option("--top-p", _fraction, 1.0, "P", "draw from the likeliest that make up P")
    option("--seed", int, 0, "S", "of the draws")


def _config_words(command: argparse.ArgumentParser, default: str = "base") -> None:
    does = f"a config file (default: {default}), {_OVERRIDES}"
    command.add_argument("words", nargs="*", metavar="CONFIG k=v", help=does)


def _count(text: str) -> int:
    return _at_least(1, int(text))


def _whole(text: str) -> int:
    return _at_least(0, int(text))


def _temperature(text: str) -> float:
    return _at_least(0.0, float(text))


def _at_least(least: Number, value: Number) -> Number:
    if not value >= least:
        raise argparse.ArgumentTypeError(f"{value} must be at least {least}")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1")
    return value
