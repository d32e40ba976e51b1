"""A checkpoint of 1.1 billion parameters, made here: each process holds its shard and one tensor, no more."""

import hashlib
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.llama import LayerWidths, LlamaSpec, abstract_llama
from saap_jax.llama.files.config import config_from_spec
from saap_jax.llama.files.write import model_tensors, write_json, write_tensors
from tests.sharded.test_processes import port, started

pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc"),
]

MIB = 2**20
SPEC = LlamaSpec(
    vocab=32000, embed=2048, head_dim=64, layers=(LayerWidths(kv_heads=4, q_per_kv=8, mlp=5632),) * 22, tied=False
)
"""The shapes of TinyLlama-1.1B, in bfloat16: 2.1 GiB."""
SMALL = LlamaSpec(vocab=64, embed=64, head_dim=8, layers=(LayerWidths(kv_heads=8, q_per_kv=2, mlp=64),) * 2, tied=False)
TENSOR = 2 * 32000 * 2048 / MIB
"""The largest: an embedding."""


def write_random(spec: LlamaSpec, directory: Path) -> int:
    """Write a checkpoint of random numbers, a tensor at a time; return how many parameters it has."""
    directory.mkdir()
    random, dtype = np.random.default_rng(0), jnp.dtype(jnp.bfloat16)

    def drawn(shape: tuple[int, ...]) -> np.ndarray:
        bits = random.integers(0x3C00, 0x3C80, shape, np.uint16)  # 0.0078 to 0.0156
        return bits.view(dtype)

    tensors = [
        tensor._replace(read=lambda shape=tensor.shape: drawn(shape))
        for tensor in model_tensors(abstract_llama(spec, dtype))
    ]
    write_tensors(tensors, directory / "model.safetensors", dtype)
    write_json(config_from_spec(spec, "bfloat16"), directory / "config.json")
    return sum(int(np.prod(tensor.shape)) for tensor in tensors)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    parent = tmp_path_factory.mktemp("large")
    write_random(SMALL, parent / "small")
    parameters = write_random(SPEC, parent / "large")
    assert 1.0e9 < parameters < 3e9
    yield parent, 2 * parameters / MIB
    for path in parent.rglob("*.safetensors"):
        path.unlink()


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


@pytest.mark.parametrize(("processes", "devices"), [(1, 8), (2, 4), (2, 1)])
def test_a_shard_and_one_tensor(processes, devices, checkpoints, tmp_path):
    """Loading holds the shard and one tensor at most; saving two tensors beside it: as it was, and as it is stored.

    Several processes hold one more, what they were sent; CPU devices have their memory on the host, so it counts here.
    """
    parent, size = checkpoints
    worker, at, out = str(Path(__file__).with_name("large_worker.py")), f"127.0.0.1:{port()}", tmp_path / "out"
    words = [worker, at, str(processes)]
    running = started(
        [[*words, str(n), str(parent / "small"), str(parent / "large"), str(out)] for n in range(processes)], devices
    )
    said = [each.communicate(timeout=400)[0] for each in running]
    assert [each.returncode for each in running] == [0] * processes, "\n".join(said)
    for each in said:
        found = re.search(r"loading (\S+) (\S+) saving (\S+) (\S+)", each)
        assert found, each
        loading, held, saving, left = map(float, found.groups())
        assert size / processes - 32 < held
        assert loading < size / processes + TENSOR + 64
        assert saving < (3 if processes == 1 else 4) * TENSOR
        assert left < 2 * TENSOR
    assert digest(out / "model.safetensors") == digest(parent / "large" / "model.safetensors")
    (out / "model.safetensors").unlink()
