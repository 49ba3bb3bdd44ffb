"""A trained model for other programs: a folder of safetensors, or one that `transformers` opens.

`safetensors` holds any model, under mainrun's own names. A Hugging Face folder holds those that a
class of `transformers` computes exactly as mainrun does; any other is refused with the settings
that stand in the way. Neither format needs `transformers` to be written.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, assert_never

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mainrun import config as configs
from mainrun import probe, run_config, trained
from mainrun.errors import UserError, one_line
from mainrun.export import hugging_face
from mainrun.export.architectures import architecture
from mainrun.trained import Trained, Which

Format = Literal["safetensors", "huggingface"]


def export(
    run_dir: Path,
    output: Path,
    *,
    format: Format,
    checkpoint: Which = "best",
    average: bool = False,
) -> str:
    """Makes the folder `output` of one of a run's checkpoints; see `write`.

    Raises UserError, moreover, where the run has no checkpoint.
    """
    _check_is_new(output)
    if format == "huggingface":  # said before anything is loaded
        model = run_config.load(run_dir).model
        architecture(replace(model, lora=None))
    return write(
        trained.load(run_dir, checkpoint=checkpoint, average=average), output, format=format
    )


def write(found: Trained, output: Path, *, format: Format) -> str:
    """Makes the folder `output` of this model, adapters merged; a line that says what it holds.

    The tensors are the float32 parameters, unrounded. Raises UserError where `output` exists or no
    class holds the model.
    """
    _check_is_new(output)
    found = found.merged()
    params = {name: np.asarray(array) for name, array in found.params.items()}
    match format:
        case "safetensors":
            what = f"{len(params)} parameters under mainrun's names"
            tensors = params
            files = {
                "config.yaml": configs.to_yaml(found.config),
                "tokenizer.json": found.tokenizer.to_str(pretty=True),
            }
        case "huggingface":
            what = architecture(found.config.model)
            tensors = hugging_face.tensors(found.config.model, params, found.network.vocab_size)
            files = hugging_face.files(found.config, found.tokenizer)
        case _:
            assert_never(format)
    _write_whole(output, tensors, files, step=found.step)
    return f"{output}: {what}, checkpoint of step {found.step}"


def _check_is_new(output: Path) -> None:
    if os.path.lexists(output):
        raise UserError(f"{output} exists: choose another --output")
    try:
        probe.check(output)
    except OSError as error:
        raise UserError(f"{output}: cannot be made ({error.strerror})") from error


def _write_whole(
    output: Path, tensors: Mapping[str, np.ndarray], files: Mapping[str, str], *, step: int
) -> None:
    # Under another name first: a process killed here leaves no half model.
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        # transformers insists on a `format`, which says whose tensors they are; the library writes
        # from an array's first byte on, as if none were transposed.
        metadata = {"format": "pt", "mainrun_step": str(step)}
        dense = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        save_file(dense, partial / "model.safetensors", metadata=metadata)
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")
        partial.rename(output)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{output}: cannot be made ({one_line(error)})") from error
