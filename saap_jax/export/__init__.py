"""Take a model to other programs: Hugging Face directories (plain, padded, with code of their own) and GGUF files."""

from saap_jax.jobs.export import Exported, export_model

__all__ = ["Exported", "export_model"]
