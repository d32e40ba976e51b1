"""How what is left stands in for what went. The formulas are in `saap_jax.surgery`."""
