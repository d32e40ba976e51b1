"""Stage 2c, uniform: all layers that stay keep as many units as each other, and how many is searched.

What takes one number for all layers (plain Hugging Face models, MaxText, serving on TPUs) needs that. A *shape* says
how many layers go whole, and how many KV heads and channels each of the others keeps. For a budget there is one for
each number of layers and of heads: channels are what is left, rounded down to what widths are multiples of. All are
judged by the divergence from the unpruned model, by masks and so by one program, on a microbatch; the best few of them
on held-out text. Which layers go: those without each of which alone the divergence is lowest on that microbatch. Which
units: their scores say.

Source: the search of Minitron (Muralidharan et al., arXiv:2407.14679, section 2.4), which enumerates architectures
within a budget and ranks them by a short retraining; here by the divergence, and the width of the residual stream is
not part of it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from saap_jax.config.search import SearchConfig
from saap_jax.selection.budget import SLACK
from saap_jax.selection.search import Selection, aligned
from saap_jax.subjects.base import Objective
from saap_jax.types import STRUCTURES, Keep, Scores


class Shape(NamedTuple):
    """An architecture whose layers are alike."""

    layers: int
    """How many go whole."""
    attention: int
    """KV heads that each of the others keeps."""
    mlp: int
    """Channels that it keeps."""

    def keeps_all_of(self, other: "Shape") -> bool:
        """Say whether it keeps whatever another one keeps."""
        return self.layers <= other.layers and self.attention >= other.attention and self.mlp >= other.mlp


def uniform(
    start: Selection,
    priority: Scores,
    objective: Objective,
    costs: dict[str, np.ndarray],
    existing: Keep,
    config: SearchConfig,
    made: Callable[[Keep], Selection],
    *,
    progress: Callable[[Sequence[int]], Iterator[int]] = iter,
) -> Selection:
    """Return the best uniform shape that removes as much as a selection; its price is told by both divergences.

    Args:
        start: what the search chose, whose layers are free; not part of the outcome.
        priority: what orders the units of a layer, `[layers, units]` a structure, larger = kept longer.
        objective: what is lowered.
        costs: parameters a unit, `[layers]` a structure.
        existing: which units there are.
        config: limits of the search, and how many shapes are looked at more closely.
        made: returns a keep-set with what it removes.
        progress: wraps the passes over a microbatch, to show progress.

    Raises:
        ValueError: layers that are not alike, or a ratio that no shape meets.
    """
    found = shapes_of(existing, costs, start.asked, config)

    def without(layer: int) -> Keep:
        keep = {name: units.copy() for name, units in existing.items()}
        for units in keep.values():
            units[layer] = False
        return keep

    layers = range(len(existing["mlp"]) if any(shape.layers for shape in found) else 0)
    alone = [objective.value(without(layer), 0) for layer in (progress(layers) if layers else ())]
    order = np.argsort(alone, kind="stable")
    ranks = {name: np.argsort(-values, axis=1, kind="stable") for name, values in priority.items()}
    keeps = [keep_of(shape, order, ranks, existing) for shape in found]
    values = [objective.value(keeps[number], 0) for number in progress(range(len(keeps)))]
    best = [keeps[number] for number in np.argsort(values, kind="stable")[: config.uniform.finalists]]
    judged = [objective.judge(keep) for keep in best]
    chosen = best[int(np.argmin(judged))]
    return made(chosen)._replace(price=(objective.judge(start.keep), min(judged)))


def shapes_of(existing: Keep, costs: dict[str, np.ndarray], ratio: float, config: SearchConfig) -> list[Shape]:
    """Return the shapes that remove at least a share of the parameters, none of which keeps all that another one keeps.

    Raises:
        ValueError: layers that are not alike, or no shape.
    """
    units = {name: np.unique(existing[name].sum(axis=1)) for name in STRUCTURES}
    if any(len(np.unique(each)) > 1 for each in (*units.values(), *(costs[name] for name in STRUCTURES))):
        raise ValueError("search.shape: expected a model whose layers are alike, to keep them so, got others")
    heads, channels = (int(units[name][0]) for name in STRUCTURES)
    head, channel = (int(costs[name][0]) for name in STRUCTURES)
    layers, least, multiple = len(existing["mlp"]), config.min_keep, aligned(config)
    whole = heads * head + channels * channel
    left = layers * whole * (1 - ratio)
    fewest = {
        name: max(getattr(least, name), 1, count - math.floor(count * getattr(config.max_ratio, name) * (1 + SLACK)))
        for name, count in (("attention", heads), ("mlp", channels))
    }
    found = []
    for gone in range(min(int(config.uniform.layers * layers), layers - 1) + 1):
        for kept in range(heads, fewest["attention"] - 1, -1):
            fits = int((left / (layers - gone) - kept * head) / channel * (1 + 1e-12))
            width = channels if fits >= channels else fits // multiple.mlp * multiple.mlp
            if (kept == heads or kept % multiple.attention == 0) and width >= fewest["mlp"]:
                found.append(Shape(gone, kept, width))
    found = [shape for shape in found if not any(other.keeps_all_of(shape) for other in found if other != shape)]
    if not found:
        raise ValueError(
            f"search.shape: no uniform shape removes {ratio:.2%} of the prunable parameters under min_keep, max_ratio, "
            "multiple_of and uniform.layers: relax one of them"
        )
    return found


def keep_of(shape: Shape, order: np.ndarray, ranks: dict[str, np.ndarray], existing: Keep) -> Keep:
    """Return what a shape keeps: all layers but the first ones of an order, and of each the units of the best ranks."""
    keep = {name: np.zeros_like(units) for name, units in existing.items()}
    stays = np.ones(len(existing["mlp"]), bool)
    stays[order[: shape.layers]] = False
    for name, count in zip(STRUCTURES, shape[1:], strict=True):
        for layer in np.flatnonzero(stays):
            keep[name][layer, ranks[name][layer, :count]] = True
    return keep
