"""What a sharded scoring step sends: weights a layer at a time, gradients once, and no activations."""

import jax
import pytest

from saap_jax.config.mesh import MeshConfig
from saap_jax.config.use import PlanConfig
from saap_jax.evaluation.cost import program_bytes
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from saap_jax.planning.count import collectives_of, shard_bytes
from saap_jax.planning.programs import program_of
from saap_jax.runtime.mesh import layout_of

pytestmark = pytest.mark.sharded

LAYERS, EMBED, MLP, VOCAB = 6, 64, 192, 128
SPEC = LlamaSpec(
    vocab=VOCAB, embed=EMBED, head_dim=8, layers=(LayerWidths(kv_heads=8, q_per_kv=1, mlp=MLP),) * LAYERS, tied=False
)
LAYER = 4 * (4 * EMBED * EMBED + 3 * EMBED * MLP)
"""Bytes of the matrices of a layer in float32."""
EMBEDDING = 4 * VOCAB * EMBED
LENGTH, BATCH = 256, 8


def compiled(constrained: bool, estimators=("taylor_element", "taylor_element_second"), **sizes):
    config = PlanConfig(
        estimators=estimators, examples=BATCH, length=LENGTH, dtype="float32", mesh=MeshConfig(**(sizes or {"fsdp": 8}))
    )
    layout = layout_of(config.mesh, jax.devices()[:8])
    program = program_of(config, SPEC, layout, BATCH, "full")
    if not constrained:
        return program, program.trace().lower().compile()
    with jax.set_mesh(layout.mesh):
        return program, program.trace().lower().compile()


def test_parameters_and_statistics_are_an_eighth():
    program, executable = compiled(True)
    whole = LAYERS * LAYER + 2 * EMBEDDING
    assert whole / 8 <= shard_bytes(program.parameters) <= 1.1 * whole / 8
    assert shard_bytes(program.state) <= 1.1 * (whole + LAYERS * LAYER) / 8
    assert program_bytes(executable.memory_analysis()) > shard_bytes(program.parameters) + shard_bytes(program.state)


def test_weights_are_gathered_a_layer_at_a_time_and_activations_stay():
    sent = collectives_of(compiled(True)[1].as_text(), 8)
    assert sent.largest["all-gather"] <= 4 * EMBED * MLP
    # Forward and backward pass, and embeddings; nothing of the size of all activations.
    assert sent.bytes["all-gather"] <= 7 / 8 * (2 * LAYERS * LAYER + 4 * EMBEDDING) * 1.05
    assert sum(sent.bytes.values()) <= 7 / 8 * (2 + 2 + 2) * (LAYERS * LAYER + 2 * EMBEDDING)


def test_without_constraints_activations_are_summed():
    """The negative control: what the partitioner does where nobody says what stays where."""
    sent, free = (collectives_of(compiled(constrained)[1].as_text(), 8) for constrained in (True, False))
    assert sum(free.bytes.values()) > 3 * sum(sent.bytes.values())
    assert free.bytes["all-reduce"] > 10 * sent.bytes.get("all-reduce", 1)


def test_tensor_parallel_layers_sum_the_stream_twice_a_pass():
    sent = collectives_of(compiled(True, ("gate_fisher",), tensor=8)[1].as_text(), 8)
    stream = 4 * BATCH * LENGTH * EMBED
    # Two sums forward, two again (rematerialisation), four backward (query, key and value are not summed together), and
    # a few of the embedding and the loss.
    assert sent.bytes["all-reduce"] <= 2 * 7 / 8 * stream * (8 * LAYERS + 4) * 1.1
