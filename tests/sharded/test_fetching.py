"""Arrays that are spread over devices, and over processes, come to every host whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from saap_jax.runtime.gather import fetched
from tests.sharded.test_processes import port, started

pytestmark = pytest.mark.sharded

SPECS = [(), ("x",), (None, "x"), ("y", "x"), (("x", "y"),), ("y", None, "x")]
DTYPES = ["float32", "bfloat16", "bool", "int8"]

WORKER = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from saap_jax.runtime import gather
from tests.sharded.test_fetching import DTYPES, SPECS, reference
coordinator, processes, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(coordinator, processes, number)
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, -1), ("x", "y"))
for spec in SPECS:
    for dtype in DTYPES:
        expected = reference(dtype)
        place = NamedSharding(mesh, PartitionSpec(*spec))
        array = jax.make_array_from_callback(expected.shape, place, lambda part: expected[part])
        np.testing.assert_array_equal(gather.fetched(array), expected)
        for index in (0, 5):
            np.testing.assert_array_equal(gather.fetched(array, index), expected[index])
total = jax.jit(jnp.sum)(array)
assert float(gather.fetched(total)) == float(expected.astype(np.float32).sum())
print("equal on", number)
"""


def reference(dtype: str) -> np.ndarray:
    """Return 8 x 12 x 16 numbers of which no two rows are alike."""
    numbers = np.random.default_rng(0).integers(-100, 100, (8, 12, 16))
    return (numbers > 0) if dtype == "bool" else numbers.astype(jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_on_eight_devices(spec, dtype):
    mesh, expected = jax.make_mesh((2, 4), ("x", "y")), reference(dtype)
    array = jax.device_put(expected, NamedSharding(mesh, PartitionSpec(*spec)))
    np.testing.assert_array_equal(fetched(array), expected)
    for index in range(8):
        np.testing.assert_array_equal(fetched(array, index), expected[index])
    assert not np.array_equal(fetched(array, 0), expected[1])


def test_on_one_device_it_is_a_view():
    array = jnp.arange(6.0).reshape(2, 3)
    assert np.shares_memory(fetched(array), fetched(array, 1))


@pytest.mark.parametrize(("processes", "devices"), [(2, 4), (4, 1)])
def test_on_several_processes(processes, devices):
    at = f"127.0.0.1:{port()}"
    running = started([["-c", WORKER, at, str(processes), str(n)] for n in range(processes)], devices)
    said = [each.communicate(timeout=200)[0] for each in running]
    for number, each in enumerate(said):
        assert f"equal on {number}" in each, each[-3000:]
