"""Stage 1: which weights must go together.

For our LLaMA, from the axis names that its parameters carry: the names below. For any other function of parameters,
from the traced program: `trace.trace` finds the structures, `gates.gated` puts gates on their units,
`removal.keep_units` cuts parameters and `smaller.smaller` runs the program on them. `problem.Problem` says what pruning
such a function takes, and `saap_jax.trace.subject` does it.
"""

from saap_jax.structures.structures import (
    Member,
    Structure,
    channel_view,
    count_parameters,
    discover,
    parameters_by_path,
    prunable_parameters,
    unit_costs,
    unit_view,
)

__all__ = [
    "Member",
    "Structure",
    "channel_view",
    "count_parameters",
    "discover",
    "parameters_by_path",
    "prunable_parameters",
    "unit_costs",
    "unit_view",
]
