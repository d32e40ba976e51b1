"""The contract of an importance estimator, and the statistics of one calibration pass that it may ask for."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saap_jax.config.checks import check_seed
from saap_jax.llama.model import Llama
from saap_jax.llama.segments import join_segments, segment_bounds
from saap_jax.structures import Member, Structure, channel_view, discover, unit_view
from saap_jax.structures.weights import TracedWeights, Weights
from saap_jax.types import Objective, Scores

Batch = tuple[Int[Array | np.ndarray, "batch seq"], Bool[Array | np.ndarray, "batch seq"]]
"""Tokens and which of them are real; padding is on the right, a row without real tokens counts for nothing."""

Reduction = Literal["sum", "mean", "max", "prod", "last"]
"""How the scores of the matrices of one unit become the score of the unit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curvature:
    """How the diagonal of the gate Hessian is observed."""

    probes: int = 16
    """Random sign vectors; the error of an estimated entry shrinks as 1/√probes."""
    seed: int = 0
    attention: str = "exact"
    """`exact`: one Hessian-vector product an attention unit; `probes`: estimated like the channels."""

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise ValueError(f"gate_hessian: expected probes >= 1, got {self.probes}")
        if self.attention not in ("exact", "probes"):
            raise ValueError(f"gate_hessian: expected attention 'exact' or 'probes', got {self.attention!r}")
        check_seed("gate_hessian: seed", self.seed)


class Plan(NamedTuple):
    """What the shapes of the statistics depend on beside the model."""

    examples: int
    """Rows of what is kept of each example, padding included."""
    curvature: Curvature = Curvature()


class Point(NamedTuple):
    """The activations of a microbatch at a point of a layer; nothing of them is differentiated."""

    name: str
    """`attention_in`, `attention`, `attention_out`, `mlp_in`, `mlp`, `mlp_out`, in the order of the forward pass."""
    layer: Mapping[str, Array]
    """By point, those of the layer up to this one: `[batch, seq, embed]` at the ends, else `[batch, seq, *units]`."""
    mask: Bool[Array, "batch seq"]
    norm_eps: float

    @property
    def values(self) -> Array:
        """The activations at this point, float32 at least."""
        return self.layer[self.name]

    def units(self, structure: str) -> Float[Array, "batch seq units coordinates"]:
        """Return the gated activations of a structure's units."""
        batch, seq, units, *rest = self.layer[structure].shape
        return self.layer[structure].reshape(batch, seq, units, math.prod(rest))


class Accumulation(NamedTuple):
    """How an array of a statistic grows: `accumulate.mean_over`, `accumulate.ROWS`, or another."""

    add: Callable[[Array, Array, Int[Array, ""], int], Array]
    """(total, what a microbatch adds, the index of its first example, its examples) -> total."""
    finish: Callable[[Array, "Statistics"], Array]
    """(total, counts) -> what estimators read."""
    merge: Callable[[Array, Array, "Statistics", "Statistics"], Array]
    """(finished array of one text, of another, counts of the one, of the other) -> that of both."""


def per_unit(path: str) -> tuple[str, ...]:
    """Return the leading axes of an array of one number, or more, a unit."""
    return ("layers", "units")


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Statistic:
    """What a calibration pass observes: how it starts, what a microbatch adds, and how parts become the whole.

    Values are float32 at least, padding excluded. What is said here is all that the pass, merging, the check for
    finite numbers and files of statistics know of a statistic: one of your own needs no change of them.
    """

    name: str
    """In files and messages, unlike that of any other."""
    init: Callable[[Llama, Plan], Any]
    """Zeros, from shapes alone; where they are spread over devices, they stay so, else every device holds them."""
    source: Literal["activations", "weights", "squares", "gates", "step"]
    """What it is made of: `observe`d activations; the gradient of the summed loss; the squares of the examples'
    gradients of their mean loss, summed; the gate gradients of each example's mean loss, `[batch, layers, units]`; or
    what a `step` of its own adds."""
    observe: Callable[[Point], Mapping[str, Any]] = lambda point: {}
    """Of `activations`: sums over a microbatch by key, at some points; joined, `{key: [layers, ...]}`."""
    contribute: Callable[[Any], Any] = lambda shown: shown
    """What the pass shows of its source -> what a microbatch adds, a tree like that of `init`."""
    accumulation: Accumulation
    axes: Callable[[str], tuple[str, ...]] = per_unit
    """Leading axes of the array at a path: `examples` (rows), `layers`, `units`, or others, which have a single entry
    where an example is observed alone; none where the path names a parameter."""
    step: Callable[..., Any] | None = None
    """A jitted program in place of `observe` and `contribute`, such as `hessian.hessian_step`."""
    curvature: Callable[[Any], Curvature] | None = None
    """Where its shapes depend on the curvature of the plan: from its value."""
    objective: Objective = "loss"
    """Of gradients: what is differentiated in place of the loss, by a backward pass of its own; see `of_objective`."""

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name == "losses":
            raise ValueError(f"statistic: expected an identifier other than 'losses' as its name, got {self.name!r}")

    def __lt__(self, other: "Statistic") -> bool:
        return self.name < other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"<Statistic {self.name}>"

    def of_objective(self, objective: Objective) -> "Statistic":
        """Return the same of another objective, under a name of its own."""
        if objective == self.objective:
            return self
        return dataclasses.replace(self, name=f"{self.name}_{objective}", objective=objective)

    @property
    def large(self) -> bool:
        """Whether it takes about as much space as the model in float32."""
        return self.source in ("weights", "squares")


class Statistics(NamedTuple):
    """What one pass observed on one scenario."""

    examples: Int[Array, ""]
    tokens: Int[Array, ""]
    """Predicted tokens: those that enter the loss."""
    losses: Float[Array, "examples"]
    """Mean loss of each example, in nats a token."""
    values: dict[Statistic, Any]

    @property
    def seen(self) -> Int[Array, ""]:
        """Real tokens, each with one activation a unit: an example has one more than it predicts."""
        return self.tokens + self.examples

    def of(self, statistic: Statistic) -> Any:
        """Return an observed statistic; a clear error when the pass did not observe it."""
        if statistic not in self.values:
            observed = ", ".join(known.name for known in self.values) or "none"
            raise ValueError(
                f"statistic {statistic.name} was not observed (observed: {observed}); "
                "name it in the estimator's `needs`"
            )
        return self.values[statistic]


class Estimator(NamedTuple):
    """An importance estimator: the statistics that it needs, and its formula as a pure function of them."""

    needs: frozenset[Statistic]
    score: Callable[[Statistics, Weights], Scores]
    """(statistics, weights) -> one number a unit, larger = more important; NaN where a layer has no such unit."""
    curvature: Curvature | None = None
    """How the gate Hessian is to be observed, if it is needed."""


def score_matrices(
    formula: Callable[..., Array], *trees: Weights, reduction: Reduction = "sum", channels: bool = False
) -> Scores:
    """Score every unit by `formula(matrix of the first tree, the same of the second, …) -> [layers, units]`.

    Each matrix comes as `[layers, units, rest]`, or with `channels` as `[layers, units, channels, embed]`; the results
    of a unit's matrices are combined by `reduction`, in the order of the model's parameters (so `last` is the
    projection that writes: output, down). Of a traced model a matrix is a member of a structure, vectors included, and
    layers are copies.

    Raises:
        ValueError: `channels` of a traced model, whose axes have no names.
    """
    traced = [tree for tree in trees if isinstance(tree, TracedWeights)]
    models = [tree for tree in trees if isinstance(tree, Llama)]
    if traced and channels:
        raise ValueError(
            "estimator: expected within='matrix' for a traced model, which does not tell the channels of a unit apart, "
            "got 'channel'"
        )
    view, scores = channel_view if channels else unit_view, {}
    for structure in traced[0].structures if traced else ():
        matrices = [formula(*(wide(tree.view(structure, each)) for tree in traced)) for each in structure.members]
        scores[structure.name] = reduce_matrices(matrices, reduction)
    for name, structure in discover(models[0]).items() if models else ():

        def of_segment(*segments: Any, members: tuple[Member, ...] = structure.members) -> Array:
            matrices = [formula(*(wide(view(segment, member)) for segment in segments)) for member in members]
            return reduce_matrices(matrices, reduction)

        scores[name] = over_segments(of_segment, *models)
    return scores


def score_writers(formula: Callable[..., Array], params: Weights, *statistics: dict[str, Array]) -> Scores:
    """Score every unit by `formula(W_out [layers, units, coordinates, embed], statistic [layers, units, …], …)`.

    W_out is the matrix that carries the unit's activation into the residual stream (output, down). Of a traced model it
    is what the unit is multiplied with where it acts, `TracedWeights.writing`, and layers are copies.

    Raises:
        ValueError: a structure of a traced model whose units act nowhere where that is known.
    """
    if isinstance(params, TracedWeights):
        return {
            structure.name: formula(wide(params.writing(structure)), *(x[structure.name] for x in statistics))
            for structure in params.structures
        }
    scores = {}
    for name, matrices in output_matrices(params).items():
        pieces = []
        for place, weight in matrices:
            own = (x[name][place, : weight.shape[1]] for x in statistics)
            pieces.append(formula(weight, *(x[:, :, : weight.shape[2]] for x in own)))
        scores[name] = join_segments(pieces, fill=jnp.nan)
    return scores


def output_matrices(model: Llama) -> dict[str, list[tuple[slice, Float[Array, "_ _ _ embed"]]]]:
    """Return what writes into the stream by structure, of each segment: its layers, and of each a matrix a unit.

    The matrices are `[layers, units, coordinates, embed]`.
    """
    bounds, embed = segment_bounds(model.segments), model.embedding.shape[-1]
    return {
        name: [
            (slice(place.start, place.stop), _writer(segment, each, embed))
            for segment, place in zip(model.segments, bounds, strict=True)
        ]
        for name, each in discover(model).items()
    }


def _writer(segment: Any, structure: Structure, embed: int) -> Float[Array, "layers units coordinates embed"]:
    """Return the writing matrices of the layers of a segment."""
    view = wide(unit_view(segment, structure.writer))
    return view.reshape(*view.shape[:2], view.shape[2] // embed, embed)


def over_segments(function: Callable[..., Array], *trees: Llama) -> Array:
    """Apply `function` to the segments of trees and join what it returns, `[layers, units, ...]`, padded with NaN."""
    pieces = [function(*segments) for segments in zip(*(tree.segments for tree in trees), strict=True)]
    return join_segments(pieces, fill=jnp.nan)


def reduce_matrices(values: Sequence[Array], reduction: Reduction) -> Float[Array, "layers units"]:
    """Combine the scores of a unit's matrices."""
    stacked = jnp.stack(list(values))
    match reduction:
        case "sum":
            return jnp.sum(stacked, axis=0)
        case "mean":
            return jnp.mean(stacked, axis=0)
        case "max":
            return jnp.max(stacked, axis=0)
        case "prod":
            return jnp.prod(stacked, axis=0)
        case "last":
            return stacked[-1]
        case _:
            raise ValueError(f"reduction: expected 'sum', 'mean', 'max', 'prod' or 'last', got {reduction!r}")


def wide(array: Array) -> Array:
    """Cast to float32 (at least), in which every score is computed."""
    return array.astype(jnp.float64 if array.dtype == jnp.float64 else jnp.float32)
