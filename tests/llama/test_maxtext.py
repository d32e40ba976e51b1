"""MaxText: what is written for it and read back. With the package itself: `make maxtext`."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

from saap_jax.config.use import ExportConfig
from saap_jax.jobs.export import export_model
from saap_jax.llama import Constants, LlamaSpec, RopeScaling, load_model, save_model
from saap_jax.llama.files.orbax import arrays_of, item_of, tensor_of, tree_of
from saap_jax.llama.files.trainers import overrides
from tests.export.models import PLAIN, RELATIVES, UNIFORM, spec_of
from tests.helpers import random_model

PUBLISHED = RopeScaling(kind="llama3", factor=8.0)
SPECS: dict[str, LlamaSpec] = {
    "llama": UNIFORM,
    "tied": PLAIN["tied"],
    "scaled": dataclasses.replace(UNIFORM, constants=Constants(rope_scaling=PUBLISHED, max_positions=131072)),
    "qwen3": RELATIVES["qwen3-uniform"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_an_export_is_read_back(name, tmp_path):
    model = random_model(SPECS[name], 1)
    source = save_model(model, tmp_path / "model")
    done = export_model(ExportConfig(model=str(source), out=str(tmp_path / "out"), format="maxtext"))
    assert done.written == done.parameters == sum(leaf.size for leaf in jax.tree.leaves(model))
    for place in ("out", "out/0"):
        if place == "out/0":
            (tmp_path / "out" / "0" / "config.json").write_bytes((source / "config.json").read_bytes())
        read = load_model(tmp_path / place)
        assert read.spec == model.spec
        for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(read), strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=1e-6)  # queries are scaled and scaled back
    said = yaml.safe_load((tmp_path / "out" / "maxtext.yml").read_text())
    assert said.keys() == {"base_config", "student_overrides", "distill_layer_indices"}
    assert said["student_overrides"]["decoder_block"] == ("qwen3" if name == "qwen3" else "llama2")
    assert said["student_overrides"]["load_parameters_path"] == str(tmp_path / "out" / "0" / "items")
    assert said["distill_layer_indices"] == [0, 1]
    assert any("lacks its teacher" in note for note in done.notes)


@pytest.mark.parametrize("layers", [2, 3])
def test_the_teacher_is_beside_it_in_one_configuration(layers, tmp_path):
    """Features of layers are compared by number, so not where whole layers went."""
    student, teacher = random_model(UNIFORM, 1), random_model(spec_of(*((2, 2, 24),) * layers), 2)
    places = [save_model(model, tmp_path / name) for name, model in (("s", student), ("t", teacher))]
    out = tmp_path / "out"
    done = export_model(ExportConfig(model=str(places[0]), teacher=str(places[1]), out=str(out), format="maxtext"))
    said = yaml.safe_load((out / "maxtext.yml").read_text())
    assert said["base_config"] == "post_train/distillation.yml"
    for name, where, model in (("student", out, student), ("teacher", out / "teacher", teacher)):
        assert said[f"{name}_overrides"]["load_parameters_path"] == str(where / "0" / "items")
        assert said[f"{name}_overrides"]["base_num_decoder_layers"] == len(model.spec.layers)
        for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(load_model(where)), strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=1e-6)
    assert said.get("distill_layer_indices") == ([0, 1] if layers == 2 else None)
    assert any("leave distill_beta 0" in note for note in done.notes) == (layers == 3)


@pytest.mark.parametrize("form", ["maxtext", "tunix"])
def test_paths_may_be_relative(form, tmp_path, monkeypatch):
    """As people type them."""
    monkeypatch.chdir(tmp_path)
    model = random_model(UNIFORM, 1)
    save_model(model, Path("small"))
    export_model(ExportConfig(model="small", out="exported", format=form))
    if form == "tunix":  # as it keeps what it trained
        tree = {"embedder": {"input_embedding": {"value": np.asarray(model.embedding[...])}}}
        with ocp.PyTreeCheckpointer() as writer:
            writer.save(tmp_path / "steps" / "4" / "model_params", tree)
        assert arrays_of(Path("steps/4/model_params")).keys() == {"embedder/input_embedding"}
    assert load_model("exported").spec == model.spec


def test_a_teacher_of_other_words_is_refused(tmp_path):
    other = dataclasses.replace(UNIFORM, vocab=UNIFORM.vocab + 1)
    places = [str(save_model(random_model(spec), tmp_path / name)) for name, spec in (("s", UNIFORM), ("t", other))]
    asked = ExportConfig(model=places[0], teacher=places[1], out=str(tmp_path / "out"), format="maxtext")
    with pytest.raises(ValueError, match=f"expected a model of {UNIFORM.vocab} words, as the one that is exported"):
        export_model(asked)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="teacher: expected format maxtext beside it"):
        dataclasses.replace(asked, format="tunix")


def test_layers_that_are_not_stacked_are_read_too(tmp_path):
    model = random_model(UNIFORM, 1)
    tree = tree_of(model)
    decoder = tree["params"]["params"]["decoder"]
    stacked = decoder.pop("layers")
    for layer in range(2):
        decoder[f"layers_{layer}"] = jax.tree.map(lambda array, layer=layer: array[:, layer], stacked)
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(tmp_path / "7" / "items", tree)
    (tmp_path / "config.json").write_bytes((save_model(model, tmp_path / "m") / "config.json").read_bytes())
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(load_model(tmp_path)), strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-6)


def test_what_its_distillation_keeps_is_read(tmp_path):
    """An item of the same name as Tunix's, whose own models have other arrays."""
    model = random_model(UNIFORM, 1)
    tree = jax.tree.map(lambda array: {"value": np.asarray(array)}, tree_of(model)["params"]["params"])
    tree["decoder"]["layers"]["self_attention"]["rngs"] = {"aqt": {"count": {"value": np.ones(2, np.uint32)}}}
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(tmp_path / "7" / "model_params", tree)
    (tmp_path / "config.json").write_bytes((save_model(model, tmp_path / "m") / "config.json").read_bytes())
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(load_model(tmp_path)), strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-6)


def test_queries_of_a_narrow_type_are_rounded_once():
    """√24 is no bfloat16."""
    layer = jax.random.normal(jax.random.key(0), (8, 4, 24), "bfloat16")
    found = tensor_of("self_attention/query/kernel", np.asarray(layer), UNIFORM)
    exact = np.asarray(layer, np.float64) * 24**0.5
    np.testing.assert_allclose(found, exact.reshape(8, -1).T, rtol=1e-6)


def test_the_last_step_is_read_whatever_its_width(tmp_path):
    for name in ("9", "00000010"):
        (tmp_path / name / "items").mkdir(parents=True)
    assert item_of(tmp_path, "items") == tmp_path / "00000010" / "items"


def test_what_is_no_such_checkpoint_is_refused(tmp_path):
    model = random_model(UNIFORM)
    (tmp_path / "config.json").write_bytes((save_model(model, tmp_path / "m") / "config.json").read_bytes())
    tree = tree_of(model)
    for step, strange in enumerate(({"weights": tree["params"]}, {"params": {"params": {"decoder": {"lora": 0}}}})):
        tree = jax.tree.map(np.asarray, strange)
        with ocp.PyTreeCheckpointer() as writer:
            writer.save(tmp_path / str(step) / "items", tree)
        with pytest.raises(ValueError, match=r"expected arrays (below params/params|of the blocks llama2, qwen3)"):
            load_model(tmp_path / str(step)) if step else load_model(tmp_path)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (spec_of((2, 2, 24), (1, 2, 24)), "expected layers of equal widths above zero, one number each"),
        (spec_of((0, 1, 8), (0, 1, 8)), "expected layers of equal widths above zero"),
        (PLAIN["biased"], "expected no biases of output projections"),
        (dataclasses.replace(UNIFORM, constants=Constants(rope_theta=10000.5)), "a whole number as rotary base"),
        (PLAIN["linear"], "expected the rotary scaling of Llama 3.1, factor 8 from 8,192 positions, got .*linear"),
        (PLAIN["llama3"], "factor 8 from 8,192 positions, got .*original_max_positions=64"),
        (RELATIVES["mistral-uniform"], "expected no windows, which its blocks have not"),
        (RELATIVES["qwen2-uniform"], "expected a family of llama, mistral, qwen3, got qwen2"),
    ],
)
def test_what_it_cannot_compute_is_refused(spec, said):
    with pytest.raises(ValueError, match=said):
        overrides(spec)
