"""From scores to keep-sets of a subject: at a ratio, or along a path of ratios with scores anew on the way."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np

from saap_jax.config.compensation import CompensationConfig
from saap_jax.config.method import FusionConfig
from saap_jax.config.registries import ALLOCATIONS
from saap_jax.config.search import SearchConfig
from saap_jax.runtime.progress import Track, quiet
from saap_jax.selection.bisection import bisected
from saap_jax.selection.budget import SLACK
from saap_jax.selection.calibrate import Calibrated, calibrate
from saap_jax.selection.evolved import evolved
from saap_jax.selection.learned import Store, learned
from saap_jax.selection.search import Selection, largest_ratio, priorities, search
from saap_jax.selection.uniform import uniform
from saap_jax.subjects.base import Examples, Subject
from saap_jax.types import Keep, Remat, Scores


def choose(
    subject: Subject,
    scores: Scores,
    ratio: float,
    config: SearchConfig,
    stability: Scores | None = None,
    gone: Keep | None = None,
) -> Selection:
    """Choose the units to keep so that at least `ratio` of the prunable parameters goes; see `search`.

    Where two structures meet in one matrix, what both hold counts once: the search, which adds up what single units
    cost, is then asked for whatever removes the share that is wanted.

    Raises:
        ValueError: a ratio that cannot be met, a limit of a structure that does not exist, or scores that the search
            refuses.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio: expected a number in [0, 1), got {ratio}")
    config = subject.searched(config)
    limits, costs, existing = subject.limits(config), subject.costs, subject.existing
    nominal = sum(int((units.sum(1) * costs[name]).sum()) for name, units in existing.items())
    if limits is None:
        return search(scores, costs, existing, ratio, config, stability, gone)

    def chosen(asked: float) -> Selection:
        made = search(scores, costs, existing, asked, config, stability, gone, limits)
        return selection_of(subject, made.keep, ratio)

    def holds(keep: Keep) -> bool:
        return subject.removed(keep) >= ratio * subject.prunable * (1 - 1e-12)

    top = largest_ratio(costs, existing, config, limits)
    most = chosen(top)
    if not holds(most.keep):
        raise ValueError(
            f"ratio: {ratio:.4g} of the prunable parameters cannot be removed; the largest possible ratio is "
            f"{int(most.actual * 10_000) / 10_000:.4f} under search.min_keep_each, max_ratio_each and "
            "multiple_of_each: relax one of them"
        )
    if nominal == subject.prunable:  # no matrix is of two structures
        return chosen(min(ratio, top))
    return bisected(0.0, top, chosen, holds)


def selection_of(subject: Subject, keep: Keep, asked: float) -> Selection:
    """Return a keep-set with what it removes, by which it was asked for."""
    removed = subject.removed(keep)
    return Selection(keep, asked, removed / subject.prunable, removed)


def most_removable(subject: Subject, config: SearchConfig) -> float:
    """Return the largest ratio that `choose` can meet whatever the scores, rounded down to four decimals."""
    config = subject.searched(config)
    limits, costs, existing = subject.limits(config), subject.costs, subject.existing
    top = largest_ratio(costs, existing, config, limits)
    if limits is None:
        return top
    equal = some_scores(subject)
    removed = subject.removed(search(equal, costs, existing, top, config, equal, limits=limits).keep)
    return min(removed * 10_000 // max(subject.prunable, 1) / 10_000, 0.9999)


def some_scores(subject: Subject) -> Scores:
    """Return a score of 1 for each unit."""
    return {name: np.ones(units.shape) for name, units in subject.existing.items()}


def check_ratios(subject: Subject, ratios: Iterable[float], config: SearchConfig) -> None:
    """Raise ValueError for a ratio that cannot be met whatever the scores, or limits of structures that are none."""
    scores = some_scores(subject)
    for ratio in ratios:
        choose(subject, scores, ratio, config, scores)


def choose_calibrated(
    subject: Subject,
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
    return choose(subject, scores, ratio, config, stability, gone)


def choose_path(
    subject: Subject,
    calibrated: Calibrated,
    scenarios: Mapping[str, Examples],
    estimator: str,
    ratios: Iterable[float],
    config: SearchConfig,
    *,
    fusion: FusionConfig | None = None,
    compensation: CompensationConfig | None = None,
    batch_size: int = 8,
    remat: Remat = "dots",
    track: Track = quiet,
    done: Collection[float] = (),
    found: Callable[[float, Selection], None] = lambda ratio, selection: None,
    store_of: Callable[[float], Store] | None = None,
) -> dict[float, Selection]:
    """Choose the units to keep at each ratio, estimating again on the way there if `config.rescore_every` says so.

    A score tells what a unit matters to the model as it is. Once others are gone, what is left matters more, and not
    all of it equally: so the model is observed again, with the removed units masked and all statistics anew, whenever
    a share `rescore_every` has gone. Removed units stay removed on the way to higher ratios. With
    `config.attention_from` each ratio has a way of its own, all along which attention has the share that it has there.

    Args:
        calibrated: scores of the whole model.
        scenarios: the calibration examples of each scenario; read only on the way.
        ratios: shares of the prunable parameters, in any order.
        compensation: how layers are corrected before the next one is looked at, with `config.in_sequence`.
        done: ratios on the way to others whose units are known already, and are not returned.
        found: is called with each ratio and its selection as soon as it is known.
        store_of: where training that is killed is gone on from, for each ratio.
    """
    ratios = tuple(ratios)
    if config.attention_from and config.rescore_every is not None:
        chosen: dict[float, Selection] = {}
        for ratio in dict.fromkeys(each for each in ratios if each not in done):
            chosen |= choose_path(
                subject, calibrated, scenarios, estimator, [ratio], config.at_ratio(ratio), fusion=fusion,
                compensation=compensation, batch_size=batch_size, remat=remat, track=track, found=found,
                store_of=store_of,
            )  # fmt: skip
        return chosen
    first = calibrated
    selections: dict[float, Selection] = {}
    gone = None
    for ratio in checkpoints(ratios, config.rescore_every):
        if gone is not None and (met := _met(subject, gone, ratio)):
            selections[ratio] = met
            continue
        if gone is not None:
            calibrated = calibrate(
                subject,
                scenarios,
                [estimator],
                fusion=fusion,
                stability=ALLOCATIONS[config.allocation].stability,
                keep={name: units & ~gone[name] for name, units in subject.existing.items()},
                batch_size=batch_size,
                remat=remat,
                track=track,
            )
        selections[ratio] = choose_calibrated(subject, calibrated, estimator, ratio, config, gone)
        if config.rescore_every is not None:
            gone = {name: ~kept for name, kept in selections[ratio].keep.items()}
    priority = priority_of(subject, first, estimator, config)
    chosen = {}
    for ratio in dict.fromkeys(each for each in ratios if each not in done):
        chosen[ratio] = chosen_again(
            subject, selections[ratio], scenarios, config, compensation, priority,
            batch_size=batch_size, store=None if store_of is None else store_of(ratio), track=track,
        )  # fmt: skip
        found(ratio, chosen[ratio])
    return chosen


def priority_of(subject: Subject, calibrated: Calibrated, estimator: str, config: SearchConfig) -> Scores | None:
    """Return what orders the units of a layer; None where nothing asks for it."""
    if not config.orders:
        return None
    scores = calibrated.scores(estimator, config.scenario_reduction)
    adaptive = ALLOCATIONS[config.allocation].stability
    stability = calibrated.indicator(estimator, config.stability_over) if adaptive else None
    return priorities(scores, subject.costs, subject.existing, config, stability, None)


def chosen_again(
    subject: Subject,
    selection: Selection,
    scenarios: Mapping[str, Examples],
    config: SearchConfig,
    compensation: CompensationConfig | None = None,
    priority: Scores | None = None,
    *,
    batch_size: int = 8,
    store: Store | None = None,
    track: Track = quiet,
) -> Selection:
    """Return a selection after evolution or a uniform shape, training which units stay, and choosing layer by layer, if
    `config` says so.

    Args:
        compensation: how layers are corrected before the next one is looked at; not at all by default.
        priority: what orders the units of a layer, as `priority_of` makes it.
    """
    if not config.chooses_again:
        return selection
    searched, examples = subject.searched(config), subject.join([*scenarios.values()])
    if config.orders:
        assert priority is not None
        start, alike = selection, config.shape == "uniform"
        doing = "search a uniform shape" if alike else "evolve how much each layer loses"
        selection = (uniform if alike else evolved)(
            start, priority, subject.objective(examples, batch_size), subject.costs, subject.existing, searched,
            lambda keep: selection_of(subject, keep, start.asked),
            progress=lambda steps: track(doing, steps, len(steps)),
        )  # fmt: skip
    if config.learn.steps:
        selection = learned(
            lambda values, free: choose(subject, values, selection.asked, free),
            subject.objective(examples, batch_size, config.learn.language_loss), selection, subject.costs,
            subject.existing, searched, store=store,
            progress=lambda steps: track("learn which units stay", steps, len(steps)),
        )  # fmt: skip
    if config.in_sequence == "none":
        return selection
    keep = subject.in_sequence(
        selection.keep,
        examples,
        config.in_sequence,
        compensation or CompensationConfig(),
        batch_size=batch_size,
        progress=lambda places: track("choose layer by layer", places, len(places)),
    )
    return selection._replace(keep=keep)


def _met(subject: Subject, gone: Keep, ratio: float) -> Selection | None:
    """Return what is left where that meets a ratio already, since a block went that is larger than a step."""
    keep = {name: units & ~gone[name] for name, units in subject.existing.items()}
    made = selection_of(subject, keep, ratio)
    return made if made.removed >= ratio * subject.prunable * (1 - SLACK) else None


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
