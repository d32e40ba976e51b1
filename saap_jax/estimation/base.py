"""The contract of an importance estimator, and the statistics of one calibration pass that it may ask for."""

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saap_jax.config.checks import check_seed
from saap_jax.discovery import Member, Structure, discover, unit_view
from saap_jax.discovery.weights import TracedWeights, Weights
from saap_jax.llama.model import Llama
from saap_jax.llama.segments import join_runs, run_bounds
from saap_jax.types import Gates, Scores

Batch = tuple[Int[Array | np.ndarray, "batch seq"], Bool[Array | np.ndarray, "batch seq"]]
"""Tokens and which of them are real; padding is on the right, a row without real tokens counts for nothing."""

Reduction = Literal["sum", "mean", "max", "prod", "last"]
"""How the scores of the matrices of one unit become the score of the unit."""


class Statistic(enum.StrEnum):
    """What a calibration pass can observe. Values are float32 (at least), padding excluded."""

    WEIGHT_GRADIENT = "weight_gradient"
    """Gradient of the mean loss over all tokens: a tree like the model's."""
    SQUARED_WEIGHT_GRADIENT = "squared_weight_gradient"
    """Mean over examples of the squared gradient of its mean loss: a tree like the model's, of the matrices of
    its layers; each other parameter has a single 0."""
    GATE_GRADIENT = "gate_gradient"
    """Gradient of each example's mean loss: {structure: [examples, layers, units]}."""
    ACTIVATION_MOMENTS = "activation_moments"
    """`Moments` of the gated activations over all tokens."""
    ACTIVATION_USAGE = "activation_usage"
    """Share of tokens on which a unit stands out, {structure: [layers, units, multiples]}: `activations.used`."""
    BLOCK_CHANGE = "block_change"
    """Mean over all tokens of 1 - cos(in, out) of the residual stream: {"attention", "mlp", "layer": [layers]}."""
    GRAM = "gram"
    """`gram.Gram` of the gated activations: two matrices a layer, of all coordinates squared. No estimator needs it."""
    GATE_HESSIAN = "gate_hessian"
    """`GateHessian` of the mean loss over all tokens, by a step of its own, as `Curvature` says."""


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


class GateHessian(NamedTuple):
    """First derivatives of the mean loss with respect to the gates, and what is known of the second ones."""

    gradient: Gates
    exact: Gates
    """Diagonal entries; only the structures that were observed exactly."""
    probed: Gates
    """z ⊙ Hz of each probe z, [probes, layers, units], whose mean estimates the diagonal; the other structures."""


class Moments(NamedTuple):
    """Mean of a and of a² of each unit's coordinates: a channel has one, an attention unit q_per_kv · head_dim."""

    mean: dict[str, Float[Array, "layers units coordinates"]]
    square: dict[str, Float[Array, "layers units coordinates"]]


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
            observed = ", ".join(self.values) or "none"
            raise ValueError(
                f"statistic {statistic.value} was not observed (observed: {observed}); "
                "name it in the estimator's `needs`"
            )
        return self.values[statistic]


class Estimator(NamedTuple):
    """An importance estimator: the statistics that it needs, and its formula as a pure function of them."""

    needs: frozenset[Statistic]
    score: Callable[[Statistics, Weights], Scores]
    """(statistics, weights) -> one number a unit, larger = more important; NaN where a layer has no such unit."""
    curvature: Curvature | None = None
    """How GATE_HESSIAN is to be observed, if it is needed."""


def score_matrices(formula: Callable[..., Array], *trees: Weights, reduction: Reduction = "sum") -> Scores:
    """Score every unit by `formula(matrix of the first tree, the same of the second, …) -> [layers, units]`.

    Each matrix comes as `[layers, units, rest]`; the results of a unit's matrices are combined by `reduction`, in the
    order of the model's parameters (so `last` is the projection that writes: output, down). Of a traced model a matrix
    is a member of a structure, vectors included, and layers are copies.
    """
    traced = [tree for tree in trees if isinstance(tree, TracedWeights)]
    models = [tree for tree in trees if isinstance(tree, Llama)]
    scores = {}
    for structure in traced[0].structures if traced else ():
        matrices = [formula(*(wide(tree.view(structure, each)) for tree in traced)) for each in structure.members]
        scores[structure.name] = reduce_matrices(matrices, reduction)
    for name, structure in discover(models[0]).items() if models else ():

        def of_run(*runs: Any, members: tuple[Member, ...] = structure.members) -> Array:
            matrices = [formula(*(wide(unit_view(run, member)) for run in runs)) for member in members]
            return reduce_matrices(matrices, reduction)

        scores[name] = over_runs(of_run, *models)
    return scores


def score_writers(formula: Callable[..., Array], params: Weights, *statistics: dict[str, Array]) -> Scores:
    """Score every unit by `formula(W_out [layers, units, coordinates, embed], statistic [layers, units, …], …)`.

    W_out is the matrix that carries the unit's activation into the residual stream (output, down).

    Raises:
        ValueError: a traced model, of which no activations are observed.
    """
    if isinstance(params, TracedWeights):
        raise ValueError("expected an estimator of gates or weights for a traced model, got one of activations")
    bounds, scores = run_bounds(params.runs), {}
    for name, structure in discover(params).items():
        pieces = []
        for run, place in zip(params.runs, bounds, strict=True):
            weight = _writer(run, structure, params.embedding.shape[-1])
            own = (x[name][place.start : place.stop, : weight.shape[1]] for x in statistics)
            pieces.append(formula(weight, *(x[:, :, : weight.shape[2]] for x in own)))
        scores[name] = join_runs(pieces, fill=jnp.nan)
    return scores


def _writer(run: Any, structure: Structure, embed: int) -> Float[Array, "layers units coordinates embed"]:
    """Return the writing matrices of the layers of a run."""
    view = wide(unit_view(run, structure.writer))
    return view.reshape(*view.shape[:2], view.shape[2] // embed, embed)


def over_runs(function: Callable[..., Array], *trees: Llama) -> Array:
    """Apply `function` to the runs of the trees and join what it returns, `[layers, units, ...]`, padded with NaN."""
    pieces = [function(*runs) for runs in zip(*(tree.runs for tree in trees), strict=True)]
    return join_runs(pieces, fill=jnp.nan)


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
