"""The energy that a unit writes to the power ¾, times the mean size of its gate's gradient to the power ½.

    S(u) = E(u)^share · (mean_n |∂ℒ_n/∂g_u|^power)^(2 (1 - share) / power),     E(u) = Σ_c mean(a_c²) · ‖W_out[c]‖²

At `share=0` it is gate_fisher (power 2) or orders as gate_taylor does (power 1); at `share=1` it is the energy alone.
With `centred`, E is that of a_c less its mean. Share and power were chosen in a race on the packaged texts, and not
confirmed on others: the log is mixed.md beside this file.
"""

import jax.numpy as jnp

from saap_jax.estimation.activations import ACTIVATION_MOMENTS
from saap_jax.estimation.base import Estimator, score_writers
from saap_jax.estimation.gates import GATE_GRADIENT


def written(weight, square):
    """Σ_c square_c · ‖W_out[c]‖²: weight [layers, units, coordinates, embed], square [layers, units, coordinates]."""
    return jnp.einsum("lucd,luc->lu", jnp.square(weight), square)


def mixed(*, share: float = 0.5, power: float = 2.0, centred: bool = False) -> Estimator:
    """Score a unit by the product above."""

    def score(statistics, params):
        moments, gradients = statistics.of(ACTIVATION_MOMENTS), statistics.of(GATE_GRADIENT)
        squares = {name: each - centred * jnp.square(moments.mean[name]) for name, each in moments.square.items()}
        energy = score_writers(written, params, squares)
        scores = {}
        for name, each in energy.items():
            size = jnp.mean(jnp.abs(gradients[name]) ** power, axis=0) ** (2 / power)
            scores[name] = jnp.maximum(each, 0.0) ** share * size ** (1 - share)
        return scores

    return Estimator(needs=frozenset({ACTIVATION_MOMENTS, GATE_GRADIENT}), score=score)


AUTHOR = "saap_jax, by the prompt of AGENTS.md"
METHOD = "FILE:mixed(share=0.75, power=1.0) > within(protect=(0.13, -0.07)) > uniform > least_squares"
