"""Eight importance estimators on SmolLM2-135M, at 20 % and 50 % of the prunable parameters.

    saap compare quickstart

Calibrated on 4,096 tokens of the Python language reference, evaluated on 3,072 tokens of its other half (in domain) and
of data-set descriptions (out of domain), in a race: who is surely worse is evaluated no further (docs/racing.md).
"""

from saap_jax.config import CompareConfig
from saap_jax.config.jobs import USUAL

CONFIG = CompareConfig(
    name="quickstart",
    methods=tuple(f"{name} = {name} > within(protect=(0.13, -0.07)) > uniform" for name in USUAL),
    race=True,
)
