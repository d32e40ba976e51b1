"""Random programs of the operations that have rules: what is called prunable can be removed, whatever they do."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saap_jax.trace.interpret import gated
from saap_jax.trace.own_code import retrace
from saap_jax.trace.trace import trace
from tests.models_for_tracing import masked_as_cut, removed_shapes
from tests.trace.test_gates import keep_of

Array = Any
Step = Callable[[list[Array], dict[str, Array]], list[Array]]
BATCH = 5
SIZES = st.sampled_from([2, 3, 4, 6])


class Builder:
    """Draws a program step by step. Each step reads sizes from its operands only."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw = draw
        self.params: dict[str, tuple[int, ...]] = {}
        self.steps: list[Step] = []
        self.story: list[str] = []
        width = draw(SIZES)
        self.shapes = [(BATCH, width)]
        name = self.param(7, width)
        self.steps.append(lambda pool, p: [jnp.einsum("bi,id->bd", pool[0], p[name])])

    def __repr__(self) -> str:
        return f"{self.params} {' '.join(self.story)}"

    def param(self, *shape: int) -> str:
        name = f"p{len(self.params)}"
        self.params[name] = shape
        return name

    def function(self, params: dict[str, Array], x: Array) -> Array:
        pool: list[Array] = []
        for step in self.steps:
            pool += step(pool or [x], params)
        return sum(
            jnp.tensordot(value, params[name], value.ndim - 1) for value, name in zip(pool, self.heads, strict=True)
        )

    def finish(self) -> None:
        self.heads = [self.param(*shape[1:]) for shape in self.shapes]

    def add(self, step: Step) -> None:
        pool = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in self.shapes]
        params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in self.params.items()}
        self.shapes += [out.shape for out in jax.eval_shape(step, pool, params)]
        self.steps.append(step)


def unary(builder: Builder, i: int, kind: str) -> None:
    shape = builder.shapes[i]
    functions: dict[str, Callable[[Array], list[Array]]] = {
        "relu": lambda x: [jax.nn.relu(x)],
        "softmax": lambda x: [jax.nn.softmax(x, -1)],
        "below": lambda x: [x - x.max(-1, keepdims=True, initial=-99.0)],
        "least": lambda x: [x.min(-1, initial=99.0)],
        "centre": lambda x: [x - x.mean(-1, keepdims=True)],
        "sum": lambda x: [x.sum(-1)],
        "cumsum": lambda x: [jnp.cumsum(x, -1)],
        "sort": lambda x: [jnp.sort(x, -1)],
        "flip": lambda x: [jnp.flip(x, -1)],
        "tail": lambda x: [x[..., 1:]],
        "pad": lambda x: [jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 2)])],
        "take": lambda x: [jnp.take(x, jnp.array([1, 0]), axis=-1)],
        "head": lambda x: [x[..., : x.shape[-1] // 2]],
        "halves": lambda x: list(jnp.split(x, 2, -1)),
        "twist": lambda x: [jnp.concatenate([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)],
        "odd": lambda x: [x[..., ::2]],
        "twice": lambda x: [jnp.concatenate([x, x], -1)],
        "interleave": lambda x: [jnp.stack([x[..., ::2], -x[..., 1::2]], -1).reshape(x.shape)],
        "tile": lambda x: [jnp.tile(x, (1,) * (x.ndim - 1) + (2,))],
        "unstack": lambda x: [sum(jnp.unstack(x, axis=-1))],
        "swap": lambda x: [jnp.swapaxes(x, -1, -2)],
        "merge": lambda x: [x.reshape(*x.shape[:-2], -1)],
        "merge_back": lambda x: [jax.nn.relu(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)],
        "outer": lambda x: [x[..., :, None] * x[..., None, :]],
        "zeros": lambda x: [x + jnp.zeros_like(x)],
        "branch": lambda x: [jax.lax.cond(x.sum() > 0, jnp.sin, lambda x: x * 2, x)],
        "loop": lambda x: [jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x), x)],
        "checkpoint": lambda x: [jax.checkpoint(jnp.tanh)(x)],
        "noise": lambda x: [x + jax.random.normal(jax.random.key(0), x.shape)],
        "noise_of_rows": lambda x: [x + jax.random.normal(jax.random.key(0), (BATCH,) + (1,) * (x.ndim - 1))],
    }
    if kind in ("halves", "twist", "odd", "head", "interleave") and shape[-1] % 2:
        return
    if len(shape) < 3 and kind in ("swap", "merge", "merge_back", "sum", "least", "unstack"):
        return
    if kind == "take" and shape[-1] < 2:  # an index outside reads NaN
        return
    if len(shape) > 3 and kind == "outer":
        return
    builder.add(lambda pool, p: functions[kind](pool[i]))


def with_parameter(builder: Builder, i: int, kind: str) -> None:
    shape, draw = builder.shapes[i], builder.draw
    if kind == "dense":
        same = [n for n, s in builder.params.items() if len(s) == 2 and s[0] == shape[-1]]
        name = draw(st.sampled_from(same)) if same and draw(st.booleans()) else builder.param(shape[-1], draw(SIZES))
        builder.add(lambda pool, p: [jnp.einsum("...i,ij->...j", pool[i], p[name])])
    elif kind == "scale":
        name = builder.param(shape[-1])
        builder.add(lambda pool, p: [pool[i] * p[name].reshape((1,) * (pool[i].ndim - 1) + (-1,))])
    elif kind == "unmerge":
        major = [n for n in (2, 3, 4) if shape[-1] % n == 0 and shape[-1] > n]
        if major and len(shape) < 4:
            name = builder.param(n := draw(st.sampled_from(major)), shape[-1] // n)
            builder.add(lambda pool, p: [pool[i].reshape(*pool[i].shape[:-1], *p[name].shape) * 2])
            k = len(builder.shapes) - 1
            builder.add(lambda pool, p: [pool[k] + p[name].reshape((1,) * (pool[k].ndim - 2) + p[name].shape)])
    elif kind == "scan":
        up, down = builder.param(3, shape[-1], n := draw(SIZES)), builder.param(3, n, shape[-1])

        def layer(x: Array, weights: tuple[Array, Array]) -> tuple[Array, None]:
            h = jax.nn.relu(jnp.einsum("...i,ij->...j", x, weights[0]))
            return x + jnp.einsum("...j,ji->...i", h, weights[1]), None

        builder.add(lambda pool, p: [jax.lax.scan(layer, pool[i], (p[up], p[down]))[0]])
    elif kind == "experts":
        if len(shape) < 4:
            name = builder.param(draw(SIZES), shape[-1], draw(SIZES))
            builder.add(lambda pool, p: [jnp.einsum("...i,eij->...ej", pool[i], p[name])])
    elif kind == "conv" and len(shape) == 3:
        name = builder.param(draw(st.sampled_from([1, 2])), shape[-1], draw(SIZES))
        numbers = ("NWC", "WIO", "NWC")
        builder.add(
            lambda pool, p: [jax.lax.conv_general_dilated(pool[i], p[name], (1,), "SAME", dimension_numbers=numbers)]
        )


def binary(builder: Builder, i: int, kind: str) -> None:
    first = builder.shapes[i]
    if kind == "concatenate":
        fitting = [j for j, shape in enumerate(builder.shapes) if shape[:-1] == first[:-1]]
        j = builder.draw(st.sampled_from(fitting))
        builder.add(lambda pool, p: [jnp.concatenate([pool[i], pool[j]], -1)])
    else:
        fitting = [j for j, shape in enumerate(builder.shapes) if shape == first]
        j = builder.draw(st.sampled_from(fitting))
        if kind == "add":
            builder.add(lambda pool, p: [pool[i] + pool[j]])
        elif len(first) == 3:
            builder.add(lambda pool, p: [jnp.einsum("bti,bsi->bts", pool[i], pool[j])])


UNARY = """relu softmax below least centre sum cumsum sort flip tail pad take head halves twist odd twice swap merge
merge_back interleave tile unstack outer zeros branch loop checkpoint noise noise_of_rows"""
KINDS = {
    **dict.fromkeys(UNARY.split(), unary),
    **dict.fromkeys(("dense", "scale", "unmerge", "scan", "experts", "conv"), with_parameter),
    **dict.fromkeys(("concatenate", "add", "scores"), binary),
}
FAVOURED = ["dense", "experts", "merge", "unmerge", "concatenate", "add", "halves", "swap"]


@st.composite
def programs(draw: Any) -> Builder:
    builder = Builder(draw)
    for kind in draw(st.lists(st.sampled_from([*KINDS, *FAVOURED]), min_size=1, max_size=10)):
        i = draw(st.integers(0, len(builder.shapes) - 1))
        if max(map(len, builder.shapes)) < 5 and len(builder.shapes) < 16:
            builder.story.append(f"{kind}({i})")
            KINDS[kind](builder, i, kind)
    builder.finish()
    return builder


@pytest.mark.slow
@given(programs())
@settings(max_examples=300, deadline=None, database=None, derandomize=True)
def test_what_is_prunable_can_be_removed_in_many_programs(builder: Builder) -> None:
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in builder.params.items()}
    x = jax.ShapeDtypeStruct((BATCH, 7), jnp.float32)
    traced = trace(builder.function, params, x)
    assert not traced.unknown
    for structure in traced.prunable:
        assert retrace(builder.function, traced, structure, params, x) == "", structure
        if structure.units < 3:  # one that is left may be repeated to fit
            continue
        for left_out in structure.members:
            others = [member for member in structure.members if member != left_out]
            smaller = removed_shapes(traced, others)
            less = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in smaller.items()}
            if others:
                with pytest.raises((TypeError, ValueError)):
                    jax.eval_shape(builder.function, less, x)


def check_masked(builder: Builder) -> None:
    random = np.random.default_rng(0)
    params = {name: jnp.asarray(random.uniform(-1, 1, s), jnp.float32) for name, s in builder.params.items()}
    x = jnp.asarray(random.uniform(-1, 1, (BATCH, 7)), jnp.float32)
    traced = trace(builder.function, params, x)
    for structure in traced.prunable:
        if structure.units < 2:
            continue
        own, keep = [] if structure.normalised else [builder.function], keep_of(structure, random)
        masked_as_cut(traced, {structure.name: keep}, params, x, run=gated(traced), own=own)


@given(programs())
@settings(max_examples=3, deadline=None, database=None, derandomize=True)
def test_masked_is_cut(builder):
    check_masked(builder)


@pytest.mark.slow
@given(programs())
@settings(max_examples=40, deadline=None, database=None, derandomize=True)
def test_masked_is_cut_in_many_programs(builder):
    check_masked(builder)
