"""How far can SmolLM2-135M be pruned before its perplexity rises by 25 %? Three variants, three calibration texts.

    saap frontier frontier

Draws the curves with their seeds, marks the largest ratio that holds the limit (to 0.5 % of the prunable parameters)
and each curve's knee. In steps, as docs/study.md found best, with an estimation anew at every tenth that goes:

    saap frontier frontier --name steps --search.rescore-every 0.1

Evaluated on 1,024 tokens of each text; 45 points and about five rounds of bisection.
"""

from saap_jax.config import EstimationConfig, EvaluationConfig, FrontierConfig, GridConfig, SearchConfig

CONFIG = FrontierConfig(
    name="frontier",
    estimation=EstimationConfig(estimators=("wanda", "taylor_element", "saap")),
    search=SearchConfig(attention_share=0.1, skip_layers=(0, 1, 2, 3, -2, -1)),
    grid=GridConfig(seeds=(0, 1, 2)),
    max_ppl_increase="25%",
    evaluation=EvaluationConfig(windows=8),
)
