"""Every setting of a run: names, types, ranges, defaults. No JAX here.

The classes are the schema. `config/base.yaml` states the same defaults with their units, and a test
holds the two together. `load` makes one frozen `Config` of a file and overrides.
"""
# ruff: noqa: F401 - these are the names that the rest of the package uses

from mainrun.config.carried import CARRIED, carried_values, is_zero, structure, with_values
from mainrun.config.data import Bpe, Char, Data, Tiktoken, Tokenizer, Unigram, WordPiece
from mainrun.config.effects import is_effect, is_fixed, is_of_text, is_place, is_training_only
from mainrun.config.kinds import Duration
from mainrun.config.load import (
    Source,
    as_dict,
    checked,
    default_config_root,
    load,
    notes,
    read,
    to_yaml,
)
from mainrun.config.mesh import Mesh
from mainrun.config.mlp import Activation, DenseMlp, MixtureOfExperts, Mlp
from mainrun.config.model import (
    AllKeys,
    Attention,
    CausalAttention,
    FixedKeys,
    Gpt,
    LatentAttention,
    LocalKeys,
    Lora,
    Model,
    MultiHead,
    Network,
    Pattern,
    SparseAttention,
    SparseKAttention,
    StridedKeys,
    UnetGpt,
)
from mainrun.config.optimizer import (
    Adafactor,
    Adagrad,
    Adam,
    AdamW,
    Group,
    Lion,
    Muon,
    Optimizer,
    RmsProp,
    ScheduleFreeAdamW,
    Sgd,
)
from mainrun.config.overrides import known_paths, path_of
from mainrun.config.run import Config, Tracking
from mainrun.config.schedule import (
    Constant,
    Cosine,
    Linear,
    NoSchedule,
    Schedule,
    Step,
    WarmupStableDecay,
)
from mainrun.config.training import (
    Checkpoint,
    Divergence,
    Ema,
    LossScale,
    Regularization,
    Swa,
    Training,
    WeightAverage,
)
from mainrun.config.trees import leaves
