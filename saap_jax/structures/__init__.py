"""Stage 1: which weights must go together.

Our LLaMA's parameters carry axis names, from which `discover` reads them. For any other function of parameters
`saap_jax.trace` finds them in the traced program.
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
