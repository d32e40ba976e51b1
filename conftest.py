"""What examples of docstrings take for granted; `docs/api/index.md` says it to readers."""

from typing import Any

import pytest


@pytest.fixture(scope="session")
def doctest_namespace(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny random model, its tokenizer of single bytes, windows, and a directory that has both."""
    import jax
    import numpy as np
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    import saap_jax
    from saap_jax.data.windows import Windows
    from saap_jax.llama.model import random_llama
    from saap_jax.llama.spec import LayerWidths, LlamaSpec

    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({sign: at for at, sign in enumerate(split.alphabet())}, []))
    backend.pre_tokenizer, backend.decoder = split, tokenizers.decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    layers = (LayerWidths(kv_heads=2, q_per_kv=1, mlp=16),) * 2
    model = random_llama(LlamaSpec(vocab=256, embed=8, head_dim=4, layers=layers, tied=True), jax.random.key(0))
    tokens = np.arange(64, dtype=np.int32).reshape(4, 16)
    folder = tmp_path_factory.mktemp("examples")
    path = saap_jax.save_model(model, folder / "tiny", tokenizer=tokenizer)
    windows = Windows(tokens, np.ones(tokens.shape, bool))
    return {"model": model, "tokenizer": tokenizer, "windows": windows, "folder": folder, "path": path}
