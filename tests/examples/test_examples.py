"""The examples run, in at most 80 lines each, and do what their first lines say."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import saap_jax
from saap_jax.data.windows import pairs
from saap_jax.estimation.gates import GATE_GRADIENT
from saap_jax.estimation.observe import observe

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str):
    """Load an example."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_fits_on_a_page(path):
    assert len(path.read_text().splitlines()) <= 80


def test_scores_of_pure_jax_are_those_of_the_package_and_masked_is_cut(tiny_model_directory):
    example, name = load("score_select_cut"), str(tiny_model_directory)
    model, words = saap_jax.load_model(name), saap_jax.load_tokenizer(name)
    text = saap_jax.calibration_windows("builtin:reference", words, 4, 16, seed=0)
    scores = example.score(model, text.tokens)
    gradients = observe(model, pairs(text, 4), frozenset({GATE_GRADIENT})).of(GATE_GRADIENT)
    for structure, each in gradients.items():
        np.testing.assert_allclose(scores[structure], np.square(each).mean(axis=0), rtol=1e-4, atol=1e-9)
        assert np.abs(scores[structure] - np.square(each.mean(axis=0))).max() > 1e-3 * scores[structure].max(), (
            "control"
        )
    figures = example.main(name, examples=4, length=16, ratio=0.4)
    assert figures["masked"] == pytest.approx(figures["cut"], rel=1e-5)
    assert figures["cut"] != pytest.approx(figures["unpruned"], rel=1e-5)


def test_a_model_of_ones_own_is_pruned_by_one_call():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = load("own_model").main()
    losses = {method: pruned.losses for method, pruned in found.items()}
    for each in found.values():
        assert each.losses["masked"] == pytest.approx(each.losses["cut"], rel=1e-4)
        assert each.ratio >= 0.3
    chosen, drawn = losses["gate_taylor > uniform"], losses["random > uniform"]
    assert chosen["dense"] < 0.25, "it has learnt: the targets vary by more than 0.4"
    assert chosen["cut"] < drawn["cut"]
    assert losses["gate_taylor > uniform > least_squares"]["cut"] < chosen["cut"]


def test_what_the_readme_prunes_is_pruned(tiny_model_directory, tmp_path, monkeypatch):
    """Both Python blocks, the second on a tiny model: the lowest of its rows is the one that is cut."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "README.md").read_text(), re.DOTALL)
    own, session = blocks
    names: dict[str, Any] = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(own, names)
    assert names["smaller"](names["x"]).shape == (256, 3)
    assert names["pruned"].losses["masked"] == pytest.approx(names["pruned"].losses["cut"], rel=1e-4)
    names = {}
    exec(session.replace("smollm2-135m", str(tiny_model_directory)).replace("128", "16"), names)
    pruned = saap_jax.load_model("pruned")
    assert saap_jax.count_parameters(pruned) < saap_jax.count_parameters(names["model"])
    saved = saap_jax.perplexity(pruned, names["evaluation"])
    assert saved == pytest.approx(min(names["found"].values()), rel=1e-4)
    assert saved != pytest.approx(max(names["found"].values()), rel=1e-4), "control"
