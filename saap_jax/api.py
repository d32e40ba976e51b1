"""The calls of a Python session in the method's order: no files, no command line. Read this file first.

load model and text -> observe and score (2a) -> fuse (2b) -> search (2c) -> mask and evaluate -> compensate and cut
(2d) -> save
"""

from collections.abc import Iterable, Mapping
from typing import Any

from saap_jax.config.method import FusionConfig
from saap_jax.config.search import SearchConfig
from saap_jax.data import Windows, pairs
from saap_jax.estimation import Estimator
from saap_jax.evaluation.perplexity import window_losses
from saap_jax.llama import Llama
from saap_jax.llama.segments import masks
from saap_jax.runtime.mesh import taken_in
from saap_jax.runtime.progress import Track, quiet
from saap_jax.selection import calibrate as calibration
from saap_jax.selection.calibrate import Calibrated
from saap_jax.selection.choose import choose, choose_calibrated, choose_path
from saap_jax.selection.search import Selection
from saap_jax.subjects.base import Examples, Subject
from saap_jax.subjects.opened import subject_of
from saap_jax.trace.problem import Problem
from saap_jax.trace.subject.observe import OBSERVED
from saap_jax.trace.subject.subject import TracedSubject
from saap_jax.types import Keep, Scores


@taken_in
def score_units(
    model: Llama | Problem | Subject,
    windows: Examples | Mapping[str, Examples],
    estimators: Iterable[str | Estimator] | Mapping[str, Estimator],
    *,
    fusion: FusionConfig | None = None,
    stability: bool = True,
    batch_size: int = 8,
    track: Track = quiet,
) -> Calibrated:
    """Score every unit by every estimator, from one pass over the calibration windows; see `calibrate`.

    Args:
        model: one of ours, or a problem.
        windows: the calibration text, or that of each scenario by name; of a problem, examples.
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


@taken_in
def calibrate(
    model: Llama | Problem | Subject,
    windows: Examples | Mapping[str, Examples],
    estimators: Iterable[str],
    **options: Any,
) -> Calibrated:
    """Score every unit by every estimator named; options are those of `selection.calibrate.calibrate`."""
    subject, names = subject_of(model), [*estimators]
    scenarios = windows if isinstance(windows, Mapping) else {"calibration": windows}
    known = [name for name in names if name not in options.get("given", {})]
    if known or not names:
        observed = OBSERVED if isinstance(subject, TracedSubject) else None
        calibration.check_estimators(known, options.get("fusion") or FusionConfig(), observed)
    return calibration.calibrate(subject, scenarios, names, **options)


@taken_in
def select_units(
    model: Llama | Problem | Subject,
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
    if config.chooses_again:
        raise ValueError(
            "search: expected no in_sequence, learn, evolve or uniform shape without text, got "
            f"{config.in_sequence!r}, {config.learn.steps} steps, {config.evolve.generations} generations and "
            f"{config.shape!r}; call select_path"
        )
    if isinstance(scores, Calibrated):
        if estimator is None and len(scores.estimators) > 1:
            raise ValueError(f"estimator: expected one of {', '.join(scores.estimators)}, got none; name one")
        name = estimator or scores.estimators[0]
        if name not in scores.estimators:
            raise ValueError(f"estimator: expected one of {', '.join(scores.estimators)}, got {name!r}")
        return choose_calibrated(subject_of(model), scores, name, ratio, config, gone)
    return choose(subject_of(model), scores, ratio, config, stability, gone)


@taken_in
def select_path(
    model: Llama | Problem | Subject,
    calibrated: Calibrated,
    scenarios: Mapping[str, Examples],
    estimator: str,
    ratios: Iterable[float],
    config: SearchConfig,
    **options: Any,
) -> dict[float, Selection]:
    """Choose the units to keep at each ratio, estimating again on the way; see `selection.choose.choose_path`."""
    return choose_path(subject_of(model), calibrated, scenarios, estimator, ratios, config, **options)


@taken_in
def perplexity(model: Llama, windows: Windows, keep: Keep | None = None, *, batch_size: int = 8) -> float:
    """Return exp(mean next-token loss) over the windows; with `keep`, of the model with all other units masked."""
    return window_losses(model, pairs(windows, batch_size), None if keep is None else masks(keep)).perplexity
