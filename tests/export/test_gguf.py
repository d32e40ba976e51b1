"""GGUF files as llama.cpp lays them out, of every family; what it does not compute is refused."""

import dataclasses

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.export import gguf_file
from saap_jax.export.gguf_file import architecture_of
from saap_jax.llama.files.load import load_model
from saap_jax.llama.spec import Apart, Constants, RopeScaling
from saap_jax.recovery.quantization import quantize
from tests.export.models import (
    EMPTY,
    LINEAR,
    LLAMA3,
    MIXTURES,
    PLAIN,
    RAGGED,
    RELATIVES,
    UNIFORM,
    fields_of,
    gemma,
    rewritten,
    spec_of,
    types_of,
    written,
)  # fmt: skip
from tests.helpers import changed, forward, parameters_by_path, random_model
from tests.llama.conftest import assert_same

TOKENS = np.random.default_rng(0).integers(0, 300, (2, 9), np.int32)


def test_a_llama_with_per_layer_numbers_is_refused(tmp_path):
    """Negative control for the architecture's name, and a file that llama.cpp would misread."""
    written(random_model(RAGGED), tmp_path / "x.gguf")
    content = (tmp_path / "x.gguf").read_bytes()
    for before in (b"deci.attention", b"deci.feed"):
        assert before in content
    rewritten(tmp_path / "x.gguf", tmp_path / "y.gguf", "llama")
    with pytest.raises(ValueError, match="expected layers of equal widths for architecture 'llama'"):
        load_model(tmp_path / "y.gguf")


def test_q8_0(tmp_path):
    model = random_model(spec_of((2, 2, 64), (2, 2, 40)))
    assert written(model, tmp_path / "x.gguf", "q8_0") == ("deci", 0, 1)
    kinds = types_of(tmp_path / "x.gguf")
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_down.weight"] == "F16", "rows of 40 are no blocks of 32"
    assert kinds["blk.1.ffn_up.weight"] == kinds["token_embd.weight"] == "Q8_0"
    loaded, weights = load_model(tmp_path / "x.gguf"), np.asarray(model.embedding[...])
    step = np.abs(weights.reshape(-1, 32)).max(axis=1) / 127
    error = np.abs(np.asarray(loaded.embedding[...]) - weights).reshape(-1, 32).max(axis=1)
    assert (error <= step * 0.51 + 1e-3 * step * 127).all()
    assert error.max() > 0


def test_values_beyond_float16_are_refused(tmp_path):
    model = changed(random_model(UNIFORM), "segments/0/mlp/up", lambda value: value * 1e6)
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight: holds values up to .* beyond the range of float16"):
        written(model, tmp_path / "x.gguf", "float16")
    written(model, tmp_path / "y.gguf", "bfloat16")


def test_scaling_settings_are_kept_beside_the_divisors(tmp_path):
    model = random_model(PLAIN["llama3"])
    written(model, tmp_path / "x.gguf")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    divisors = tensors["rope_freqs.weight"]
    wavelengths = 2 * np.pi * 10_000.0 ** (np.arange(0, 8, 2) / 8)
    assert divisors[wavelengths < 64 / 4] == pytest.approx(1)
    assert divisors[wavelengths > 64 / 1] == pytest.approx(8)
    assert load_model(tmp_path / "x.gguf").constants.rope_scaling == LLAMA3
    without = random_model(UNIFORM)
    written(without, tmp_path / "y.gguf")
    assert "rope_freqs.weight" not in types_of(tmp_path / "y.gguf")


def test_layers_without_heads_have_no_tensors_that_nothing_reads(tmp_path):
    model = random_model(EMPTY)
    written(model, tmp_path / "x.gguf")
    names = types_of(tmp_path / "x.gguf")
    assert "blk.2.attn_norm.weight" not in names
    assert "blk.2.attn_q.weight" not in names
    assert {"blk.2.ffn_norm.weight", "blk.0.attn_norm.weight", "blk.0.attn_q.weight"} <= names.keys()
    changed_norm = changed(model, "segments/4/attention_norm", lambda value: value * 5)
    np.testing.assert_array_equal(forward(changed_norm, TOKENS), forward(model, TOKENS))


# --- relatives of LLaMA ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_gguf_refuses_what_llama_cpp_has_not(family, tmp_path):
    path, spec = tmp_path / "x.gguf", RELATIVES[f"{family}-uniform"]
    biased = dataclasses.replace(spec, output_biases=True)
    with pytest.raises(
        ValueError, match=rf"format gguf: expected no biases .* in family {family}.*choose --format rag"
    ):
        written(random_model(biased), path)
    scaled = dataclasses.replace(spec, constants=dataclasses.replace(spec.constants, rope_scaling=LLAMA3))
    with pytest.raises(ValueError, match=rf"no rope type 'llama3' in family {family}"):
        written(random_model(scaled), path)
    assert not path.exists()
    linear = dataclasses.replace(spec, constants=dataclasses.replace(spec.constants, rope_scaling=LINEAR))
    written(random_model(linear), path)
    assert_same(load_model(path), random_model(linear))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_rows_keep_their_order(family, tmp_path, monkeypatch):
    """Negative control: rows permuted as a LLaMA's are would be another model. Source: rope types of llama.cpp."""
    model = random_model(RELATIVES[f"{family}-uniform"])
    rows = np.asarray(model.segments[0].attention.query[...][0]).reshape(32, -1).T
    for permuted in ((), (family,)):
        monkeypatch.setattr(gguf_file, "PERMUTED", permuted)
        path = tmp_path / f"{len(permuted)}.gguf"
        written(model, path)
        tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
        assert np.array_equal(tensors["blk.0.attn_q.weight"], rows) == (not permuted)
        far = np.abs(forward(load_model(path), TOKENS) - forward(model, TOKENS)).max() > 1e-2
        assert far == bool(permuted)


def test_fused_rows_keep_their_order(tmp_path):
    model = random_model(RELATIVES["phi3-uniform"])
    written(model, tmp_path / "x.gguf")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    attention, mlp = model.segments[0].attention, model.segments[0].mlp
    rows = [np.asarray(part[...][1]).reshape(32, -1).T for part in (attention.query, attention.key, attention.value)]
    np.testing.assert_array_equal(tensors["blk.1.attn_qkv.weight"], np.concatenate(rows))
    rows = [np.asarray(part[...][1]).T for part in (mlp.gate, mlp.up)]
    np.testing.assert_array_equal(tensors["blk.1.ffn_up.weight"], np.concatenate(rows))


def test_a_phi3_file_says_its_window(tmp_path):
    """Published files have the key, which llama.cpp reads and leaves; here it counts where it is shorter than texts."""
    model = random_model(RELATIVES["phi3-uniform"])
    written(model, tmp_path / "x.gguf")
    assert fields_of(tmp_path / "x.gguf")["phi3.attention.sliding_window"] == model.constants.sliding_window
    for said, window in ((5, 5), (2047, 2047), (2048, None), (5000, None)):
        rewritten(tmp_path / "x.gguf", tmp_path / "y.gguf", "phi3", {"attention.sliding_window": said})
        assert load_model(tmp_path / "y.gguf").constants.sliding_window == window


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_quantised_matrices_are_blocks(family, tmp_path):
    spec = dataclasses.replace(spec_of((2, 2, 32), (2, 2, 32)), constants=RELATIVES[f"{family}-uniform"].constants)
    model = quantize(random_model(spec), bits=4, group_size=32, rounding="nearest")
    written(model, tmp_path / "x.gguf")
    kinds = types_of(tmp_path / "x.gguf")
    assert kinds["blk.0.attn_qkv.weight" if family == "phi3" else "blk.0.attn_q.weight"] == "Q4_1"
    np.testing.assert_allclose(
        forward(load_model(tmp_path / "x.gguf"), TOKENS), forward(model, TOKENS), rtol=0, atol=2e-2
    )


def test_fused_matrices_of_two_kinds_are_refused(tmp_path):
    spec = dataclasses.replace(spec_of((2, 2, 32), (2, 2, 32)), constants=RELATIVES["phi3-uniform"].constants)
    model = quantize(random_model(spec), bits=4, group_size=32, matrices=("query", "down"), rounding="nearest")
    with pytest.raises(ValueError, match=r"qkv_proj\.weight: expected its matrices all in floats or all quantised"):
        written(model, tmp_path / "x.gguf")


SOME = Apart(layers=(1,), sliding_window=9)


@pytest.mark.parametrize(
    "constants",
    [
        Constants(family="mistral", sliding_window=9, max_positions=64),
        Constants(family="phi3", sliding_window=9, max_positions=64),
        Constants(family="qwen2", sliding_window=9, max_positions=64),
        Constants(family="qwen3", apart=SOME, max_positions=64),
    ],
    ids=lambda constants: constants.family,
)
def test_windows_come_back_with_all_positions(constants, tmp_path):
    """In llama.cpp, which would see beyond a window, the context ends with it."""
    model = random_model(spec_of((2, 2, 24), (2, 2, 24), constants=constants))
    found = written(model, tmp_path / "x.gguf")
    assert fields_of(tmp_path / "x.gguf")[f"{found.architecture}.context_length"] == 9
    loaded = load_model(tmp_path / "x.gguf")
    assert loaded.constants == constants
    tokens = np.arange(24).reshape(2, 12)
    np.testing.assert_allclose(forward(loaded, tokens), forward(model, tokens), rtol=0, atol=2e-5)


def test_a_window_of_no_layer_is_refused(tmp_path):
    model = random_model(spec_of((2, 2, 24), (2, 2, 24), constants=Constants(family="qwen3", apart=SOME)))
    written(model, tmp_path / "x.gguf")
    reader = gguf.GGUFReader(tmp_path / "x.gguf", "r+")
    reader.fields["saap.attention.sliding_window_layers"].parts[-1][0] = 2
    reader.data.flush()
    with pytest.raises(ValueError, match=r"sliding_window_layers to be numbers of 2 layers, got \[2\]"):
        load_model(tmp_path / "x.gguf")


@pytest.mark.parametrize("window", [40, None])
def test_windows_of_gemma_are_kept_among_scaled_positions(window, tmp_path):
    """Those as long as any text are none: of 32 positions times 8, such of 256."""
    constants, scaling = gemma(7), RopeScaling(kind="linear", factor=8.0)
    apart = dataclasses.replace(constants.apart, sliding_window=window)
    constants = dataclasses.replace(constants, apart=apart, rope_scaling=scaling, max_positions=32)
    model = random_model(spec_of(*[(1, 2, 4)] * 7, constants=constants, tied=True))
    written(model, tmp_path / "x.gguf")
    assert load_model(tmp_path / "x.gguf").constants == constants


def test_a_gemma_whose_scores_llama_cpp_scales_otherwise_is_refused(tmp_path):
    """It tells the 27B by its 62 layers; with one layer less the same file is loaded."""
    for layers in (62, 61):
        spec = spec_of(*[(1, 2, 4)] * layers, constants=gemma(layers), tied=True)
        written(random_model(spec), tmp_path / "x.gguf")
        if layers == 62:
            with pytest.raises(ValueError, match=r"a gemma3 of 62 layers \(27B\) divides its scores by another number"):
                load_model(tmp_path / "x.gguf")
        else:
            assert len(load_model(tmp_path / "x.gguf").spec.layers) == 61


# --- mixtures of experts ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_routers_are_float32_whatever_else_is(name, tmp_path):
    written(random_model(MIXTURES[name]), tmp_path / "half.gguf", "float16")
    kinds = types_of(tmp_path / "half.gguf")
    assert (kinds["blk.0.ffn_gate_inp.weight"], kinds["blk.0.ffn_gate_exps.weight"]) == ("F32", "F16")


def test_experts_of_zeros_are_refused():
    """Negative control of it: an expert of zeros, with a score of zero, takes tokens from others."""
    spec = MIXTURES["qwen3_moe-uniform"]
    fewer = (spec.layers[0], dataclasses.replace(spec.layers[1], mlp=5))
    with pytest.raises(ValueError, match="expected as many experts in each layer, at least 2, got 5 to 6; prune with"):
        architecture_of(dataclasses.replace(spec, layers=fewer))
    none = tuple(dataclasses.replace(layer, mlp=0) for layer in spec.layers)
    with pytest.raises(ValueError, match="at least 2, got 0 to 0"):
        architecture_of(dataclasses.replace(spec, layers=none))
    model = random_model(spec)
    wider = random_model(dataclasses.replace(spec, layers=(dataclasses.replace(spec.layers[0], mlp=7),) * 2))
    for path, ours in parameters_by_path(model).items():
        zeros = [(0, wide - size) for wide, size in zip(parameters_by_path(wider)[path].shape, ours.shape, strict=True)]
        wider = changed(wider, path, lambda _, ours=ours, zeros=zeros: jnp.pad(ours[...], zeros))
    assert np.abs(forward(wider, TOKENS) - forward(model, TOKENS)).max() > 1e-3


def test_routing_that_llama_cpp_has_not_is_refused():
    spec = MIXTURES["qwen3_moe-uniform"]
    kept = Constants(family="qwen3_moe", experts_per_token=2, route_scale="kept")
    with pytest.raises(ValueError, match=r"by their sum, .* got others \(norm_topk_prob false\); choose"):
        architecture_of(dataclasses.replace(spec, constants=kept))


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("qwen3moe", {"expert_count": None}, "expected qwen3moe.expert_count to be a positive integer, got None"),
        ("qwen3moe", {"expert_count": 5}, r"has shape \[32, 144\], expected \[32, 120\]"),
        ("qwen3moe", {"expert_used_count": 7}, "expected qwen3moe.expert_used_count of at most 6 experts, got 7"),
        ("qwen3moe", {"expert_feed_forward_length": 12}, r"has shape \[32, 144\], expected \[32, 72\]"),
        ("qwen3", {}, "expected qwen3.expert_count to be none, got 6"),
    ],
)
def test_files_that_contradict_themselves(architecture, fields, message, tmp_path):
    written(random_model(MIXTURES["qwen3_moe-uniform"]), tmp_path / "x.gguf")
    path = rewritten(tmp_path / "x.gguf", tmp_path / "y.gguf", architecture, fields)
    with pytest.raises(ValueError, match=message) as error:
        load_model(path)
    assert "y.gguf" in str(error.value)
    assert "\n" not in str(error.value)
