"""Stage 2b: several estimators' scores of a unit become one, weighted by learned uncertainty. Sees scores, no model."""

import re
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from saap_jax.types import Scores

FusionMethod = Literal["closed_form", "learned", "sampling"]
FusionScope = Literal["global", "structure", "layer"]

PerExample = dict[str, Float[Array | np.ndarray, "_examples _layers _units"]]
"""Scores of each example (or scenario) by itself, a structure."""

STEPS = 100
"""Gradient steps of `learned`; `_learned` says how many are needed."""


class Fusion(NamedTuple):
    """One score a unit, and how it came about. Scopes are named `global`, `mlp` or `mlp/3` (structure/layer)."""

    scores: Scores
    """I_fused, float64, `[layers, units]` a structure; NaN where there is no unit."""
    sigmas: dict[str, dict[str, float]]
    """σ_m of each estimator and scope."""
    weights: dict[str, dict[str, float]]
    """1 / (2 σ_m²) of each estimator and scope: what its scores are multiplied by."""
    loss: float
    """Σ over scopes and estimators of mean I_m / (2 σ_m²) + log σ_m: what the learned σ minimise."""

    def again(self, scores: dict[str, Scores]) -> "Fusion":
        """Fuse other scores of the same units, such as those of a single example, by the same σ, without constants."""
        fused: Scores = {}
        for structure, like in next(iter(scores.values())).items():
            fused[structure] = np.zeros(np.shape(like))
            for estimator, weights in self.weights.items():
                own = [_weight_of(weights, structure, layer) for layer in range(len(like))]
                fused[structure] += np.array(own)[:, None] * np.asarray(scores[estimator][structure], np.float64)
        return self._replace(scores=fused)


def _weight_of(weights: dict[str, float], structure: str, layer: int) -> float:
    """Look up the weight of a layer's units in whichever kind of scopes there is; NaN of a layer without units."""
    for scope in ("global", structure, f"{structure}/{layer}"):
        if scope in weights:
            return weights[scope]
    return np.nan


class Units(NamedTuple):
    """All existing units in one row: where they are, and which scope they belong to."""

    mask: dict[str, np.ndarray]
    scope: np.ndarray
    names: list[str]
    """Names of the scopes."""

    def pack(self, values: dict) -> np.ndarray:
        """Return the existing units of `[..., layers, units]` a structure as float64 `[..., all units]`."""
        return np.concatenate([np.asarray(values[n], np.float64)[..., m] for n, m in self.mask.items()], axis=-1)

    def unpack(self, row: np.ndarray) -> Scores:
        """Undo `pack`, with NaN where there is no unit."""
        ends = np.cumsum([mask.sum() for mask in self.mask.values()])[:-1]
        scores: Scores = {}
        for (name, mask), part in zip(self.mask.items(), np.split(row, ends), strict=True):
            values = np.full(mask.shape, np.nan)
            values[mask] = part
            scores[name] = values
        return scores

    def mean(self, rows: np.ndarray) -> np.ndarray:
        """Return the means over each scope, `[estimators, scopes]`, of `[estimators, all units]`."""
        count = np.bincount(self.scope)
        return np.stack([np.bincount(self.scope, weights=row) / count for row in rows])


def scope_parts(scope: str) -> tuple[str, int | None]:
    """Read the structure in a scope's name, and the layer where the scope is one layer.

    >>> scope_parts("mlp/12"), scope_parts("layers/up[1]")
    (('mlp', 12), ('layers/up[1]', None))
    """
    layered = re.fullmatch(r"(.+)/(\d+)", scope)
    if layered is None:
        return scope, None
    return layered[1], int(layered[2])


def fuse(
    scores: dict[str, Scores],
    method: FusionMethod = "closed_form",
    scope: FusionScope = "structure",
    scope_constant: bool = False,
    per_example: dict[str, PerExample] | None = None,
) -> Fusion:
    """Fuse the scores of two or more estimators m into one by homoscedastic uncertainty.

        I_fused(u) = Σ_m I_m(u) / (2 σ_m²)   [ + Σ_m log σ_m  with `scope_constant` ]

    σ_m is shared by the units of a scope. `closed_form`: σ_m² = mean of I_m over the scope, which minimises the sum of
    the whole expression; `learned` finds the same by gradient steps; both make I_fused = ½ Σ_m I_m / mean I_m, free of
    the estimators' units. `sampling`: σ_m² = Σ_u Var_n I_mn(u) / Σ_u Mean_n I_mn(u) over the units u of the scope and
    the examples n: an estimator that varies much between examples counts less.

    Args:
        scores: I_m >= 0, `{estimator: {structure: [layers, units]}}`; NaN where a layer has no such unit.
        method: where σ comes from.
        scope: `global` all units, `structure` those of a structure, `layer` those of a structure in one layer.
        scope_constant: add Σ_m log σ_m of its scope to each score. It changes the ranking between scopes only, and may
            make scores negative, which `stable` refuses.
        per_example: I_mn, `{estimator: {structure: [examples, layers, units]}}`; read by `sampling`.

    >>> one, other = {"mlp": np.array([[1.0, 3.0]])}, {"mlp": np.array([[40.0, 20.0]])}
    >>> fuse({"one": one, "other": other}).scores["mlp"].round(2).tolist()
    [[0.92, 1.08]]

    Raises:
        ValueError: fewer than two estimators; scores that are negative, infinite, of differing units or all zero in a
            scope; for `sampling` an estimator without scores of two examples or more, or without variance in a scope.

    Source: SAAP (arXiv:2412.15127), adaptive importance fusion, after Kendall & Gal (arXiv:1705.07115).
    Deviation: the variance of `sampling` is divided by the mean. σ² stands under a score, so it has the unit of a score
    (as the closed form has); a bare variance has that unit squared, and the fusion would depend on the units.
    """
    # From here on a row holds all units of all structures, `[estimators, units]`.
    units = _units(scores, scope)
    rows = np.stack([units.pack(s) for s in scores.values()])
    means = units.mean(rows)
    _refuse(scores, rows, means, units)
    # σ² of each estimator and scope, `[estimators, scopes]`.
    if method == "learned":
        variances = _learned(rows, units)
    elif method == "sampling":
        variances = np.stack([_sampled(name, per_example or {}, units) for name in scores])
    else:
        variances = means
    weights = 1 / (2 * variances)
    fused = (rows * weights[:, units.scope]).sum(axis=0)
    if scope_constant:
        fused = fused + np.log(variances).sum(axis=0)[units.scope] / 2

    def named(values: np.ndarray) -> dict[str, dict[str, float]]:
        found = {}
        for name, row in zip(scores, values, strict=True):
            found[name] = dict(zip(units.names, row.tolist(), strict=True))
        return found

    loss = float((means * weights + np.log(variances) / 2).sum())
    return Fusion(units.unpack(fused), named(np.sqrt(variances)), named(weights), loss)


def _units(scores: dict[str, Scores], scope: FusionScope) -> Units:
    """Number the scopes and the units that exist; raise where the estimators' units differ."""
    if len(scores) < 2:
        raise ValueError(f"fusion: expected two or more estimators, got {list(scores)}")
    (first, reference), *others = scores.items()
    for estimator, given in others:
        if given.keys() != reference.keys() or any((np.isnan(given[n]) != np.isnan(reference[n])).any() for n in given):
            raise ValueError(f"fusion: expected {estimator} to score the units that {first} scores, got others")
    mask = {name: ~np.isnan(np.asarray(values)) for name, values in reference.items()}
    # The scope of each unit, in the order in which `pack` puts them.
    labels = []
    for name, exists in mask.items():
        for layer in np.nonzero(exists)[0]:
            named = {"global": "global", "structure": name, "layer": f"{name}/{layer}"}
            labels.append(named[scope])
    names = list(dict.fromkeys(labels))
    number = {label: index for index, label in enumerate(names)}
    return Units(mask, np.array([number[label] for label in labels], np.int64), names)


def _refuse(scores: dict[str, Scores], rows: np.ndarray, means: np.ndarray, units: Units) -> None:
    """Raise for scores that have no place in a likelihood: infinite, negative, or all zero in a scope."""
    for estimator, row, own in zip(scores, rows, means, strict=True):
        wrong = np.flatnonzero((row < 0) | np.isinf(row))
        if len(wrong):
            raise ValueError(
                f"fusion: expected finite scores of at least 0, got {row[wrong[0]]:.4g} from {estimator} in scope "
                f"{units.names[units.scope[wrong[0]]]}; use an estimator of absolute values"
            )
        zero = np.flatnonzero(own == 0)
        if len(zero):
            raise ValueError(
                f"fusion: all scores of {estimator} are zero in scope {units.names[zero[0]]}, so its uncertainty has "
                "no value; leave the estimator out or choose a wider scope"
            )


def _sampled(estimator: str, per_example: dict[str, PerExample], units: Units) -> np.ndarray:
    """Return σ² of an estimator in each scope: variance over examples by mean."""
    given = per_example.get(estimator, {})
    if not given or any(len(given[name]) < 2 for name in units.mask):
        raise ValueError(
            f"fusion: 'sampling' expects per-example scores of {estimator} for two examples or more, got those of: "
            f"{', '.join(per_example) or 'none'}"
        )
    values = units.pack(per_example[estimator])
    variance, mean = units.mean(np.stack([values.var(axis=0), values.mean(axis=0)]))
    usable = (variance > 0) & (variance < np.inf) & (mean > 0) & (mean < np.inf)
    wrong = np.flatnonzero(~usable)
    if len(wrong):
        raise ValueError(
            f"fusion: 'sampling' expects per-example scores of {estimator} that vary and have a mean above 0 in scope "
            f"{units.names[wrong[0]]}, got variance {variance[wrong[0]]:.4g} and mean {mean[wrong[0]]:.4g}; use "
            "'closed_form'"
        )
    return variance / mean


def _learned(rows: np.ndarray, units: Units) -> np.ndarray:
    """Find σ² by gradient steps, `[estimators, scopes]`.

    Scores are divided by their maximum in the scope, c, and s = log (σ² / c) starts at 0: never below its minimum
    s* = log (mean / c). There a step of 1 down the gradient, ½ (1 - e^(s* - s)), is at most ½ far, never oversteps and
    halves the distance in the end, whatever the scale of the scores: 2 |s*| + 20 steps reach 1e-6.
    """
    inside = [units.scope == scope for scope in range(len(units.names))]
    largest = np.stack([np.array([row[own].max() for own in inside]) for row in rows])
    # The loss is linear in the scores: their mean, summed in float64, stands for them at every step.
    means = jnp.asarray(units.mean(rows / largest[:, units.scope]), jnp.float32)
    return largest * np.exp(np.asarray(_descend(means), np.float64))


@jax.jit
def _descend(means: Float[Array, "estimators scopes"]) -> Float[Array, "estimators scopes"]:
    """Minimise the mean over each scope of I / (2 e^s) + s / 2 over s = log σ², from s = 0."""
    optimizer = optax.sgd(learning_rate=1.0)

    def loss(s: Float[Array, "estimators scopes"]) -> Float[Array, ""]:
        return jnp.sum(means / (2 * jnp.exp(s)) + s / 2)

    def step(carry: tuple, _: None) -> tuple:
        s, state = carry
        updates, state = optimizer.update(jax.grad(loss)(s), state)
        s = optax.apply_updates(s, updates)
        return (s, state), None

    start = jnp.zeros_like(means)
    (found, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, length=STEPS)
    return found
