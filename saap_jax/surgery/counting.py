"""How many parameters a model has after a cut."""

from saap_jax.discovery import count_parameters, discover, query_head_parameters, unit_costs
from saap_jax.llama import Llama
from saap_jax.llama.segments import existing_units, heads_of
from saap_jax.types import QUERY_HEADS, STRUCTURES, Keep


def kept_parameters(model: Llama, keep: Keep) -> int:
    """Count the parameters that a model has after a cut."""
    exists, costs = existing_units(model.runs), unit_costs(discover(model))
    removed = sum(((exists[n] & ~keep[n]).sum(axis=1) * costs[n]).sum() for n in STRUCTURES)
    if QUERY_HEADS in keep:  # those of kept KV heads
        heads = keep[QUERY_HEADS]
        gone = heads_of(keep["attention"], model.spec.layers, heads.shape) & ~heads
        removed += gone.sum() * query_head_parameters(model)
    return count_parameters(model) - int(removed)
