"""Eight importance estimators on SmolLM2-135M, at 20 % and 50 % of the prunable parameters.

    saap compare quickstart

Calibrated on 4,096 tokens of the Python language reference, evaluated on 3,072 tokens of its other half (in domain) and
of data-set descriptions (out of domain), in a race: who is surely worse is evaluated no further (docs/racing.md).
"""

from saap_jax.config import CompareConfig, SearchConfig

CONFIG = CompareConfig(name="quickstart", search=SearchConfig(skip_layers=(0, 1, 2, 3, -2, -1)), race=True)
