"""Tunix: what configures its models, and its checkpoints read back. With the package itself: `make tunix`."""

import dataclasses
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from saap_jax.config.use import ExportConfig
from saap_jax.jobs.export import export_model
from saap_jax.llama import Constants, LlamaSpec, load_model, save_model
from saap_jax.llama.files.trainers import configuration, departures
from tests.export.models import PLAIN, RELATIVES, UNIFORM, spec_of
from tests.helpers import random_model
from tests.llama.tunix_layout import arrays_of

GEMMA = "gemma3_text-apart"
SPECS: dict[str, LlamaSpec] = {
    "llama": UNIFORM,
    "tied": PLAIN["tied"],
    **{name: RELATIVES[f"{name}-uniform"] for name in ("qwen2", "qwen3", "mistral")},
    "gemma3": RELATIVES[GEMMA],
}


def checkpoint(model, directory, step: int = 3):
    """Write a checkpoint as Tunix does."""
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(directory / str(step) / "model_params", arrays_of(model))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_a_checkpoint_is_read_back(name, tmp_path):
    model, other = random_model(SPECS[name], 1), random_model(SPECS[name], 2)
    exported = save_model(model, tmp_path / "exported")
    checkpoint(other, tmp_path / "trained", step=2)
    checkpoint(model, tmp_path / "trained", step=10)
    (tmp_path / "trained" / "config.json").write_bytes((exported / "config.json").read_bytes())
    for place in ("trained", "trained/10"):
        read = load_model(tmp_path / place)
        assert read.spec == model.spec
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(read), jax.tree.leaves(model))
    earlier = jax.tree.leaves(load_model(tmp_path / "trained" / "2"))
    assert any((a != b).any() for a, b in zip(earlier, jax.tree.leaves(model), strict=True))


def test_what_is_no_such_checkpoint_is_refused(tmp_path):
    model = random_model(UNIFORM)
    checkpoint(model, tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"expected the config.json of the model that was trained in .*; copy it"
    ):
        load_model(tmp_path)
    (tmp_path / "config.json").write_bytes((save_model(model, tmp_path / "m") / "config.json").read_bytes())
    tree = arrays_of(model)
    tree["layers"]["0"]["attn"]["q_proj"]["w_lora_a"] = {"value": np.zeros((2, 2))}
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(tmp_path / "4" / "model_params", tree)
    with pytest.raises(ValueError, match=r"got 'layers/0/attn/q_proj/w_lora_a'; merge adapters"):
        load_model(tmp_path)
    (tmp_path / "5" / "model_params").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="No structure could be identified .*5/model_params"):
        load_model(tmp_path)


def test_an_export_says_what_configures_it(tmp_path):
    model = random_model(dataclasses.replace(UNIFORM, constants=Constants(rope_theta=1e6)))
    source = save_model(model, tmp_path / "model")
    done = export_model(ExportConfig(model=str(source), out=str(tmp_path / "out"), format="tunix"))
    said = json.loads((tmp_path / "out" / "tunix.json").read_text())
    assert (said["module"], said["model"], said["loader"]) == ("tunix.models.llama3", "Llama3", "params")
    assert said["config"] == {
        "num_layers": 2, "embed_dim": 32, "hidden_dim": 24, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2,
        "vocab_size": 300, "rope_theta": 1_000_000, "norm_eps": 1e-5, "weight_tying": False,
    }  # fmt: skip
    assert load_model(tmp_path / "out").spec == model.spec
    assert not any("Tunix" in note for note in done.notes)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (UNIFORM, "rotary base of 1,000,000, whatever its configuration says, and the model has 10,000"),
        (PLAIN["llama3"], "does not scale rotary frequencies of llama3"),
        (RELATIVES["mistral-uniform"], "has no sliding window in llama3: its logits are others beyond 9 tokens"),
        (RELATIVES["gemma3_text-uniform"], "has a window in all layers of Gemma but each sixth"),
    ],
)
def test_what_tunix_computes_otherwise_is_said(spec, said):
    assert any(said in each for each in departures(spec)), departures(spec)


def test_nothing_is_said_where_it_computes_the_same():
    alike = dataclasses.replace(UNIFORM, constants=Constants(rope_theta=1e6))
    assert departures(alike) == ()
    assert departures(dataclasses.replace(alike, constants=Constants(family="qwen2", rope_theta=1e4))) == ()
    published = dataclasses.replace(RELATIVES[GEMMA].constants, norm_eps=1e-6)
    assert departures(dataclasses.replace(RELATIVES[GEMMA], constants=published)) == ()


@pytest.mark.parametrize("theta", [1e6, 1000.5])
def test_the_rotary_base_is_said_as_it_is(theta):
    for spec, name in ((UNIFORM, "rope_theta"), (RELATIVES[GEMMA], "global_base_frequency")):
        own = dataclasses.replace(spec.constants, rope_theta=theta)
        assert configuration(dataclasses.replace(spec, constants=own))["config"][name] == theta


def test_what_tunix_has_no_model_for_is_refused():
    with pytest.raises(ValueError, match="expected layers of equal widths, which is all that Tunix knows"):
        configuration(spec_of((2, 2, 24), (1, 2, 24)))
    with pytest.raises(ValueError, match="expected no biases of output projections, which Tunix has not"):
        configuration(PLAIN["biased"])
    with pytest.raises(ValueError, match=r"expected a family of llama, .*, which Tunix has, got phi3"):
        configuration(RELATIVES["phi3-uniform"])
