"""Continue prompts: the cache, the compiled steps, the text that comes out."""
