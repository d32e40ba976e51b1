"""The LLaMA family: what a model is, the model itself, and its ways into and out of memory (`files`)."""
