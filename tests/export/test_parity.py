"""Exported directories in transformers (torch, float32): the same logits, the same greedy text, through its cache."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.export.hf import write_hf
from saap_jax.llama.files.load import load_model
from saap_jax.llama.segments import existing_units
from saap_jax.surgery.cut import cut
from tests.export.models import EMPTY, RELATIVES, SPECS, spec_of
from tests.export.test_contract import ALL, refusal
from tests.helpers import forward, random_keep, random_model
from tests.llama.test_parity import load_torch, torch_logits

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("modules_cache")]
torch = pytest.importorskip("torch")

TOKENS = np.random.default_rng(1).integers(0, 300, (2, 24), np.int32)


def exported(model, directory, form, tokenizer=None):
    directory.mkdir()
    write_hf(model, directory, form, np.dtype(np.float32), tokenizer=tokenizer)
    return directory


def greedy(model, tokens, new):
    """Return the greedy continuation by our model, the whole sequence run anew for each token."""
    tokens = np.pad(tokens, [(0, 0), (0, new)])
    for end in range(tokens.shape[1] - new, tokens.shape[1]):
        tokens[:, end] = np.asarray(forward(model, tokens))[:, end - 1].argmax(-1)
    return tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in SPECS | RELATIVES for form in ("hf", "padded", "ragged") if not refusal(name, form)],
)
def test_logits(name, form, attention, tmp_path):
    """In the class of the family where layers are alike, padded or not; otherwise with the code that travels."""
    model = random_model(ALL[name])
    theirs = load_torch(exported(model, tmp_path / "model", form), attention)
    expected = np.asarray(forward(model, TOKENS))
    near = 1e-5 * np.abs(expected).max() if name.startswith("gemma3") else 5e-5  # norms behind sub-blocks
    np.testing.assert_allclose(torch_logits(theirs, TOKENS), expected, rtol=0, atol=near)
    assert np.abs(torch_logits(theirs, TOKENS[:, ::-1].copy()) - expected).max() > 0.1
    architecture = "SaapLlamaForCausalLM" if form == "ragged" else model.constants.traits.architecture
    assert type(theirs).__name__ == architecture


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in (
        *("ragged", "empty", "empty_biased", "groups", "ragged_llama3", "nothing"),
        *("qwen2-empty", "qwen3-empty", "mistral-ragged", "mistral-empty", "phi3-ragged"),
    ) for form in ("padded", "ragged")] + [("gemma3_text-apart", "padded"), ("gemma3_text-empty", "padded")],
)  # fmt: skip
def test_greedy_generation(name, form, tmp_path):
    """Token by token with a cache; a cache whose first layer never fills would count positions wrongly."""
    model = random_model(ALL[name])
    theirs = load_torch(exported(model, tmp_path / "model", form))
    got = {
        cached: theirs.generate(
            torch.tensor(TOKENS[:, :8], dtype=torch.long),
            attention_mask=torch.ones(2, 8, dtype=torch.long),
            max_new_tokens=16,
            do_sample=False,
            use_cache=cached,
            eos_token_id=None,
        ).numpy()
        for cached in (True, False)
    }
    np.testing.assert_array_equal(got[True], greedy(model, TOKENS[:, :8], 16))
    np.testing.assert_array_equal(got[False], got[True])


def test_left_padding_and_static_cache(tmp_path):
    """What a batch of prompts of two lengths needs; each row continues as it does alone."""
    model = random_model(EMPTY)
    theirs = load_torch(exported(model, tmp_path / "model", "ragged"))
    prompts = torch.tensor(TOKENS[:, :8], dtype=torch.long)
    mask = torch.ones_like(prompts)
    mask[0, :3] = 0
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = theirs.generate(prompts, attention_mask=mask, **options).numpy()
    np.testing.assert_array_equal(together[:1, 3:], greedy(model, TOKENS[:1, 3:8], 10))
    np.testing.assert_array_equal(together[1:], greedy(model, TOKENS[1:, :8], 10))
    static = theirs.generate(prompts, attention_mask=mask, cache_implementation="static", **options).numpy()
    np.testing.assert_array_equal(static, together)


def test_saved_again_and_trained(tmp_path):
    """transformers saves the directory with its code, and gradients reach every parameter."""
    model = random_model(spec_of((2, 2, 8), (1, 2, 4), output_biases=True))
    theirs = load_torch(exported(model, tmp_path / "model", "ragged"))
    theirs.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_saap_llama.py").is_file()
    again = load_torch(tmp_path / "again")
    np.testing.assert_array_equal(torch_logits(again, TOKENS), torch_logits(theirs, TOKENS))
    np.testing.assert_allclose(forward(load_model(tmp_path / "model"), TOKENS), forward(model, TOKENS), atol=1e-6)
    ids = torch.tensor(TOKENS, dtype=torch.long)
    theirs.train()(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in theirs.parameters())


def test_without_trust_it_is_refused(tmp_path):
    """The type is unknown to transformers, so nothing can load it as a plain LLaMA by mistake."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    directory = exported(random_model(EMPTY), tmp_path / "model", "ragged")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
    plain = tmp_path / "plain"
    shutil.copytree(directory, plain)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"model_type": "llama", "auto_map": None}))
    with pytest.raises(Exception, match=r"num_key_value_heads|num_attention_heads|intermediate_size"):
        LlamaForCausalLM.from_pretrained(plain)


def test_real_model(smollm2, smollm2_tokenizer, tmp_path):
    """SmolLM2 with layers cut to different widths, one without heads, one without channels."""
    from transformers import AutoTokenizer

    keep = random_keep(existing_units(smollm2.segments), 0.95)
    keep["attention"][0] = keep["mlp"][9] = False
    pruned, tokenizer = cut(smollm2, keep), smollm2_tokenizer
    ids = np.asarray([tokenizer.encode("The capital of France is")], np.int32)
    for form in ("ragged", "padded"):
        theirs = load_torch(exported(pruned, tmp_path / form, form, tokenizer))
        loaded = AutoTokenizer.from_pretrained(tmp_path / form, trust_remote_code=True)
        assert loaded("The capital of France is")["input_ids"] == ids[0].tolist()
        assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id
        expected = np.asarray(forward(pruned, jnp.asarray(ids)))
        np.testing.assert_allclose(torch_logits(theirs, ids), expected, rtol=0, atol=5e-4)
        got = theirs.generate(torch.tensor(ids, dtype=torch.long), max_new_tokens=12, do_sample=False).numpy()
        np.testing.assert_array_equal(got, greedy(pruned, ids, got.shape[1] - ids.shape[1]))
