"""The contract of an importance estimator, and of the statistics of one calibration pass that it may ask for.

Sums are float32 (float64 for a float64 model). Nothing is allocated for a statistic that nobody needs; the largest,
mean and squared weight gradients, take one float32 a parameter of the layers each.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from saap_jax.checks import Checked, Positive, Seed
from saap_jax.llama.model import Llama, at_least_float32
from saap_jax.llama.product import is_matrix
from saap_jax.llama.segments import existing_units, join_segments
from saap_jax.structures.weights import Weights, weights_of
from saap_jax.types import Gates, Objective, Scores

Batch = tuple[Int[Array | np.ndarray, "batch seq"], Bool[Array | np.ndarray, "batch seq"]]
"""Tokens and which of them are real; padding is on the right, a row without real tokens counts for nothing."""

Reduction = Literal["sum", "mean", "max", "prod", "last"]
"""How the scores of the matrices of one unit become the score of the unit."""

REDUCTIONS: dict[str, Callable[..., Array]] = {"sum": jnp.sum, "mean": jnp.mean, "max": jnp.max, "prod": jnp.prod}
"""All but `last`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curvature(Checked):
    """How the diagonal of the gate Hessian is observed."""

    PLACE = "gate_hessian."

    probes: Positive = 16
    """Random sign vectors; the error of an estimated entry shrinks as 1/√probes."""
    seed: Seed = 0
    attention: Literal["exact", "probes"] = "exact"
    """`exact`: one Hessian-vector product an attention unit; `probes`: estimated like the channels."""


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

    @property
    def values(self) -> Array:
        """The activations at this point, float32 at least."""
        return self.layer[self.name]

    def units(self, structure: str) -> Float[Array, "batch seq units coordinates"]:
        """Show the gated activations of a structure's units."""
        batch, seq, units, *rest = self.layer[structure].shape
        return self.layer[structure].reshape(batch, seq, units, math.prod(rest))

    def gates(self, structure: str) -> Float[Array, "*batch units"]:
        """Show at which gates the layer is observed: 0 of units that have gone."""
        return self.layer[f"{structure}_gates"]


class Accumulation(NamedTuple):
    """How an array of a statistic grows: `mean_over`, `ROWS`, or another."""

    add: Callable[[Array, Array, Int[Array, ""]], Array]
    """(total, what a microbatch adds, the index of its first example) -> total."""
    finish: Callable[[Array, "Statistics"], Array]
    """(total, counts) -> what estimators read."""


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Statistic:
    """What a calibration pass observes: how it starts, what a microbatch adds, and how sums become what is read.

    Values are float32 at least, padding excluded. What is said here is all that the pass, the check for finite numbers
    and files of statistics know of a statistic: one of your own needs no change of them.

    >>> def summed(gates):
    ...     return {name: gradient.sum(axis=0) for name, gradient in gates.items()}
    >>> zeros = lambda model, plan: like_units(model)
    >>> Statistic(name="push", source="gates", init=zeros, contribute=summed, accumulation=mean_over("examples"))
    <Statistic push>
    """

    name: str
    """In files and messages, unlike that of any other."""
    init: Callable[[Llama, Plan], Any]
    """Zeros, from shapes alone; where they are spread over devices, they stay so, else every device holds them."""
    source: Literal["activations", "weights", "squares", "gates", "step"]
    """What it is made of: `observe`d activations; the gradient of the summed loss; the squares of the examples'
    gradients of their mean loss, which the backward pass itself adds up; the gate gradients of each example's mean
    loss, `[batch, layers, units]`; or what a `step` of its own adds."""
    observe: Callable[[Point], Mapping[str, Any]] = lambda point: {}
    """Of `activations`: sums over a microbatch by key, at some points; joined, `{key: [layers, ...]}`."""
    kind: Callable[..., Any] | None = None
    """Named tuple that its value is, of dictionaries of arrays; `observe` then gives a sum for each field by key. None:
    a dictionary or an array, or a tree like the model's of `weights` and `squares`."""
    contribute: Callable[[Any], Any] = lambda shown: shown
    """What the pass shows of its source -> what a microbatch adds, a tree like that of `init`; not of `squares`."""
    accumulation: Accumulation
    axes: Callable[[str], tuple[str, ...]] = lambda path: ("layers", "units")
    """Leading axes of the array at a path: `examples` (rows), `layers`, `units`, or others; none where the path names a
    parameter."""
    step: Callable[..., Any] | None = None
    """A jitted program in place of `observe` and `contribute`, such as `hessian.hessian_step`."""
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
        """Make the same statistic of another objective, under a name of its own."""
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
    gates: Gates | None = None
    """At which the model was observed, `[layers, units]` a structure; None: all 1."""

    @property
    def seen(self) -> Int[Array, ""]:
        """Real tokens, each with one activation a unit: an example has one more than it predicts."""
        return self.tokens + self.examples

    def of(self, statistic: Statistic) -> Any:
        """Look up an observed statistic; a clear error when the pass did not observe it."""
        if statistic not in self.values:
            observed = ", ".join(known.name for known in self.values) or "none"
            raise ValueError(
                f"statistic {statistic.name} was not observed (observed: {observed}); "
                "name it in the estimator's `needs`"
            )
        return self.values[statistic]

    def there(self, weights: Any) -> Mapping[str, Bool[Array | np.ndarray, "layers units"]]:
        """Say which units were there: formulas that compare units with each other leave the others out."""
        units = weights_of(weights).units
        if self.gates is None:
            return units
        return {name: exist & (self.gates[name] != 0) for name, exist in units.items()}


class Estimator(NamedTuple):
    """An importance estimator: the statistics that it needs, and its formula as a pure function of them.

    >>> from saap_jax import score_units
    >>> def ones(seen, weights):
    ...     return {name: jnp.ones(units.shape) for name, units in weights.units.items()}
    >>> score_units(model, windows, {"ones": Estimator(frozenset(), ones)}).scores("ones")["mlp"].shape
    (2, 16)
    """

    needs: frozenset[Statistic]
    score: Callable[[Statistics, Weights], Scores]
    """(statistics, weights) -> one number a unit, larger = more important; NaN where a layer has no such unit."""
    curvature: Curvature | None = None
    """How the gate Hessian is to be observed, if it is needed."""


def estimator_of(
    need: Statistic, formula: Callable[[Any, Weights], Scores], curvature: Curvature | None = None
) -> Estimator:
    """Make an estimator that needs one statistic: `formula(its value, weights)`."""
    return Estimator(frozenset({need}), lambda seen, weights: formula(seen.of(need), weights), curvature)


def score_matrices(
    formula: Callable[..., Array], params: Any, *trees: Any, reduction: Reduction = "sum", channels: bool = False
) -> Scores:
    """Score every unit by `formula(matrix of the weights, the same of the next tree, …) -> [layers, units]`.

    Each matrix comes as `[layers, units, rest]`, or with `channels` as `[layers, units, channels, embed]`; the results
    of a unit's matrices are combined by `reduction`, in the order of the model's parameters (so `last` is the
    projection that writes: output, down). Of a traced model a matrix is a member of a structure, vectors included, and
    layers are copies.

    Raises:
        ValueError: `channels` of a traced model, whose axes have no names.
    """
    weights = weights_of(params)
    every = [weights, *(weights.like(tree) for tree in trees)]
    scores = {}
    for name in weights.units:
        pieces = []
        for segment in zip(*(each.matrices(name, channels) for each in every), strict=True):
            of_matrices = [formula(*map(wide, same)) for same in zip(*segment, strict=True)]
            pieces.append(_reduced(jnp.stack(of_matrices), reduction))
        scores[name] = join_segments(pieces, fill=jnp.nan)
    return scores


def _reduced(scores: Float[Array, "matrices layers units"], reduction: Reduction) -> Float[Array, "layers units"]:
    if reduction == "last":
        return scores[-1]
    return REDUCTIONS[reduction](scores, axis=0)


def score_writers(formula: Callable[..., Array], params: Any, *statistics: Mapping[str, Array]) -> Scores:
    """Score every unit by `formula(W_out [layers, units, coordinates, embed], statistic [layers, units, …], …)`.

    W_out is what the unit is multiplied with where it acts, `Weights.writing`: the matrix that carries its activation
    into the residual stream (output, down). Of a traced model layers are copies.

    Raises:
        ValueError: a structure of a traced model whose units act nowhere where that is known.
    """
    weights = weights_of(params)
    scores = {}
    for name in weights.units:
        pieces = []
        for layers, matrix in weights.writing(name):
            _, units, coordinates, _ = matrix.shape
            # statistics are as wide as the widest layer
            own = [statistic[name][layers, :units] for statistic in statistics]
            pieces.append(formula(wide(matrix), *(each[:, :, :coordinates] for each in own)))
        scores[name] = join_segments(pieces, fill=jnp.nan)
    return scores


def only_units(
    params: Any, values: Mapping[str, Array], formula: Callable[[Array], Array] = lambda value: value
) -> Scores:
    """Score by `formula(value of a structure) -> [layers, units]`; NaN where a layer has no such unit."""
    exists = weights_of(params).units
    return {name: jnp.where(jnp.asarray(units), formula(values[name]), jnp.nan) for name, units in exists.items()}


def wide(array: Array) -> Array:
    """Cast to float32 (at least), in which every score is computed."""
    return array.astype(jnp.float64 if array.dtype == jnp.float64 else jnp.float32)


def statistics_dtype(model: Llama) -> Any:
    """The type of sums and statistics: float32, or float64 for a float64 model."""
    return at_least_float32(model.embedding.dtype)


# --- zeros -----------------------------------------------------------------------------------------


def _each_parameter(function: Callable[[nnx.Variable], Array], model: Llama) -> Llama:
    return jax.tree.map(lambda v: v.replace(function(v)), model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def like_matrices(model: Llama, plan: Plan) -> Llama:
    """Make zeros like the matrices of the layers, spread over the same devices, and a single 0 for each other one."""

    def zeros(variable: nnx.Variable) -> Array:
        shape = ()
        place = None
        if is_matrix(variable):
            shape = variable.shape
            place = getattr(variable.get_value(), "sharding", None)
        place = place if isinstance(place, NamedSharding) else None
        return jnp.zeros(shape, at_least_float32(variable.dtype), device=place)

    return _each_parameter(zeros, model)


def matrices_of(gradient: Llama) -> Llama:
    """Keep the matrices of the layers of a tree, float32 at least, and a single 0 for each other parameter.

    What else a backward pass could make, the gradient of the embedding above all, is then never computed.
    """
    return _each_parameter(lambda v: wide(v[...]) if is_matrix(v) else jnp.zeros((), jnp.float32), gradient)


def like_units(model: Llama, before: tuple[int, ...] = (), after: dict[str, int] | None = None) -> Gates:
    """Make zeros `[*before, layers, units]`, with `after[structure]` numbers a unit if given."""
    return {
        name: jnp.zeros(before + units.shape + (() if after is None else (after[name],)), statistics_dtype(model))
        for name, units in existing_units(model.segments).items()
    }


# --- sums, and what becomes of them ----------------------------------------------------------------


def mean_over(per: Literal["examples", "tokens", "seen"]) -> Accumulation:
    """Accumulate a sum that becomes a mean over a count of `Statistics`."""
    return Accumulation(
        add=lambda total, new, position: total + new.astype(total.dtype),
        finish=lambda total, counts: total / int(getattr(counts, per)),
    )


ROWS = Accumulation(
    add=lambda total, new, position: jax.lax.dynamic_update_slice_in_dim(total, wide(new), position, axis=0),
    finish=lambda total, counts: total[: int(counts.examples)],
)
"""A row an example, kept as it is; padding is cut off at the end."""
