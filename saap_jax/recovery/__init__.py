"""A wing: recover what pruning cost by training all parameters, or adapters that merge into the model."""
