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
    for word in unknown:
        if "=" not in word or not word.startswith("--"):
            parser.error(f"unrecognized argument: {word}")
    if unknown and not hasattr(options, "words"):
        parser.error(f"unrecognized argument: {unknown[0]}")
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

    def command(
        name: str, call: Callable[[argparse.Namespace], None], does: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=does, description=does, allow_abbrev=False)
        added.set_defaults(call=call)
        return added

    train = command("train", _train, "train a model in a new run folder")
    train.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG k=v",
        help=f"a config file (default: quickstart), {_OVERRIDES}",
    )
    train.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/<date>-<config>")
    train.add_argument(
        "--dry-run", action="store_true", help="stop before the first step and report"
    )

    resume = command("resume", _resume, "go on from a run's newest complete checkpoint")
    resume.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    resume.add_argument("words", nargs="*", metavar="k=v", help=_OVERRIDES)

    evaluate = command(
        "evaluate", _evaluate, "metrics of a run's best checkpoint, every token once"
    )
    evaluate.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    evaluate.add_argument("words", nargs="*", metavar="k=v", help=_OVERRIDES)
    evaluate.add_argument("--data", metavar="SOURCE", help="another source, all of its documents")
    evaluate.add_argument("--json", action="store_true", help="one JSON object")

    generate = command("generate", _generate, "text from a run's best checkpoint")
    generate.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    generate.add_argument("--prompt", default="", metavar="TEXT", help="how each text begins")
    generate.add_argument("--num", type=_count, default=5, metavar="N", help="texts (default 5)")
    generate.add_argument(
        "--max-tokens", type=_count, default=64, metavar="N", help="new tokens at most (default 64)"
    )
    generate.add_argument(
        "--temperature",
        type=_temperature,
        default=0.8,
        metavar="X",
        help="0: the likeliest token (default 0.8)",
    )
    generate.add_argument(
        "--top-k",
        type=_whole,
        default=0,
        metavar="K",
        help="draw from the K likeliest (default 0: all)",
    )
    generate.add_argument(
        "--top-p",
        type=_fraction,
        default=1.0,
        metavar="P",
        help="draw from the likeliest that make up P (default 1)",
    )
    generate.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")

    config = command("config", _config, "print the resolved config")
    config.add_argument(
        "words", nargs="*", metavar="CONFIG k=v", help=f"a config file, {_OVERRIDES}"
    )
    return parser


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
