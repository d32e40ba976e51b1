"""What does each layer of SmolLM2-135M cost when its attention or its MLP alone is pruned, and what follows?

    saap sensitivity sensitivity

Removes 20 %, 40 % and 60 % of the units of one layer and structure at a time (the lowest scores of `wanda`), draws what
that costs, and suggests changes of the search at 20 %, each with the effect to expect and the command to try.
Evaluated on 1,024 tokens of each text; 180 places and shares, of which 150 differ.
"""

from saap_jax.config.jobs import SensitivityConfig

CONFIG = SensitivityConfig(name="sensitivity", method="wanda", fractions=(0.2, 0.4, 0.6))
