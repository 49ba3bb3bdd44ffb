"""mainrun as a contestant: `python -m benchmarks.ours SETTINGS.json`, lines as `worker.py` says.

It runs the loop of a real run over real batches. Only what PyTorch's side has no
counterpart of is left out: evaluations, checkpoints, and writing the metrics down.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import given
from mainrun import config, parts
from mainrun.compilation import compile_step, initial_state
from mainrun.model.gpt import num_parameters
from mainrun.training import backend, loop, step
from mainrun.training.checkpoint import Progress
from mainrun.training.trainee import Alone


class Surroundings:
    """What the loop calls: nothing is done with what it reports."""

    def __init__(self) -> None:
        self.loss = float("nan")

    def evaluate(self, state: step.TrainState) -> float:
        return 0.0

    def save(self, state: step.TrainState, progress: Progress, *, best: bool) -> None:
        pass

    def saved(self, step: int, like: step.TrainState) -> step.TrainState:
        raise AssertionError("nothing is saved, and the plan goes back to nothing")

    def log(self, event: str, step: int, fields: Mapping[str, float | str]) -> None:
        assert event == "train_step", fields
        self.loss = float(fields["train/loss"])

    def stop_requested(self) -> bool:
        return False


def main(path: str) -> None:
    """Says BEGIN, does one step, says READY, then as many steps as each line asks for."""
    backend.prepare()
    settings = json.loads(Path(path).read_text())
    run = config.load(Path(settings["config"]))
    texts = given.load_windows(Path(settings["windows"]))
    joined = parts.assemble(run, texts)
    compiled = compile_step(run, joined, None)
    state = initial_state(run, joined, None)
    weights = np.load(settings["weights"])
    state = state._replace(params={name: jnp.array(weights[name]) for name in weights})
    trainee = Alone(state, compiled.run, compiled.feed)
    surroundings, progress = Surroundings(), Progress()
    done = 0

    def steps(count: int) -> float:
        """The last one's loss."""
        nonlocal progress, done
        done += count
        plan = dataclasses.replace(
            joined.plan, total_steps=done, eval_every=None, checkpoint_every=done, log_every=1
        )
        progress = loop.drive(loop.course(trainee, progress, plan, surroundings), trainee.take)
        return surroundings.loss

    jax.block_until_ready(trainee.state)
    print("BEGIN {}", flush=True)
    facts = {
        "first_loss": steps(1),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(trainee.state)),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "device": backend.describe_device(),
        "float32_matmul": jax.config.values["jax_default_matmul_precision"] or "default",
        "micro_batches": joined.micro_batches,
        "parameters": num_parameters(trainee.state.params),
    }
    print("READY " + json.dumps(facts), flush=True)
    for line in sys.stdin:
        count = int(line)
        started = time.perf_counter()
        loss = steps(count)
        jax.block_until_ready(trainee.state)
        seconds = (time.perf_counter() - started) / count
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        answer = {"seconds": seconds, "loss": loss, "steps": done, "device_bytes": peak}
        print("R " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
