"""Stage 1: which weights must go together."""

from saap_jax.discovery.structures import (
    Member,
    Structure,
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
    "count_parameters",
    "discover",
    "parameters_by_path",
    "prunable_parameters",
    "unit_costs",
    "unit_view",
]
