"""How far can SmolLM2-135M be pruned before its perplexity rises by 25 %? Three variants, three calibration texts.

    saap frontier frontier

Draws the curves with their seeds, and marks the largest ratio that holds the limit (to 0.5 % of the prunable
parameters). In steps (docs/studies.md), with an estimation anew at every tenth that goes:

    saap frontier frontier --name steps \
        --methods "fused > within(protect=(0.13, -0.07), attention=0.1) > uniform > rounds(0.1)"

Evaluated on 1,024 tokens of each text; 45 points and about five rounds of bisection.
"""

from saap_jax.config.jobs import FrontierConfig
from saap_jax.config.method import EvaluationConfig

CONFIG = FrontierConfig(
    name="frontier",
    methods=("{wanda,taylor_element,fused} > within(attention=0.1, protect=(0, 1, 2, 3, -2, -1)) > uniform",),
    seeds=(0, 1, 2),
    max_ppl_increase="25%",
    evaluation=EvaluationConfig(windows=8),
)
