"""Stage 1 for any JAX program: follow its axes, gate its units, cut it."""
