"""What a run folder is good for afterwards: its best parameters, evaluated or asked for text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer

from mainrun import folder, parts
from mainrun.config import Config
from mainrun.data import tokenizers
from mainrun.errors import UserError
from mainrun.model.generate import generate
from mainrun.model.gpt import Network, Params
from mainrun.record import metrics, read_events
from mainrun.training import backend, evaluate
from mainrun.training.checkpoint import Checkpoints


@dataclass(frozen=True, eq=False)
class Trained:
    """A network with the best parameters that its run has kept."""

    config: Config
    tokenizer: Tokenizer
    network: Network
    params: Params
    step: int


def load(run_dir: Path, overrides: Sequence[str] = ()) -> Trained:
    """The best checkpoint by `val/loss`, else the newest. Raises UserError where there is none."""
    config = folder.stored_config(run_dir, overrides)
    backend.prepare()
    tokenizer = tokenizers.load(run_dir / "tokenizer.json")
    network = parts.build_network(config, tokenizer)
    like = jax.eval_shape(lambda: network.init(jax.random.key(0)))
    checkpoints = run_dir / "checkpoints"
    if not checkpoints.is_dir():
        raise UserError(f"{run_dir} has no checkpoint yet: resume it with `mainrun resume`")
    with Checkpoints(checkpoints, read_only=True) as saved:
        kept = saved.steps()
        if not kept:
            raise UserError(f"{run_dir} has no checkpoint yet: resume it with `mainrun resume`")
        losses = {
            int(row["step"]): row["val/loss"]
            for row in metrics(read_events(run_dir / "events.jsonl"))
            if "val/loss" in row and row["step"] in kept
        }
        step = min(losses, key=lambda s: losses[s]) if losses else kept[-1]
        try:
            params = saved.restore_params(step, like)
        except Exception as error:  # damage has many shapes
            raise UserError(
                f"{run_dir}/checkpoints/{step} is damaged ({error}); remove it to use another"
            ) from error
    return Trained(config, tokenizer, network, params, step)


def evaluate_run(trained: Trained, source: str | None) -> dict[str, float]:
    """The `val/` metrics on the run's own validation text, or on every document of `source`."""
    config = trained.config
    if source is None:
        text = parts.read_texts(config, trained.tokenizer).validation
    else:
        documents = parts.all_documents(config, source)
        text = parts.validation_text(config, trained.tokenizer, documents)
    score_batch = evaluate.make_score_batch(
        trained.network,
        micro_batches=parts.num_micro_batches(config),
        mask_documents=config.data.mask_documents,
    )
    batch_size, context_length = config.training.batch_size, config.data.context_length
    nll = evaluate.score(score_batch, trained.params, text.windows, batch_size)
    return evaluate.metrics(nll, text, batch_size=batch_size, context_length=context_length)


def generate_texts(
    trained: Trained,
    *,
    prompt: str,
    num: int,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> list[str]:
    """`num` continuations of the prompt, the prompt included, each up to the end of its document.

    Raises UserError where the prompt leaves no room in the context.
    """
    eos_id = tokenizers.special_id(trained.tokenizer, tokenizers.EOS)
    ids = [eos_id, *tokenizers.encode(trained.tokenizer, [prompt])[0]] if prompt else [eos_id]
    room = trained.network.context_length - len(ids)
    if room < 1:
        raise UserError(
            f"--prompt has {len(ids) - 1} tokens and the model's context is "
            f"data.context_length={trained.network.context_length}: shorten it to at most "
            f"{trained.network.context_length - 2} tokens"
        )
    tokens = generate(
        trained.network,
        trained.params,
        np.tile(np.array(ids, np.int32), (num, 1)),
        jax.random.key(seed),
        max_tokens=min(max_tokens, room),
        eos_id=eos_id,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    return [tokenizers.decode(trained.tokenizer, row[1:]) for row in np.asarray(tokens)]
