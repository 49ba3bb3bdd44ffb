"""A config's parts: its texts in windows, its network, its optimizer, its plan.

All of it is a function of the config (and, for a run that exists, of its stored tokenizer), so
training, resuming and evaluating see the same data and the same network.
"""

from dataclasses import dataclass, replace

import optax
from tokenizers import Tokenizer

from mainrun.config import Config, Tiktoken
from mainrun.data import batches, sources, tokenizers
from mainrun.data.batches import Windows
from mainrun.errors import UserError
from mainrun.model.gpt import Network
from mainrun.training import backend
from mainrun.training import optimizer as optimizers
from mainrun.training.evaluate import Text
from mainrun.training.loop import Plan


@dataclass(frozen=True, eq=False)
class Texts:
    """Training windows, the validation text, and what they were made of."""

    tokenizer: Tokenizer
    train: Windows
    validation: Text
    num_train_documents: int
    num_train_tokens: int
    fingerprint: str

    @property
    def eos_id(self) -> int:
        return tokenizers.special_id(self.tokenizer, tokenizers.EOS)


@dataclass(frozen=True, eq=False)
class Parts:
    """What a training run is made of."""

    texts: Texts
    network: Network
    learning_rate: optax.Schedule
    optimizer: optax.GradientTransformation
    plan: Plan
    steps_per_epoch: int
    micro_batches: int


def read_texts(config: Config, tokenizer: Tokenizer | None = None) -> Texts:
    """The corpus, split and then tokenized; without a tokenizer, one is fitted.

    Raises UserError where the source cannot be read or is too small.
    """
    documents = sources.documents(config.data, config.seed)
    train, validation = sources.split(documents, config.data.validation_fraction)
    if tokenizer is None:
        tokenizer = tokenizers.fit(config.tokenizer, _shown(config, documents, train))
    train_ids = tokenizers.encode(tokenizer, train)
    return Texts(
        tokenizer=tokenizer,
        train=_windows(config, tokenizer, train_ids),
        validation=validation_text(config, tokenizer, validation),
        num_train_documents=len(train),
        num_train_tokens=sum(map(len, train_ids)) + len(train),
        fingerprint=sources.fingerprint(documents),
    )


def _shown(config: Config, documents: list[str], train: list[str]) -> list[str]:
    """What the tokenizer sees while it is fitted, or only tried."""
    match config.tokenizer:
        case Tiktoken():
            return train
        case fitted:
            return documents if fitted.fit_on == "all" else train


def validation_text(config: Config, tokenizer: Tokenizer, documents: list[str]) -> Text:
    """The documents ready to be scored. Raises UserError when they fill not one window."""
    ids = tokenizers.encode(tokenizer, documents)
    tokens = sum(map(len, ids)) + len(ids)
    if tokens < config.data.context_length:
        raise UserError(
            f"the validation text has {tokens} tokens, fewer than one window of "
            f"data.context_length={config.data.context_length}: use more documents, a larger "
            "data.validation_fraction or a smaller data.context_length"
        )
    return Text.of(documents, [len(x) for x in ids], _windows(config, tokenizer, ids))


def build_network(config: Config, tokenizer: Tokenizer) -> Network:
    """The network for this tokenizer's vocabulary, which may be smaller than was asked for."""
    return Network(
        config.model,
        vocab_size=tokenizer.get_vocab_size(),
        context_length=config.data.context_length,
        precision=config.training.precision,
    )


def assemble(config: Config, texts: Texts) -> Parts:
    """Network, optimizer and plan for these texts."""
    training = config.training
    steps_per_epoch = batches.steps_per_epoch(texts.train, training.batch_size)
    total_steps = optimizers.num_steps(training, steps_per_epoch)
    lengths = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
    learning_rate = optimizers.schedule(config.schedule, config.optimizer.learning_rate, **lengths)
    evals = training.evals_per_epoch
    return Parts(
        texts=texts,
        network=build_network(config, texts.tokenizer),
        learning_rate=learning_rate,
        optimizer=optimizers.optimizer(config.optimizer, learning_rate, training.grad_clip),
        plan=Plan(
            total_steps=total_steps,
            eval_every=max(1, steps_per_epoch // evals) if evals else None,
            checkpoint_every=max(1, training.checkpoint.every.in_steps(**lengths)),
            log_every=config.tracking.log_every,
            tokens_per_step=training.batch_size * config.data.context_length,
        ),
        steps_per_epoch=steps_per_epoch,
        micro_batches=num_micro_batches(config),
    )


def num_micro_batches(config: Config) -> int:
    """Pieces that a batch is computed in, in training and in evaluation."""
    return backend.micro_batches(
        config.training.batch_size,
        config.data.context_length,
        at_least=config.training.grad_accumulation,
    )


def all_documents(config: Config, source: str) -> list[str]:
    """Every document of another source, in the seed's order."""
    data = replace(config.data, source=source, num_documents=None)
    return sources.documents(data, config.seed)


def _windows(config: Config, tokenizer: Tokenizer, ids: list) -> Windows:
    return batches.pack(
        ids,
        context_length=config.data.context_length,
        packing=config.data.packing,
        eos_id=tokenizers.special_id(tokenizer, tokenizers.EOS),
        pad_id=tokenizers.special_id(tokenizer, tokenizers.PAD),
    )
