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

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from saap_jax.checks import Positive, Share
from saap_jax.runtime.decisions import least_first
from saap_jax.steps.allocation.blocks import SLACK
from saap_jax.steps.base import Context, Cost, Prefix, State, Step, TextSize, need, step
from saap_jax.steps.limits import Within, limits_at_end
from saap_jax.subjects.base import LanguageModel, language_model
from saap_jax.types import HELD_OUT, STRUCTURES, Keep


@step("shape")
@dataclasses.dataclass(frozen=True)
class UniformShape(Step):
    """Search one shape for all layers that stay, as plain models and MaxText have it: how many layers, heads, channels.

    The shape removes as much as what was chosen before, which is no part of the outcome; a quarter of the text is held
    out and judges. `protect` and a share for attention then count for nothing.
    """

    kind = "refinement"
    of = LanguageModel
    excludes = MappingProxyType({"rounds": "it reads the scores of all units"})
    needs_objective = True
    cacheable = True

    layers: Share = 0.25
    """Share of the layers that may go whole."""
    finalists: Positive = 4
    """Shapes that held-out text decides between, the best ones on a microbatch."""

    def plan(self, text: TextSize, ratio: float, prefix: Prefix) -> Cost:
        """A microbatch for each layer that may go and for each shape; the held-out text for each finalist."""
        subject = prefix.subject
        limits = subject.limits(prefix.within.at(ratio))
        found = list_shapes(subject.existing, subject.costs, ratio, limits, self.layers)
        if any(shape.layers for shape in found):
            layers = len(subject.existing["mlp"])
        else:
            layers = 0
        judged = min(self.finalists, len(found)) + 1
        return Cost((layers + len(found)) / text.microbatches + judged / HELD_OUT)

    def __call__(self, state: State, on: Context) -> State:
        """Keep the best uniform shape; its price is told by both divergences."""
        within = limits_at_end(state, on)
        if within.depth:
            raise ValueError("shape: expected no depth: it says what each layer keeps")
        existing = state.subject.existing
        scores = need(state, self)
        objective = language_model(self.name, state.subject).objective(on.text, on.batch_size, on.dense)
        found = shapes_of(existing, state.subject.costs, on.ratio, within, self.layers)

        progress = on.progress("search a uniform shape")

        # which layers go first: those without each of which alone the divergence is lowest on a microbatch
        alone = []
        if any(shape.layers for shape in found):
            for layer in progress(range(len(existing["mlp"]))):
                alone.append(objective.value(_without_layer(existing, layer), 0))
        first = least_first("divergences without a layer", alone)

        # which units of a layer stay: those of the highest scores
        ranks = {}
        for name, units in existing.items():
            ranks[name] = np.argsort(np.where(units, -scores[name], np.inf), axis=1, kind="stable")

        # the best shapes on a microbatch, then the best of those on held-out text
        keeps = [keep_of(shape, first, ranks, existing) for shape in found]
        values = [objective.value(keeps[number], 0) for number in progress(range(len(keeps)))]
        best = [keeps[number] for number in least_first("divergences of shapes", values)[: self.finalists]]
        judged = [objective.judge(keep) for keep in best]
        lowest = int(least_first("divergences of shapes", judged)[0])
        price = [objective.judge(state.keep), judged[lowest]]
        return state._replace(keep=best[lowest]).report(price=price)


def _without_layer(existing: Keep, layer: int) -> Keep:
    """Keep all units but those of a layer."""
    keep = {name: units.copy() for name, units in existing.items()}
    for units in keep.values():
        units[layer] = False
    return keep


class Shape(NamedTuple):
    """An architecture whose layers are alike."""

    layers: int
    """How many go whole."""
    attention: int
    """KV heads that each of the others keeps."""
    mlp: int
    """Channels that it keeps."""


def shapes_of(
    existing: Keep, costs: Mapping[str, np.ndarray], ratio: float, within: Within, whole: float
) -> list[Shape]:
    """List the shapes that remove at least a share of the parameters, none of which keeps all of another one.

    Args:
        whole: share of the layers that may go whole.

    Raises:
        ValueError: layers that are not alike, or no shape.
    """
    found = list_shapes(existing, costs, ratio, within, whole)
    if not found:
        raise ValueError(
            f"shape: no uniform shape removes {ratio:.2%} of the prunable parameters under min_keep, max_ratio, "
            "multiple_of and shape.layers: relax one of them"
        )
    return found


def list_shapes(
    existing: Keep, costs: Mapping[str, np.ndarray], ratio: float, within: Within, whole: float
) -> list[Shape]:
    """List what `shapes_of` does, nothing where there is no shape."""
    units = {name: existing[name].sum(axis=1) for name in STRUCTURES}
    for name in STRUCTURES:
        if len(np.unique(units[name])) > 1 or len(np.unique(costs[name])) > 1:
            raise ValueError("shape: expected a model whose layers are alike, to keep them so, got others")
    heads = int(units["attention"][0])
    channels = int(units["mlp"][0])
    head = int(costs["attention"][0])
    channel = int(costs["mlp"][0])
    layers = len(existing["mlp"])
    limits = {name: within.layer(name) for name in STRUCTURES}
    left = layers * (heads * head + channels * channel) * (1 - ratio)
    fewest = {}
    for name, count in (("attention", heads), ("mlp", channels)):
        most = math.floor(count * limits[name].max_ratio * (1 + SLACK))
        fewest[name] = max(limits[name].min_keep, 1, count - most)
    multiple = limits["mlp"].multiple_of
    found = []
    for gone in range(min(int(whole * layers), layers - 1) + 1):
        for kept in range(heads, fewest["attention"] - 1, -1):
            fits = int((left / (layers - gone) - kept * head) / channel * (1 + 1e-12))
            if fits >= channels:
                width = channels
            else:
                width = fits // multiple * multiple
            if (kept == heads or kept % limits["attention"].multiple_of == 0) and width >= fewest["mlp"]:
                found.append(Shape(gone, kept, width))
    return [shape for shape in found if not any(_keeps_all(other, shape) for other in found if other != shape)]


def _keeps_all(one: Shape, other: Shape) -> bool:
    """Tell whether a shape keeps all that another one keeps."""
    return one.layers <= other.layers and one.attention >= other.attention and one.mlp >= other.mlp


def keep_of(shape: Shape, order: np.ndarray, ranks: dict[str, np.ndarray], existing: Keep) -> Keep:
    """Keep a shape: all layers but the first ones of an order, and of each the units of the best ranks."""
    keep = {name: np.zeros_like(units) for name, units in existing.items()}
    stays = np.ones(len(existing["mlp"]), bool)
    stays[order[: shape.layers]] = False
    for name, count in zip(STRUCTURES, shape[1:], strict=True):
        for layer in np.flatnonzero(stays):
            keep[name][layer, ranks[name][layer, :count]] = True
    return keep
