"""Models as files: Hugging Face directories, GGUF, tokenizers."""
