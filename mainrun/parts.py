"""A config's parts: its texts in windows, its network, its optimizer, its plan.

All of it is a function of the config (and, for a run that exists, of its stored tokenizer), so
training, resuming and evaluating see the same data and the same network.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import optax
from tokenizers import Tokenizer

from mainrun.config import Config, Swa, Tiktoken, WeightAverage
from mainrun.data import batches, sources, tokenizers
from mainrun.data.batches import Batch, Windows
from mainrun.errors import UserError
from mainrun.model import kernels
from mainrun.model.gpt import Network, Params
from mainrun.training import backend, flops, peaks, step
from mainrun.training import optimizer as optimizers
from mainrun.training import schedule as schedules
from mainrun.training.averaging import EVERY_UPDATE, Samples
from mainrun.training.evaluate import Text
from mainrun.training.feed import Feed, Resident, Sent, table_bytes
from mainrun.training.loop import Plan
from mainrun.training.mesh import ONE, Layout
from mainrun.training.optimizer import Optimizer
from mainrun.training.step import TrainState, TrainStep

_TEXT_SHARE = 0.02
"""Of the device's memory, that the training text may take."""


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
    optimizer: Optimizer
    samples: Samples  # that an average of weights takes
    plan: Plan
    steps_per_epoch: int
    micro_batches: int
    head_tokens: int  # whose logits are held at one time, on all devices together
    layout: Layout


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


def build_network(
    config: Config, vocab_size: int, windows: Sequence[Windows] | None = None
) -> Network:
    """The network for a tokenizer's vocabulary, which may be smaller than was asked for.

    `windows` are all that it will read, where they are known: how many documents stand in one may
    decide how attention is told of them. Raises UserError where its kernel cannot be had.
    """
    data, precision = config.data, config.training.precision
    most = max(map(batches.most_documents, windows)) if windows and data.mask_documents else None
    kernel = kernels.choose(
        config.training.attention_kernel,
        config.model,
        precision,
        kernels.Packing(data.context_length, data.mask_documents, most),
        backend.attention_device(),
    )
    return Network(
        config.model,
        vocab_size=vocab_size,
        context_length=data.context_length,
        precision=precision,
        kernel=kernel,
    )


def assemble(config: Config, texts: Texts, layout: Layout = ONE) -> Parts:
    """Network, optimizer and plan for these texts, on these devices."""
    training = config.training
    steps_per_epoch = batches.steps_per_epoch(texts.train, training.batch_size)
    total_steps = schedules.num_steps(training, steps_per_epoch)
    lengths = {
        "total_steps": total_steps,
        "steps_per_epoch": steps_per_epoch,
        "tokens_per_step": training.batch_size * config.data.context_length,
    }
    learning_rate = schedules.schedule(config.schedule, config.optimizer.learning_rate, **lengths)
    evals = training.evals_per_epoch
    windows = texts.train, texts.validation.windows
    network = build_network(config, texts.tokenizer.get_vocab_size(), windows)
    return Parts(
        texts=texts,
        network=network,
        learning_rate=learning_rate,
        optimizer=optimizers.optimizer(config.optimizer, learning_rate, training.grad_clip),
        plan=Plan(
            total_steps=total_steps,
            eval_every=max(1, steps_per_epoch // evals) if evals else None,
            checkpoint_every=max(1, training.checkpoint.every.in_steps(**lengths)),
            log_every=config.tracking.log_every,
            tokens_per_step=lengths["tokens_per_step"],
            patience=training.patience,
            divergence=training.divergence,
            limit_at_min_scale=training.loss_scale.limit_at_min,
            scales_loss=training.precision == "float16",
            peak_tokens_per_second=peak_tokens_per_second(
                config, network, jax.local_devices()[0].device_kind, layout.devices
            ),
        ),
        samples=_samples(training.weight_average, lengths),
        steps_per_epoch=steps_per_epoch,
        micro_batches=num_micro_batches(config, layout),
        head_tokens=backend.head_tokens(network.vocab_size) * layout.devices,
        layout=layout,
    )


def peak_tokens_per_second(
    config: Config, network: Network, device_kind: str, devices: int = 1
) -> float | None:
    """What so many such devices would train at their peak; None where that is not known."""
    peak = peaks.of_device(device_kind, config.training.precision)
    if peak is None:
        return None
    return devices * peak / flops.training(network, config.training.regularization).total


def train_step(config: Config, joined: Parts) -> TrainStep:
    """The step of these parts, not yet compiled."""
    return step.make_train_step(
        joined.network,
        joined.optimizer,
        joined.learning_rate,
        config.training,
        micro_batches=joined.micro_batches,
        mask_documents=config.data.mask_documents,
        head_tokens=joined.head_tokens,
        samples=joined.samples,
        layout=joined.layout,
    )


def initial_state(config: Config, joined: Parts, base: Params | None) -> TrainState:
    """The state before the first step, on the base's parameters where there is one."""
    key = jax.random.key(config.seed)
    return step.init(joined.network, joined.optimizer, key, config.training, base)


def batch(config: Config, texts: Texts, index: int) -> Batch:
    """That of step `index`, counted from 0; epochs follow one another without end."""
    return batches.batch(
        texts.train,
        index,
        batch_size=config.training.batch_size,
        order=config.data.order,
        seed=config.seed,
    )


def feed(config: Config, joined: Parts, most: int, *, limit_bytes: int | None) -> Feed:
    """The training batches on their way to the devices, for at most `most` steps at a time.

    The text lies on each where it takes no more than a small part of `limit_bytes` (None: unknown).
    """
    texts = joined.texts
    if limit_bytes is None or table_bytes(texts.train) <= _TEXT_SHARE * limit_bytes:
        numbers = partial(
            batches.rows,
            texts.train,
            batch_size=config.training.batch_size,
            order=config.data.order,
            seed=config.seed,
        )
        return Resident(texts.train, numbers, most, joined.layout.put)
    return Sent(partial(batch, config, texts), most)


def _samples(settings: WeightAverage | None, lengths: dict[str, int]) -> Samples:
    """The updates after which an average of samples takes one; raises nothing, has at least one."""
    match settings:
        case Swa(start=start, every=every):
            return Samples(
                min(max(1, start.in_steps(**lengths)), lengths["total_steps"]),
                max(1, every.in_steps(**lengths)),
            )
        case _:
            return EVERY_UPDATE


def num_micro_batches(config: Config, layout: Layout = ONE, platform: str | None = None) -> int:
    """Pieces that a batch is computed in, in training and in evaluation, here or elsewhere."""
    asked = config.training.grad_accumulation  # auto: a run has settled it before (`memory`)
    return backend.micro_batches(
        config.training.batch_size,
        config.data.context_length,
        at_least=1 if asked == "auto" else asked,
        shards=layout.example_shards,
        platform=platform,
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
