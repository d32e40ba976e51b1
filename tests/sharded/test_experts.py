"""Experts spread over an axis of their own: no device has or gathers all, and a step is that of one device."""

import re
from itertools import permutations
from math import prod

import jax
import numpy as np
import pytest

from saap_jax.config.mesh import MeshConfig
from saap_jax.config.use import PlanConfig
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from saap_jax.planning.count import shard_bytes
from saap_jax.planning.programs import program_of
from saap_jax.recovery.adapters import full
from saap_jax.recovery.objective import Objective
from saap_jax.recovery.train import Schedule, microbatches, split, start, train_step
from saap_jax.runtime.constraints import on_mesh_of
from saap_jax.runtime.mesh import laid_out, layout_of
from tests.helpers import RELATIVES, random_model
from tests.recovery.helpers import rows_of
from tests.sharded.test_relatives import EXPERTS as MESHES

pytestmark = pytest.mark.sharded

EXPERTS, CHANNELS, EMBED = 8, 6, 16


def spec_of(family: str) -> LlamaSpec:
    widths = LayerWidths(kv_heads=4, q_per_kv=1, mlp=EXPERTS, channels=CHANNELS)
    return LlamaSpec(vocab=32, embed=EMBED, head_dim=4, layers=(widths,) * 2, tied=False, constants=RELATIVES[family])


def layout(config: MeshConfig):
    return layout_of(config, jax.devices()[:8])


@pytest.mark.parametrize("family", MESHES)
def test_a_step_of_recovery_is_that_of_one_device(family):
    alone, batch = random_model(spec_of(family)), rows_of(5, 7, 4, 9, 12, 11).arrays()
    batch = {name: array[:4] for name, array in batch.items()}
    assert len(batch["tokens"]) == 4
    trained, moments, norms = [], [], []
    for model in (alone, laid_out(alone, layout(MESHES[family]))):
        state, frozen = split(full().prepare(model, jax.random.key(0)), full().trainable)
        schedule = Schedule(learning_rate=1e-2, warmup=0, steps=4)
        begun = start(state, schedule)
        with on_mesh_of(begun):
            after, measured = train_step(
                begun, frozen, microbatches(batch, 4, begun), objective=Objective(), schedule=schedule
            )
        trained.append(jax.tree.leaves(after.trained))
        moments.append(jax.tree.leaves(after.optimizer))
        norms.append((float(measured.loss), float(measured.norm)))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for one, other in zip(*moments, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5 * np.abs(one).max())
    for one, other, before in zip(*trained, jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=2e-3)  # where a gradient is hardly more than its rounding
        assert np.abs(np.asarray(one) - np.asarray(before)).max() > 5e-3, "control: it moved"


def whole(text: str) -> set[str]:
    """Return the arrays of a compiled program, as one device has them, that are as a matrix of all experts."""
    flat = {(EXPERTS, CHANNELS, EMBED), (EXPERTS * CHANNELS, EMBED)}
    ordered = {order for sizes in flat for order in permutations(sizes)}
    found = set(re.findall(r"\bf32\[([\d,]+)\]", text))
    sizes = {each: tuple(int(size) for size in each.split(",") if size != "1") for each in found}
    return {each for each, dims in sizes.items() if any(dims[-len(order) :] == order for order in ordered)}


def program(config: MeshConfig, task, estimators=("wanda",)):
    plan = PlanConfig(task=task, method="full", estimators=estimators, examples=4, length=10, dtype="float32")
    spread = layout(config)
    made = program_of(plan, spec_of("qwen3_moe"), spread, config.data * config.fsdp * 2, "full")
    with jax.set_mesh(spread.mesh):
        return made, made.trace().lower().compile().as_text()


@pytest.mark.parametrize(
    ("task", "config"),
    [
        ("score", MeshConfig(fsdp=2, expert=4)),
        ("score", MeshConfig(fsdp=2, tensor=2, expert=2)),
        ("recover", MeshConfig(fsdp=2, expert=4)),
    ],
)
def test_no_device_holds_or_gathers_all_experts(task, config):
    made, text = program(config, task, ("taylor_element", "taylor_element_second", "reap"))
    assert not whole(text)
    experts = 4 * 2 * EXPERTS * (3 * CHANNELS + 1) * EMBED
    total = 4 * sum(prod(leaf.shape) for leaf in jax.tree.leaves(made.parameters))
    rest = (total - experts) / (config.fsdp * config.tensor)
    assert experts / 8 + rest <= shard_bytes(made.parameters) <= experts / 8 + 1.1 * rest


def test_weights_that_are_spread_by_width_alone_are_gathered():
    """The negative control: what is looked for is there where experts have no axis."""
    assert whole(program(MeshConfig(fsdp=8), "evaluate")[1])
