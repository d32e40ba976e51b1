"""The calls of a Python session in the method's order: no files, no command line. Read this file first.

load model and text -> observe and score (2a) -> fuse (2b) -> search (2c) -> mask and evaluate -> compensate and cut
(2d) -> save
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np

from saap_jax.config.method import FusionConfig, SearchConfig
from saap_jax.config.registries import ALLOCATIONS
from saap_jax.data import Windows
from saap_jax.discovery import discover, unit_costs
from saap_jax.estimation import Estimator
from saap_jax.evaluation.perplexity import window_losses
from saap_jax.llama import Llama
from saap_jax.llama.segments import existing_units, masks
from saap_jax.runtime.progress import Track, quiet
from saap_jax.selection.calibrate import Calibrated, calibrate, pairs
from saap_jax.selection.search import Selection, search
from saap_jax.types import Keep, Remat, Scores


def score_units(
    model: Llama,
    windows: Windows | Mapping[str, Windows],
    estimators: Iterable[str | Estimator] | Mapping[str, Estimator],
    *,
    fusion: FusionConfig | None = None,
    stability: bool = True,
    batch_size: int = 8,
    track: Track = quiet,
) -> Calibrated:
    """Score every unit by every estimator, from one pass over the calibration windows; see `calibrate`.

    Args:
        windows: the calibration text, or that of each scenario by name.
        estimators: names (`saap`, fusions `a+b`, `FILE.py:FACTORY`, with hyper-parameters in brackets if any), or
            `Estimator` objects, which are named after their formula or by a mapping.
        stability: observe what the stability indicator needs, so that `adaptive` search can use it.

    Returns:
        Scores, larger = more important: `scores(NAME)` is `{structure: [layers, units]}`; hand it to `select_units`.
    """
    if isinstance(estimators, Mapping):
        named = [(str(name), each) for name, each in estimators.items()]
    else:
        named = [
            (getattr(each.score, "__name__", "estimator") if isinstance(each, Estimator) else each, each)
            for each in estimators
        ]
    names = [name for name, _ in named]
    if twice := next((name for name in names if names.count(name) > 1), None):
        hint = "give objects as {name: estimator}"
        raise ValueError(f"estimators: expected each name once, got {twice!r} twice; {hint}")
    given = {name: each for name, each in named if isinstance(each, Estimator)}
    return calibrate(
        model, windows, names, given=given, fusion=fusion, stability=stability, batch_size=batch_size, track=track
    )


def select_units(
    model: Llama,
    scores: Scores | Calibrated,
    ratio: float,
    config: SearchConfig | None = None,
    stability: Scores | None = None,
    gone: Keep | None = None,
    *,
    estimator: str | None = None,
) -> Selection:
    """Choose the units to keep so that at least `ratio` of the model's prunable parameters goes; see `search`.

    Args:
        scores: of one estimator, or all that `score_units` returned.
        stability: the stability indicator; that of what `score_units` returned by default.
        gone: units that are removed already.
        estimator: which of several to go by.

    Raises:
        ValueError: a ratio that the search cannot meet, or several estimators and none named.
    """
    config = config or SearchConfig()
    if isinstance(scores, Calibrated):
        if estimator is None and len(scores.estimators) > 1:
            raise ValueError(f"estimator: expected one of {', '.join(scores.estimators)}, got none; name one")
        name = estimator or scores.estimators[0]
        if name not in scores.estimators:
            raise ValueError(f"estimator: expected one of {', '.join(scores.estimators)}, got {name!r}")
        return select_calibrated(model, scores, name, ratio, config, gone)
    costs = unit_costs(discover(model))
    return search(scores, costs, existing_units(model.runs), ratio, config, stability, gone)


def select_calibrated(
    model: Llama,
    calibrated: Calibrated,
    estimator: str,
    ratio: float,
    config: SearchConfig,
    gone: Keep | None = None,
) -> Selection:
    """Choose the units to keep by one estimator; `config` says how scenarios are reduced and what has to be stable."""
    scores = calibrated.scores(estimator, config.scenario_reduction)
    adaptive = ALLOCATIONS[config.allocation].stability
    stability = calibrated.indicator(estimator, config.stability_over) if adaptive else None
    return select_units(model, scores, ratio, config, stability, gone)


def select_path(
    model: Llama,
    calibrated: Calibrated,
    scenarios: Mapping[str, Windows],
    estimator: str,
    ratios: Iterable[float],
    config: SearchConfig,
    *,
    fusion: FusionConfig | None = None,
    batch_size: int = 8,
    remat: Remat = "dots",
    track: Track = quiet,
) -> dict[float, Selection]:
    """Choose the units to keep at each ratio, estimating again on the way there if `config.rescore_every` says so.

    A score tells what a unit matters to the model as it is. Once others are gone, what is left matters more, and not
    all of it equally: so the model is observed again, with the removed units masked and all statistics anew, whenever
    a share `rescore_every` has gone. Removed units stay removed on the way to higher ratios.

    Args:
        calibrated: scores of the whole model.
        scenarios: the calibration text of each scenario; read only on the way.
        ratios: shares of the prunable parameters, in any order.
    """
    ratios = tuple(ratios)
    selections: dict[float, Selection] = {}
    gone = None
    for ratio in checkpoints(ratios, config.rescore_every):
        if gone is not None:
            keep = {name: units & ~gone[name] for name, units in existing_units(model.runs).items()}
            calibrated = calibrate(
                model,
                scenarios,
                [estimator],
                fusion=fusion,
                stability=ALLOCATIONS[config.allocation].stability,
                keep=keep,
                batch_size=batch_size,
                remat=remat,
                track=track,
            )
        selections[ratio] = select_calibrated(model, calibrated, estimator, ratio, config, gone)
        if config.rescore_every is not None:
            gone = {name: ~kept for name, kept in selections[ratio].keep.items()}
    return {ratio: selections[ratio] for ratio in ratios}


def checkpoints(ratios: Iterable[float], every: float | None) -> list[float]:
    """Return the ratios of a path in ascending order: those asked for, and the multiples of `every` on the way there.

    >>> checkpoints((0.5, 0.2), 0.15)
    [0.15, 0.2, 0.3, 0.45, 0.5]
    """
    asked = sorted(set(ratios))
    if every is None:
        return asked
    steps = [round(n * every, 9) for n in range(1, math.ceil(asked[-1] / every))]
    return sorted(set(asked) | {step for step in steps if step < asked[-1] and not np.isclose(step, asked).any()})


def perplexity(model: Llama, windows: Windows, keep: Keep | None = None, *, batch_size: int = 8) -> float:
    """Return exp(mean next-token loss) over the windows; with `keep`, of the model with all other units masked."""
    return window_losses(model, pairs(windows, batch_size), None if keep is None else masks(keep)).perplexity
