"""Which settings of a sweep mattered: PED-ANOVA of its finished trials, by Optuna.

Watanabe et al. 2023 (arXiv:2304.10255): how far the values of the best trials are from those of all
trials, setting by setting; the shares sum to one. It says nothing of settings that only matter
together, and with few trials it is mostly chance: `caveat` says so.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from mainrun.analysis.trials import Parameter, Sweep

_FEWEST = 8
_BEST = 5
"""So many trials stand for the best at least: Optuna's advice for a stable answer."""
_TRIALS_PER_SETTING = 10


def importances(sweep: Sweep) -> dict[str, float]:
    """Shares by setting, the largest first; empty where there are too few finished trials."""
    finished = sweep.ranking()
    if len(finished) < _FEWEST or not sweep.parameters:
        return {}
    if len(sweep.parameters) == 1:
        return {sweep.parameters[0].name: 1.0}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction=sweep.space.metric.goal)
    spaces = {p.name: _distribution(p) for p in sweep.parameters}
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={p.name: _encoded(p, trial.values[p.name]) for p in sweep.parameters},
                distributions=spaces,
                value=trial.value,
            )
            for trial in finished
        ]
    )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_share(len(finished)))
    found: Mapping[str, float] = optuna.importance.get_param_importances(study, evaluator=evaluator)
    known = {name: share if math.isfinite(share) else 0.0 for name, share in found.items()}
    missing = {p.name: 0.0 for p in sweep.parameters if p.name not in known}
    return known | missing


def caveat(sweep: Sweep) -> str:
    """What to think of the shares."""
    finished, settings = len(sweep.ranking()), len(sweep.parameters)
    best = round(_share(finished) * finished)
    said = (
        f"PED-ANOVA: how the settings of the best {best} of {finished} finished trials differ from "
        "those of all. Settings that matter only together are not seen."
    )
    if finished < _TRIALS_PER_SETTING * settings:
        said += (
            f" {finished} trials are few for {settings} settings: the shares are mostly chance; "
            f"some {_TRIALS_PER_SETTING * settings} would say more."
        )
    if sweep.space.method == "bayes":
        said += (
            " The search itself has chosen: a setting that it fixed on early varies little among "
            "all trials and looks less important than it is."
        )
    return said


def _share(trials: int) -> float:
    """Of the trials that count as the best: a tenth, or more where that is less than five."""
    return max(0.1, min(_BEST / trials, 0.5))


def _distribution(parameter: Parameter) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if parameter.is_numeric:
        return FloatDistribution(*parameter.bounds, log=parameter.is_log)
    return CategoricalDistribution([json.dumps(v, sort_keys=True) for v in parameter.levels])


def _encoded(parameter: Parameter, value: Any) -> float | str:
    return float(value) if parameter.is_numeric else json.dumps(value, sort_keys=True)
