"""Mixtures of experts: an expert is a unit of the MLP, tokens of one that is gone go to the others, the whole way."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import saap_jax
from saap_jax.data.windows import Windows
from saap_jax.estimation.observe import observe, score
from saap_jax.estimation.registry import make_estimator
from saap_jax.export.hf import write_hf
from saap_jax.llama.files.load import load_keep, load_model
from saap_jax.llama.files.write import save_model
from saap_jax.llama.loss import next_token_losses
from saap_jax.llama.model import _norms_of_parts
from saap_jax.llama.segments import existing_units, masks, ones_gates
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from saap_jax.recovery.adapters import METHODS
from saap_jax.steps.allocation.allocation import choose, most_removable
from saap_jax.steps.allocation.allocations import Global
from saap_jax.steps.limits import Within
from saap_jax.steps.repair.output import LeastSquares
from saap_jax.structures.discovery import discover
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery.compensation import compensate
from saap_jax.surgery.cut import cut
from tests.helpers import RELATIVES, forward, random_model, random_tokens, reference, relative
from tests.helpers import spec_of as small_spec
from tests.test_relatives import RECOVER

TOKENS = random_tokens(4, 9)
BATCH = (TOKENS, np.ones(TOKENS.shape, bool))


def spec_of(family: str, experts: int = 8, vocab: int = 24) -> LlamaSpec:
    """Return a spec whose embeddings are wide enough for the recoveries of the commands."""
    constants = dataclasses.replace(RELATIVES[family], bos_token=0, eos_tokens=(0,))
    widths = LayerWidths(kv_heads=2, q_per_kv=2, mlp=experts, channels=12)
    return LlamaSpec(vocab=vocab, embed=16, head_dim=4, layers=(widths,) * 3, tied=False, constants=constants)


def test_a_unit_is_an_expert_with_its_column_of_the_router():
    structure = discover(relative("mixtral"))["mlp"]
    assert (structure.axis, structure.units) == ("experts", (6, 6))
    assert [member.path for member in structure.members] == ["mlp/gate", "mlp/router", "mlp/up", "mlp/down"]
    assert structure.parameters_per_unit == (3 * 3 * 8 + 8,) * 2


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_tokens_of_an_expert_that_is_gone_go_to_the_others(family, x64):
    """Masked is cut; a gate that is nearly closed lets the token stay where it is."""
    model = relative(family, dtype=np.float64)
    keep = existing_units(model.segments)
    keep["mlp"][0, :3] = False
    masked, nearly = masks(keep), ones_gates(model.segments)
    nearly["mlp"] = nearly["mlp"].at[0, :3].set(1e-9)
    expected = np.asarray(forward(cut(model, keep), TOKENS))
    np.testing.assert_allclose(forward(model, TOKENS, masked), expected, rtol=0, atol=1e-12)
    assert np.abs(np.asarray(forward(model, TOKENS, nearly)) - expected).max() > 1e-2


@pytest.mark.slow
def test_each_example_has_gates_of_its_own():
    model = relative("mixtral")
    some = masks(existing_units(model.segments))
    other = some | {"mlp": some["mlp"].at[:, :4].set(0.0)}
    gates = {name: jnp.stack([some[name], other[name], some[name], other[name]]) for name in some}
    got = np.asarray(forward(model, TOKENS, gates))
    for row, each in enumerate((some, other, some, other)):
        np.testing.assert_allclose(got[row], np.asarray(forward(model, TOKENS[row : row + 1], each))[0], atol=2e-6)


@pytest.mark.slow
def test_gate_gradients_are_differences(x64):
    """Of gates near 1: routing does not change there."""
    model = relative("qwen3_moe", dtype=np.float64)
    ones = {name: gates.astype(jnp.float64) for name, gates in ones_gates(model.segments).items()}

    @jax.jit
    def loss(gates):
        return next_token_losses(model, jnp.asarray(TOKENS), jnp.ones(TOKENS.shape, bool), gates)[0].sum()

    gradient = jax.grad(loss)(ones)["mlp"]
    for layer, expert in ((0, 2), (1, 5)):
        step = 1e-5
        up, down = (ones | {"mlp": ones["mlp"].at[layer, expert].add(change)} for change in (step, -step))
        assert float(gradient[layer, expert]) == pytest.approx(float(loss(up) - loss(down)) / (2 * step), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_reap_by_hand(family, x64):
    """Mean over the tokens routed to an expert of its weight times the norm of its output; of heads, of all tokens."""
    if family == "llama":
        model = random_model(small_spec((2, 6), (2, 6)), dtype=np.float64)
    else:
        model = relative(family, dtype=np.float64)
    estimator = make_estimator("reap")
    mask = BATCH[1].copy()
    mask[-1, 6:] = False
    got = score({"reap": estimator}, observe(model, [(TOKENS, mask)], estimator.needs), model)["reap"]
    written = {"attention": np.zeros((0, 2, 2)), "mlp": np.zeros((0, 2, 6))}
    for row, real in zip(TOKENS, mask, strict=True):
        each = {"attention": [], "mlp": []}
        for layer, active in enumerate(reference(model, row)[1]):
            output = np.asarray(model.segments[0].attention.output[...])[layer]
            down = np.asarray(model.segments[0].mlp.down[...])[layer]
            heads = np.einsum("tkgh,kghd->tkd", active["attention"], output)
            parts = active["mlp"] if family != "llama" else active["mlp"][..., None]
            units = np.einsum("tec,ecd->ted", parts, down.reshape(*parts.shape[1:], -1))
            for name, values in (("attention", heads), ("mlp", units)):
                each[name].append(np.linalg.norm(values, axis=-1)[real])
        for name, values in each.items():
            written[name] = np.concatenate([written[name], np.stack(values, axis=1)])
    for name, norms in written.items():
        routed = (norms > 0).sum(axis=0)
        np.testing.assert_allclose(got[name], norms.sum(axis=0) / np.maximum(routed, 1), rtol=1e-6)
    assert (written["mlp"] == 0).any() == (family != "llama"), "some tokens are routed elsewhere"


def test_norms_of_parts_are_those_of_all_units():
    """As they are taken where devices hold parts of the experts; also of a layer that has none left."""
    random = np.random.default_rng(0)
    rows, own = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((2, 3, 8, 4), (8, 4, 5)))
    expected = np.linalg.norm(np.einsum("btuc,ucd->btud", rows, own), axis=-1)
    np.testing.assert_allclose(_norms_of_parts(rows, own, 4), expected, rtol=1e-5)
    assert not np.allclose(_norms_of_parts(rows, own[::-1], 4), expected, rtol=1e-2), "negative control"
    assert _norms_of_parts(rows[:, :, :0], own[:0], 4).shape == (2, 3, 0)


def some_scores(subject):
    return {name: np.random.default_rng(0).random(units.shape) for name, units in subject.existing.items()}


def test_as_many_experts_stay_as_a_token_is_routed_to():
    def kept_by(model, within: Within) -> int:
        subject = LlamaSubject(model)
        top = most_removable(subject, Global(), within)
        return int(choose(subject, some_scores(subject), top, Global(), within).keep["mlp"].sum(axis=1).min())

    assert kept_by(random_model(spec_of("mixtral")), Within()) == 2
    assert kept_by(random_model(small_spec((2, 8), (2, 8))), Within()) == 1, "negative control"


def test_a_whole_mlp_goes_where_whole_ones_go():
    subject = LlamaSubject(random_model(spec_of("mixtral")))
    keep = choose(subject, some_scores(subject), 0.3, Global(), Within(depth=True, min_keep=0)).keep["mlp"]
    assert sorted({*keep.sum(axis=1).tolist()}) == [0, 8]


@pytest.mark.slow
@pytest.mark.parametrize("step", ["evolve(6, offspring=8, quantum=0.2)", "shape(0.0)", "learn(8, rate=0.3)"])
def test_what_chooses_again_keeps_as_many_experts(step):
    """At a ratio at which some layers are down to two."""
    subject = LlamaSubject(random_model(spec_of("mixtral")))
    text = Windows(random_tokens(8, 9), np.ones((8, 9), bool))
    keep = saap_jax.run_chain(subject, f"random > global > {step}", text, 0.55, batch_size=2).keep["mlp"]
    assert keep.sum(axis=1).min() >= 2


@pytest.mark.slow
def test_compensation_leaves_experts_and_sees_where_tokens_go(x64):
    """Attention behind a layer without some experts is corrected on the stream that these are missing from."""
    model = random_model(spec_of("mixtral"), dtype=np.float64)
    keep = existing_units(model.segments)
    keep["mlp"][0, :5] = keep["attention"][1, 0] = keep["mlp"][1, 2] = False
    batches = [(random_tokens(2, 16, seed), np.ones((2, 16), bool)) for seed in range(4)]
    made = compensate(model, keep, batches, LeastSquares())
    assert [(each.structure, each.layer) for each in made.corrections] == [
        ("attention", 1),
        ("attention", 2),
    ]
    for name in ("gate", "up", "down", "router"):
        before, after = (getattr(each.segments[0].mlp, name)[...] for each in (model, made.model))
        np.testing.assert_array_equal(before, after)
    masked = np.asarray(forward(made.model, TOKENS, masks(keep)))
    np.testing.assert_allclose(forward(cut(made.model, keep), TOKENS), masked, rtol=0, atol=1e-10)
    dense = compensate(model, keep, batches, LeastSquares(propagate="dense"))
    weights = [each.model.segments[0].attention.output[...] for each in (made, dense)]
    assert np.abs(weights[0] - weights[1]).max() > 1e-6, "the stream without experts is another one"
    subject = LlamaSubject(model)
    assert list(subject.unrepaired(LeastSquares(), keep)) == ["mlp"]
    for each in (subject, LlamaSubject(cut(model, keep))):  # the second with other numbers of experts a layer
        assert each.unrepaired(LeastSquares(), each.existing) == {}


def test_what_has_no_place_for_experts(tmp_path):
    model = random_model(spec_of("qwen3_moe"))
    for method in ("lora", "groupwise"):
        with pytest.raises(ValueError, match="matrices: expected those of attention in a qwen3_moe, got gate"):
            METHODS[method]().prepare(model, jax.random.key(0))
    keep = existing_units(model.segments)
    keep["mlp"][0, 0] = False
    with pytest.raises(ValueError, match=r"format hf: expected layers alike, .* got 7 to 8 experts"):
        write_hf(cut(model, keep), tmp_path, "hf", np.dtype(np.float32))


@pytest.mark.slow
def test_the_whole_way(tokenizer, tmp_path, run):
    """Compared, pruned, recovered, exported, planned."""
    family = "qwen3_moe"
    spec = spec_of(family, vocab=len(tokenizer))
    spec = dataclasses.replace(spec, constants=dataclasses.replace(spec.constants, route_scale="sum_to_one"))
    source = str(save_model(random_model(spec), tmp_path / "m", tokenizer=tokenizer))
    runs, text = str(tmp_path / "runs"), tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log. " * 100)
    assert "mlp (experts)" in run("discover", source)
    calibration = [
        *("--model.name", source, "--calibration.examples", "8", "--calibration.length", "16"),
        *("--calibration.batch-size", "2"),
    ]
    judged = ("--evaluation.windows", "3", "--evaluation.length", "16", "--evaluation.batch-size", "2")
    names = ("reap", "taylor_element", "fisher", "gate_fisher", "gate_hessian", "wanda", "fluctuation", "obs")
    said = run("compare", "--cut", *calibration, "--runs", runs, *judged, "--methods", *names)
    assert all(name in said for name in names)
    best, original = load_model(tmp_path / "runs" / "compare" / "best"), load_model(source)
    keep = load_keep(tmp_path / "runs" / "compare" / "best")
    assert not keep["mlp"].all()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (2, 12)))
    np.testing.assert_allclose(forward(best, tokens), forward(original, tokens, masks(keep)), rtol=0, atol=5e-5)

    pruned = str(tmp_path / "pruned")
    said = run("prune", *calibration, "--ratio", "0.3", "--method", "reap > least_squares", "--out", pruned)
    assert "mlp is not repaired: tokens of an expert that goes are routed to others" in said
    words = "--method.matrices query key value output --method.name lora"  # a tiny width has no groups of 32
    assert f"saap recover {pruned} --dense {source} {words}" in said
    assert "--format padded" not in said
    alike = str(tmp_path / "alike")
    words = ("--method", "reap > uniform > shape > least_squares", "--out", alike)
    run("prune", *calibration, "--ratio", "0.25", *words)
    assert load_model(alike).spec.uniform
    words = ("--method.name", "full", "--data.sources", f"text:{text}", *RECOVER)
    run("recover", "--model", pruned, "--dense", source, "--runs", runs, *words)
    assert load_model(tmp_path / "runs" / "recover" / "model").spec == load_model(pruned).spec
    out = tmp_path / "hf"
    assert load_model(alike).constants.traits.architecture in run("export", alike, str(out), "--format", "hf")
    assert json.loads((out / "config.json").read_text())["model_type"] == family
    assert "architecture qwen3moe" in run("export", alike, str(tmp_path / "x.gguf"), "--format", "gguf")
    assert "ppl@16" in run("evaluate", str(tmp_path / "x.gguf"), "--windows", "3", "--length", "16")
