"""The oracle: equal to zeroing weights, whatever the batches, resumable, and running the remaining layers only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from saap_jax.estimation import ablation
from saap_jax.estimation.ablation import (
    Unit,
    ablate,
    changes_from_lines,
    changes_to_lines,
    prefix_step,
    sample_units,
    suffix_step,
)
from saap_jax.evaluation.perplexity import loss_step
from saap_jax.llama import loss
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.write import save_model
from saap_jax.llama.loss import summed_losses
from saap_jax.llama.model import Llama
from saap_jax.llama.segments import existing_units, ones_gates
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from tests.helpers import changed, losses_of

DENSE = ((2, 6),) * 3
CUT = ((2, 6), (1, 6), (0, 4), (2, 0), (2, 0))
"""(kv_heads, mlp) a layer: runs of one and of two layers, and layers without a structure."""


def model_of(widths=DENSE, tied=False, dtype=np.float32) -> Llama:
    layers = tuple(LayerWidths(kv_heads=heads, q_per_kv=2, mlp=mlp) for heads, mlp in widths)
    spec = LlamaSpec(vocab=32, embed=16, head_dim=4, layers=layers, tied=tied)
    random = np.random.default_rng(0)

    def make(shape, fan_in):
        return jnp.asarray((random.standard_normal(shape) * (fan_in or 1) ** -0.5).astype(dtype))

    return Llama(spec, make)


def changes_of(model: Llama, units: list[Unit], batches=None, **options) -> dict[Unit, float]:
    """Return the changes; two units at once is the size that lets both structures share a program."""
    return ablate(model, [text()] if batches is None else batches, units, at_once=2, **options)


def all_units(model: Llama) -> list[Unit]:
    return sample_units(existing_units(model.segments), 99)


def text(examples=4, seq=9) -> tuple[np.ndarray, np.ndarray]:
    """Return random tokens; the last example ends early, and one is padding."""
    tokens = np.random.default_rng(1).integers(0, 32, (examples, seq)).astype(np.int32)
    mask = np.ones(tokens.shape, bool)
    mask[-2, 5:] = False
    mask[-1] = False
    return tokens, mask


def mean_loss(model: Llama, batch, gates=None) -> float:
    tokens, mask = map(jnp.asarray, batch)
    sums, counts = loss_step(model, tokens, mask, ones_gates(model.segments) if gates is None else gates)
    return float(np.asarray(sums).sum() / np.asarray(counts).sum())


def without(model: Llama, unit: Unit) -> float:
    """Return the loss of the whole model with one gate closed."""
    gates = ones_gates(model.segments)
    gates[unit.structure] = gates[unit.structure].at[unit.layer, unit.number].set(0.0)
    return mean_loss(model, text(), gates)


@pytest.mark.slow
@pytest.mark.parametrize(("widths", "tied"), [(DENSE, True), (CUT, False)])
def test_equals_the_whole_model_with_one_gate_closed(x64, widths, tied):
    model = model_of(widths, tied, np.float64)
    changes = changes_of(model, all_units(model))
    dense = mean_loss(model, text())
    expected = {unit: without(model, unit) - dense for unit in all_units(model)}
    assert list(changes) == all_units(model)
    np.testing.assert_allclose(list(changes.values()), list(expected.values()), rtol=0, atol=1e-12)
    assert np.abs(np.diff(list(expected.values()))).min() > 1e-8  # no two neighbours are alike, so none is swapped
    assert min(expected.values()) < 0 < max(expected.values())  # removing a unit can help


@pytest.mark.slow
def test_bfloat16_stays_near():
    model, units = model_of(dtype=jnp.bfloat16), [Unit("attention", 0, 1), Unit("mlp", 1, 4)]
    expected = [without(model_of(), unit) - mean_loss(model_of(), text()) for unit in units]
    np.testing.assert_allclose(list(changes_of(model, units).values()), expected, rtol=0, atol=0.03)
    assert np.abs(expected).min() > 0.03, "control"


class TestHeadsByZeroedWeights:
    """Query head h reads key/value head h // q_per_kv: checked on the tensors of the Hugging Face layout."""

    @pytest.fixture
    def loss_without(self, tmp_path):
        directory = save_model(model_of(), tmp_path / "model")
        original = load_file(directory / "model.safetensors")

        def loss(layer: int, key_head: int, query_heads) -> float:
            tensors = {name: tensor.copy() for name, tensor in original.items()}
            prefix = f"model.layers.{layer}.self_attn"
            for name in ("k_proj", "v_proj"):
                tensors[f"{prefix}.{name}.weight"].reshape(2, 4, 16)[key_head] = 0
            for head in query_heads:
                tensors[f"{prefix}.q_proj.weight"].reshape(4, 4, 16)[head] = 0
                tensors[f"{prefix}.o_proj.weight"].reshape(16, 4, 4)[:, head] = 0
            save_file(tensors, directory / "model.safetensors", {"format": "pt"})
            return mean_loss(load_model(directory), text())

        return loss

    @pytest.mark.parametrize("layer", [0, 2])
    @pytest.mark.parametrize("head", [0, 1])
    def test_pairs(self, loss_without, layer, head):
        unit = Unit("attention", layer, head)
        change = ablate(model_of(), [text()], [unit])[unit]
        dense = mean_loss(model_of(), text())
        assert change == pytest.approx(loss_without(layer, head, (2 * head, 2 * head + 1)) - dense, abs=2e-6)
        wrong = loss_without(layer, head, (head, head + 2)) - dense  # h % kv_heads
        assert abs(change - wrong) > 1e-3


@pytest.mark.slow
def test_does_not_depend_on_batches():
    model, units, (tokens, mask) = model_of(), all_units(model_of()), text()
    expected = np.asarray(list(changes_of(model, units).values()))
    parts = [(tokens[i : i + 1], mask[i : i + 1]) for i in range(4)]
    changes = ablate(model, parts, units, at_once=1)
    np.testing.assert_allclose(list(changes.values()), expected, rtol=0, atol=2e-6)
    fewer = ablate(model, parts[:2], units, at_once=1)
    assert np.abs(np.asarray(list(fewer.values())) - expected).max() > 1e-3


class TestOnlyTheRemainingLayersRun:
    @pytest.mark.slow
    def test_layers_in_front_are_not_read(self):
        """With NaN weights in front of `start`, the loss is still that of the whole model."""
        model = model_of(((2, 6), (2, 6), (1, 6)))
        tokens, mask = map(jnp.asarray, text())
        states, losses = prefix_step(model, tokens, mask)

        def run(start: int):
            return suffix_step(model, states[2][None], jnp.asarray(start, jnp.int32), tokens, mask)[0]

        model.segments[0].mlp.down[...] = jnp.full_like(model.segments[0].mlp.down[...], jnp.nan)
        np.testing.assert_allclose(run(2), losses, rtol=1e-6)
        assert np.isnan(run(1)[0])

    @pytest.mark.slow
    def test_one_program_serves_every_layer(self):
        model = model_of(((2, 6),) * 5)
        units = [Unit("mlp", layer, index) for layer in range(5) for index in range(4)]
        ablate(model, [text(5)], units[:4])
        before = suffix_step._cache_size(), ablation.remove_step._cache_size()
        ablate(model, [text(5)], units[4:])
        assert (suffix_step._cache_size(), ablation.remove_step._cache_size()) == before
        ablate(model, [text(7)], units[:4])  # the count sees a new program where there is one
        assert suffix_step._cache_size() == before[0] + 1


def test_a_killed_job_goes_on():
    model, units, lines = model_of(), all_units(model_of()), []

    def killed(new):
        if len(lines) == 3:
            raise KeyboardInterrupt
        lines.append(changes_to_lines(new))

    with pytest.raises(KeyboardInterrupt):
        changes_of(model, units, save=killed)
    done = changes_from_lines("\n".join(lines) + '\n["mlp", 2, 3, 0.12')
    assert 0 < len(done) < len(units)
    rest = []
    changes = changes_of(model, units, done=done, save=rest.extend)
    assert {unit for unit, _ in rest} == set(units) - set(done)
    whole = changes_of(model, units)
    assert {unit: changes[unit] for unit in done} == done
    np.testing.assert_allclose(list(changes.values()), list(whole.values()), rtol=0, atol=2e-6)


def test_a_sample_has_all_heads_and_grows_by_adding():
    existing = existing_units(model_of(CUT).segments)
    units = sample_units(existing, 5, seed=3)
    counts = {name: [sum(u[:2] == (name, layer) for u in units) for layer in range(5)] for name in existing}
    assert counts == {"attention": [2, 1, 0, 2, 2], "mlp": [5, 5, 4, 0, 0]}
    assert len(set(units)) == len(units)
    existing = {"attention": np.ones((2, 1), bool), "mlp": np.ones((2, 500), bool)}
    small, large, other = (set(sample_units(existing, *a)) for a in ((20, 0), (30, 0), (20, 1)))
    assert small == set(sample_units(existing, 20, 0))
    assert small < large
    assert len(small & other) < len(small) / 2
    layers = [{unit.number for unit in small if unit[:2] == ("mlp", layer)} for layer in (0, 1)]
    assert layers[0] != layers[1]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [5, 1024])
def test_loss_by_chunks_of_the_vocabulary(monkeypatch, tied, chunk):
    monkeypatch.setattr(loss, "VOCAB_CHUNK", chunk)
    model, (tokens, mask) = model_of(tied=tied), map(jnp.asarray, text())
    last = jax.jit(lambda model, tokens: model.hidden(tokens)[0])
    hidden = jnp.stack([last(model, tokens), 30 * last(model, tokens[:, ::-1])])
    losses = jax.jit(lambda *each: summed_losses(*each))(model, hidden, tokens, mask)
    np.testing.assert_allclose(losses[0], losses_of(model, tokens, mask), rtol=1e-6)
    assert np.isfinite(losses).all()
    assert np.abs(losses[1] - losses[0])[:3].min() > 1


@pytest.mark.parametrize("unit", [Unit("mlp", 2, 4), Unit("mlp", 5, 0), Unit("mlp", -1, 0), Unit("embed", 0, 0)])
def test_units_that_do_not_exist_are_refused(unit):
    with pytest.raises(ValueError, match=r"does not exist in this model of 5 layers"):
        ablate(model_of(CUT), [text()], [unit])


def test_no_text_and_losses_that_are_not_finite_are_refused():
    model, (tokens, mask) = model_of(), text()
    for batches in ([], [(tokens, np.zeros_like(mask))]):
        with pytest.raises(ValueError, match="expected at least one example"):
            ablate(model, batches, [Unit("mlp", 0, 0)])
    prefixes = [ablation.prefix_of(model, text())]
    broken = changed(model, "segments/0/mlp/down", lambda down: down.at[1, 2].set(jnp.nan))
    with pytest.raises(ValueError, match=r"without Unit\(structure='mlp', layer=0, number=3\) is not finite"):
        ablation.changes_of(broken, prefixes, (Unit("mlp", 0, 3),))
    with pytest.raises(ValueError, match="loss of the whole model is nan"):
        ablate(broken, [text()], [Unit("mlp", 0, 0)])
