"""Stage 3: recover what pruning cost, by training: all parameters, or adapters that merge into the model."""

from saap_jax.recovery.adapters import METHODS, AdapterParam, Method, full, groupwise, lora
from saap_jax.recovery.quantization import check_group_size, quantize

__all__ = ["METHODS", "AdapterParam", "Method", "check_group_size", "full", "groupwise", "lora", "quantize"]
