"""MaxText and Tunix: what is written for them and read back. With the packages: `make maxtext`, `make tunix`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

from saap_jax.config.use import ExportConfig
from saap_jax.contrib.trainers.read import arrays_of, item_of, tensor_of, tree_of
from saap_jax.contrib.trainers.write import configuration, departures, overrides
from saap_jax.export.command import export_model
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.write import save_model
from saap_jax.llama.model import Llama
from saap_jax.llama.spec import Apart, Constants, LlamaSpec, RopeScaling
from tests.export.models import PLAIN, RELATIVES, UNIFORM, spec_of
from tests.helpers import random_model

GEMMA = RELATIVES["gemma3_text-apart"]
PUBLISHED = RopeScaling(kind="llama3", factor=8.0)
SCALED = dataclasses.replace(UNIFORM, constants=Constants(rope_scaling=PUBLISHED, max_positions=131072))
OF_MAXTEXT = {"llama": UNIFORM, "tied": PLAIN["tied"], "scaled": SCALED, "qwen3": RELATIVES["qwen3-uniform"]}
OF_TUNIX: dict[str, LlamaSpec] = {name: RELATIVES[f"{name}-uniform"] for name in ("qwen2", "qwen3", "mistral")}
OF_TUNIX |= {"llama": UNIFORM, "tied": PLAIN["tied"], "gemma3": GEMMA}
ALONE = tuple(dataclasses.replace(each, q_per_kv=1) for each in GEMMA.layers)
OF_TUNIX["gemma3-alone"] = dataclasses.replace(GEMMA, layers=ALONE)


def changed(spec: LlamaSpec, **constants) -> LlamaSpec:
    return dataclasses.replace(spec, constants=dataclasses.replace(spec.constants, **constants))


def keep(tree, place: Path, config: Path | None = None) -> None:
    """Write an item as a trainer does, with the config of the exported model beside its step."""
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(place, jax.tree.map(np.asarray, tree))
    if config is not None:
        (place.parents[1] / "config.json").write_bytes((config / "config.json").read_bytes())


def close(first: Llama, second: Llama) -> None:
    assert first.spec == second.spec
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-6)  # queries are scaled and scaled back


# --- MaxText ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_MAXTEXT)
def test_an_export_is_read_back(name, tmp_path):
    model = random_model(OF_MAXTEXT[name], 1)
    source = save_model(model, tmp_path / "model")
    done = export_model(ExportConfig(model=str(source), out=str(tmp_path / "out"), format="maxtext"))
    assert done.written == done.parameters == sum(leaf.size for leaf in jax.tree.leaves(model))
    (tmp_path / "out" / "0" / "config.json").write_bytes((source / "config.json").read_bytes())
    for place in ("out", "out/0"):
        close(model, load_model(tmp_path / place))
    said = yaml.safe_load((tmp_path / "out" / "maxtext.yml").read_text())
    assert said.keys() == {"base_config", "student_overrides", "distill_layer_indices"}
    assert said["student_overrides"]["decoder_block"] == ("qwen3" if name == "qwen3" else "llama2")
    assert said["student_overrides"]["load_parameters_path"] == str(tmp_path / "out" / "0" / "items")
    assert any("lacks its teacher" in note for note in done.notes)


@pytest.mark.parametrize("layers", [2, 3])
def test_the_teacher_is_beside_it_in_one_configuration(layers, tmp_path):
    """Features of layers are compared by number, so not where whole layers went."""
    student, teacher = random_model(UNIFORM, 1), random_model(spec_of(*((2, 2, 24),) * layers), 2)
    places = [str(save_model(model, tmp_path / name)) for name, model in (("s", student), ("t", teacher))]
    out = tmp_path / "out"
    done = export_model(ExportConfig(model=places[0], teacher=places[1], out=str(out), format="maxtext"))
    said = yaml.safe_load((out / "maxtext.yml").read_text())
    assert said["base_config"] == "post_train/distillation.yml"
    for name, where, model in (("student", out, student), ("teacher", out / "teacher", teacher)):
        assert said[f"{name}_overrides"]["load_parameters_path"] == str(where / "0" / "items")
        assert said[f"{name}_overrides"]["base_num_decoder_layers"] == len(model.spec.layers)
        close(model, load_model(where))
    assert said.get("distill_layer_indices") == ([0, 1] if layers == 2 else None)
    assert any("leave distill_beta 0" in note for note in done.notes) == (layers == 3)


def test_a_teacher_of_other_words_is_refused(tmp_path):
    other = dataclasses.replace(UNIFORM, vocab=UNIFORM.vocab + 1)
    places = [str(save_model(random_model(spec), tmp_path / name)) for name, spec in (("s", UNIFORM), ("t", other))]
    asked = ExportConfig(model=places[0], teacher=places[1], out=str(tmp_path / "out"), format="maxtext")
    with pytest.raises(ValueError, match=f"expected a model of {UNIFORM.vocab} words, as the one that is exported"):
        export_model(asked)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="teacher: expected --format maxtext beside it"):
        dataclasses.replace(asked, format="tunix")


def test_layers_apart_and_what_a_distillation_keeps_are_read_too(tmp_path):
    model = random_model(UNIFORM, 1)
    exported, apart = save_model(model, tmp_path / "m"), tree_of(model)
    stacked = apart["params"]["params"]["decoder"].pop("layers")
    for layer in range(2):
        own = jax.tree.map(lambda array, layer=layer: array[:, layer], stacked)
        apart["params"]["params"]["decoder"][f"layers_{layer}"] = own
    keep(apart, tmp_path / "a" / "7" / "items", exported)
    close(model, load_model(tmp_path / "a"))
    kept = jax.tree.map(lambda array: {"value": array}, tree_of(model)["params"]["params"])
    kept["decoder"]["layers"]["self_attention"]["rngs"] = {"aqt": {"count": {"value": np.ones(2, np.uint32)}}}
    keep(kept, tmp_path / "b" / "7" / "model_params", exported)
    close(model, load_model(tmp_path / "b"))


def test_queries_of_a_narrow_type_are_rounded_once():
    """√24 is no bfloat16."""
    layer = np.asarray(jax.random.normal(jax.random.key(0), (8, 4, 24), "bfloat16"))
    exact = np.asarray(layer, np.float64) * 24**0.5
    np.testing.assert_allclose(tensor_of("self_attention/query/kernel", layer, UNIFORM), exact.reshape(8, -1).T, 1e-6)


def test_the_last_step_is_read_whatever_its_width(tmp_path):
    for name in ("9", "00000010"):
        (tmp_path / name / "items").mkdir(parents=True)
    assert item_of(tmp_path, "items") == tmp_path / "00000010" / "items"


@pytest.mark.parametrize(
    ("item", "tree", "message"),
    [
        ("items", {"weights": {"a": 0}}, "expected arrays below params/params"),
        ("items", {"params": {"params": {"decoder": {"lora": 0}}}}, "expected arrays of the blocks llama2, qwen3"),
        ("model_params", {"layers": {"0": {"attn": {"q_proj": {"w_lora_a": 0}}}}}, "got 'layers/0/.*; merge adapters"),
    ],
)
def test_arrays_of_other_models_are_refused(item, tree, message, tmp_path):
    keep(tree, tmp_path / "4" / item)
    with pytest.raises(FileNotFoundError, match=r"expected the config.json of the model that was trained .*; copy it"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_bytes(
        (save_model(random_model(UNIFORM), tmp_path / "m") / "config.json").read_bytes()
    )
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)
    (tmp_path / "5" / item).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"No structure could be identified .*5/{item}"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (spec_of((2, 2, 24), (1, 2, 24)), "expected layers of equal widths above zero, one number each"),
        (PLAIN["biased"], "expected no biases of output projections"),
        (changed(UNIFORM, rope_theta=10000.5), "a whole number as rotary base"),
        (PLAIN["linear"], "expected the rotary scaling of Llama 3.1, factor 8 from 8,192 positions, got .*linear"),
        (RELATIVES["mistral-uniform"], "expected no windows, which its blocks have not"),
        (RELATIVES["qwen2-uniform"], "expected a family of llama, mistral, qwen3, got qwen2"),
    ],
)
def test_what_maxtext_cannot_compute_is_refused(spec, said):
    with pytest.raises(ValueError, match=said):
        overrides(spec)


# --- Tunix -----------------------------------------------------------------------------------------


def tunix_tree(model: Llama) -> dict[str, Any]:
    """Return the tree that Tunix keeps, a second implementation of what `files.orbax` reads."""
    gemma = model.constants.family == "gemma3_text"
    words = {"input_embedding": model.embedding[...]}
    layers = [each for segment in model.segments for each in (_layer(segment, n) for n in range(segment.length))]
    tree = {"embedder": words, "final_norm": {"scale" if gemma else "w": model.norm[...]}}
    tree |= {"layers": {str(number): layer for number, layer in enumerate(layers)}}
    tree |= {"lm_head": {"w": model.unembedding[...]}} if model.unembedding is not None else {}
    return jax.tree.map(lambda array: {"value": np.asarray(array)}, tree)


def _layer(segment: Any, at: int) -> dict[str, Any]:
    own = {name: np.asarray(each[...][at]) for name, each in vars(segment.attention).items() if hasattr(each, "shape")}
    query, key, value, output = (own[name] for name in ("query", "key", "value", "output"))
    query, output = query.reshape(len(query), -1, query.shape[-1]), output.reshape(-1, *output.shape[2:])
    mlp = {f"{name}_proj": {"kernel": getattr(segment.mlp, name)[...][at]} for name in ("gate", "up", "down")}
    before, behind = segment.attention_norm[...][at], segment.mlp_norm[...][at]
    if segment.mlp_post_norm is not None:
        inputs = {"q_einsum": {"w": query.transpose(1, 0, 2)}}
        inputs |= {"kv_einsum": {"w": np.stack([key, value]).transpose(0, 2, 1, 3)}}
        if query.shape == key.shape:
            inputs = {"qkv_einsum": {"w": np.stack([query, key, value]).transpose(0, 2, 1, 3)}}
        attention: dict[str, Any] = {
            **inputs,
            "attn_vec_einsum": {"w": output},
            "_query_norm": {"scale": own["query_norm"]},
            "_key_norm": {"scale": own["key_norm"]},
        }
        norms = {"pre_attention_norm": before, "pre_ffw_norm": behind}
        norms |= {"post_attention_norm": segment.attention_post_norm[...][at]}
        norms |= {"post_ffw_norm": segment.mlp_post_norm[...][at]}
        return {"attn": attention, "mlp": mlp} | {name: {"scale": each} for name, each in norms.items()}
    attention = {f"{name}_proj": {"w": each} for name, each in zip("qkvo", (query, key, value, output), strict=True)}
    for name in ("query", "key", "value"):
        attention |= {f"{name[0]}_bias": own[f"{name}_bias"].ravel()} if f"{name}_bias" in own else {}
        attention |= {f"{name[0]}_norm": {"w": own[f"{name}_norm"]}} if f"{name}_norm" in own else {}
    norms = {"input_layernorm": {"w": before}, "post_attention_layernorm": {"w": behind}}
    return {"attn": attention, "mlp": mlp} | norms


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_TUNIX)
def test_a_checkpoint_of_tunix_is_read_back(name, tmp_path):
    model, other = random_model(OF_TUNIX[name], 1), random_model(OF_TUNIX[name], 2)
    exported = save_model(model, tmp_path / "exported")
    keep(tunix_tree(other), tmp_path / "trained" / "2" / "model_params")
    keep(tunix_tree(model), tmp_path / "trained" / "10" / "model_params", exported)
    for place in ("trained", "trained/10"):
        read = load_model(tmp_path / place)
        assert read.spec == model.spec
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(read), jax.tree.leaves(model))
    earlier = jax.tree.leaves(load_model(tmp_path / "trained" / "2"))
    assert any((a != b).any() for a, b in zip(earlier, jax.tree.leaves(model), strict=True))


@pytest.mark.parametrize("form", ["maxtext", "tunix"])
def test_paths_may_be_relative_and_an_export_says_what_configures_it(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = random_model(changed(UNIFORM, rope_theta=1e6), 1)
    save_model(model, Path("small"))
    done = export_model(ExportConfig(model="small", out="exported", format=form))
    if form == "tunix":
        said = json.loads(Path("exported/tunix.json").read_text())
        assert (said["module"], said["model"], said["loader"]) == ("tunix.models.llama3", "Llama3", "params")
        assert said["config"] == {
            "num_layers": 2, "embed_dim": 32, "hidden_dim": 24, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2,
            "vocab_size": 300, "rope_theta": 1_000_000, "norm_eps": 1e-5, "weight_tying": False,
        }  # fmt: skip
        assert not any("Tunix" in note for note in done.notes)
        keep({"embedder": {"input_embedding": {"value": 1.0}}}, tmp_path / "steps" / "4" / "model_params")
        assert arrays_of(Path("steps/4/model_params")).keys() == {"embedder/input_embedding"}
    assert load_model("exported").spec == model.spec


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (UNIFORM, "rotary base of 1,000,000, whatever its configuration says, and the model has 10,000"),
        (PLAIN["llama3"], "does not scale rotary frequencies of llama3"),
        (RELATIVES["mistral-uniform"], "has no sliding window in llama3: its logits are others beyond 9 tokens"),
        (
            changed(UNIFORM, family="qwen2", apart=Apart(layers=(1,), sliding_window=5)),
            "no sliding window in qwen2: its logits are others beyond 5 tokens",
        ),
        (dataclasses.replace(GEMMA, tied=False), "predicts words of Gemma by their embeddings"),
        (RELATIVES["gemma3_text-uniform"], "has a window in all layers of Gemma but each sixth"),
        (changed(UNIFORM, rope_theta=1e6), None),
        (changed(UNIFORM, family="qwen2"), None),
        (changed(GEMMA, norm_eps=1e-6), None),
    ],
)
def test_what_tunix_computes_otherwise_is_said(spec, said):
    assert any(said in each for each in departures(spec)) if said else departures(spec) == ()


def test_a_window_as_long_as_any_text_is_a_number_for_tunix():
    long = changed(GEMMA, apart=dataclasses.replace(GEMMA.constants.apart, sliding_window=None))
    assert configuration(long)["config"]["sliding_window_size"] == long.constants.positions


def test_what_tunix_has_no_model_for_is_refused():
    for spec, message in (
        (spec_of((2, 2, 24), (1, 2, 24)), "expected layers of equal widths, which is all that Tunix knows"),
        (PLAIN["biased"], "expected no biases of output projections, which Tunix has not"),
        (RELATIVES["phi3-uniform"], r"expected a family of llama, .*, which Tunix has, got phi3"),
    ):
        with pytest.raises(ValueError, match=message):
            configuration(spec)
