"""Which units matter in every text, and which only in one? Scores of several scenarios, side by side.

    saap score patterns

Writes a page with the agreement of estimators, how scores were fused, and a table and heat maps of both structures:
how often a unit is used, how important it is, and which units are unimportant in all scenarios. Other texts, say

    saap score patterns --name tasks --calibration.scenarios prose=text:text/war_and_peace.txt \\
        code=builtin:reference instructions=jsonl:instruct/alpaca_random9k.jsonl#instruction

A chain over scenarios then has `scenarios(max)` or `scenarios(min_rank)` behind its score:
`saap prune --ratio 0.2 --from-run runs/tasks --method "gate_fisher > scenarios(max)"`.
"""

from saap_jax.config.jobs import ScoreConfig
from saap_jax.config.method import CalibrationConfig

CONFIG = ScoreConfig(
    name="patterns",
    calibration=CalibrationConfig(scenarios=("reference=builtin:reference", "descriptions=builtin:descriptions")),
    estimators=("gate_fisher", "taylor_element", "wanda", "activation_frequency", "gate_taylor+taylor_element"),
    keep_statistics="small",
)
