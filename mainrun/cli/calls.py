"""What each subcommand calls, once its words are parsed.

Heavy imports happen inside, so that `mainrun --help` answers at once.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mainrun.errors import UserError

if TYPE_CHECKING:
    from mainrun.config import Config


def train(options: argparse.Namespace) -> None:
    from mainrun import config

    path, _, settings = _settings(options.words)
    if translated := config.notes(path):
        _tell_all(translated)
        _tell(f"{path} is in the report's layout; its new form: mainrun config {path} > new.yaml")
    from mainrun import folder, run

    if options.run_dir is not None or not options.dry_run:
        folder.check_new(options.run_dir, path.stem)
    if options.dry_run:
        print(run.dry_run(settings))
        return
    run.train(settings, options.run_dir, path.stem, command=options.command_line)


def resume(options: argparse.Namespace) -> None:
    from mainrun import run

    run.resume(
        options.run_dir,
        _overrides(options.words),
        command=options.command_line,
        checkpoint=options.checkpoint,
    )


def evaluate(options: argparse.Namespace) -> None:
    from mainrun import trained

    found = trained.load(
        options.run_dir,
        _overrides(options.words),
        checkpoint=options.checkpoint,
        average=options.average,
    )
    text, metrics = trained.evaluate_run(options.run_dir, found, options.data)
    if options.json:
        another = {} if options.data is None else {"data": options.data}
        print(json.dumps({"step": found.step, **another, **metrics}))
        return
    print(f"{'checkpoint':22} step {found.step}")
    print(f"{'text':22} {text}")
    for name, value in metrics.items():
        print(f"{name:22} {value:,}" if isinstance(value, int) else f"{name:22} {value:.6f}")


def generate(options: argparse.Namespace) -> None:
    from mainrun import trained

    found = trained.load(
        options.run_dir,
        _overrides(options.words),
        checkpoint=options.checkpoint,
        average=options.average,
    )
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


def export(options: argparse.Namespace) -> None:
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


def sweep(options: argparse.Namespace) -> None:
    from mainrun.sweep import start, sweep_file

    files, overrides = _split(options.words)
    if len(files) != 1:
        raise UserError("sweep takes one file, a search space such as config/sweep/quickstart.yaml")
    if Path(files[0]).is_file():
        _tell_all(sweep_file.read(Path(files[0])).notes)
    folder = start.run(
        Path(files[0]),
        overrides,
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


def report(options: argparse.Namespace) -> None:
    if options.scaling:
        from mainrun.analysis import scaling

        print(scaling.report(options.folders, options.output))
        return
    from mainrun.analysis import report

    print(report.report(options.folders, options.output))


def promote(options: argparse.Namespace) -> None:
    from mainrun import config
    from mainrun.sota import promotion

    named, overrides = _split(options.words)
    *folders, name = named or [""]
    if not folders:
        raise UserError("promote takes run folders and, last, a name: mainrun promote runs/X NAME")
    path = promotion.promote(
        [Path(folder) for folder in folders],
        name,
        config.default_config_root(),
        overrides,
        _tell,
    )
    print("\n".join(promotion.summary(path)))


def check_sota(options: argparse.Namespace) -> int:
    from mainrun import config
    from mainrun.sota import check

    verdicts = check.again(options.names, config.default_config_root(), _tell)
    for verdict in verdicts:
        print(check.told(verdict))
    return 0 if all(verdict.is_reproduced for verdict in verdicts) else 1


def launch(options: argparse.Namespace) -> int | None:
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


def image(options: argparse.Namespace) -> None:
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


def job(options: argparse.Namespace) -> int | None:
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


def gpu_status(options: argparse.Namespace) -> int:
    from mainrun import host, machine, machine_report

    found = machine.read(host.load())
    if options.json:
        print(json.dumps(machine_report.as_dict(found), indent=2))
    else:
        print(machine_report.markdown(found) if options.markdown else machine_report.table(found))
    return 1 if found.problems else 0


def doctor(options: argparse.Namespace) -> int:
    from mainrun import doctor, host

    checks = doctor.examine(host.load())
    print(json.dumps(doctor.as_dict(checks), indent=2) if options.json else doctor.table(checks))
    return 1 if doctor.has_problems(checks) else 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _tell_all(lines: Iterable[str]) -> None:
    for line in lines:
        _tell(line)


def config(options: argparse.Namespace) -> None:
    from mainrun import config

    path, overrides = _config_and_overrides(options.words)
    print(config.to_yaml(config.load(path, overrides)), end="")
    _tell_all(config.notes(path) if path else ())


def memory(options: argparse.Namespace) -> None:
    from mainrun import config

    path, _, settings = _settings(options.words)
    _tell_all(config.notes(path))
    from mainrun import memory

    card = None if options.device is None else memory.named(options.device)
    _tell("compiling the training step")
    found = memory.examine(settings, options.vocab_size, card)
    print(json.dumps(memory.as_dict(found)) if options.json else memory.table(found))


def profile(options: argparse.Namespace) -> None:
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


def find_lr(options: argparse.Namespace) -> None:
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
    files, overrides = _split(words)
    if len(files) > 1:
        raise UserError(f"one config file at a time, not {' and '.join(files)}")
    return (Path(files[0]) if files else None), overrides


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without a `=`, and those with one."""
    return [word for word in words if "=" not in word], [word for word in words if "=" in word]


def _overrides(words: Sequence[str]) -> list[str]:
    for word in words:
        if "=" not in word:
            raise UserError(f"{word!r} is not an override: write key.path=value")
    return list(words)
