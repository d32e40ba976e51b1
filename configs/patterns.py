"""Which units matter in every text, and which only in one? Scores of several scenarios, side by side.

    saap score patterns

Writes a page with the agreement of estimators, how scores were fused, and a table and heat maps of both structures:
how often a unit is used, how important it is, and which units are unimportant in all scenarios. Other texts, say

    saap score patterns --name tasks --calibration.scenarios prose=text:text/war_and_peace.txt \\
        code=builtin:reference instructions=jsonl:instruct/alpaca_random9k.jsonl#instruction

A search over scenarios then takes `--search.scenario-reduction max` or `min_rank`: `saap prune --from-run runs/tasks`.
"""

from saap_jax.config import CalibrationConfig, EstimationConfig, ScoreConfig

CONFIG = ScoreConfig(
    name="patterns",
    calibration=CalibrationConfig(scenarios=("reference=builtin:reference", "descriptions=builtin:descriptions")),
    estimation=EstimationConfig(
        estimators=("gate_fisher", "taylor_element", "wanda", "activation_frequency", "gate_taylor+taylor_element")
    ),
    keep_statistics="small",
)
