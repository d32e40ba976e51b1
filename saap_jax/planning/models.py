"""Shapes of models that are planned for by name, or by the `config.json` of any model directory."""

from pathlib import Path
from typing import Any

from saap_jax.errors import read_object
from saap_jax.llama.files.config import spec_from_config
from saap_jax.llama.files.families import all_but_each
from saap_jax.llama.files.sources import PACKAGED
from saap_jax.llama.spec import Apart, Constants, LayerWidths, LlamaSpec, RopeScaling


def _llama(
    *sizes: int, head_dim: int = 0, channels: int | None = None, tied: bool = False, **constants: Any
) -> LlamaSpec:
    vocab, embed, layers, heads, kv_heads, mlp = sizes
    widths = LayerWidths(kv_heads=kv_heads, q_per_kv=heads // kv_heads, mlp=mlp, channels=channels)
    return LlamaSpec(
        vocab=vocab,
        embed=embed,
        head_dim=head_dim or embed // heads,
        layers=(widths,) * layers,
        tied=tied,
        constants=Constants(**constants),
    )


KNOWN: dict[str, LlamaSpec] = {
    "llama-7b": _llama(32000, 4096, 32, 32, 32, 11008),
    "llama-13b": _llama(32000, 5120, 40, 40, 40, 13824),
    "llama-2-7b": _llama(32000, 4096, 32, 32, 32, 11008),
    "llama-2-13b": _llama(32000, 5120, 40, 40, 40, 13824),
    "llama-2-70b": _llama(32000, 8192, 80, 64, 8, 28672),
    "llama-3-8b": _llama(128256, 4096, 32, 32, 8, 14336),
    "llama-3-70b": _llama(128256, 8192, 80, 64, 8, 28672),
    "llama-3.1-405b": _llama(128256, 16384, 126, 128, 8, 53248),
    "gemma-3-27b": _llama(
        262208, 5376, 62, 32, 16, 21504, head_dim=128, tied=True, family="gemma3_text", query_scalar=168,
        rope_theta=1e6, rope_scaling=RopeScaling(kind="linear", factor=8.0),
        apart=Apart(layers=all_but_each(6, 62), sliding_window=1024),
    ),
    "qwen3-30b-a3b": _llama(
        151936, 2048, 48, 32, 4, 128, channels=768, head_dim=128, family="qwen3_moe", experts_per_token=8
    ),
}  # fmt: skip
"""Sizes as published, by name: vocabulary, width, layers, query heads, KV heads, channels (of a mixture, experts)."""


def spec_of(name: str) -> LlamaSpec:
    """Read the sizes of a model: a name of `KNOWN`, a `config.json`, or a directory that has one.

    Raises:
        ValueError: no such name and no such file, or a file that describes no LLaMA model.
    """
    if name in KNOWN:
        return KNOWN[name]
    if name in PACKAGED:
        from saap_jax.llama.files.load import load_model

        return load_model(name).spec
    if Path(name).is_dir():
        path = Path(name) / "config.json"
    else:
        path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"model: expected one of {', '.join((*KNOWN, *PACKAGED))}, a config.json or its directory, got {name!r}"
        )
    return spec_from_config(read_object(path), str(path))
