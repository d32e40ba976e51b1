"""Estimators on gates: what the loss does when a unit's activation is scaled.

∂ℒ/∂g_u at g = 1 equals Σ w_k ∂w_k over the unit's writing matrix (output, down), and equally over value or up. A gate
is one number a unit, so its gradient is kept for each calibration example.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from saap_jax.estimation.base import ROWS, Estimator, Statistic, estimator_of, like_units, only_units
from saap_jax.types import Objective

GATE_GRADIENT = Statistic(
    name="gate_gradient",
    init=lambda model, plan: like_units(model, (plan.examples,)),
    source="gates",
    accumulation=ROWS,
    axes=lambda path: ("examples", "layers", "units"),
)
"""Gradient of each example's mean loss: {structure: [examples, layers, units]}."""


def gate_taylor(*, objective: Objective = "loss") -> Estimator:
    """Score a unit by (1/N) Σ_n |∂ℒ_n/∂g_u|, the mean absolute first-order effect of removing it on an example.

    ℒ is the loss, or another objective (`estimation.objectives`).
    Source: Molchanov et al. (arXiv:1906.10771) with gates; Michel et al. (arXiv:1905.10650) for attention heads.
    """
    return _on_gates(lambda gradient: jnp.mean(jnp.abs(gradient), axis=0), objective)


def gate_taylor_signed() -> Estimator:
    """Score a unit by -(1/N) Σ_n ∂ℒ_n/∂g_u, the first-order estimate of the change of the loss when it goes.

    In nats, of either sign: a negative score says that removal is expected to help. Source: as `gate_taylor`, without
    the absolute value.
    """
    return _on_gates(lambda gradient: -jnp.mean(gradient, axis=0), "loss")


def gate_fisher(*, objective: Objective = "loss") -> Estimator:
    """Score a unit by (1/N) Σ_n (∂ℒ_n/∂g_u)²: the second-order term wᵀHw with the empirical Fisher information for H.

    With `objective="sampled"` it is the Fisher information itself, estimated by one draw a token
    (`estimation.objectives`).
    Source: Kwon et al. (arXiv:2204.09656), the diagonal of their mask Fisher, without the factor ½.
    """
    return _on_gates(lambda gradient: jnp.mean(jnp.square(gradient), axis=0), objective)


def _on_gates(
    formula: Callable[[Float[Array, "examples layers units"]], Float[Array, "layers units"]], objective: Objective
) -> Estimator:
    gradient = GATE_GRADIENT.of_objective(objective)
    return estimator_of(gradient, lambda gradients, params: only_units(params, gradients, formula))
