"""Logits of each family equal those of transformers (torch, float32): their checkpoints here, and ours there."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.llama import load_model, save_model

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")

from tests.llama import theirs as made  # noqa: E402, needs torch

TOKENS = np.random.default_rng(1).integers(0, 32, (2, 24))


def torch_logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.numpy()


def load_torch(directory):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


@pytest.mark.parametrize("name", made.VARIANTS)
def test_both_ways(name, tmp_path):
    theirs = made.tiny_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    family, options = made.VARIANTS[name]
    assert ours.constants.family == family
    assert ours.constants.sliding_window == options.get("sliding_window")
    expected, got = torch_logits(theirs), np.asarray(ours(jnp.asarray(TOKENS)))
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)
    assert np.abs(got - torch_logits(theirs, TOKENS[:, ::-1].copy())).max() > 0.1
    config = json.loads((save_model(ours, tmp_path / "ours") / "config.json").read_text())
    assert config["model_type"] == family
    back = load_torch(tmp_path / "ours")
    assert type(back) is type(theirs)
    np.testing.assert_allclose(torch_logits(back), got, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in made.VARIANTS if "window" in name])
def test_without_its_window_it_is_another_model(name, tmp_path):
    """Negative control: the window of these models is shorter than the text, and is what is computed."""
    theirs = made.tiny_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    config = json.loads(path.read_text())
    config.pop("layer_types", None)
    changes = {"use_sliding_window": False} if "qwen" in name else {"sliding_window": None}
    path.write_text(json.dumps(config | changes))
    assert np.abs(np.asarray(load_model(tmp_path / "theirs")(jnp.asarray(TOKENS))) - torch_logits(theirs)).max() > 0.01
