"""The memory that is planned for a program is the memory that it takes, on devices of this machine's CPU."""

import json
import os
import subprocess
import sys

import pytest

from tests.xla_flags import forced

pytestmark = pytest.mark.sharded

MEASURE = """
import json, re, sys
from pathlib import Path
import jax, numpy as np
from saap_jax.config.use import PlanConfig
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from saap_jax.config.mesh import MeshConfig
from saap_jax.evaluation.cost import program_bytes
from saap_jax.planning.programs import program_of
from saap_jax.runtime.mesh import layout_of

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

estimators, remat, batch, length = json.loads(sys.argv[1])
spec = LlamaSpec(
    vocab=4096, embed=1024, head_dim=128, layers=(LayerWidths(kv_heads=8, q_per_kv=1, mlp=2048),) * 6, tied=False
)
config = PlanConfig(
    estimators=tuple(estimators), examples=8, length=length, dtype="float32", remat=remat, mesh=MeshConfig(fsdp=4)
)
layout = layout_of(config.mesh, jax.devices())
program = program_of(config, spec, layout, batch, remat)
with jax.set_mesh(layout.mesh):
    compiled = program.trace().lower().compile()
before = status("VmRSS")
shapes = jax.tree.leaves(compiled.args_info, is_leaf=lambda leaf: hasattr(leaf, "shape"))
arrays = [
    jax.device_put(np.zeros(info.shape, info.dtype), place)
    for info, place in zip(shapes, jax.tree.leaves(compiled.input_shardings), strict=True)
]
arguments, named = jax.tree.unflatten(compiled.in_tree, arrays)
Path("/proc/self/clear_refs").write_text("5")
out = jax.block_until_ready(compiled(*arguments, **named))
print(json.dumps([4 * program_bytes(compiled.memory_analysis()), status("VmHWM") - before]))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="measures memory through Linux's /proc")
@pytest.mark.parametrize(
    "settings",
    [
        (["taylor_element", "taylor_element_second"], "full", 4, 128),
        (["gate_fisher"], "none", 8, 256),
    ],
    ids=["weights", "gates"],
)
def test_planned_memory_is_measured(settings):
    environment = os.environ | forced(4, flags="") | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(settings)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    planned, measured = json.loads(done.stdout.splitlines()[-1])
    assert planned == pytest.approx(measured, rel=0.15)
    assert planned > 200e6
