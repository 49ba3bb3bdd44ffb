"""The command: `task bench -- --rounds 20`.

Some 45 minutes of two quiet cores, half of it the size `large`; a GPU, where there is one, some
15 minutes more.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import contestants, given, page, pytorch, race, ratios, report
from benchmarks.contestants import Contestant
from benchmarks.sizes import SIZES, bytes_per_step
from mainrun import config, parts
from mainrun.training import flops

TITLES = Path("../shared/data/hn_titles.txt")  # from the repository's root, where this is run


def main(arguments: Sequence[str]) -> int:
    """Runs the comparisons and writes them; 1 when a row was refused or PyTorch is missing."""
    options = _parser().parse_args(arguments)
    torch = pytorch.interpreter()
    if torch is None:
        print(pytorch.MISSING, file=sys.stderr)
        return 1
    jax.config.update("jax_platforms", "cpu")  # of this process: the GPU is the contestants'
    gpu = _gpu()
    command = ["python", "-m", "benchmarks", *arguments]
    is_refused = False
    for size in options.sizes:
        record = _record(size, gpu, torch, options, command)
        page.store(record, options.output / f"{size}.json")
        print(report.markdown(record))
        rows = [row for c in record["comparisons"] for row in c["rows"].values()]
        is_refused = is_refused or any(row["refused"] for row in rows)
    return int(is_refused)


def _record(
    size: str, gpu: str | None, torch: Path, options: argparse.Namespace, command: Sequence[str]
) -> dict[str, Any]:
    """Of one size on all of its devices that are here, as JSON has it."""
    run = _config(size, options.overrides)
    texts = parts.read_texts(run)
    devices, results = SIZES[size][0], []
    left_out = {} if _has_amx() or "cpu" not in devices else {"cpu": "this CPU has no AMX"}
    with tempfile.TemporaryDirectory(prefix="mainrun-bench-") as name:
        folder = Path(name)
        settings = equal_settings(run, texts, folder)
        for device in devices:
            if device == "gpu" and gpu is None:
                continue
            has_torch = device == "cpu" or pytorch.sees_gpu(torch)
            field = contestants.field(
                device, bfloat16=device not in left_out, torch=torch if has_torch else None
            )
            results.append(_compare(field, settings, run, folder, options))
    record = {
        "kind": "steps",
        **report.machine(command, texts.fingerprint),
        "size": size,
        "devices": devices,
        "left_out": left_out,
        "config": config.as_dict(run),
        "vocab_size": texts.tokenizer.get_vocab_size(),
        "rounds": options.rounds,
        "steps_per_round": options.steps,
        "gpu": gpu or "none",
        "comparisons": [dataclasses.asdict(comparison) for comparison in results],
    }
    read_back: dict[str, Any] = json.loads(json.dumps(record))
    return read_back


def equal_settings(run: config.Config, texts: parts.Texts, folder: Path) -> dict[str, Any]:
    """What both sides are told; writes the windows and weights they read into `folder`."""
    joined = parts.assemble(run, texts)
    settings = pytorch.settings(
        run,
        vocab_size=joined.network.vocab_size,
        total_steps=joined.plan.total_steps,
        steps_per_epoch=joined.steps_per_epoch,
    )
    return {
        **settings,
        "windows": str(given.save_windows(texts, folder)),
        "weights": str(given.save_weights(joined.network, run.seed, folder)),
    }


def _compare(
    field: Sequence[Contestant],
    settings: dict[str, Any],
    run: config.Config,
    folder: Path,
    options: argparse.Namespace,
) -> report.Comparison:
    commands = {
        contestant: contestants.command(contestant, settings, run, folder) for contestant in field
    }
    records, facts = race.rounds(
        commands,
        folder,
        count=options.drop + options.rounds,
        steps=options.steps,
        seed=run.seed,
        say=_say,
    )
    parameters, state_bytes = next(
        (f["parameters"], f["state_bytes"]) for f in facts.values() if "state_bytes" in f
    )
    return report.Comparison(
        device=field[0].device,
        reference=field[0].name,
        drop=options.drop,
        rows=ratios.rows(
            records, field[0].name, drop=options.drop, rivals=contestants.rivals(field)
        ),
        records=records,
        starts=race.starts(commands, folder, count=options.starts, say=_say),
        facts=facts,
        peaks=_peaks(field[0], folder),
        flops_per_step=_flops_per_step(run, settings["model"]["vocab_size"]),
        bytes_per_step=bytes_per_step(state_bytes, parameters),
    )


def _flops_per_step(run: config.Config, vocab_size: int) -> float:
    network = parts.build_network(run, vocab_size)
    tokens = run.training.batch_size * run.data.context_length
    return tokens * flops.training(network, run.training.regularization).total


def _peaks(contestant: Contestant, folder: Path) -> dict[str, Any]:
    """What the device can do at most, measured while the contestants are gone."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peaks"],
        env=contestants.environment(contestant, folder / "cache"),
        cwd=pytorch.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    peaks: dict[str, Any] = json.loads(done.stdout)
    return peaks


def _config(size: str, overrides: Sequence[str]) -> config.Config:
    """The run that is timed. Its paths stay relative: they are written into the report."""
    source = f"file:{TITLES}" if TITLES.exists() else "python-docs"
    return config.load(
        Path("config/base/baseline.yaml"),
        [f"data.source={source}", "data.num_documents=null", *SIZES[size][1], *overrides],
    )


def _gpu() -> str | None:
    """The name of the GPU that JAX sees. In a process of its own: this one is to stay small."""
    program = (
        "import jax; d = jax.devices()[0]; print(d.device_kind if d.platform != 'cpu' else '')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return done.stdout.strip() or None


def _has_amx() -> bool:
    """Whether bfloat16 is faster than float32 on this CPU at all."""
    info = Path("/proc/cpuinfo")
    return info.exists() and "amx_bf16" in info.read_text()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Whole optimizer steps of mainrun against the equal PyTorch step.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help=f"settings that differ from the size's, for both sides; the tokens are those of "
        f"data.source (file:{TITLES} where it is, else python-docs)",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=SIZES,
        default=[size for size in SIZES if size != "tiny"],
        help="of the model; each on the CPU, the GPU or both (default: all but `tiny`)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--drop", type=int, default=2, help="rounds before them (default 2)")
    parser.add_argument("--steps", type=int, default=1, help="steps in a round (default 1)")
    parser.add_argument(
        "--starts", type=int, default=3, help="cold and warm starts of each contestant (default 3)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=page.FOLDER,
        help=f"folder of the records; beside it the page of them all (default {page.FOLDER})",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
