"""Whether a long run stays as it began: `python -m benchmarks.steady --steps 5000`.

A real `mainrun train` of a tiny model on packed documents, attention kept inside each. While it
goes on, its resident memory is looked at from outside; when it has ended, its record says how long
each step took and when. What grows with the steps (a list that nobody empties, a cache of
compiled programs, a file's buffer) shows as memory or milliseconds of the later thousands.
"""

import argparse
import datetime
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.population import MAINRUN
from mainrun import config
from mainrun.markdown import table
from mainrun.record import read_events
from mainrun.training import backend

TINY = (
    "data.num_documents=2000",
    "data.packing=documents",
    "data.mask_documents=true",
    "tokenizer.vocab_size=512",
    "model.d_model=16",
    "model.num_layers=2",
    "model.attention.num_heads=2",
    "model.mlp.hidden=32",
    "training.batch_size=4",
    "training.num_samples=0",
    "training.checkpoint={every: {steps: 250}, keep: 1}",
    "tracking.wandb=disabled",
)

_LOOK_SECONDS = 0.2


def measure(steps: int, every: int, folder: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Of a run of so many steps in `folder`: for each `every` of them, its last step, the median
    resident bytes while they were taken, and the median milliseconds of a step."""
    run_dir, base = folder / "run", config.default_config_root() / "base" / "quickstart.yaml"
    words = ["train", str(base), *TINY, f"training.max_steps={steps}", *overrides]
    command = [*MAINRUN, *words, "--run-dir", str(run_dir)]
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            seen = _watched(process)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        assert process.returncode == 0, output.read()[-2000:]
    taken = [e for e in read_events(run_dir / "events.jsonl") if e["event"] == "train_step"]
    stretches = []
    for first in range(0, steps, every):
        events = [e for e in taken if first < e["step"] <= first + every]
        begin, end = (_seconds(e["timestamp"]) for e in (events[0], events[-1]))
        resident = [number for moment, number in seen if begin <= moment <= end]
        stretches.append(
            {
                "last_step": events[-1]["step"],
                "resident_bytes": statistics.median(resident) if resident else None,
                "step_ms": statistics.median(e["perf/step_ms"] for e in events),
            }
        )
    return {"overrides": [*words[2:]], "stretches": stretches}


def markdown(record: Mapping[str, Any]) -> str:
    """A row for each stretch of steps."""
    rows = [
        [f"{s['last_step']:,}", f"{s['resident_bytes'] / 2**20:,.1f} MiB", f"{s['step_ms']:.2f} ms"]
        for s in record["stretches"]
    ]
    return table(["to step", "resident, median", "a step, median"], rows)


def _watched(process: subprocess.Popen[bytes]) -> list[tuple[float, int]]:
    """Moments and resident bytes of the process, to its end; of Linux alone."""
    status, seen = Path(f"/proc/{process.pid}/status"), []
    while process.poll() is None:
        lines = status.read_text().splitlines()
        resident = [int(x.split()[1]) * 1024 for x in lines if x.startswith("VmRSS:")]
        seen += [(time.time(), number) for number in resident]  # none of one that is a zombie
        time.sleep(_LOOK_SECONDS)
    return seen


def _seconds(timestamp: str) -> float:
    return datetime.datetime.fromisoformat(timestamp).timestamp()


def main(arguments: Sequence[str]) -> None:
    from benchmarks import page  # which shows this record among others

    parser = argparse.ArgumentParser(prog="python -m benchmarks.steady", description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=page.FOLDER, help="folder of the records")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="mainrun-steady-") as folder:
        found = measure(options.steps, options.every, Path(folder))
    backend.prepare()
    record = {
        "kind": "steady",
        **report.machine(["python", "-m", "benchmarks.steady", *arguments], ""),
        "device": backend.describe_device(),
        **found,
    }
    page.store(record, options.output / "steady.json")
    print(markdown(record))


if __name__ == "__main__":
    main(sys.argv[1:])
