"""Loads a large checkpoint onto the mesh of all processes and saves it; prints how memory grew, in MiB."""

import sys

import jax
import jax.numpy as jnp

from saap_jax.config.mesh import MeshConfig
from saap_jax.llama import load_model, save_model
from saap_jax.runtime.mesh import layout_of
from tests.memory import growth


def main() -> None:
    coordinator, processes, number, small, large, out = sys.argv[1:]
    if int(processes) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, int(processes), int(number))
    layout = layout_of(MeshConfig(fsdp=-1))
    save_model(load_model(small, "bfloat16", layout=layout), out + "-small")  # what is imported and compiled once
    model, loading, held = growth(lambda: load_model(large, "bfloat16", layout=layout))
    jax.block_until_ready(model)
    assert model.embedding.dtype == jnp.bfloat16
    _, saving, left = growth(lambda: save_model(model, out))
    print(f"loading {loading:.0f} {held:.0f} saving {saving:.0f} {left:.0f}")


if __name__ == "__main__":
    main()
