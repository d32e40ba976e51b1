"""Shapes of models that are planned for by name, or by the `config.json` of any model directory."""

from pathlib import Path

from saap_jax.formats.json_files import read_object
from saap_jax.llama.files.hf_config import spec_from_config
from saap_jax.llama.files.packaged import PACKAGED
from saap_jax.llama.spec import Constants, LayerWidths, LlamaSpec

KNOWN = {
    "llama-7b": (32000, 4096, 32, 32, 32, 11008),
    "llama-13b": (32000, 5120, 40, 40, 40, 13824),
    "llama-2-7b": (32000, 4096, 32, 32, 32, 11008),
    "llama-2-13b": (32000, 5120, 40, 40, 40, 13824),
    "llama-2-70b": (32000, 8192, 80, 64, 8, 28672),
    "llama-3-8b": (128256, 4096, 32, 32, 8, 14336),
    "llama-3-70b": (128256, 8192, 80, 64, 8, 28672),
}
"""Vocabulary, width, layers, query heads, KV heads, channels, as published; none of them ties its embeddings."""


def spec_of(name: str) -> LlamaSpec:
    """Return the sizes of a model: a name of `KNOWN`, a `config.json`, or a directory that has one.

    Raises:
        ValueError: no such name and no such file, or a file that describes no LLaMA model.
    """
    if name in KNOWN:
        vocab, embed, layers, heads, kv_heads, mlp = KNOWN[name]
        widths = LayerWidths(kv_heads=kv_heads, q_per_kv=heads // kv_heads, mlp=mlp)
        return LlamaSpec(
            vocab=vocab,
            embed=embed,
            head_dim=embed // heads,
            layers=(widths,) * layers,
            tied=False,
            output_biases=False,
            constants=Constants(),
        )
    if name in PACKAGED:
        from saap_jax.llama.files.load import load_model

        return load_model(name).spec
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise ValueError(
            f"model: expected one of {', '.join((*KNOWN, *PACKAGED))}, a config.json or its directory, got {name!r}"
        )
    return spec_from_config(read_object(path), str(path))
