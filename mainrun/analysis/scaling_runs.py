"""Runs of different sizes, as points of a scaling law: parameters, tokens, loss.

N is counted twice: all parameters, as Hoffmann et al. 2022 (arXiv:2203.15556) do, and those outside
the embeddings, as Kaplan et al. 2020 (arXiv:2001.08361). D is the tokens that training has seen,
repeated ones counted again. The loss is `val/nats_per_token` after the last step, where the
schedule has come to its end; the best of the run's evaluations stands beside it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax

from mainrun import config as configs
from mainrun import run_config
from mainrun.config import Config
from mainrun.errors import UserError
from mainrun.model.gpt import Network, num_parameters
from mainrun.record import metrics, read_events
from mainrun.result import last_event, read_result

_EMBEDDINGS = ("token_embedding.", "position_embedding.", "head.")
"""Tables with a row for each token or position; an untied head is one as well."""


@dataclass(frozen=True)
class Run:
    name: str
    seed: int
    parameters: int
    non_embedding: int
    tokens: int
    epochs: float
    last: float
    """Nats per token of the validation text after the last step."""
    best: float
    num_documents: int | None
    vocab_size: int


@dataclass(frozen=True)
class Found:
    runs: Sequence[Run]
    left_out: Sequence[tuple[str, str]]
    """Names of runs that are no points, and why."""


def read(folders: Sequence[Path]) -> Found:
    """The runs of these run folders and sweep folders.

    Raises UserError where a folder is neither, or two runs' losses do not compare.
    """
    runs: list[Run] = []
    left_out: list[tuple[str, str]] = []
    first: Config | None = None
    for run_dir in dict.fromkeys(_run_dirs(folders)):
        config = run_config.load(run_dir)
        first = first or config
        _check_comparable(first, config, run_dir)
        found = _run(run_dir, config)
        if isinstance(found, Run):
            runs.append(found)
        else:
            left_out.append((run_dir.resolve().name, found))
    for run in runs:
        if run.vocab_size != runs[0].vocab_size:
            raise UserError(
                f"{run.name} has a vocabulary of {run.vocab_size:,} tokens and {runs[0].name} of "
                f"{runs[0].vocab_size:,}: losses per token compare within one tokenizer only"
            )
    return Found(runs, left_out)


def non_embedding(params: Iterable[tuple[str, int]]) -> int:
    """The parameters outside the embeddings, of names and sizes."""
    return sum(size for name, size in params if not name.startswith(_EMBEDDINGS))


def _run_dirs(folders: Sequence[Path]) -> Iterator[Path]:
    for path in folders:
        if not (path / "sweep.yaml").is_file():
            yield path
            continue
        trials = sorted(p.parent for p in path.glob("trials/*/config.yaml"))
        if not trials:
            raise UserError(f"{path} has no trial with a run folder yet: start it with the sweep")
        yield from trials


def _run(run_dir: Path, config: Config) -> Run | str:
    """The run as a point, or why it is none."""
    events = read_events(run_dir / "events.jsonl")
    told = read_result(run_dir, events)
    if told["status"] != "finished":
        return f"{told['status']}, not finished"
    if moved := run_config.moved(run_dir, events):
        return f"resumed with {', '.join(moved)}"
    losses = [r["val/nats_per_token"] for r in metrics(events) if "val/nats_per_token" in r]
    if not losses or not math.isfinite(losses[-1]):
        return "its last loss is no number"
    started = last_event(events, "run_started")
    tokens = told["tokens_seen"]
    if tokens is None or not {"parameters", "vocab_size"} <= started.keys():
        return "its record no longer says how it began"
    if not tokens:
        return "it has seen no tokens"
    every, outside = _sizes(config.model, config.data.context_length, started["vocab_size"])
    assert every == started["parameters"], run_dir
    return Run(
        name=run_dir.resolve().name,
        seed=config.seed,
        parameters=every,
        non_embedding=outside,
        tokens=tokens,
        epochs=told["steps"] / started["steps_per_epoch"],
        last=losses[-1],
        best=min(filter(math.isfinite, losses)),
        num_documents=config.data.num_documents,
        vocab_size=started["vocab_size"],
    )


@cache
def _sizes(model: configs.Model, context_length: int, vocab_size: int) -> tuple[int, int]:
    """All parameters, and those outside the embeddings."""
    network = Network(
        model, vocab_size=vocab_size, context_length=context_length, precision="float32"
    )
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0)))
    sizes = ((name, int(leaf.size)) for name, leaf in shapes.items())
    return num_parameters(shapes), non_embedding(sizes)


def _check_comparable(first: Config, config: Config, run_dir: Path) -> None:
    ours, theirs = (configs.leaves(configs.as_dict(x)) for x in (first, config))
    for path in dict.fromkeys([*ours, *theirs]):
        if not configs.is_of_text(path) or ours.get(path) == theirs.get(path):
            continue
        raise UserError(
            f"{run_dir}: `{path}` is {theirs.get(path)} and elsewhere {ours.get(path)}: losses per "
            "token compare only where text, tokenizer and context are the same"
        )
