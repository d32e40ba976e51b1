"""By arithmetic alone: what a step holds and does. Ranks what is worth compiling, and answers where no compiler can.

P parameters of `width` bytes on `shards` = fsdp · tensor devices; n tokens a device; E the width of the residual
stream. A recovery holds the model as it was loaded, and what it trains in float32 with the optimiser's moments (state);
`groupwise` the quantised model too. What is held beside parameters and state:

    a gradient of the weights, split like the parameters; for scoring, of the matrices of the layers alone
    where anything is differentiated, the residual stream in front of every layer, n · E; without rematerialisation all
        activations of every layer
    the activations of one layer, of long rows with a block of their scores alone, its gathered weights twice, logits
    and their gradient in float32

Sent: with `fsdp`, all weights gathered in the forward and again in the backward pass, and gradients summed; with
`tensor`, two sums of the residual stream a layer and pass; with `data`, one sum of the gradients. With `expert`, a
device is as one of a model that has its part of the experts, and the sum behind a mixture is over more devices.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from saap_jax.config.recover import MethodConfig
from saap_jax.config.use import PlanConfig
from saap_jax.estimation.base import Plan, Statistic
from saap_jax.estimation.observe import union_of_needs
from saap_jax.estimation.reconstruction import SECOND_MOMENT
from saap_jax.estimation.registry import make_estimator
from saap_jax.llama.attention import block_of, whole
from saap_jax.llama.loss import LOGITS
from saap_jax.llama.model import abstract_llama
from saap_jax.llama.spec import LlamaSpec
from saap_jax.planning.chips import Machine
from saap_jax.types import Remat

Mesh = tuple[int, ...]
"""Devices along data, fsdp and tensor, and along expert where a mixture is spread over that too."""


class Estimate(NamedTuple):
    """Of one step on one device."""

    parameters: float
    state: float
    temporaries: float
    flops: float
    memory_bytes: float
    """Read and written by matrix products."""
    sent: float
    """Bytes over the links."""

    @property
    def peak(self) -> float:
        """Bytes in all."""
        return self.parameters + self.state + self.temporaries

    def seconds(self, target: Machine) -> dict[str, float]:
        """The time that each limit alone would take."""
        chip = target.chip
        return {
            "compute": self.flops / chip.flops * chip.devices,
            "memory": self.memory_bytes / chip.bandwidth * chip.devices,
            "links": self.sent / chip.link * chip.devices,
        }


def estimate(config: PlanConfig, spec: LlamaSpec, mesh: Mesh, batch: int, remat: Remat) -> Estimate:
    """Estimate a step of `batch` rows on all devices."""
    data, fsdp, tensor = mesh[:3]
    expert = math.prod(mesh[3:])
    shards = fsdp * tensor
    rows = batch / (data * fsdp)
    tokens = rows * config.length
    width = 2 if config.dtype == "bfloat16" else 4
    layers = [  # with the channels of all experts that a device has a part of
        (w.kv_heads, w.kv_heads * w.q_per_kv, -(-w.mlp // expert) * (w.channels or 1)) for w in spec.layers
    ]
    matrices = [spec.embed * (spec.head_dim * (2 * kv + 2 * heads) + 3 * mlp) for kv, heads, mlp in layers]
    embeddings = spec.vocab * spec.embed * (1 if spec.tied else 2)
    count = sum(matrices) + embeddings
    parameters = (sum(matrices) + embeddings) * width
    loaded = 0
    if config.task == "recover" and config.method == "groupwise":
        loaded = parameters
    if loaded:  # beside it integers, and of a group a scale and an offset
        method = method_of(config, spec)
        of_attention = [2 * (kv + heads) for kv, heads, _ in layers]
        if "up" in method.matrices:
            packed = sum(matrices)
        else:
            packed = spec.embed * spec.head_dim * sum(of_attention)
        parameters -= packed * (width - tensor * (method.bits / 8 + 8 / method.group_size))  # whole along tensor
    gradient, squares, state = _state(config, spec, count, sum(matrices), fsdp, tensor)
    backward, passes, words, again = passes_of(config, remat)
    working = [tokens * width * (2 * spec.head_dim * (kv + heads) + 3 * mlp) / tensor for kv, heads, mlp in layers]
    of_device = [rows * max(heads / tensor, 1) for _, heads, _ in layers]
    scores = [heads * config.length**2 * 6 for heads in of_device]
    moved = sum(working) + sum(scores)
    if not whole(config.attention, config.length):
        at_once = [block_of(config.length, math.ceil(heads)) for heads in of_device]
        scores = [heads * queries * config.length * 6 for heads, queries in zip(of_device, at_once, strict=True)]
    held = [sum(each) for each in zip(working, scores, strict=True)]
    kept = 0.0
    if backward:
        kept = {"none": sum(held), "dots": 0.7 * sum(held), "full": 0.0}[remat]
    logits = tokens * spec.vocab / tensor * 4
    temporaries = (
        gradient
        + kept
        + (len(layers) * tokens * spec.embed * width if backward else 0)
        + 2 * max(held)
        + 2 * max(matrices) * width / tensor
        + min(logits, LOGITS) * (2.5 if backward else 1.5)
        + (3 * spec.embed * max(mlp for *_, mlp in layers) / tensor * 4 if squares else 0)
    )
    words += again * (logits > LOGITS)
    grams = 0
    if config.task == "score":
        grams = whole_bytes(needs_of(config) & {SECOND_MOMENT}, spec, 0) / 4
    attention = sum(4 * heads * spec.head_dim * config.length for _, heads, _ in layers)
    once = 2 * sum(matrices) + attention
    flops = tokens / tensor * (passes * once + words * 2 * spec.vocab * spec.embed + 2 * grams)
    weights = parameters / tensor
    sent = 0.0
    if fsdp > 1:
        sent += (fsdp - 1) / fsdp * weights * (2 if backward else 1) + (fsdp - 1) * (gradient + squares)
    groups = (tensor, tensor * expert)  # behind attention, and behind the MLP
    sent += sum(2 * (group - 1) / group * passes * len(layers) * tokens * spec.embed * width for group in groups)
    if data > 1:
        sent += 2 * (data - 1) / data * (gradient + squares)
    moved = passes * (weights + moved) + 2 * (gradient + squares)
    return Estimate((parameters + loaded) / shards, state, temporaries, flops, moved, sent)


@functools.cache
def needs_of(config: PlanConfig) -> frozenset[Statistic]:
    """Collect what the estimators need of the text.

    Raises:
        ValueError: an estimator whose passes are its own, such as `gate_hessian`.
    """
    needs = union_of_needs(make_estimator(name) for name in config.estimators)
    if apart := ", ".join(need.name for need in sorted(needs) if need.step):
        raise ValueError(f"estimators: expected none that needs {apart}, whose passes are not planned for")
    return needs


def passes_of(config: PlanConfig, remat: Remat) -> tuple[bool, int, int, int]:
    """Tell whether anything is differentiated, and how often products are computed, the forward pass too: those of the
    layers, and those with the vocabulary, and how many more of these where logits come in chunks.

    A backward pass computes them once for the gradients of activations, and once more for those of weights, where
    these are wanted; scoring wants none of the embedding. Only layers are rematerialised. Chunks of logits are made
    again, but for the loss that scoring differentiates. Each objective has passes of its own.
    """
    trains = config.task == "recover"
    backward = {"loss": trains * (1 + (config.method == "full"))}
    if config.task == "score":
        sources: dict[str, set[str]] = {}
        for need in needs_of(config):
            sources.setdefault(need.objective, set()).add(need.source)
        wanted = {name: 2 if each & {"weights", "squares"} else int("gates" in each) for name, each in sources.items()}
        backward = wanted or backward
    layers = sum(1 + each + (each > 0 and remat == "full") for each in backward.values())
    words = sum(1 + min(each, 1 + trains) for each in backward.values())
    again = sum(each > 0 and (trains or name != "loss") for name, each in backward.items())
    return any(backward.values()), layers, words, again


def method_of(config: PlanConfig, spec: LlamaSpec) -> MethodConfig:
    """The method of a recovery by its defaults; of a mixture with the matrices of attention, the only ones that
    can have adapters or be quantised there."""
    if config.method == "full" or not spec.constants.traits.experts:
        return MethodConfig(name=config.method)
    return MethodConfig(name=config.method, matrices=("query", "key", "value", "output"))


def _state(
    config: PlanConfig, spec: LlamaSpec, count: int, matrices: int, fsdp: int, tensor: int
) -> tuple[float, float, float]:
    """The bytes of a gradient, of squared gradients, and of what is carried from step to step."""
    width = 2 if config.dtype == "bfloat16" else 4
    shards = fsdp * tensor
    if config.task == "evaluate":
        return 0.0, 0.0, 0.0
    if config.task == "recover":
        method = method_of(config, spec)
        embed = spec.embed
        both = not spec.constants.traits.experts
        group = method.group_size if config.method == "groupwise" else 1  # inputs, of which an adapter sees one number
        units = [(w.kv_heads * spec.head_dim, w.kv_heads * w.q_per_kv * spec.head_dim, both * w.mlp)
                 for w in spec.layers]  # fmt: skip
        seen = sum((3 + 2 * both) * embed + heads + mlp for _, heads, mlp in units) / group
        written = sum((1 + both) * embed + heads + 2 * kv + 2 * mlp for kv, heads, mlp in units)
        trained = count / shards if config.method == "full" else method.rank * (seen + written / fsdp)  # outputs alone
        return 4 * trained, 0.0, 12 * trained
    needs = needs_of(config)
    sources = [need.source for need in needs]
    squared = sources.count("squares")
    first = sources.count("weights")
    state = 4 * matrices * (first + squared) / shards + whole_bytes(needs, spec, config.examples)
    return (width * matrices / shards if first or squared else 0.0), 4 * matrices * squared / shards, state


@functools.cache
def whole_bytes(needs: frozenset[Statistic], spec: LlamaSpec, examples: int) -> int:
    """Count the bytes of statistics of activations and of gates, which every device holds whole."""
    model = abstract_llama(spec, jnp.dtype("float32"))
    plan = Plan(examples)
    some = [need for need in needs if need.source in ("activations", "gates")]
    shapes = [jax.eval_shape(lambda model, need=need: need.init(model, plan), model) for need in some]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def meshes(devices: int, spec: LlamaSpec) -> list[Mesh]:
    """List the ways to arrange devices for a model whose axes divide: each as (data, fsdp, tensor).

    Of a mixture also those with a fourth size, of `expert`.
    """
    heads, units = (math.gcd(*sizes) for sizes in zip(*((w.kv_heads, w.mlp) for w in spec.layers), strict=True))
    most = 1
    if spec.constants.traits.experts:
        most = max(min(devices, units), 1)
    found = []
    for expert, tensor in itertools.product(range(1, most + 1), (1, 2, 4, 8)):
        if devices % (expert * tensor) or units % (expert * tensor) or math.gcd(heads, spec.vocab) % tensor:
            continue
        rest = devices // (expert * tensor)
        behind = (expert,) if expert > 1 else ()
        found += [
            (rest // fsdp, fsdp, tensor, *behind)
            for fsdp in range(1, rest + 1)
            if rest % fsdp == 0 and spec.embed % fsdp == 0
        ]
    return found
