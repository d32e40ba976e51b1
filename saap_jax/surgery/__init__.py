"""Stage 2d: a model without the units that went, and what stands in for them."""

from saap_jax.llama.segments import masks
from saap_jax.surgery.compensation import compensate
from saap_jax.surgery.cut import cut, keep_to_json, pruned_spec

__all__ = ["compensate", "cut", "keep_to_json", "masks", "pruned_spec"]
