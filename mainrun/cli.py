"""The command `mainrun`: each subcommand parses its words, then makes one call.

Exit codes: 0 done, 1 the run failed, 2 the user's mistake, 75 stopped on request and resumable.
Heavy imports happen inside the subcommands, so that `mainrun --help` answers at once.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mainrun import huge_pages
from mainrun.errors import RunFailed, Stopped, UserError

if TYPE_CHECKING:
    from mainrun.config import Config

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
    if arguments is None and options.call in (_train, _resume, _sweep, _find_lr, _profile):
        huge_pages.ask()
    try:
        call: Callable[[argparse.Namespace], int | None] = options.call
        return call(options) or 0
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


def _train(options: argparse.Namespace) -> None:
    from mainrun import config

    path, _, settings = _settings(options.words)
    if translated := config.notes(path):
        _tell_all(translated)
        _tell(f"{path} is in the report's layout; its new form: mainrun config {path} > new.yaml")
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

    found = trained.load(options.run_dir, _overrides(options.words), average=options.average)
    metrics = trained.evaluate_run(found, options.data)
    if options.json:
        print(json.dumps({"step": found.step, **metrics}))
        return
    print(f"{'checkpoint':22} step {found.step}")
    for name, value in metrics.items():
        print(f"{name:22} {value:,}" if isinstance(value, int) else f"{name:22} {value:.6f}")


def _generate(options: argparse.Namespace) -> None:
    from mainrun import trained

    found = trained.load(options.run_dir, _overrides(options.words), average=options.average)
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


def _export(options: argparse.Namespace) -> None:
    from mainrun import export

    print(
        export.export(
            options.run_dir,
            options.output,
            format=options.format,
            checkpoint=options.checkpoint,
            average=options.average,
        )
    )


def _sweep(options: argparse.Namespace) -> None:
    from mainrun.sweep import start, sweep_file

    files = [word for word in options.words if "=" not in word]
    if len(files) != 1:
        raise UserError("sweep takes one file, a search space such as config/sweep/quickstart.yaml")
    if Path(files[0]).is_file():
        _tell_all(sweep_file.read(Path(files[0])).notes)
    folder = start.run(
        Path(files[0]),
        [word for word in options.words if "=" in word],
        count=options.count,
        backend=options.backend,
        sweep_id=options.id,
        run_dir=options.run_dir,
        population=options.population,
    )
    from mainrun.analysis import report

    try:
        print(f"report: {report.report([folder], None)}")
    except Exception as error:  # whatever it is, the trials are done, and it can be made again
        _tell(f"no report: {error}; try `mainrun report {folder}`")


def _report(options: argparse.Namespace) -> None:
    if options.scaling:
        from mainrun.analysis import scaling

        print(scaling.report(options.folders, options.output))
        return
    from mainrun.analysis import report

    print(report.report(options.folders, options.output))


def _promote(options: argparse.Namespace) -> None:
    from mainrun import config
    from mainrun.sota import promotion

    *folders, name = [word for word in options.words if "=" not in word] or [""]
    if not folders:
        raise UserError("promote takes run folders and, last, a name: mainrun promote runs/X NAME")
    path = promotion.promote(
        [Path(folder) for folder in folders],
        name,
        config.default_config_root(),
        [word for word in options.words if "=" in word],
        _tell,
    )
    print("\n".join(promotion.summary(path)))


def _check_sota(options: argparse.Namespace) -> int:
    from mainrun import config
    from mainrun.sota import check

    verdicts = check.again(options.names, config.default_config_root(), _tell)
    for verdict in verdicts:
        print(check.told(verdict))
    return 0 if all(verdict.is_reproduced for verdict in verdicts) else 1


def _launch(options: argparse.Namespace) -> int | None:
    from dataclasses import replace

    from mainrun import host, launch, request, stop

    settings = host.load()
    given = {
        name: getattr(options, name)
        for name in ("image", "gpus", "memory", "shm_size", "wait")
        if getattr(options, name) is not None
    }
    settings = replace(settings, **given)
    if options.stop is not None:
        if not launch.stop(settings, options.stop, say=_tell):
            _tell(f"nothing runs under the label {options.stop}")
        return None
    if options.reap:
        _tell(f"{len(launch.reap(settings, say=_tell))} strays removed")
        return None
    asked = request.request_here(options.task, options.task_words, settings)
    with stop.listening() as stopping:
        ending = launch.launch(asked, settings, stopping=stopping, output=print)
    if ending.kind != "finished":
        remedy = f"; {ending.remedy}" if ending.remedy else ""
        print(f"mainrun: {asked.task}: {ending.sentence}{remedy}", file=sys.stderr)
    return ending.exit_code


def _image(options: argparse.Namespace) -> None:
    from dataclasses import replace

    from mainrun import containers, host, images, stop

    settings = host.load()
    here = Path.cwd()
    with stop.listening() as stopping:
        match options.what:
            case "build":
                given = {"target": options.target, "base_image": options.base_image}
                settings = replace(settings, **{k: v for k, v in given.items() if v is not None})
                name = images.build(
                    settings, context=here, tag=options.tag, stopping=stopping, say=_tell
                )
                if options.tag is None:  # what was just built is what `launch` takes
                    _tell(images.promote(containers.connect(), name))
            case "update":
                images.update(settings, context=here, stopping=stopping, say=_tell)
            case "smoke":
                images.smoke_test(containers.connect(), options.tag or settings.image)
            case "promote":
                images.promote(containers.connect(), options.tag or settings.image)
            case "rollback":
                _tell(images.rollback(containers.connect()))
            case _:
                for removed in images.prune(containers.connect(), settings.keep_images):
                    _tell(f"removed {removed}")


def _job(options: argparse.Namespace) -> int | None:
    from mainrun import jobs

    match options.step:
        case "check":
            jobs.check()
        case "image":
            jobs.image()
        case "run":
            return jobs.run()
        case "stop":
            jobs.stop()
        case "summary":
            jobs.summary()
        case "status":
            return 0 if jobs.status(reap=os.environ.get("INPUT_REAP") == "true") else 1
        case _:
            jobs.update(rollback=os.environ.get("INPUT_ROLLBACK") == "true")
    return None


def _gpu_status(options: argparse.Namespace) -> int:
    from mainrun import host, machine, machine_report

    found = machine.read(host.load())
    if options.json:
        print(json.dumps(machine_report.as_dict(found), indent=2))
    else:
        print(machine_report.markdown(found) if options.markdown else machine_report.table(found))
    return 1 if found.problems else 0


def _doctor(options: argparse.Namespace) -> int:
    from mainrun import doctor, host

    checks = doctor.examine(host.load())
    print(json.dumps(doctor.as_dict(checks), indent=2) if options.json else doctor.table(checks))
    return 1 if doctor.has_problems(checks) else 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _tell_all(lines: Iterable[str]) -> None:
    for line in lines:
        _tell(line)


def _config(options: argparse.Namespace) -> None:
    from mainrun import config

    path, overrides = _config_and_overrides(options.words)
    print(config.to_yaml(config.load(path, overrides)), end="")
    _tell_all(config.notes(path) if path else ())


def _memory(options: argparse.Namespace) -> None:
    from mainrun import config

    path, _, settings = _settings(options.words)
    _tell_all(config.notes(path))
    from mainrun import memory

    card = None if options.device is None else memory.named(options.device)
    _tell("compiling the training step")
    found = memory.examine(settings, options.vocab_size, card)
    print(json.dumps(memory.as_dict(found)) if options.json else memory.table(found))


def _profile(options: argparse.Namespace) -> None:
    from mainrun import config

    path, overrides, settings = _settings(options.words)
    _tell_all(config.notes(path))
    from mainrun import profile

    folder = options.output
    if folder is None and not options.no_trace:
        folder = profile.default_folder(path.stem)
    with profile.opened(folder):
        if options.compare:
            chosen = profile.variants(options.compare)
            each = _profile_options(options)
            rows = profile.compare(path, overrides, chosen, each, folder)
            print(json.dumps(profile.as_rows(rows)) if options.json else profile.comparison(rows))
            return
        found = profile.measure(
            settings,
            profile.Chosen(options.steps, options.trace),
            None if options.no_trace or folder is None else folder / "trace",
            tell=_tell,
        )
        if folder is not None:
            profile.write(folder, profile.as_dict(found))
    print(json.dumps(profile.as_dict(found)) if options.json else profile.table(found))


def _profile_options(options: argparse.Namespace) -> list[str]:
    """The options for each of those that are compared."""
    words = ["--steps", str(options.steps)]
    if options.trace is not None:
        words += ["--trace", f"{options.trace.start}-{options.trace.stop - 1}"]
    return [*words, "--no-trace"] if options.no_trace else words


def _find_lr(options: argparse.Namespace) -> None:
    from mainrun import config

    path, _, settings = _settings(options.words)
    _tell_all(config.notes(path))
    from mainrun import learning_rate

    found = learning_rate.find(
        settings,
        learning_rate.Ramp(options.min, options.max, options.steps),
        options.output,
        name=path.stem,
        tell=_tell,
    )
    print(json.dumps(learning_rate.as_dict(found)) if options.json else " ".join(found.overrides))


def _settings(words: Sequence[str]) -> "tuple[Path, list[str], Config]":
    """The config file, the quickstart's where none is named, the overrides, and what they make."""
    from mainrun import config

    path, overrides = _config_and_overrides(words)
    path = path or config.default_config_root() / "base" / "quickstart.yaml"
    return path, overrides, config.load(path, overrides)


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
        ("export", _export, _export_words, "a run's model in a folder for other programs"),
        ("config", _config, _config_words, "print the resolved config"),
        ("find-lr", _find_lr, _find_lr_words, "the learning rate at which the loss falls fastest"),
        ("memory", _memory, _memory_words, "bytes of a training step, by part and as compiled"),
        ("profile", _profile, _profile_words, "a trace of some steps, step time, FLOP utilisation"),
        ("sweep", _sweep, _sweep_words, "trials of a search space in W&B's format"),
        ("report", _report, _report_words, "curves, tables and tests of a run, a sweep or several"),
        ("promote", _promote, _promote_words, "a finished run's config and result in config/sota/"),
        ("check-sota", _check_sota, _check_sota_words, "do promoted configs still reproduce"),
        ("launch", _launch, _launch_words, "a task in its container, cleaned up whatever happens"),
        ("image", _image, _image_words, "build, test, move and remove the containers' images"),
        ("gpu-status", _gpu_status, _gpu_status_words, "the machine's GPUs and what runs on them"),
        ("doctor", _doctor, _doctor_words, "is this machine ready, and what it lacks"),
        ("job", _job, _job_words, "a step of a GitHub workflow's job"),
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
    _average_word(command)
    command.add_argument("--data", metavar="SOURCE", help="another source, all of its documents")
    command.add_argument("--json", action="store_true", help="one JSON object")


def _generate_words(command: argparse.ArgumentParser) -> None:
    def option(name: str, kind: Callable, default: object, metavar: str, does: str) -> None:
        does = f"{does} (default {default})" if default != "" else does
        command.add_argument(name, type=kind, default=default, metavar=metavar, help=does)

    _resume_words(command)
    _average_word(command)
    option("--prompt", str, "", "TEXT", "how each text begins")
    option("--num", _count, 5, "N", "texts")
    option("--max-tokens", _count, 64, "N", "new tokens at most, each")
    option("--temperature", _temperature, 0.8, "X", "0 takes the likeliest token")
    option("--top-k", _whole, 0, "K", "draw from the K likeliest; 0: from all")
    option("--top-p", _fraction, 1.0, "P", "draw from the likeliest that make up P")
    option("--seed", int, 0, "S", "of the draws")


def _export_words(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    command.add_argument(
        "--format", choices=("safetensors", "huggingface"), required=True,
        help="any model under mainrun's names; or what transformers opens, if a class holds it",
    )  # fmt: skip
    command.add_argument("--output", type=Path, metavar="DIR", required=True, help="a new folder")
    command.add_argument("--checkpoint", choices=("best", "newest"), default="best")
    _average_word(command)


def _average_word(command: argparse.ArgumentParser) -> None:
    does = "of the running average of the weights (training.weight_average)"
    command.add_argument("--average", action="store_true", help=does)


def _config_words(command: argparse.ArgumentParser, default: str = "base") -> None:
    does = f"a config file (default: {default}), {_OVERRIDES}"
    command.add_argument("words", nargs="*", metavar="CONFIG k=v", help=does)


def _memory_words(command: argparse.ArgumentParser) -> None:
    _config_words(command, default="quickstart")
    command.add_argument(
        "--vocab-size", type=_count, metavar="N", help="tokens; default: what the config asks for"
    )
    command.add_argument(
        "--device", metavar="CARD", help="a card that need not be here, as h200; default: this one"
    )
    command.add_argument("--json", action="store_true", help="one JSON object")


def _profile_words(command: argparse.ArgumentParser) -> None:
    _config_words(command, default="quickstart")
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
        "--output", type=Path, metavar="DIR", help="a new folder (default: profile/<date>-<name>)"
    )
    command.add_argument("--json", action="store_true", help="one JSON object")


def _find_lr_words(command: argparse.ArgumentParser) -> None:
    _config_words(command, default="quickstart")
    for name, kind, default, metavar, does in (
        ("--min", float, 1e-6, "X", "rate of the first step"),
        ("--max", float, 1.0, "X", "rate of the last step"),
        ("--steps", int, 100, "N", "steps; several times as many lower the answer"),
        ("--output", Path, Path("lr_finder.png"), "FILE", "picture of the losses"),
    ):
        does = f"{does} (default {default})"
        command.add_argument(name, type=kind, default=default, metavar=metavar, help=does)
    command.add_argument("--json", action="store_true", help="one JSON object, with all losses")


def _sweep_words(command: argparse.ArgumentParser) -> None:
    command.add_argument("words", nargs="*", metavar="FILE k=v", help=_OVERRIDES)
    command.add_argument("--count", type=_count, metavar="N", help="trials at most")
    command.add_argument("--backend", choices=("auto", "local", "wandb"), default="auto")
    command.add_argument(
        "--population", type=_population, metavar="N|auto", help="trials trained side by side"
    )
    command.add_argument("--id", metavar="ENTITY/PROJECT/ID", help="a W&B sweep to join")
    command.add_argument("--run-dir", type=Path, metavar="DIR", help="new, or one to go on with")


def _report_words(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR",
        help="a run, a sweep, or several runs to compare",
    )  # fmt: skip
    command.add_argument(
        "--output", type=Path, metavar="FILE.html",
        help="default: report.html in the folder, or here for several; .md and PNGs beside it",
    )  # fmt: skip
    command.add_argument(
        "--scaling", action="store_true", help="how loss falls with size, fitted to the runs"
    )


def _promote_words(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "words", nargs="*", metavar="RUN_DIR NAME k=v",
        help="run folders of one config with different seeds, or a sweep; then the config's name; "
        "k=v: what makes its check small, instead of what fits by itself",
    )  # fmt: skip


def _check_sota_words(command: argparse.ArgumentParser) -> None:
    command.add_argument("names", nargs="*", metavar="NAME", help="default: all of config/sota/")


def _launch_words(command: argparse.ArgumentParser) -> None:
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


def _image_words(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "what", choices=("build", "smoke", "promote", "rollback", "prune", "update")
    )
    command.add_argument("--target", choices=("cpu", "cuda"), help="default: what the machine has")
    command.add_argument("--tag", metavar="NAME", help="default: mainrun:<commit>")
    command.add_argument("--base-image", metavar="NAME", help="default: the Dockerfile's")


def _gpu_status_words(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="one JSON object")
    command.add_argument("--markdown", action="store_true", help="for a page")


def _doctor_words(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="one JSON object")


def _job_words(command: argparse.ArgumentParser) -> None:
    steps = ("check", "image", "run", "stop", "summary", "status", "update")
    command.add_argument("step", choices=steps, help="inputs are taken from the environment")


def _gpus(text: str) -> str:
    from mainrun import host

    return _or_argument_error(host.checked_gpus, text)


def _size(text: str) -> str:
    from mainrun import host

    return _or_argument_error(host.checked_size, text)


def _or_argument_error(checked: Callable[[str], str], text: str) -> str:
    try:
        return checked(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


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
