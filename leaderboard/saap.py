"""The paper's method, as its recipe says."""

AUTHOR = "saap_jax"
METHOD = "saap"
