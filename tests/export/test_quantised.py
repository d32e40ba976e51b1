"""Exports of group-quantised models: GGUF has their integers as they are, everything else floats."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.cli import main
from saap_jax.config.use import ExportConfig
from saap_jax.export import command as export
from saap_jax.export.command import export_model
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.write import save_model
from saap_jax.llama.quantized import quantization_of
from saap_jax.recovery.adapters import AdapterParam, groupwise
from saap_jax.recovery.quantization import quantize
from tests.export.models import spec_of, written
from tests.helpers import forward, random_model
from tests.recovery.models import trained

TOKENS = np.random.default_rng(0).integers(0, 300, (2, 12), np.int32)
SPECS = {
    "uniform": spec_of((4, 1, 64), (4, 1, 64)),
    "ragged": spec_of((4, 1, 64), (2, 2, 32), (2, 2, 32)),
    "empty_biased": spec_of((0, 2, 32), (4, 1, 0), (0, 1, 64), output_biases=True),
}


def merged_model(spec, **options):
    """Return a quantised model whose offsets took adapters, so that no scale is a round number."""
    method = groupwise(group_size=32, rank=2, scale=0.5, rounding="nearest", **options)
    return method.merge(trained(method.prepare(random_model(spec), jax.random.key(0)), AdapterParam))


def tensors_of(model, path, dtype="float32"):
    written(model, path, dtype)
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_blocks_are_the_model_with_scales_in_float16(name, tmp_path):
    """Read back, each matrix is α·q + m with α and m rounded, bit for bit, rotary rows in their places."""
    model = merged_model(SPECS[name])
    tensors = tensors_of(model, tmp_path / "x.gguf", "float16")
    kinds = {tensor.tensor_type.name for tensor in tensors.values() if tensor.name.endswith(("up.weight", "q.weight"))}
    assert "Q4_1" in kinds
    assert tensors["token_embd.weight"].tensor_type.name == "F16"
    rounded = jax.tree.map(lambda leaf: leaf, model)
    for run in rounded.segments:
        for matrix in (*vars(run.attention).values(), *vars(run.mlp).values()):
            for array in (matrix.scale, matrix.offset) if hasattr(matrix, "packed") else ():
                array[...] = array[...].astype(jnp.float16).astype(jnp.float32)
    rounded.embedding[...] = rounded.embedding[...].astype(jnp.float16).astype(jnp.float32)
    rounded.unembedding[...] = rounded.unembedding[...].astype(jnp.float16).astype(jnp.float32)
    expected, got = forward(rounded, TOKENS), forward(load_model(tmp_path / "x.gguf"), TOKENS)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)
    difference = np.abs(got - forward(model, TOKENS))
    assert 1e-5 < difference.max() < 0.1


def test_integers_are_kept(tmp_path):
    model = merged_model(SPECS["ragged"])
    down = tensors_of(model, tmp_path / "x.gguf")["blk.2.ffn_down.weight"]
    blocks = np.asarray(down.data).reshape(32, 1, 20)
    np.testing.assert_array_equal(blocks[:, :, 4:].transpose(1, 2, 0), model.segments[1].mlp.down.packed[1])


@pytest.mark.slow
def test_some_quantised_matrices(tmp_path):
    """The others are of the type that was asked for."""
    model = merged_model(SPECS["empty_biased"], matrices=("down", "query"))
    tensors = tensors_of(model, tmp_path / "x.gguf", "float16")
    assert tensors["blk.2.ffn_down.weight"].tensor_type.name == "Q4_1"
    assert tensors["blk.2.ffn_up.weight"].tensor_type.name == "F16"
    np.testing.assert_allclose(forward(load_model(tmp_path / "x.gguf"), TOKENS), forward(model, TOKENS), atol=0.05)


@pytest.fixture
def source(tokenizer, tmp_path):
    model = merged_model(SPECS["ragged"])
    return save_model(model, tmp_path / "source", tokenizer=tokenizer)


@pytest.mark.slow
def test_gguf_is_as_small_as_it_should_be(source, tmp_path):
    exported = export_model(ExportConfig(model=str(source), out=str(tmp_path / "x.gguf"), format="gguf"))
    assert 1e-6 < exported.agreement.deviation < 5e-3
    assert exported.agreement.tolerance == 1e-2
    assert any("integers as they are" in note for note in exported.notes)
    plain = ExportConfig(model=str(source), out=str(tmp_path / "y.gguf"), format="gguf", dequantize=True)
    whole = export_model(plain)
    assert whole.agreement.deviation < 1e-5
    assert exported.bytes < whole.bytes
    assert any("dequantised to float32" in note for note in whole.notes)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["padded", "ragged"])
def test_other_formats_dequantise(form, source, tmp_path):
    exported = export_model(ExportConfig(model=str(source), out=str(tmp_path / "x"), format=form))
    assert exported.agreement.deviation < 1e-5
    assert any("4 bits were dequantised" in note for note in exported.notes)
    assert quantization_of(load_model(tmp_path / "x")) is None


@pytest.mark.slow
def test_other_quantisations_are_refused_by_gguf(tokenizer, tmp_path, capsys):
    model = quantize(random_model(SPECS["uniform"]), bits=3, group_size=16)
    save_model(model, tmp_path / "source", tokenizer=tokenizer)
    words = ["export", str(tmp_path / "source"), str(tmp_path / "x.gguf"), "--format", "gguf"]
    assert main.main(words) == 2
    assert "got 3 bits in groups of 16; choose --dequantize, with --dtype q8_0" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert main.main([*words, "--dequantize", "--dtype", "q8_0"]) == 0
    assert "3 bits were dequantised to q8_0" in capsys.readouterr().out


def test_offsets_beyond_float16_are_refused(tmp_path):
    model = merged_model(SPECS["uniform"])
    model.segments[0].mlp.up.offset[...] = model.segments[0].mlp.up.offset[...] + 1e6
    with pytest.raises(ValueError, match="up_proj.weight: has a scale or offset of 1e\\+06, beyond float16"):
        written(model, tmp_path / "x.gguf")


@pytest.mark.slow
def test_a_wrong_block_is_found(source, tmp_path, monkeypatch):
    """Negative control of the comparison: one group of one matrix with another offset."""

    def wrong(path):
        model = load_model(path)
        if str(path).endswith(".gguf"):
            model.segments[0].mlp.down[...] = model.segments[0].mlp.down[...].at[0, :32, :8].add(0.05)
        return model

    monkeypatch.setattr(export, "load_model", wrong)
    with pytest.raises(ValueError, match="expected the logits of the written model"):
        export_model(ExportConfig(model=str(source), out=str(tmp_path / "x.gguf"), format="gguf"))
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.llamacpp
class TestInLlamaCpp:
    """llama.cpp rounds activations to 8 bits where it multiplies by Q4_1, so logits are near, not equal."""

    @pytest.mark.parametrize("name", SPECS)
    def test_logits(self, name, tmp_path):
        from tests.export.test_llamacpp import TOKENS, expected_logits, logits_of

        model = merged_model(SPECS[name])
        written(model, tmp_path / "x.gguf")
        expected = expected_logits(model, TOKENS)
        got = logits_of(tmp_path / "x.gguf", TOKENS)
        assert np.sqrt(np.mean((got - expected) ** 2)) < 0.05 * expected.std()
        other = expected_logits(model, TOKENS[::-1])
        assert np.sqrt(np.mean((got - other) ** 2)) > 0.5 * expected.std()

    def test_greedy_tokens_of_a_merged_model(self, smollm2, smollm2_tokenizer, tmp_path):
        """32 tokens of SmolLM2 with adapters merged, in 4 bits, are those that our own decoding makes."""
        from saap_jax.llama.generate import Sampling, generate
        from tests.export.test_llamacpp import last_logits, opened

        method = groupwise(rank=2, scale=0.02, rounding="nearest")
        model = method.merge(trained(method.prepare(smollm2, jax.random.key(0)), AdapterParam))
        source = save_model(model, tmp_path / "merged", tokenizer=smollm2_tokenizer)
        export_model(ExportConfig(model=str(source), out=str(tmp_path / "x.gguf"), format="gguf"))
        prompt = smollm2_tokenizer.encode("The capital of France is")
        tokens = list(prompt)
        with opened(tmp_path / "x.gguf") as runtime:
            past = runtime._eval_tokens(prompt, 0)
            for _ in range(32):
                tokens.append(int(last_logits(runtime).argmax()))
                past = runtime._eval_tokens(tokens[-1:], past)
        assert (
            generate(model, [prompt], max_new_tokens=32, sampling=Sampling(stop_tokens=()))[0] == tokens[len(prompt) :]
        )
