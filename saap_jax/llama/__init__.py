"""The LLaMA family: what a model is, the model itself, and its ways into and out of memory."""

from saap_jax.llama.files.load import load_keep, load_model
from saap_jax.llama.files.tokenizer import load_tokenizer
from saap_jax.llama.files.write import save_model
from saap_jax.llama.model import Llama, abstract_llama, random_llama
from saap_jax.llama.spec import Constants, LayerWidths, LlamaSpec, RopeScaling

__all__ = [
    "Constants",
    "LayerWidths",
    "Llama",
    "LlamaSpec",
    "RopeScaling",
    "abstract_llama",
    "load_keep",
    "load_model",
    "load_tokenizer",
    "random_llama",
    "save_model",
]
