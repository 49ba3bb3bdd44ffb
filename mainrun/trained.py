"""What a run folder is good for afterwards: its parameters, evaluated, asked for text, built on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from tokenizers import Tokenizer

from mainrun import folder, parts, run_config
from mainrun.config import Config
from mainrun.data import sources, tokenizers
from mainrun.errors import UserError
from mainrun.fingerprint import check_data, is_data
from mainrun.model import lora
from mainrun.model.generate import generate
from mainrun.model.gpt import Gpt, Network, Params
from mainrun.origin import Base, check_same_architecture, fingerprint
from mainrun.record import metrics, read_events
from mainrun.training import backend, evaluate
from mainrun.training.checkpoint import Checkpoints, Damaged

Which = Literal["best", "newest"] | int


@dataclass(frozen=True, eq=False)
class Trained:
    """A network with parameters that its run has kept."""

    config: Config
    tokenizer: Tokenizer
    network: Network
    params: Params
    step: int

    @property
    def model(self) -> Gpt:
        """Token ids in, logits out."""
        return self.network.bind(self.params)

    def merged(self) -> "Trained":
        """The same without adapters: what they learned is part of the weights."""
        adapters = self.config.model.lora
        if adapters is None:
            return self
        plain = replace(self.config.model, lora=None)
        config = replace(
            self.config, model=plain, training=replace(self.config.training, init_from=None)
        )
        network = parts.build_network(config, self.tokenizer.get_vocab_size())
        return Trained(
            config, self.tokenizer, network, lora.merged(self.params, adapters), self.step
        )


def load(
    run_dir: Path,
    overrides: Sequence[str] = (),
    *,
    checkpoint: Which = "best",
    average: bool = False,
) -> Trained:
    """The run's best checkpoint, or its newest, or that of a step: see `step_of`.

    `average` takes the average of the weights, best by its own loss. Raises UserError where there
    is none.
    """
    config = run_config.load(run_dir, overrides)
    if average and config.training.weight_average is None:
        raise UserError(
            f"{run_dir} keeps no average of its weights: train with "
            "training.weight_average.kind=ema"
        )
    backend.prepare()
    tokenizer = folder.tokenizer(run_dir)
    network = parts.build_network(config, tokenizer.get_vocab_size())
    like = jax.eval_shape(lambda: network.init(jax.random.key(0)))
    frozen: Params = {}
    if config.model.lora is not None:
        frozen = find_base(config, run_dir).params
        like, _ = lora.split(like)
    step = step_of(run_dir, checkpoint, "val_average/loss" if average else "val/loss")
    with Checkpoints(run_dir / "checkpoints", read_only=True) as saved:
        try:
            params = saved.restore_params(step, like, average=average)
        except Damaged as error:
            raise UserError(
                f"{run_dir}/checkpoints/{step} is damaged ({error}): put it back from a copy, or "
                f"say --checkpoint STEP; there are {', '.join(map(str, saved.steps()))}"
            ) from error
    return Trained(config, tokenizer, network, frozen | params, step)


def load_base(config: Config) -> Base | None:
    """What `training.init_from` names, or None.

    Raises UserError where that is no run, or its parameters do not fit this model.
    """
    if config.training.init_from is None:
        return None
    run_dir = Path(config.training.init_from)
    if not _is_run(run_dir):
        raise UserError(
            f"training.init_from={run_dir} is no run folder: it has no config.yaml and "
            "tokenizer.json; name the folder that `mainrun train` made"
        )
    check_same_architecture(config, run_config.load(run_dir))
    base = _base(run_dir, None)
    # Only to hear of adapters that fit nowhere before the corpus is read, which can take minutes.
    parts.build_network(config, base.tokenizer.get_vocab_size())
    return base


def base_to_resume(config: Config, run_dir: Path) -> Base | None:
    """What a run needs of its base to go on: all of it under adapters, else nothing.

    Where an override names it, it is found all the same, so that a wrong name is told.
    """
    is_named_anew = config.training.init_from != run_config.load(run_dir).training.init_from
    if config.model.lora is None and not is_named_anew:
        return None
    return find_base(config, run_dir)


def find_base(config: Config, run_dir: Path) -> Base:
    """The base of a run that has one: where it was, or beside the run; or where `config` says now.

    Raises UserError where it is not there, or no longer what it was.
    """
    reference = folder.base_reference(run_dir)
    if reference is None:
        raise UserError(f"{run_dir} has no {folder.BASE}: training did not start from another run")
    was = Path(reference["run_dir"])
    first_day = run_config.history(run_dir)[0][1].load().training.init_from
    places = [was, Path(first_day or was), run_dir.resolve().parent / was.name]
    if config.training.init_from != first_day:
        places = [Path(str(config.training.init_from))]
    others = (place for place in places if place.resolve() != run_dir.resolve())
    found = next(filter(_is_run, others), None)
    remedy = "say where it is with training.init_from=RUN_DIR, or put it beside the run"
    if found is None:
        raise UserError(f"the run that {run_dir} started from is not at {places[0]}: {remedy}")
    base = _base(found, reference["step"])
    if base.fingerprint != reference["fingerprint"]:
        raise UserError(
            f"{found} is not what {run_dir} started from, its parameters differ: {remedy}"
        )
    return base


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and (path / "tokenizer.json").is_file()


def _base(run_dir: Path, step: int | None) -> Base:
    found, beneath = load(run_dir, checkpoint="best" if step is None else step), ""
    stored = found.params
    if found.config.model.lora is not None:
        reference = folder.base_reference(run_dir)
        assert reference is not None  # `load` has followed it
        stored, beneath = lora.split(found.params)[0], reference["fingerprint"]
    return Base(
        run_dir, found.step, found.merged().params, found.tokenizer, fingerprint(stored, beneath)
    )


def step_of(run_dir: Path, checkpoint: Which, loss: str = "val/loss") -> int:
    """The step that this means among the checkpoints there are; of those never scored the newest.

    The best is that of the record; where that is lost, the one that the newest checkpoint knows.
    Raises UserError where the run has no such checkpoint.
    """
    steps = folder.checkpoint_steps(run_dir)
    if not steps:
        raise UserError(f"{run_dir} has no checkpoint yet: resume it with `mainrun resume`")
    match checkpoint:
        case "newest":
            return steps[-1]
        case "best":
            path = run_dir / "events.jsonl"
            losses = {
                int(row["step"]): row[loss]
                for row in (metrics(read_events(path)) if path.is_file() else [])
                if math.isfinite(row.get(loss, math.nan)) and row["step"] in steps
            }
            if losses:
                return min(losses, key=losses.__getitem__)
            with Checkpoints(run_dir / "checkpoints", read_only=True) as saved:
                best = saved.progress(steps[-1]).best_step
            return best if best in steps else steps[-1]
        case step:
            if step not in steps:
                raise UserError(
                    f"{run_dir} has no checkpoint of step {step} (any more): there are "
                    f"{', '.join(map(str, steps))}"
                )
            return step


def evaluate_run(
    run_dir: Path, trained: Trained, source: str | None
) -> tuple[str, dict[str, float]]:
    """What was scored, in words, and the `val/` metrics of it.

    The run's own validation text, or every document of `source`. Raises UserError where the text
    that the run names is no longer the one that it was trained on: its split could be any other.
    """
    config = trained.config
    if source is None:
        texts = parts.read_texts(config, trained.tokenizer)
        otherwise = ", or score all of this text with --data"
        check_data(run_dir, config.data.source, texts.fingerprint, otherwise)
        text, scored_text = texts.validation, "the run's validation text"
    else:
        documents = parts.all_documents(config, source)
        text = parts.validation_text(config, trained.tokenizer, documents)
        scored_text = f"all {len(documents):,} documents of {source}, not the run's validation text"
        those_of_the_run = sources.fingerprint(documents[: config.data.num_documents])
        if is_data(run_dir, those_of_the_run):
            scored_text += ": the text it was trained on among them"
    score_batch = evaluate.make_score_batch(
        trained.network,
        micro_batches=parts.num_micro_batches(config),
        mask_documents=config.data.mask_documents,
        head_tokens=backend.head_tokens(trained.network.vocab_size),
    )
    batch_size, context_length = config.training.batch_size, config.data.context_length
    scored = evaluate.score(score_batch, trained.params, text.windows, batch_size)
    return scored_text, evaluate.metrics(
        scored, text, batch_size=batch_size, context_length=context_length
    )


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

    Raises UserError where the prompt is no text or leaves no room in the context.
    """
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError("--prompt is not UTF-8 text")
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
        np.full(num, len(ids), np.int32),
        jax.random.key(seed),
        max_tokens=min(max_tokens, room),
        eos_id=eos_id,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    return [tokenizers.decode(trained.tokenizer, row[1:]) for row in np.asarray(tokens)]
