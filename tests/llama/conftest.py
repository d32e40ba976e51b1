"""Models and checkpoints that the tests of this folder share."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from saap_jax.llama.files.write import save_model
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from tests.helpers import random_model


def spec_of(*widths: tuple[int, int], tied: bool = False, **constants) -> LlamaSpec:
    """Return a small spec with the given (kv_heads, mlp) a layer."""
    layers = tuple(LayerWidths(kv_heads=heads, q_per_kv=2, mlp=mlp) for heads, mlp in widths)
    return LlamaSpec(vocab=48, embed=16, head_dim=4, layers=layers, tied=tied, **constants)


class Saved:
    """A saved model whose files a test may damage before it loads them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors = load_file(directory / "model.safetensors")
        self.config = json.loads((directory / "config.json").read_text())

    def write(self) -> Path:
        """Write the (changed) tensors and config back."""
        save_file(self.tensors, self.directory / "model.safetensors", {"format": "pt"})
        self.write_config()
        return self.directory

    def write_config(self) -> None:
        """Write the (changed) config back."""
        (self.directory / "config.json").write_text(json.dumps(self.config))

    def write_shards(self, *shards: tuple[str, ...]) -> Path:
        """Write the given names to one shard each, with an index of everything that the shards hold."""
        (self.directory / "model.safetensors").unlink()
        index = {}
        for number, names in enumerate(shards):
            file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
            save_file({name: self.tensors[name] for name in names}, self.directory / file)
            index |= dict.fromkeys(names, file)
        (self.directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        return self.directory


@pytest.fixture
def saved(tmp_path):
    """Return a maker of saved random models: `saved(spec)`."""

    def make(spec: LlamaSpec) -> Saved:
        return Saved(save_model(random_model(spec), tmp_path / "saved"))

    return make


def assert_same(first, second) -> None:
    """Assert that two models have the same spec, axis names and bits."""
    assert first.spec == second.spec
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


TOKENS = jnp.arange(10).reshape(2, 5) * 4 + 1
