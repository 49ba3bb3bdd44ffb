"""What each kind of attention costs as the context grows: `python -m benchmarks.attention`.

One forward and backward pass of attention alone, projections left out: batch 1, 8 heads of 64,
float32, against dense causal attention in this tree. Peak bytes are the compiler's temporaries of
that pass. The kinds are timed in turn, round after round, so that a slow moment meets them all;
times are medians, and ratios are to the same round's dense time.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import report
from mainrun import config
from mainrun.model import masks, sparse, sparsek
from mainrun.model.attention import attend
from mainrun.training import backend

HEADS, DIM = 8, 64
NEAR = 128  # window and stride, tokens

Pass = Callable[..., tuple[jax.Array, ...]]


def kinds() -> dict[str, Callable[..., jax.Array]]:
    """What is timed: q, k, v [batch, heads, time, dim] and a score for each key to the output."""

    def dense(q: jax.Array, k: jax.Array, v: jax.Array, scores: jax.Array) -> jax.Array:
        places = jnp.arange(q.shape[2])
        return attend(q, k, v, masks.grid(masks.causal, places, places, HEADS))

    def tiled(settings: sparse.Tiled) -> Callable[..., jax.Array]:
        return lambda q, k, v, scores: sparse.attend(q, k, v, settings)

    def selected(q: jax.Array, k: jax.Array, v: jax.Array, scores: jax.Array) -> jax.Array:
        return sparsek.attend(q, k, v, scores, num_selected=64, window_including_self=64)

    patterns: dict[str, config.Pattern] = {
        "local": config.LocalKeys(window_including_self=NEAR),
        "fixed": config.FixedKeys(stride=NEAR, num_verts=4, vertsize=8),
        "strided": config.StridedKeys(stride=NEAR),
    }
    fixed_blocks = config.FixedKeys(stride=NEAR, num_verts=4, vertsize=1)
    return {
        "dense": dense,
        f"causal, window {NEAR}": tiled(config.CausalAttention(window_including_self=NEAR)),
        **{
            f"sparse {name}, {NEAR}": tiled(config.SparseAttention(pattern=pattern))
            for name, pattern in patterns.items()
        },
        f"sparse fixed, {NEAR}, blocks of 16": tiled(
            config.SparseAttention(block_size=16, pattern=fixed_blocks)
        ),
        "sparsek, 64 selected, window 64": selected,
    }


def compiled(function: Callable[..., jax.Array], length: int) -> jax.stages.Compiled:
    """The gradients of everything that goes in, for texts of this length."""

    def summed(*inputs: jax.Array) -> jax.Array:
        return (function(*inputs) * jnp.cos(jnp.arange(DIM))).sum()

    shapes = [jax.ShapeDtypeStruct((1, HEADS, length, DIM), jnp.float32)] * 3
    scores = jax.ShapeDtypeStruct((1, HEADS, length), jnp.float32)
    return jax.jit(jax.grad(summed, argnums=(0, 1, 2, 3))).lower(*shapes, scores).compile()


def inputs(length: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(length), 4)
    return (
        *(jax.random.normal(key, (1, HEADS, length, DIM)) for key in keys[:3]),
        jax.random.normal(keys[3], (1, HEADS, length)),
    )


def measure(lengths: Sequence[int], rounds: int) -> list[dict[str, object]]:
    """A row for each kind and length."""
    rows = []
    for length in lengths:
        given = inputs(length)
        passes = {name: compiled(function, length) for name, function in kinds().items()}
        seconds: dict[str, list[float]] = {name: [] for name in passes}
        for number in range(rounds + 1):
            for name, run in passes.items():
                started = time.perf_counter()
                jax.block_until_ready(run(*given))
                if number:  # the first warms caches
                    seconds[name].append(time.perf_counter() - started)
        for name, run in passes.items():
            analysis = run.memory_analysis()
            assert analysis is not None
            ratio = [s / d for s, d in zip(seconds[name], seconds["dense"], strict=True)]
            rows.append(
                {
                    "kind": name,
                    "context": length,
                    "seconds": statistics.median(seconds[name]),
                    "to_dense": statistics.median(ratio),
                    "peak_bytes": analysis.temp_size_in_bytes,
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def markdown(rows: Sequence[dict], lengths: Sequence[int]) -> str:
    """A row for each kind: milliseconds and MiB at each context."""
    lines = [
        "| | " + " | ".join(f"{n:,}" for n in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for kind in kinds():
        mine = [row for row in rows if row["kind"] == kind]
        cells = [f"{1e3 * r['seconds']:,.0f} ms, {r['peak_bytes'] / 2**20:,.0f} MiB" for r in mine]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="FILE.json and FILE.md beside it")
    options = parser.parse_args(arguments)
    backend.prepare()
    rows = measure(options.lengths, options.rounds)
    text = markdown(rows, options.lengths)
    print(text)
    if options.output is not None:
        command = ["python", "-m", "benchmarks.attention", *arguments]
        record = {**report.machine(command, fingerprint="random inputs"), "rows": rows}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
        options.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
