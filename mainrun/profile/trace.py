"""A trace of what host and device do, by `jax.profiler`, in a folder of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax


@dataclass
class Trace:
    """Of a block: once it has ended, one file in its folder is for Perfetto; XProf reads all."""

    folder: Path
    for_perfetto: Path | None = None


@contextmanager
def traced(folder: Path) -> Iterator[Trace]:
    """Traces the block; steps and their parts are told apart where they are annotated."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of a Python function would be an event
    trace = Trace(folder)
    with jax.profiler.trace(folder, create_perfetto_trace=True, profiler_options=options):
        yield trace
    (trace.for_perfetto,) = folder.rglob("perfetto_trace.json.gz")
