"""How importance is estimated and turned; estimators themselves are in `saap_jax.estimation`."""
