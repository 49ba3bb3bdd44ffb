"""What may be written after each subcommand."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mainrun import user

Number = TypeVar("Number", int, float)
Checked = TypeVar("Checked", str, Path)

_OVERRIDES = "key.path=value: settings that differ from the config, in YAML's notation"


def train(command: argparse.ArgumentParser) -> None:
    config(command, default="quickstart")
    command.add_argument("--run-dir", type=_path, metavar="DIR", help="default: runs/<date>-<name>")
    command.add_argument("--dry-run", action="store_true", help="report instead of the first step")


def resume(command: argparse.ArgumentParser) -> None:
    _of_a_run(command, checkpoint="newest")


def _of_a_run(command: argparse.ArgumentParser, *, checkpoint: str) -> None:
    command.add_argument("run_dir", type=_path, metavar="RUN_DIR")
    command.add_argument("words", nargs="*", metavar="k=v", help=_OVERRIDES)
    _checkpoint(command, checkpoint)


def _checkpoint(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--checkpoint", type=_which, default=default, metavar="best|newest|STEP",
        help=f"the best is that of the lowest val/loss (default {default})",
    )  # fmt: skip


def evaluate(command: argparse.ArgumentParser) -> None:
    _of_a_run(command, checkpoint="best")
    _average(command)
    command.add_argument("--data", metavar="SOURCE", help="another source, all of its documents")
    command.add_argument("--json", action="store_true", help="one JSON object")


def generate(command: argparse.ArgumentParser) -> None:
    def option(name: str, kind: Callable, default: object, metavar: str, does: str) -> None:
        does = f"{does} (default {default})" if default != "" else does
        command.add_argument(name, type=kind, default=default, metavar=metavar, help=does)

    _of_a_run(command, checkpoint="best")
    _average(command)
    option("--prompt", str, "", "TEXT", "how each text begins")
    option("--num", _count, 5, "N", "texts")
    option("--max-tokens", _count, 64, "N", "new tokens at most, each")
    option("--temperature", _temperature, 0.8, "X", "0 takes the likeliest token")
    option("--top-k", _whole, 0, "K", "draw from the K likeliest; 0: from all")
    option("--top-p", _fraction, 1.0, "P", "draw from the likeliest that make up P")
    option("--seed", int, 0, "S", "of the draws")


def export(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_dir", type=_path, metavar="RUN_DIR")
    command.add_argument(
        "--format", choices=("safetensors", "huggingface"), required=True,
        help="any model under mainrun's names; or what transformers opens, if a class holds it",
    )  # fmt: skip
    command.add_argument("--output", type=_path, metavar="DIR", required=True, help="a new folder")
    _checkpoint(command, "best")
    _average(command)


def _average(command: argparse.ArgumentParser) -> None:
    does = "of the running average of the weights (training.weight_average)"
    command.add_argument("--average", action="store_true", help=does)


def config(command: argparse.ArgumentParser, default: str = "base") -> None:
    does = f"a config file (default: {default}), {_OVERRIDES}"
    command.add_argument("words", nargs="*", metavar="CONFIG k=v", help=does)


def memory(command: argparse.ArgumentParser) -> None:
    config(command, default="quickstart")
    command.add_argument(
        "--vocab-size", type=_count, metavar="N", help="tokens; default: what the config asks for"
    )
    command.add_argument(
        "--device", metavar="CARD", help="a card that need not be here, as h200; default: this one"
    )
    command.add_argument("--json", action="store_true", help="one JSON object")


def profile(command: argparse.ArgumentParser) -> None:
    config(command, default="quickstart")
    command.add_argument(
        "--steps", type=_count, default=10, metavar="N", help="steps that are timed (default 10)"
    )
    command.add_argument(
        "--compare", action="append", metavar="k=a,b,c",
        help="a row for each value of this setting, each from scratch in a process of its own; "
        "given more than once: for each combination",
    )  # fmt: skip
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        "--trace", type=_steps, metavar="FIRST-LAST",
        help="steps that are traced, by number (default: three after those that are timed)",
    )  # fmt: skip
    which.add_argument("--no-trace", action="store_true", help="nor a folder, without --output")
    command.add_argument(
        "--output", type=_path, metavar="DIR", help="a new folder (default: profile/<date>-<name>)"
    )
    command.add_argument("--json", action="store_true", help="one JSON object")


def find_lr(command: argparse.ArgumentParser) -> None:
    config(command, default="quickstart")
    for name, kind, default, metavar, does in (
        ("--min", float, 1e-6, "X", "rate of the first step"),
        ("--max", float, 1.0, "X", "rate of the last step"),
        ("--steps", int, 100, "N", "steps; several times as many lower the answer"),
        ("--output", _path, Path("lr_finder.png"), "FILE", "picture of the losses"),
    ):
        does = f"{does} (default {default})"
        command.add_argument(name, type=kind, default=default, metavar=metavar, help=does)
    command.add_argument("--json", action="store_true", help="one JSON object, with all losses")


def sweep(command: argparse.ArgumentParser) -> None:
    command.add_argument("words", nargs="*", metavar="FILE k=v", help=_OVERRIDES)
    command.add_argument("--count", type=_count, metavar="N", help="trials at most")
    command.add_argument("--backend", choices=("auto", "local", "wandb"), default="auto")
    command.add_argument(
        "--population", type=_population, metavar="N|auto", help="trials trained side by side"
    )
    command.add_argument("--id", metavar="ENTITY/PROJECT/ID", help="a W&B sweep to join")
    command.add_argument("--run-dir", type=_path, metavar="DIR", help="new, or one to go on with")


def report(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "folders", nargs="+", type=_path, metavar="DIR",
        help="a run, a sweep, or several runs to compare",
    )  # fmt: skip
    command.add_argument(
        "--output", type=_path, metavar="FILE.html",
        help="default: report.html in the folder, or here for several; .md and PNGs beside it",
    )  # fmt: skip
    command.add_argument(
        "--scaling", action="store_true", help="how loss falls with size, fitted to the runs"
    )


def promote(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "words", nargs="*", metavar="RUN_DIR NAME k=v",
        help="run folders of one config with different seeds, or a sweep; then the config's name; "
        "k=v: what makes its check small, instead of what fits by itself",
    )  # fmt: skip


def check_sota(command: argparse.ArgumentParser) -> None:
    command.add_argument("names", nargs="*", metavar="NAME", help="default: all of config/sota/")


def launch(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--gpus", type=_gpus, metavar="all|none|0,1", help="default: all there are"
    )
    command.add_argument("--image", metavar="NAME", help="default: mainrun:current")
    command.add_argument("--memory", type=_size, metavar="SIZE", help="of the container, as 60g")
    command.add_argument("--shm-size", type=_size, metavar="SIZE", help="of its /dev/shm")
    command.add_argument("--wait", type=_whole, metavar="SECONDS", help="for a GPU that is taken")
    command.add_argument("--stop", metavar="LABEL", help="stop the job of that label, saved")
    command.add_argument("--reap", action="store_true", help="stop what dead jobs have left")
    command.add_argument("task", nargs="?", default="train", metavar="TASK", help="default: train")
    command.add_argument(
        "task_words", nargs=argparse.REMAINDER, metavar="...", help="as after `mainrun TASK`"
    )


def image(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "what", choices=("build", "smoke", "promote", "rollback", "prune", "update")
    )
    command.add_argument("--target", choices=("cpu", "cuda"), help="default: what the machine has")
    command.add_argument("--tag", metavar="NAME", help="default: mainrun:<commit>")
    command.add_argument("--base-image", metavar="NAME", help="default: the Dockerfile's")


def gpu_status(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="one JSON object")
    command.add_argument("--markdown", action="store_true", help="for a page")


def doctor(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="one JSON object")


def job(command: argparse.ArgumentParser) -> None:
    steps = ("check", "image", "run", "stop", "summary", "status", "update")
    command.add_argument("step", choices=steps, help="inputs are taken from the environment")


def _path(text: str) -> Path:
    return _or_argument_error(user.expanded, text)


def _gpus(text: str) -> str:
    from mainrun import host

    return _or_argument_error(host.checked_gpus, text)


def _size(text: str) -> str:
    from mainrun import host

    return _or_argument_error(host.checked_size, text)


def _or_argument_error(checked: Callable[[str], Checked], text: str) -> Checked:
    try:
        return checked(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _which(text: str) -> str | int:
    return text if text in ("best", "newest") else _count(text)


def _count(text: str) -> int:
    return _at_least(1, int(text))


def _population(text: str) -> int | None:
    return None if text == "auto" else _count(text)


def _steps(text: str) -> range:
    first, _, last = text.partition("-")
    numbers = range(_count(first), int(last or first) + 1)
    if not numbers:
        raise argparse.ArgumentTypeError(f"{text} ends before it begins")
    return numbers


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
