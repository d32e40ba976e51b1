"""Loading and saving hold the parameters and one tensor, measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.write import save_model
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from tests.helpers import random_model

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")

SPEC = LlamaSpec(
    vocab=4096, embed=1024, head_dim=64, layers=(LayerWidths(kv_heads=4, q_per_kv=4, mlp=4096),) * 3, tied=False
)
MIB = 2**20
PROJECT = Path(__file__).parents[2]
PARAMETERS = 4 * (2 * 4096 * 1024 + 3 * (1024 * 1024 * 5 // 2 + 3 * 1024 * 4096)) / MIB
TENSOR = 4 * 4096 * 1024 / MIB
SLACK = 12  # code, descriptors, the allocator's rounding

SAMPLER = """
import sys
import jax, jax.numpy as jnp, numpy as np
from safetensors.numpy import load_file
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.write import save_model
from tests.memory import growth

jnp.zeros(3).block_until_ready()
sys.setswitchinterval(0.0005)
load_model(sys.argv[2])  # small: what is imported and compiled once
"""


def measure(script: str, *paths: Path) -> list[float]:
    words = [sys.executable, "-c", SAMPLER + script, *map(str, paths)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=PROJECT)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    parent = tmp_path_factory.mktemp("memory")
    small = LlamaSpec(
        vocab=8, embed=8, head_dim=4, layers=(LayerWidths(kv_heads=1, q_per_kv=1, mlp=8),) * 3, tied=False
    )
    return save_model(random_model(SPEC), parent / "large"), save_model(random_model(small), parent / "small")


@pytest.mark.slow
def test_parameters_and_one_tensor(checkpoints, tmp_path):
    loading, saving = measure(
        """
model, loading, _ = growth(lambda: load_model(sys.argv[1]))
_, saving, _ = growth(lambda: save_model(model, sys.argv[3]))
print(loading, saving)
""",
        *checkpoints,
        tmp_path / "again",
    )
    assert PARAMETERS - 1 < loading < PARAMETERS + TENSOR + SLACK
    assert saving < 2 * TENSOR + SLACK  # a tensor and its transpose's rows
    assert load_model(tmp_path / "again").spec == SPEC


@pytest.mark.slow
def test_exports_hold_one_tensor(checkpoints, tmp_path):
    """Beside the model: a tensor, its transpose's rows, and while a Q8_0 is made its blocks and their roundings."""
    parts = """
import pathlib
from saap_jax.export.gguf_file import write_gguf
from saap_jax.export.gguf_vocabulary import no_vocabulary
from saap_jax.export.hf import write_hf
model, small = load_model(sys.argv[1]), load_model(sys.argv[2])
out = pathlib.Path(sys.argv[3])
def padded(model, name):
    (out / name).mkdir(parents=True)
    write_hf(model, out / name, "padded", np.dtype(np.float32))
def gguf(dtype):
    return lambda model, name: write_gguf(model, out / name, dtype, name=name, vocabulary=no_vocabulary())
for number, write in enumerate((padded, gguf("float32"), gguf("float16"), gguf("q8_0"))):
    write(small, f"small{number}")
    print(growth(lambda: write(model, f"large{number}"))[1])
"""
    padded, float32, float16, q8_0 = measure(parts, *checkpoints, tmp_path)
    assert max(padded, float32, float16) < 2 * TENSOR + SLACK
    assert q8_0 < 5 * TENSOR + SLACK < PARAMETERS


@pytest.mark.slow
def test_reading_everything_first_is_seen(checkpoints):
    """Negative control: the usual way, all tensors and then their stacks, is over the bound."""
    (loading,) = measure(
        """
def everything():
    tensors = load_file(sys.argv[1] + "/model.safetensors")
    names = [n for n in tensors if n.startswith("model.layers.0.")]
    whole = [jnp.asarray(tensors[n]) for n in tensors if ".layers." not in n]
    return whole + [
        jnp.asarray(np.stack([tensors[n.replace(".0.", f".{layer}.")].T for layer in range(3)])) for n in names
    ]
_, loading, _ = growth(everything)
print(loading)
""",
        *checkpoints,
    )
    assert loading > PARAMETERS + TENSOR + SLACK
