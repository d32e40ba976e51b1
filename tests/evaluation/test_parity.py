"""The harness with `HFLM`, the same model in torch: the same likelihoods, choices and accuracies."""

import os

import numpy as np
import pytest

from saap_jax.llama.files.tokenizer import load_tokenizer
from saap_jax.llama.files.write import save_model
from tests.evaluation.items import choice_lines, context_lines
from tests.evaluation.test_harness import requests_of, write_tasks

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

TEXTS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " a city in Germany"),
    ("Question: Can birds fly?\nAnswer:", " yes"),
    ("Question: Can birds fly?\nAnswer:", " no"),
    ("In 1912, after 40 days of rain ", "the river"),
    ("", "Rivers carry water to the sea."),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    directory = tmp_path_factory.mktemp("tasks")
    write_tasks(directory, choice_lines(20), context_lines(12))
    return directory


@pytest.fixture(scope="module")
def both(smollm2, smollm2_tokenizer, tmp_path_factory):
    """Our adapter and theirs, of one directory of SmolLM2."""
    pytest.importorskip("torch")
    pytest.importorskip("lm_eval")
    hf = pytest.importorskip("lm_eval.models.huggingface")
    import torch
    from transformers import LlamaForCausalLM

    from saap_jax.evaluation.harness import HarnessModel

    path = save_model(smollm2, tmp_path_factory.mktemp("model") / "smol", tokenizer=smollm2_tokenizer)
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    theirs = hf.HFLM(pretrained=model, tokenizer=load_tokenizer(path), batch_size=4, max_length=2048, device="cpu")
    return HarnessModel(str(path)), theirs


def test_requests(both):
    ours, theirs = (np.array(model.loglikelihood(requests_of(*TEXTS))) for model in both)
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], rtol=0, atol=2e-3)
    np.testing.assert_array_equal(ours[:, 1], theirs[:, 1])
    assert ours[0, 0] > ours[1, 0]
    ours, theirs = (model.loglikelihood_rolling(requests_of(("Rivers carry water to the sea.",))) for model in both)
    assert ours == pytest.approx(theirs, abs=5e-3)


def test_generation(both):
    wanted = {"until": ["\n", "."], "max_gen_toks": 12, "do_sample": False}
    contexts = ["The capital of France is", "Two plus two is"]
    ours, theirs = (model.generate_until(requests_of(*((text, wanted) for text in contexts))) for model in both)
    assert ours == theirs


@pytest.mark.parametrize("name", ["mine_choices", "mine_contexts"])
def test_items(both, directory, name):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(directory), include_defaults=False)
    found = []
    for model in both:
        result = simple_evaluate(model=model, tasks=[name], num_fewshot=0, bootstrap_iters=0, task_manager=manager)
        found.append((result["results"][name], sorted(result["samples"][name], key=lambda sample: sample["doc_id"])))
    (ours, our_items), (theirs, their_items) = found
    for a, b in zip(our_items, their_items, strict=True):
        own, other = ([answer[0] for answer in sample["filtered_resps"]] for sample in (a, b))
        np.testing.assert_allclose(own, other, rtol=0, atol=2e-3)
        assert np.argmax(own) == np.argmax(other)
        assert a["acc"] == b["acc"]
    for metric in ("acc,none", "acc_stderr,none"):
        assert ours[metric] == theirs[metric]
    assert 0 < ours["acc,none"] < 1
