"""Use a model: `saap generate` and `saap bench`."""
