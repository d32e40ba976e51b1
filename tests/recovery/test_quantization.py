"""Group quantisation: packing, rounding, products, saved models; against numpy, and never worse than the nearest."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saap_jax.llama import quantized
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.write import save_model
from saap_jax.llama.product import product
from saap_jax.llama.quantized import Quantized, dequantized, pack, quantization_of, unpack
from saap_jax.llama.segments import existing_units
from saap_jax.recovery.quantization import check_group_size, nearest, quantize, quantize_matrix, searched
from saap_jax.structures.discovery import discover
from saap_jax.surgery.cut import cut
from tests.helpers import forward, random_model, random_tokens
from tests.recovery.models import pruned_model, spec_of

BITS = [2, 3, 4, 8]
TOKENS = jnp.asarray(random_tokens(2, 7))


def stacked(weight, bits, size, rounding="nearest"):
    """Return a down projection of one layer with this weight, quantised."""
    arrays = (jnp.asarray(each)[None] for each in quantize_matrix(weight, bits, size, rounding))
    return Quantized(("layers", "mlp", "embed"), weight.shape, bits, size, tuple(arrays))


def layer_of(matrix):
    return jax.tree.map(lambda leaf: leaf[0], matrix)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class TestPacking:
    @pytest.mark.parametrize("bits", BITS)
    def test_bytes_hold_all_bits(self, bits):
        integers = np.random.default_rng(0).integers(0, 2**bits, (3, 2, 16, 5), np.uint8)
        packed = pack(integers, bits)
        assert packed.dtype == np.uint8
        assert packed.nbytes * 8 == integers.size * bits
        np.testing.assert_array_equal(unpack(jnp.asarray(packed), bits), integers)
        changed = packed.copy()
        changed[0, 0, -1, 0] ^= 128
        assert (np.asarray(unpack(jnp.asarray(changed), bits)) != integers).sum() == 1

    def test_four_bits_lie_as_in_gguf(self):
        """gguf's own dequantisation of a Q4_1 block with d = 1 and m = 0 gives our integers."""
        gguf = pytest.importorskip("gguf")
        integers = np.random.default_rng(0).integers(0, 16, (32, 1), np.uint8)
        block = np.concatenate([np.array([1, 0], np.float16).view(np.uint8), pack(integers, 4)[:, 0]])
        values = gguf.quants.dequantize(block[None], gguf.GGMLQuantizationType.Q4_1)[0]
        np.testing.assert_array_equal(values, integers[:, 0])


class TestRounding:
    @pytest.mark.parametrize("bits", BITS)
    def test_nearest_against_numpy(self, bits):
        rows = normal(64, 8)
        q, scale, offset = (np.asarray(each) for each in nearest(jnp.asarray(rows), 2**bits - 1))
        low, high = rows.min(axis=1), rows.max(axis=1)
        np.testing.assert_array_equal(offset, low)
        np.testing.assert_allclose(scale, (high - low) / (2**bits - 1), rtol=1e-6)
        error = np.abs(q * scale[:, None] + offset[:, None] - rows)
        assert (error <= 0.5001 * scale[:, None] + 1e-6).all()
        assert q.min() == 0
        assert q.max() == 2**bits - 1

    @pytest.mark.parametrize("bits", BITS)
    def test_search_is_never_worse(self, bits):
        """In any group; and better in most at 2 bits, where outliers cost most."""
        rows = normal(256, 16) ** 3

        def errors(fit):
            q, scale, offset = (np.asarray(each, np.float64) for each in fit(jnp.asarray(rows), 2**bits - 1))
            assert q.min() >= 0
            assert q.max() < 2**bits
            return np.square(q * scale[:, None] + offset[:, None] - rows).sum(axis=1)

        plain, best = errors(nearest), errors(searched)
        assert (best <= plain * (1 + 1e-5)).all()
        assert bits != 2 or np.mean(best < 0.9 * plain) > 0.8

    @given(
        row=st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=8, max_size=8),
        fit=st.sampled_from([nearest, searched]),
    )
    @settings(max_examples=50, deadline=None)
    def test_any_group_is_within_a_step(self, row, fit):
        """Constant groups, also of zeros, are exact; others are off by no more than a step of the whole range.

        A step too small for a normal float32 is taken as 0, so that a group of such a range becomes constant.
        """
        rows = np.asarray([row], np.float32)
        q, scale, offset = (np.asarray(each, np.float64) for each in fit(jnp.asarray(rows), 15))
        error = np.abs(q * scale[:, None] + offset[:, None] - rows).max()
        tiny = 15 * float(np.finfo(np.float32).tiny)
        assert error <= np.ptp(rows) / 15 * 2 + 1e-6 * np.abs(rows).max() + tiny

    def test_a_range_below_the_smallest_float_becomes_constant(self):
        rows = np.zeros((1, 8), np.float32)
        rows[0, 7] = np.finfo(np.float32).tiny
        for fit in (nearest, searched):
            q, scale, offset = map(np.asarray, fit(jnp.asarray(rows), 15))
            assert np.isfinite([scale, offset]).all()
            assert np.abs(q * scale[:, None] + offset[:, None] - rows).max() <= rows[0, 7]


class TestProduct:
    @pytest.mark.slow
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("rows", [1, 5])
    def test_against_floats(self, bits, rows):
        """One row takes the pass over bytes where there is one, several the matrix in floats."""
        weight, x = normal(16, 5), normal(1, rows, 16, seed=1)
        matrix = layer_of(stacked(weight, bits, 8))
        dense = np.asarray(matrix.dense(), np.float64)
        np.testing.assert_allclose(product("btf,fd->btd", jnp.asarray(x), matrix), x @ dense, rtol=1e-5, atol=1e-5)
        assert np.abs(x @ dense - x @ weight).max() > 1e-3

    @pytest.mark.slow
    @pytest.mark.parametrize("chunk", [1, 40, 80])
    def test_chunks_add_up(self, chunk, monkeypatch):
        """A group, or some groups, in floats at once; gradients too."""
        matrix, x = layer_of(stacked(normal(32, 5), 4, 8)), jnp.asarray(normal(2, 3, 32, seed=1))

        def both(x):
            return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(matrix.product("btf,fd->btd", x))))(x)

        whole = both(x)
        monkeypatch.setattr(quantized, "CHUNK", chunk)
        scans = str(jax.make_jaxpr(lambda x: matrix.product("btf,fd->btd", x))(x)).count("scan[")
        assert scans == 1
        for one, other in zip(both(x), whole, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


class TestModels:
    @pytest.mark.slow
    def test_it_is_the_dequantised_model(self):
        model = pruned_model()
        quantised = quantize(model, bits=3, group_size=8)
        plain = dequantized(quantised)
        assert quantization_of(plain) is None
        assert jax.tree.structure(plain) == jax.tree.structure(model)
        np.testing.assert_allclose(forward(quantised, TOKENS), forward(plain, TOKENS), rtol=1e-5, atol=1e-5)
        assert np.abs(forward(quantised, TOKENS) - forward(model, TOKENS)).max() > 0.01

    @pytest.mark.slow
    def test_pruning_comes_first(self):
        quantised = quantize(pruned_model(), group_size=8)
        with pytest.raises(ValueError, match="cut: expected .* plain floats, got Quantized for key; prune"):
            cut(quantised, existing_units(quantised.segments))
        with pytest.raises(ValueError, match="pruning: expected"):
            discover(quantised)
        assert discover(dequantized(quantised))


class TestWidths:
    @pytest.mark.parametrize(
        ("size", "bits", "message"),
        [
            (8, 5, "bits: expected 2, 3, 4, 8, got 5"),
            (6, 3, "group_size: expected a multiple of 8, so that 3 bits fill bytes, got 6"),
            (0, 8, "group_size: expected a multiple of 1"),
            (10, 8, "group_size: expected a divisor of the width of the residual stream, 16, got 10"),
            (
                16,
                4,
                "layer 1 has 1 x 8 inputs of output, .* within.multiple_of={attention: 2}.,",
            ),
            (8, 4, "layer 1 has 12 x 1 inputs of down, no multiple of 8; prune within.multiple_of={mlp: 8}."),
        ],
    )
    def test_widths_that_do_not_fit_are_refused(self, size, bits, message):
        spec = spec_of((2, 16), (1, 12))
        with pytest.raises(ValueError, match=message):
            check_group_size(spec, bits, size)
        with pytest.raises(ValueError, match=message):
            quantize(random_model(spec), bits=bits, group_size=size)


class TestSaving:
    @pytest.mark.parametrize("bits", BITS)
    def test_a_saved_model_is_the_same(self, bits, tmp_path):
        model = quantize(random_model(spec_of((2, 16), (1, 0), (0, 8), output_biases=True)), bits=bits, group_size=8)
        path = save_model(model, tmp_path / "model")
        loaded = load_model(path)
        assert jax.tree.structure(loaded) == jax.tree.structure(model)
        for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(model), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"bits": 5}, "expected saap_quantization to have bits"),
            ({"group_size": 3}, "a group_size of whole bytes"),
            ({"group_size": 6}, "expected a group_size that divides the inputs of matrices, 16, got 6"),
            ({"group_size": 4}, "weight_offset has shape"),
            ({"matrices": ["query"]}, "missing tensors"),
        ],
    )
    def test_a_damaged_config_is_refused(self, change, message, tmp_path):
        path = save_model(quantize(pruned_model(), group_size=8), tmp_path / "model")
        config = json.loads((path / "config.json").read_text())
        config["saap_quantization"] |= change
        (path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            load_model(path)

    def test_other_readers_refuse_it(self, tmp_path):
        """A plain reader would fill the matrices with random numbers, so the config does not say `llama`."""
        model = random_model(spec_of((2, 16), (2, 16)))
        configs = [
            json.loads((save_model(each, tmp_path / name) / "config.json").read_text())
            for name, each in (("plain", model), ("quantised", quantize(model, group_size=8)))
        ]
        assert [config["model_type"] for config in configs] == ["llama", "saap_llama"]
