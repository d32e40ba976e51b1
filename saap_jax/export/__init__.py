"""Take a model to other programs: Hugging Face directories (plain, padded, with code of their own) and GGUF files."""
