"""The command: `python -m tests.bench --size baseline --output build/bench`."""

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

from mainrun import config, parts
from tests.bench import contestants, given, pytorch, race, ratios, report
from tests.bench.contestants import Contestant, Device

TITLES = Path("../shared/data/hn_titles.txt")  # from the repository's root, where this is run

SIZES = {
    # The original assessment's run: 27 million parameters, 64 windows of 128 tokens.
    "baseline": (),
    # Everything real but small: whether the harness works, not how fast anything is.
    "small": (
        "tokenizer.vocab_size=512",
        "data.num_documents=2000",
        "data.context_length=32",
        "model.d_model=32",
        "model.num_layers=2",
        "model.mlp.hidden=64",
        "model.attention.num_heads=4",
        "training.batch_size=16",
    ),
}


def main(arguments: Sequence[str]) -> int:
    """Runs the comparison and writes it; 1 when a row was refused or PyTorch is missing."""
    options = _parser().parse_args(arguments)
    torch = pytorch.interpreter()
    if torch is None:
        print(pytorch.MISSING, file=sys.stderr)
        return 1
    jax.config.update("jax_platforms", "cpu")  # of this process: the GPU is the contestants'
    run = _config(options.size, options.overrides)
    texts = parts.read_texts(run)
    devices: list[Device] = ["cpu"]
    if gpu := _gpu():
        devices.append("gpu")
    results = []
    with tempfile.TemporaryDirectory(prefix="mainrun-bench-") as name:
        folder = Path(name)
        settings = equal_settings(run, texts, folder)
        for device in devices:
            has_torch = device == "cpu" or pytorch.sees_gpu(torch)
            field = contestants.field(
                device, bfloat16=options.bf16, torch=torch if has_torch else None
            )
            results.append(_compare(field, settings, run, folder, options))

    record = {
        **report.machine(["python", "-m", "tests.bench", *arguments], texts.fingerprint),
        "size": options.size,
        "config": config.as_dict(run),
        "vocab_size": texts.tokenizer.get_vocab_size(),
        "rounds": options.rounds,
        "steps_per_round": options.steps,
        "gpu": gpu or "not run: JAX sees none here",
        "comparisons": [dataclasses.asdict(comparison) for comparison in results],
    }
    text = report.markdown(record, results)
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
        options.output.with_suffix(".md").write_text(text)
    return int(any(row.refused for result in results for row in result.rows.values()))


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
    return report.Comparison(
        device=field[0].device,
        reference=field[0].name,
        drop=options.drop,
        rows=ratios.rows(records, field[0].name, drop=options.drop),
        records=records,
        starts=race.starts(commands, folder, count=options.starts, say=_say),
        facts=facts,
    )


def _config(size: str, overrides: Sequence[str]) -> config.Config:
    """The run that is timed. Its paths stay relative: they are written into the report."""
    source = f"file:{TITLES}" if TITLES.exists() else "python-docs"
    return config.load(
        Path("config/base/baseline.yaml"),
        [f"data.source={source}", "data.num_documents=null", *SIZES[size], *overrides],
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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
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
    parser.add_argument("--size", choices=SIZES, default="baseline")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--drop", type=int, default=2, help="rounds before them (default 2)")
    parser.add_argument("--steps", type=int, default=1, help="steps in a round (default 1)")
    parser.add_argument(
        "--starts", type=int, default=3, help="cold and warm starts of each contestant (default 3)"
    )
    parser.add_argument("--bf16", action="store_true", help="bfloat16 rows too")
    parser.add_argument("--output", type=Path, help="writes this name with .md and .json")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
