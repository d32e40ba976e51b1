"""How what is left stands in for what went; a file a repair. Their formulas are in `saap_jax.surgery`."""
