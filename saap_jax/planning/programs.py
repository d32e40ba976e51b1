"""The real programs of a task, with abstract arrays that say where on the machine they lie."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from saap_jax.config.mesh import BATCH
from saap_jax.config.use import PlanConfig
from saap_jax.estimation.base import Plan
from saap_jax.estimation.observe import observe_step
from saap_jax.evaluation.perplexity import loss_step
from saap_jax.llama.model import abstract_llama
from saap_jax.llama.quantized import Quantization, abstract_quantized
from saap_jax.llama.segments import existing_units
from saap_jax.llama.spec import LlamaSpec
from saap_jax.planning.estimate import method_of, needs_of
from saap_jax.recovery.adapters import AdapterParam, adapted
from saap_jax.recovery.objective import Objective, Packed
from saap_jax.recovery.train import Schedule, TrainingState, optimizer_of, split, train_step
from saap_jax.runtime.mesh import Layout, shardings
from saap_jax.types import Remat


class Program(NamedTuple):
    """A program of a task, not compiled yet, and what it holds."""

    trace: Callable[[], Any]
    """Traces it; to be called with the mesh in force."""
    parameters: Any
    state: Any
    """What is carried from step to step: statistics, or what is trained and the optimiser's moments."""
    tokens: int
    """Tokens that one run of the program reads."""
    beside: Any = ()
    """What the job holds meanwhile and the program does not read: of a recovery, the model as it was loaded."""


def program_of(config: PlanConfig, spec: LlamaSpec, layout: Layout, batch: int, remat: Remat) -> Program:
    """Build the program that a task runs over and over, for one batch."""
    if config.task == "recover":
        return _recover(config, spec, layout, batch, remat)
    plain = abstract_llama(spec, jnp.dtype(config.dtype))
    model = placed(plain, layout)
    read = batch * config.length
    gates = {name: _whole(layout, units.shape) for name, units in existing_units(model.segments).items()}
    tokens, mask = (_batch(layout, (batch, config.length), kind) for kind in (jnp.int32, jnp.bool_))
    if config.task == "evaluate":
        return Program(lambda: loss_step.trace(model, tokens, mask, gates), model, {}, read)
    needs = needs_of(config)
    examples = -(-config.examples // batch) * batch
    state = {
        need: placed(jax.eval_shape(lambda model, need=need: need.init(model, Plan(examples)), plain), layout)
        for need in sorted(needs)
    }
    losses = _whole(layout, (examples,))
    position = _whole(layout, (), jnp.int32)

    def trace() -> Any:
        return observe_step.trace(model, state, losses, (tokens, mask, position), gates, remat=remat)

    return Program(trace, model, state, read)


def _recover(config: PlanConfig, spec: LlamaSpec, layout: Layout, batch: int, remat: Remat) -> Program:
    method = method_of(config, spec)
    model = abstract_llama(spec, jnp.dtype(config.dtype))
    trainable = nnx.Param
    group = None
    beside = () if config.method == "lora" else placed(model, layout)  # LoRA's adapters are beside these very arrays
    if config.method == "groupwise":
        group = method.group_size
        model = abstract_quantized(model, Quantization(method.bits, group, method.matrices), "model")
    if config.method != "full":
        options = {"rank": method.rank, "scale": method.scale, "matrices": method.matrices, "group_size": group}
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            model = adapted(model, jax.random.key(0), **options)
        trainable = AdapterParam
    trained, frozen = split(placed(model, layout), trainable)
    trained = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), trained)
    schedule = Schedule()
    objective = Objective(compute=config.dtype, remat=remat)
    places = {leaf.shape: leaf.sharding for leaf in reversed(jax.tree.leaves(trained))}  # each moment where its own is
    moments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places.get(x.shape, _everywhere(layout))),
        jax.eval_shape(optimizer_of(schedule).init, trained),
    )
    state = TrainingState(trained, moments, _whole(layout, (), jnp.int32))
    shape = (1, batch, config.length)
    rows = Packed(*(_batch(layout, shape, kind) for kind in (jnp.int32, jnp.int32, jnp.int32, jnp.bool_)))

    def trace() -> Any:
        return train_step.trace(state, frozen, rows, objective=objective, schedule=schedule)

    return Program(trace, (trained, frozen.parameters), moments, batch * config.length, beside)


def placed(tree: Any, layout: Layout) -> Any:
    """Say where abstract arrays lie: parameters by the rules, all else on every device."""

    def variable(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return _whole(layout, tuple(leaf.shape), leaf.dtype)
        value = leaf.get_value()
        [place] = jax.tree.leaves(shardings(leaf, layout)) if value.shape else [_everywhere(layout)]
        return leaf.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=place))

    return jax.tree.map(variable, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _everywhere(layout: Layout) -> NamedSharding:
    return NamedSharding(layout.mesh, PartitionSpec())


def _whole(layout: Layout, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=_everywhere(layout))


def _batch(layout: Layout, shape: tuple[int, ...], dtype: Any) -> Any:
    parts = tuple(axis for axis in BATCH if layout.mesh.shape[axis] > 1)
    spec = PartitionSpec(*(None,) * (len(shape) - 2), parts or None)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(layout.mesh, spec))


def of_experts(spec: LlamaSpec) -> Callable[[Any], bool]:
    """Make what says of a product of a program whether devices along `expert` share its work.

    They share what has experts and their channels among its axes, two or flat.
    """
    inner = {(w.mlp, w.channels) for w in spec.layers}
    flat = {w.mlp_channels for w in spec.layers}

    def told(equation: Any) -> bool:
        shapes = [var.aval.shape for var in (*equation.invars, *equation.outvars)]
        return any(flat & set(shape) or inner & set(itertools.pairwise(shape)) for shape in shapes)

    return told


def weight_sizes(spec: LlamaSpec) -> frozenset[int]:
    """Collect the numbers of elements of a layer's matrices and of the embedding."""
    sizes = {spec.vocab * spec.embed}
    for widths in set(spec.layers):
        kv = spec.embed * widths.kv_heads * spec.head_dim
        sizes |= {kv, kv * widths.q_per_kv, spec.embed * widths.mlp_channels}
    return frozenset(sizes - {0})
