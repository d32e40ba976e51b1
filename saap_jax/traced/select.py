"""From a problem's examples to keep-sets: the library's estimators, fusion, stability indicator and search.

A budget is a share of the *prunable parameters*: those that belong to a structure that may be pruned. Where two
structures meet in one matrix, what both hold counts once, so the search, which adds up what single units cost, is asked
for whatever removes the share that is wanted.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from saap_jax.config.method import FusionConfig
from saap_jax.config.registries import ALLOCATIONS
from saap_jax.config.traced import FUSED, TracedSearchConfig
from saap_jax.discovery.tracing.patterns import by_name
from saap_jax.discovery.tracing.removal import kept_shapes
from saap_jax.discovery.weights import TracedWeights, traced_costs, units_of
from saap_jax.estimation import make_estimators
from saap_jax.estimation.observe import curvature_of
from saap_jax.runtime.progress import Track, quiet
from saap_jax.selection.bisection import bisected
from saap_jax.selection.calibrate import Calibrated, Scored, joined, make_members, score_statistics
from saap_jax.selection.search import Limits, Selection, largest_ratio, search
from saap_jax.traced.ablation import ablate
from saap_jax.traced.observe import check_needs, members, needs_of, observe
from saap_jax.traced.subject import Subject
from saap_jax.types import Keep, Scores

ABLATION = "ablation"
"""Names the oracle among estimators."""


def check_traced_estimators(names: Iterable[str], fusion: FusionConfig = FUSED) -> None:
    """Raise ValueError for an estimator that is unknown, named twice, or not for traced models."""
    names = list(names)
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"estimator {repeated[0]!r} is named twice")
    if not names:
        make_estimators(names)
    for name in names:
        if "/" in name:
            raise ValueError(
                f"estimator {name!r}: expected one for all structures of a traced model, got two around a slash"
            )
        if name != ABLATION:
            check_needs(make_members([name], fusion, ("any",)))


def calibrate(
    subject: Subject,
    estimators: Iterable[str],
    *,
    fusion: FusionConfig = FUSED,
    stability: bool = False,
    batch_size: int = 8,
    track: Track = quiet,
) -> Calibrated:
    """Score every unit by every estimator named, from one pass over the calibration examples.

    Args:
        estimators: names, with hyper-parameters in brackets if any; `a+b` fuses, `saap` is the fusion of `fusion`, and
            `ablation` removes each unit in turn.
        stability: observe what the stability indicator needs, even if no estimator does.

    Returns:
        scores `[copies, units]` a structure.

    Raises:
        ValueError: an estimator that is unknown or not for traced models, or values that are not finite.
    """
    estimators = tuple(estimators)
    check_traced_estimators(estimators, fusion)
    _refuse_quantised(subject, estimators, fusion)
    weights = TracedWeights(subject.structures, members(subject))
    names = [name for name in estimators if name != ABLATION]
    scored = Scored({}, {}, {})
    if names or stability:
        made = make_members(names, fusion, tuple(units_of(weights)))
        statistics = observe(
            subject,
            needs_of(made, stability=stability),
            curvature=curvature_of(made.values()),
            batch_size=batch_size,
            track=track,
        )
        scored = score_statistics(weights, statistics, names, fusion)
    scores = dict(scored.scores)
    if ABLATION in estimators:
        scores[ABLATION] = ablate(subject, batch_size=batch_size, track=track)
    return joined({"calibration": scored._replace(scores={name: scores[name] for name in estimators})})


WITHOUT_WEIGHTS = ("gate_", "random", ABLATION)
"""How names of estimators begin that do not look at weights."""


def _refuse_quantised(subject: Subject, estimators: Iterable[str], fusion: FusionConfig) -> None:
    """Raise ValueError for an estimator that looks at weights, where some of them are integers."""
    if not subject.quantised:
        return
    path, dtype = next(iter(subject.quantised.items()))
    for name in estimators:
        for member in (name,) if name == ABLATION else make_members([name], fusion, ("any",)):
            if not member.startswith(WITHOUT_WEIGHTS):
                raise ValueError(
                    f"estimator {name!r}: {member} looks at weights, expected them of floating point, got {dtype} in "
                    f"{path} (quantised?); use one of gate_*, random or ablation, or dequantise the weights first"
                )


def select(
    subject: Subject, calibrated: Calibrated, estimator: str, ratio: float, config: TracedSearchConfig
) -> Selection:
    """Choose the units to keep so that at least `ratio` of the prunable parameters is removed.

    Each copy of a structure keeps as many units, for its arrays have one width. Of the selection, `actual` and
    `removed` count what two structures hold once.

    Raises:
        ValueError: a ratio that cannot be met, a limit of a structure that does not exist, or scores that the search
            refuses.
    """
    adaptive = ALLOCATIONS[config.allocation].stability and config.stability_weight != 0
    stability = calibrated.indicator(estimator) if adaptive else None
    return select_scores(subject, calibrated.scores(estimator), ratio, config, stability)


def select_scores(
    subject: Subject, scores: Scores, ratio: float, config: TracedSearchConfig, stability: Scores | None = None
) -> Selection:
    """Do what `select` does, for scores `[copies, units]` a structure."""
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio: expected a number in [0, 1), got {ratio}")
    costs, limits = traced_costs(subject.structures), limits_of(subject, config)
    existing = units_of(TracedWeights(subject.structures, {}))
    prunable = prunable_parameters(subject)

    def chosen(nominal: float) -> Selection:
        found = search(scores, costs, existing, nominal, config.ranking, stability, limits=limits)
        removed = removed_parameters(subject, found.keep)
        return Selection(found.keep, ratio, removed / prunable, removed)

    def holds(keep: Keep) -> bool:
        return removed_parameters(subject, keep) >= ratio * prunable * (1 - 1e-12)

    top = largest_ratio(costs, existing, config.ranking, limits)
    most = chosen(top)
    if not holds(most.keep):
        raise ValueError(
            f"ratio: {ratio:.4g} of the prunable parameters cannot be removed; the largest possible ratio is "
            f"{int(most.actual * 10_000) / 10_000:.4f} under search.min_keep, max_ratio and multiple_of: relax one of "
            "them"
        )
    nominal = sum(int((units.sum(1) * costs[name]).sum()) for name, units in existing.items())
    if nominal == prunable:  # no matrix is of two structures
        return chosen(min(ratio, top))
    return bisected(0.0, top, chosen, holds)


def check_ratios_met(subject: Subject, ratios: Iterable[float], config: TracedSearchConfig) -> None:
    """Raise ValueError for a ratio that cannot be met whatever the scores, or limits of structures that are none."""
    equal: Scores = {each.name: np.ones((each.copies, each.units)) for each in subject.structures}
    for ratio in ratios:
        select_scores(subject, equal, ratio, config, equal)


def limits_of(subject: Subject, config: TracedSearchConfig) -> dict[str, Limits]:
    """Return the limits of each structure; of experts, as many as are chosen remain.

    Raises:
        ValueError: a name or pattern that fits none.
    """
    names = [structure.name for structure in subject.structures]
    hints = {name: f"is left alone, as the model's own code {each}" for name, each in subject.left_out.items()}

    fewest = {structure.name: structure.least for structure in subject.structures}
    least = by_name("search.min_keep_each", config.min_keep_each, names, hints)
    most = by_name("search.max_ratio_each", config.max_ratio_each, names, hints)
    multiple = by_name("search.multiple_of_each", config.multiple_of_each, names, hints)
    return {
        name: Limits(
            max(least.get(name, config.min_keep), fewest[name]),
            most.get(name, config.max_ratio),
            multiple.get(name, config.multiple_of),
        )
        for name in names
    }


def prunable_parameters(subject: Subject) -> int:
    """Count the parameters that belong to a structure that may be pruned, each once."""
    covered: dict[str, dict[int, set[int]]] = {}
    for structure in subject.structures:
        for member in structure.members:
            held = covered.setdefault(member.path, {}).setdefault(member.axis, set())
            for place in member.places:
                held.update(index for unit in range(structure.units) for index in place.indices(unit))
    total = 0
    for path, axes in covered.items():
        shape = subject.traced.shapes[path]
        free = [size - len(axes.get(axis, ())) for axis, size in enumerate(shape)]
        total += _product(shape) - _product(free)
    return total


def removed_parameters(subject: Subject, keep: Mapping[str, Any]) -> int:
    """Count the parameters that a cut removes."""
    after = kept_shapes(subject.traced, subject.by_copies(keep))
    return sum(_product(shape) - _product(after[path]) for path, shape in subject.traced.shapes.items())


def count_parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Count all parameters of a model."""
    return sum(map(_product, shapes.values()))


def _product(sizes: Iterable[int]) -> int:
    return int(np.prod(list(sizes), dtype=np.int64))
