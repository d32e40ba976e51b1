"""Which estimator predicts best what the loss does when a unit goes? Every formula beside the exact change, on SmolLM2.

    saap fidelity fidelity

Removes all 90 attention units and 8 MLP channels of each of the 30 layers, one at a time, and ranks the estimators by
the correlation of their scores with what came of it, over all units, per structure and within layers, with bootstrap
intervals and a scatter plot each. It takes 25 CPU-minutes, most of them for the exact curvature of `gate_hessian` (90
Hessian-vector products); killed, it goes on where it was. The result on web text is in docs/studies.md:

    saap fidelity fidelity --calibration.scenarios "web=jsonl:text/c4_en_300docs.jsonl#text"
"""

from saap_jax.config.jobs import FidelityConfig
from saap_jax.config.method import CalibrationConfig
from saap_jax.estimation.registry import ESTIMATORS

CONFIG = FidelityConfig(
    name="fidelity",
    calibration=CalibrationConfig(examples=8),
    estimators=(*ESTIMATORS, "fused"),
    channels_per_layer=8,
)
