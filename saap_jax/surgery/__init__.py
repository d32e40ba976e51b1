"""The smaller model, and what repairs do to the weights of the units that are kept."""
