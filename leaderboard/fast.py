"""Fused scores, the ends protected, heads beyond 30 % only, then least squares: the recipe `fast`."""

AUTHOR = "saap_jax"
METHOD = "fast"
