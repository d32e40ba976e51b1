"""Structures read off traced programs: golden listings, agreement with axis names, brute force."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.llama.model import abstract_llama
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from saap_jax.structures.discovery import discover, parameters_by_path
from saap_jax.trace.listing import describe
from saap_jax.trace.own_code import retrace
from saap_jax.trace.trace import TracedStructure, trace
from tests.helpers import HEADS, RELATIVES, dense_model, ragged_model, relative
from tests.models_for_tracing import EXAMPLES, floats

LISTINGS = Path(__file__).parents[1] / "goldens" / "traced_structures.txt"
TOKENS = jax.ShapeDtypeStruct((2, 5), jnp.int32)


def line(structure: TracedStructure) -> str:
    """Write a structure in one line that does not depend on how JAX numbers equations."""
    members = []
    for member in structure.members:
        places = [f"{p.offset}+{p.block}" + "".join(f"x{n}by{s}" for n, s in p.repeats) for p in member.places]
        members.append(f"{member.path}[{member.axis}]" + ("" if places == ["0+1"] else f"@{','.join(places)}"))
    state = f"gates {len(structure.gates)}" + (", normalised" if structure.normalised else "")
    if structure.pinned:
        state = "pinned: " + " ".join(sorted({reason.kind for reason in structure.pinned}))
    units = f"{structure.units} x {structure.copies} units of {structure.parameters_per_unit}"
    return f"{units}, {state}: {' '.join(members)}"


def listing(name: str) -> list[str]:
    example = EXAMPLES[name]()
    return sorted(line(s) for s in trace(example.function, example.params, *example.inputs).structures)


def goldens() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in LISTINGS.read_text().splitlines():
        if text.startswith("# "):
            lines = found.setdefault(text[2:], [])
        elif text:
            lines.append(text)
    return found


def write_goldens() -> None:
    """Write the listings anew (`python -c 'from tests.trace.test_trace import *; write_goldens()'`)."""
    LISTINGS.write_text("\n\n".join("\n".join([f"# {name}", *listing(name)]) for name in EXAMPLES) + "\n")


@pytest.mark.parametrize("name", EXAMPLES)
def test_listings(name):
    assert listing(name) == goldens()[name]


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("gpt2", {10: "stream", 14: "channels", 3: "heads", 4: "head width"}),
        ("moe", {4: "experts", 7: "channels"}),
        ("convnet", {6: "stream", 8: "channels", 9: "channels"}),
    ],
)
def test_roles(name, roles):
    example = EXAMPLES[name]()
    found = trace(example.function, example.params, *example.inputs).prunable
    assert {each.units: each.role for each in found} == roles


def one_head(params, x):
    """Attend to a learned first place too."""
    h = jnp.concatenate([jnp.broadcast_to(params["first"], (len(x), 1, 4)), x @ params["in"]], 1) + params["places"]
    h += jax.nn.softmax(jnp.einsum("btd,bsd->bts", h @ params["query"], h @ params["key"])) @ h
    return h[:, 0] @ params["out"]


def values_last(params, x):
    """Multiply values with the output matrix head by head."""
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, params[name]) for name in ("query", "key", "value"))
    weights = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k))
    return jnp.einsum("bhts,bsho->bto", weights, jnp.einsum("bshe,heo->bsho", v, params["out"]))


@pytest.mark.parametrize(
    ("function", "shapes", "roles"),
    [
        (one_head, {"first": (1, 1, 4), "in": (3, 4), "places": (1, 6, 4), "query": (4, 7), "key": (4, 7),
                    "out": (4, 2)}, {4: "stream", 7: "head width"}),
        (values_last, {"query": (3, 4, 5), "key": (3, 4, 5), "value": (3, 4, 6), "out": (4, 6, 2)},
         {4: "heads", 5: "head width", 6: "head width"}),
    ],
)  # fmt: skip
def test_roles_of_attention(function, shapes, roles):
    """A sequence that reaches the inputs is no head's width, and heads that a parameter has too are no experts."""
    traced = trace(function, {name: floats(*shape) for name, shape in shapes.items()}, floats(2, 5, 3))
    assert {each.units: each.role for each in traced.prunable} == roles


def members_named(model, axis: str) -> set[tuple[str, int]]:
    parameters = parameters_by_path(model).items()
    return {(path, p.axes.index(axis)) for path, p in parameters if axis in p.axes and p.shape[p.axes.index(axis)]}


MODELS = {
    **{f"{heads}-{'tied' if tied else 'untied'}": (heads, tied) for heads in HEADS for tied in (True, False)},
    "ragged": None,
    **dict.fromkeys(RELATIVES),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_the_axis_names_of_llama_are_found(kind):
    options = MODELS[kind]
    model = ragged_model() if options is None else dense_model(options[0], tied=options[1], mlp=7)
    model = relative(kind, (2, 7), (2, 7), (1, 3), (0, 5)) if kind in RELATIVES else model
    traced = trace(lambda model, tokens: model(tokens), model, TOKENS)
    assert not traced.unknown
    sets = {frozenset((m.path, m.axis) for m in s.members): s for s in traced.structures}
    residual = sets[frozenset(members_named(model, "embed"))]
    assert residual.prunable
    assert residual.normalised
    assert (residual.copies, residual.units) == (1, 8)

    expected, first = {residual.name}, 0
    for run_index, run in enumerate(model.segments):
        for structure in discover(model).values():
            if not structure.units[first]:
                continue
            found = sets[frozenset((f"segments/{run_index}/{m.path}", m.axis) for m in structure.members)]
            assert found.prunable
            assert len(found.gates) == 1 or found.role == "experts"
            assert (found.units, found.copies) == (structure.units[first], run.length)
            assert found.parameters_per_unit == structure.parameters_per_unit[first]
            assert all(m.shared == (0,) for m in found.members)
            expected.add(found.name)
        prefix, copies = f"segments/{run_index}/attention", run.length * max(run.widths.kv_heads, 1)
        query_heads, values = {("query", 3), ("output", 2)}, {("value", 3), ("output", 3)}  # and the width of these
        if kind == "qwen2":
            query_heads |= {("query_bias", 2)}
            values |= {("value_bias", 2)}
        for free in (query_heads, values):
            found = sets[frozenset((f"{prefix}/{path}", axis) for path, axis in free)]
            assert found.prunable
            assert found.copies == copies
            expected.add(found.name)
        if (
            run.mlp.router is not None and run.widths.mlp
        ):  # the channels of experts, which our model does not tell apart
            inside = {("gate", 3), ("up", 3), ("down", 2)}
            found = sets[frozenset((f"segments/{run_index}/mlp/{path}", axis) for path, axis in inside)]
            assert (found.units, found.copies) == (3, run.length)
            expected.add(found.name)
        first += run.length
    rotated = {("query", 4), ("key", 3)}  # by one table in all runs
    norms = {("query_norm", 1), ("key_norm", 1)}
    own = {"qwen2": {("query_bias", 3), ("key_bias", 2)}, "qwen3": norms, "qwen3_moe": norms, "gemma3_text": norms}
    rotated |= own.get(kind, set())
    rotated = sets[
        frozenset((f"segments/{i}/attention/{p}", axis) for i in range(len(model.segments)) for p, axis in rotated)
    ]
    assert {reason.kind for reason in rotated.pinned} == {"constant"}
    assert {structure.name for structure in traced.prunable} == expected


@pytest.mark.parametrize("length", [6, 600])
def test_a_shifted_time_axis_may_be_long(length):
    """Inputs without their last token, targets without their first: each part of the axis is a size of its own."""

    def loss(params, tokens):
        embedded = params["embedding"][tokens[:, :-1]]
        hidden = embedded + jnp.tanh(embedded @ params["up"]) @ params["down"]
        scores = jax.nn.log_softmax(hidden @ params["embedding"].T)
        return -jnp.take_along_axis(scores, tokens[:, 1:, None], -1).mean()

    params = {"embedding": jnp.ones((11, 4)), "up": jnp.ones((4, 7)), "down": jnp.ones((7, 4)), "temperature": 0.5}
    traced = trace(loss, params, jax.ShapeDtypeStruct((2, length), jnp.int32))
    assert sorted((s.name, s.units) for s in traced.prunable) == [("down[0]", 7), ("down[1]", 4)]
    (up,) = [structure for structure in traced.prunable if structure.units == 7]
    assert retrace(loss, traced, up, params, jax.ShapeDtypeStruct((2, length), jnp.int32)) == ""


def test_a_text_names_members_gates_and_reasons():
    spec = LlamaSpec(vocab=9, embed=6, head_dim=4, layers=(LayerWidths(kv_heads=2, q_per_kv=3, mlp=5),) * 2, tied=False)
    text = describe(trace(lambda model, tokens: model(tokens), abstract_llama(spec), TOKENS))
    assert (
        "segments/0/mlp/down[1]: 5 units in each of 2, 18 parameters a unit, prunable\n    segments/0/mlp/down[1]\n"
        in text
    )
    assert "    it meets a constant of that size (iota) at iota[" in text
    assert "    it is looked up by position (gather) at gather[" in text
    assert "    changes the statistic of scan[" in text
    assert "    acts at scan[" in text


def test_an_operation_without_a_rule_pins_what_it_touches_and_says_where():
    def function(params, x):
        inverse = jnp.linalg.inv(params["square"])
        return jax.nn.relu(x @ params["up"]) @ inverse @ params["out"]

    params = {"up": floats(3, 4), "square": floats(4, 4), "out": floats(4, 2)}
    traced = trace(function, params, floats(5, 3))
    assert not traced.prunable
    assert any(text.startswith("lu at ") and "test_trace.py" in text for text in traced.unknown)
    square = next(s for s in traced.structures if ("square", 0) in {(m.path, m.axis) for m in s.members})
    assert "unknown" in {reason.kind for reason in square.pinned}
    assert "no rule for lu at " in describe(traced)


def test_a_constant_pins_and_a_broadcast_scalar_does_not():
    params = {"up": floats(3, 4), "down": floats(4, 2)}

    def function(bias, params, x):
        return (x @ params["up"] + bias) @ params["down"]

    for bias, prunable in ((np.ones((1, 4), np.float32), False), (jnp.float32(1), True)):
        traced = trace(lambda params, x, bias=bias: function(bias, params, x), params, floats(5, 3))
        assert bool(traced.prunable) == prunable
    zeros = trace(lambda params, x: function(jnp.zeros((1, params["up"].shape[1])), params, x), params, floats(5, 3))
    assert zeros.prunable


def test_what_no_output_needs_concerns_nothing():
    """A metric that is computed and thrown away once held the units that it averages or looks up."""

    def function(params, x):
        h = jnp.tanh(x @ params["up"])
        jnp.linalg.norm(h.mean(-1)), jnp.linalg.inv(h[:, :2].T @ h[:, :2]), h[:, 1]
        return h @ params["down"]

    traced = trace(function, {"up": floats(3, 4), "down": floats(4, 2)}, floats(5, 3))
    assert not traced.unknown
    (hidden,) = traced.prunable
    assert len(hidden.gates) == 1


def test_what_has_no_effect_is_pinned_and_no_parameters_are_refused():
    traced = trace(lambda params, x: x * 2, {"idle": floats(3)}, floats(3))
    assert [reason.kind for reason in traced.structures[0].pinned] == ["unused"]
    with pytest.raises(ValueError, match="params: expected a pytree of arrays"):
        trace(lambda params, x: x, {}, floats(3))
