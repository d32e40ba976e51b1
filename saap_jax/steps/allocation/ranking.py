"""One ranking of all units of the model."""

import dataclasses

from saap_jax.config.checks import check_choice
from saap_jax.steps.allocation.allocation import Allocation, By
from saap_jax.steps.base import step


@step("global")
@dataclasses.dataclass(frozen=True)
class Global(Allocation):
    """Remove the units of the lowest scores of all layers and structures, whatever each of them loses."""

    ranks = True

    by: By = "score_per_parameter"
    """What ranks them: their scores, or the scores over their parameters, which is the knapsack's order."""

    def __post_init__(self) -> None:
        check_choice("global.by", self.by, By)
