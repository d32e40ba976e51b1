"""Eight importance estimators and the quickest method of ours on SmolLM2-135M, at 20 % and 50 % of what can go.

    saap compare quickstart

Calibrated on 4,096 tokens of the Python language reference, evaluated on 3,072 tokens of its other half (in domain) and
of data-set descriptions (out of domain), in a race: who is surely worse is evaluated no further (docs/figures.md). The
best at 20 % is cut and writes a few sentences. Each row is the model that `saap prune --method ROW` makes.
"""

from saap_jax.config.jobs import QUICK, USUAL, CompareConfig

CONFIG = CompareConfig(name="quickstart", methods=(*USUAL, QUICK), race=True, cut=True, new_tokens=32)
